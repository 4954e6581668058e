"""Write the notebook of each script beside it: python convert.py

A script is cells: ``# %% [markdown]`` begins text, in comments, and ``# %%`` code.  Editors and
Jupyter (jupytext) open it as a notebook too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells(script: str) -> list[dict[str, Any]]:
    """The cells of a script, as a notebook has them."""
    _, *parts = MARK.split(script)
    found: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        lines = text.strip("\n").split("\n")
        if kind:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        source = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        cell = {"id": f"cell-{number}", "metadata": {}, "source": source}
        if kind:
            found.append({"cell_type": "markdown", **cell})
        else:
            found.append({"cell_type": "code", "execution_count": None, "outputs": [], **cell})
    return found


def notebook(script: str) -> str:
    """The text of the .ipynb file of a script."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells(script),
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.py")):
        if path != Path(__file__):
            path.with_suffix(".ipynb").write_text(notebook(path.read_text()))
