"""Optional packages: each extra of pyproject.toml has a message that names it, and the reverse."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from llamax.config.toml import tomllib

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "test"}
SOURCES = [*(ROOT / "llamax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
DISTRIBUTIONS = {  # of modules with other names, or that are part of another package
    "yaml": "pyyaml",
    "lm_eval": "lm-eval",
    "prometheus_client": "prometheus-client",
    "pydantic_core": "pydantic",
}
MACHINES = {"torch_xla", "torch_neuronx", "neuronx_distributed"}  # from the machine's own index
STANDARD = set(sys.stdlib_module_names) | {"compression"}  # which Python has from 3.14 on


def distribution(requirement: str) -> str:
    return re.split(r"[<>=;\[ ]", requirement)[0].lower()


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_every_imported_package_is_a_dependency_or_in_an_extra() -> None:
    named = {distribution(line) for line in PROJECT["dependencies"]}
    named |= {distribution(line) for lines in EXTRAS.values() for line in lines}
    modules = set().union(*map(imported, SOURCES)) - STANDARD - MACHINES
    missing = {DISTRIBUTIONS.get(name, name) for name in modules} - named - {"llamax"}
    assert not missing


def test_messages_and_extras_name_each_other() -> None:
    hints = {name for path in SOURCES for name in re.findall(r"llamax\[(\w+)\]", path.read_text())}
    assert hints == set(EXTRAS)


def test_the_harness_without_its_package_is_one_line() -> None:
    code = """
import sys
sys.modules["lm_eval"] = None
from llamax.runtime.process import run_main
sys.exit(run_main(lambda argv: __import__("llamax.inference.lm_eval") and 0, []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = "llamax: the harness needs the package lm-eval, which is not installed; "
    assert (done.returncode, done.stderr) == (2, f"{line}pip install 'llamax[eval]'\n")
