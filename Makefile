# make demo   set up, then text -> tokens -> a trained Llama -> a Hugging Face folder -> samples
# make finetune-demo   set up, then rows -> packed samples -> a tuned Llama -> its answers
# make test   set up, then run all tests, those of torch-xla in an environment of their own
# make lint   format, lint and types, as CI wants them
# make launchers   install Open MPI, MPICH and Slurm with apt-get, as root, and run jobs under them
# make drills  kill, freeze, damage and fill up real runs, at full counts: some hours on two cores
# make check  lint, then test
# make interop  load an exported folder in other programs, each installed by itself: equal tokens
# make docs   build the documentation into build/docs; any warning is an error
# make lock   write uv.lock and requirements-image.txt anew, at the versions of requirements.txt
#
# PYTHON: any CPython >= 3.10.  Everything is installed into VENV and XLA_VENV, nowhere else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
XLA_VENV ?= .venv-xla
XLA_BIN := $(XLA_VENV)/bin
DOCS_VENV ?= .venv-docs
PIP := -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash

.PHONY: demo finetune-demo test test-xla launchers drills interop lint check format docs lock clean

demo: $(VENV)/installed
	@$(BIN)/python -m llamax demo

finetune-demo: $(VENV)/installed
	@$(BIN)/python -m llamax finetune-demo

# Three workers on two cores: many tests wait for processes that they start.
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --ignore tests/xla
	@$(MAKE) --no-print-directory test-xla

test-xla: $(XLA_VENV)/installed
	@if [ -e $< ]; then $(XLA_BIN)/python -m pytest tests/xla --numprocesses 2 --dist loadgroup --timeout 1800; \
	else echo "SKIPPED tests/xla: requirements-xla.txt cannot be installed here (above: why)"; fi

launchers: $(VENV)/installed
	apt-get install --yes --no-install-recommends openmpi-bin mpich slurm-wlm munge
	$(BIN)/python -m pytest -rs tests/program/test_launch.py

drills: $(VENV)/installed
	$(BIN)/python -m pytest -rs --full --timeout 7200 tests/drills \
	  tests/property/test_checkpoint_reshard.py tests/parallel/test_checkpoint_ranks.py \
	  tests/parallel/test_not_finite.py tests/parallel/test_packed_ranks.py

interop: $(VENV)/installed
	$(BIN)/python benchmarks/interop.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS_VENV)/installed
	$(DOCS_VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html is the first page"

lock:
	.ci/lock

# The pins are in requirements.txt; a finished installation is remembered by a stamp.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "llamax needs Python 3.10 or newer; found $$($(PYTHON) -V). Use: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -r requirements.txt
	$(BIN)/python $(PIP) --no-deps -e .
	@touch $@

# Sphinx alone; llamax and what it needs are seen in VENV, which stays as it is.
$(DOCS_VENV)/installed: requirements-docs.txt $(VENV)/installed
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(PIP) -r requirements-docs.txt
	@$(BIN)/python -c 'import sys; print("\n".join(path for path in sys.path if path.endswith("-packages")))' \
	  > $$($(DOCS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	@touch $@

# torch-xla has wheels for Linux on x86-64 and CPython 3.10 to 3.13 alone.
$(XLA_VENV)/installed: requirements-xla.txt pyproject.toml
	$(PYTHON) -m venv $(XLA_VENV)
	@$(XLA_BIN)/python $(PIP) -r requirements-xla.txt && \
	  $(XLA_BIN)/python $(PIP) --no-deps -e . && touch $@ || rm -f $@

clean:
	rm -rf $(VENV) $(XLA_VENV) $(DOCS_VENV) demo build docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
