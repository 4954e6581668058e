"""Who may import whom: a file imports its own room and the rows below it, without circles."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

LLAMAX = Path(__file__).resolve().parents[1] / "llamax"
ROWS = (  # the rooms of a row do not import each other, except BESIDE
    "__init__ __main__ train cli",
    "tools.doctor tools.push",
    "tools.audit tools.monitor tools.inspect",
    "tools.plan",
    "training inference",
    "checkpoint",
    "optim model",
    "backends data",
    "parallel",
    "ops launch",
    "config",
    "runtime",
)
ROOMS = {room: number for number, row in enumerate(ROWS) for room in row.split()}
BESIDE = {("cli", "train"), ("__main__", "cli"), ("__init__", "train")}
VENDORS = "torch.distributed torch.cuda torch_xla torch_neuronx neuronx_distributed"
ONLY_IN = {"argparse": "cli train", "kernels": "ops", "launch": "launch cli tools.doctor"}
ONLY_IN |= dict.fromkeys(VENDORS.split(), "backends")
TORCH_FREE = "runtime config launch tools.plan tools.monitor parallel.mesh parallel.rendezvous "
TORCH_FREE += (
    "data.token_file training.metrics training.resolve training.heartbeat training.local_ranks "
    "checkpoint.manifest checkpoint.listing tools.inspect.description"
)
FILES, KERNELS = (
    {str(path.relative_to(LLAMAX))[:-3].replace("/", ".").removesuffix(".__init__"): path
     for pattern in patterns for path in sorted(LLAMAX.glob(pattern))}
    for patterns in (("**/*.py", "launch/*.py"), ("kernels/*/*.py",))
)  # fmt: skip


def room(module: str) -> str:
    """The room of a module: ``tools.plan`` for ``tools.plan.search``."""
    while module and module not in ROOMS:
        module = module.rpartition(".")[0]
    return module or "runtime"


def imported(path: Path) -> set[str]:
    """What a file imports, also inside functions; the module's own name, if it is of llamax."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {(prefix + alias.name).removeprefix("llamax.") for alias in node.names}
    owners = {name: name if name in FILES else name.rpartition(".")[0] for name in names}
    return {owner if owner in FILES else name for name, owner in owners.items()}


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_its_room_and_the_rows_below(module: str) -> None:
    for target in imported(FILES[module]):
        for name, rooms in ONLY_IN.items():
            if f"{target}.".startswith(f"{name}."):
                assert room(module) in rooms.split(), f"{target}: only in {rooms}"
        pair = room(module), room(target)
        if target in FILES and pair[0] != pair[1] and pair not in BESIDE:
            assert ROOMS[pair[1]] > ROOMS[pair[0]], f"{module} reaches up or sideways to {target}"


@pytest.mark.parametrize("module", KERNELS)
def test_a_kernel_imports_kernels_and_config_alone(module: str) -> None:
    assert {room(name) for name in imported(KERNELS[module]) if name in FILES} <= {"config"}


def test_there_is_no_circle() -> None:
    graph = {module: imported(path) & {*FILES} - {module} for module, path in FILES.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", [*FILES, *KERNELS])
def test_a_file_is_short_and_reads_no_environment(module: str) -> None:
    text = (FILES | KERNELS)[module].read_text()
    assert len(text.splitlines()) <= 400
    reads = "os.environ" in text or "os.getenv" in text
    assert not reads or room(module) in ("cli", "train", "backends", "runtime")


def test_the_package_has_at_most_sixteen_names() -> None:
    names = {path.name for path in LLAMAX.iterdir() if not path.name.startswith("__")}
    assert len(names - {"py.typed"}) <= 16, "py.typed marks the package for type checkers"


def test_rooms_that_need_no_torch_load_without_it() -> None:
    free = [name for name in FILES if {name, room(name)} & {*TORCH_FREE.split()}]
    code = f"import sys, {', '.join(f'llamax.{name}' for name in free)}"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
