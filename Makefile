# make demo   set up, then text -> tokens -> a trained Llama -> a Hugging Face folder -> samples
# make test   set up, then run all tests
# make lint   format, lint and types, as CI wants them
# make check  lint, then test
#
# PYTHON: any CPython >= 3.10.  Everything is installed into VENV, nowhere else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: demo test lint check format clean

demo: $(VENV)/installed
	@$(BIN)/python -m llamax.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pins are in requirements.txt; a finished installation is remembered by a stamp.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "llamax needs Python 3.10 or newer; found $$($(PYTHON) -V). Use: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
