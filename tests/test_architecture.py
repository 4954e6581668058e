"""Who may import whom: a file imports its own room and the rows below, and no circle anywhere."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = (  # the rooms of a row never import each other, but as BESIDE allows
    ("train", "cli", "__main__"),
    ("tools.doctor",),
    ("tools.audit", "tools.monitor"),
    ("tools.plan",),
    ("training", "inference"),
    ("checkpoint",),
    ("optim", "model"),
    ("backends", "data"),
    ("parallel",),
    ("ops", "launch"),
    ("config",),
    ("runtime", ""),
)
BESIDE = {("cli", "train"), ("__main__", "cli")}
LAUNCH_IS_FOR = ("cli", "tools.doctor", "launch")
VENDORS = ("torch.distributed", "torch_xla", "torch_neuronx", "neuronx_distributed", "torch.cuda")
TORCH_FREE = [
    "runtime.process",
    "config.load",
    "config.validate",
    "config.hardware",
    "parallel.mesh",
    "parallel.rendezvous",
    "data.token_file",
    "training.metrics",
    "training.resolve",
    "training.heartbeat",
    "tools.plan.search",
    "tools.monitor.watch",
    "tools.monitor.html_report",
    "launch.jobfile",
]
READS_ENVIRONMENT = ("cli", "train", "backends", "launch", "runtime")
LONGEST = 400
ROOMS = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def name(path: Path) -> str:
    inside = path.relative_to(ROOT / ("llamax" if path.is_relative_to(ROOT / "llamax") else "."))
    return ".".join(inside.with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {
    name(path): path
    for folder in ("llamax", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (ROOT / "llamax" / "kernels") not in path.parents
}
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def room(module: str) -> str:
    """The room of a module: ``tools.plan`` of ``tools.plan.search``."""
    while module not in ROOMS:
        module = module.rpartition(".")[0]
    return module


def imported(path: Path) -> Iterator[str]:
    """What a file imports, also inside functions; of llamax, the module's own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            inside = target.removeprefix("llamax.")
            while target.startswith("llamax.") and inside and inside not in FILES:
                if inside.startswith("kernels"):
                    break
                inside = inside.rpartition(".")[0]
            yield inside if target.startswith("llamax") else target


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_its_room_and_the_rows_below(module: str) -> None:
    mine = room(module)
    for target in imported(FILES[module]):
        assert not target.startswith("launch.") or mine in LAUNCH_IS_FOR, target
        assert not target.startswith("kernels") or mine == "ops", "only ops chooses kernels"
        assert not target.startswith(VENDORS) or mine == "backends", f"{target}: only in backends"
        assert not target.startswith("argparse") or mine in ("cli", "train"), "only in cli"
        if target in FILES and (theirs := room(target)) != mine and (mine, theirs) not in BESIDE:
            assert ROOMS[theirs] > ROOMS[mine], f"{module} reaches up or sideways to {target}"


def test_no_circle() -> None:
    graph = {module: {t for t in imported(path) if t in FILES} for module, path in FILES.items()}
    graphlib.TopologicalSorter({m: t - {m, ""} for m, t in graph.items()}).prepare()


@pytest.mark.parametrize("path", [*FILES.values(), *KERNELS], ids=lambda path: path.stem)
def test_a_file_is_short_and_reads_no_environment(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    reads = "os.environ" in text or "os.getenv" in text
    assert not reads or path in KERNELS or room(name(path)) in READS_ENVIRONMENT


def test_a_newcomer_finds_sixteen_names() -> None:
    names = {path.name for path in (ROOT / "llamax").iterdir() if not path.name.startswith("__")}
    assert len(names - {"py.typed"}) <= 16, "py.typed marks the package for type checkers"


def test_what_needs_no_torch_loads_without_it() -> None:
    code = f"import sys, {', '.join(f'llamax.{module}' for module in TORCH_FREE)}"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
