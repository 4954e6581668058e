"""The import graph is a decision; this file is where it is written down.

A module may import from its own row (unless it says "alone") and from rows below, never from above,
also inside functions.  Only the modules named here may speak to the machine.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llamax"
LAYERS = [
    ["__main__"],
    [
        "train",
        "generate",
        "evaluate",
        "data.prepare",
        "checkpoint.consolidate",
        "merge",
        "checkpoint.shard_hub",
        "checkpoint.inspect",
        "checkpoint.foreign.importer",
        "checkpoint.foreign.exporter",
        "plan",
        "watch",
        "report",
        "audit",
        "plot",
        "demo",
        "finetune_demo",
        "harness",
        "launch.command",
        "doctor",
    ],
    ["precompile"],
    ["job", "rehearsal"],
    ["verdict"],
    ["speaker"],
    ["profiling", "reporter", "guard", "sampling", "scores", "cache", "inputs", "step"],
    ["finetune", "feed", "patience", "prompts"],
    ["checkpoint.foreign.optimum", "checkpoint.foreign.write_nxd", "checkpoint.foreign.write_meta"],
    ["checkpoint.foreign.nxd", "checkpoint.foreign.nemo", "checkpoint.foreign.meta"],
    ["checkpoint.foreign.grid", "checkpoint.foreign.folder"],
    ["base"],
    ["model", "lora"],
    ["parallel.loss", "parallel.frozen"],
    ["parallel.tensor"],
    ["parallel.regions", "recompute"],
    ["dropout", "quant"],
    ["optim.zero1"],
    ["optim.lazy"],
    ["optim.groups", "optim.adamw", "optim.clip", "optim.buckets", "optim.schedule"],
    ["checkpoint.save", "checkpoint.adapters"],
    ["checkpoint.rotate"],
    ["checkpoint.also_hf"],
    ["checkpoint.assemble"],
    ["checkpoint.slabs", "checkpoint.hub"],
    ["checkpoint.load"],
    ["checkpoint.manifest", "checkpoint.foreign.archive", "checkpoint.foreign.pickles"],
    ["checkpoint.container"],
    ["checkpoint.layout", "checkpoint.blocks", "checkpoint.lock"],
    ["data.describe", "data.blend", "data.instruct", "data.packed"],
    ["data.parts", "data.export", "data.dataset", "data.loader", "data.packing"],
    ["data.tokenizer", "data.templates", "data.rows"],
    ["data.megatron"],
    ["data.tokens", "data.segments", "data.corpus", "data.detokenizer", "data.sandbox"],
    ["data.spm", "data.order"],
    ["backends"],
    ["backends.tracing"],
    ["backends.torch", "backends.xla"],
    ["backends.cpu", "backends.nxd", "backends.xla_install"],
    ["ops"],
    ["checkup.versions", "checkup.machine", "checkup.storage"],
    ["compile_notes"],
    ["checkup.finding"],
    ["launch.kubernetes", "launch.slurm", "launch.mpirun", "launch.sagemaker", "launch.image"],
    ["launch.torchrun", "launch.yaml"],
    ["launch.script", "launch.checks"],
    ["launch.environment"],
    ["launch.jobfile"],
    ["launch.env", "launch.instances"],
    ["runfolder", "environment", "charts"],
    ["planner.search"],
    ["planner.memory", "planner.roofline"],
    ["planner.machine", "planner.share"],
    ["graphs.formulas", "graphs.report"],
    ["graphs.census", "graphs.compare"],
    ["graphs.hlo"],
    ["configfile", "metrics", "heartbeat"],
    ["config", "rules"],
    ["hub"],
    ["fields", "shard", "mesh", "collectives", "log", "program"],
    ["signals", "files"],
    ["errors"],
]
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}
MACHINE = ("torch.distributed", "torch_xla", "torch_neuronx", "neuronx_distributed", "torch.cuda")
SPEAKS_TO_MACHINE = "backends"
PROGRAMS = ("train", "generate", "evaluate", "data.prepare", "demo", "doctor", "program")
READS_ENVIRONMENT = (*PROGRAMS, "launch", "backends.torch", "backends.xla", "backends.tracing")
LONGEST = 400

FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if "kernels" not in path.parts and "__init__" not in path.name
) + sorted((PACKAGE / "launch").rglob("*.py"))
INITS = sorted(path for path in PACKAGE.rglob("__init__.py") if "kernels" not in path.parts)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(target: str) -> str:
    """The module of llamax that an imported name belongs to; "" for the package itself."""
    inside = target.removeprefix("llamax").removeprefix(".")
    while inside and inside not in LEVEL and not inside.startswith("kernels"):
        inside = inside.rpartition(".")[0]
    return inside


def test_the_package_has_no_file_that_the_layers_do_not_name() -> None:
    found = {name(path) for path in FILES}
    assert found - LEVEL.keys() == set(), "say in LAYERS where these belong"
    assert LEVEL.keys() - found - {"backends"} == set(), "these are gone: remove them from LAYERS"


@pytest.mark.parametrize("path", FILES + INITS, ids=lambda path: name(path) or "llamax")
def test_a_module_keeps_its_place(path: Path) -> None:
    me = name(path)
    for target in imports(path):
        if target.startswith("llamax"):
            other = module_of(target)
            if other.startswith("kernels"):
                assert me == "ops", f"{me} imports {target}: only ops chooses kernels"
            elif other and me in LEVEL and other != me:
                assert LEVEL[other] >= LEVEL[me], f"{me} reaches up to {other}"
        if target.startswith(MACHINE):
            assert me.startswith(SPEAKS_TO_MACHINE), f"{me} names {target}: only backends may"
        assert not target.startswith(("kernels.", "launch.")), f"{me}: import llamax.{target}"


@pytest.mark.parametrize("path", FILES + INITS + KERNELS, ids=lambda path: path.stem)
def test_only_programs_read_the_environment(path: Path) -> None:
    me = name(path) if path.is_relative_to(PACKAGE) else "kernels"
    reads = any(
        isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        for node in ast.walk(ast.parse(path.read_text()))
    )
    assert not reads or me.startswith(READS_ENVIRONMENT), f"{me} reads the environment"


@pytest.mark.parametrize("path", FILES + INITS + KERNELS, ids=lambda path: path.stem)
def test_a_file_is_one_room(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_kernels_stand_alone(path: Path) -> None:
    for target in imports(path):
        allowed = ("llamax.kernels", "llamax.backends.cpu")
        assert not target.startswith("llamax") or target.startswith(allowed), target


def test_what_needs_no_torch_loads_without_it() -> None:
    code = (
        "import sys, llamax.config, llamax.configfile, llamax.mesh, llamax.metrics, llamax.log, "
        "llamax.launch.env, llamax.data.tokens, llamax.plan, llamax.watch, llamax.report; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
