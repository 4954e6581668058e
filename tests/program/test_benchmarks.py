"""Every script under benchmarks/ runs to its end at its smallest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.instruction import llama2_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py"))
ONE_ROUND = ["--rounds", "1"]
# script: the arguments of each start, and what it must print
STARTS: dict[str, list[tuple[list[str], str]]] = {
    "axes.py": [
        (["zero", "--smallest", "--steps", "1", "--only", "llamax"], "| llamax, ZeRO-3 |"),
        (
            ["hybrid", "--smallest", "--steps", "1", "--only", "ZeRO-2"],
            "| llamax, ZeRO-2 over 2 |",
        ),
        (["pipeline", "--smallest", "--steps", "1", "--only", "llamax"], "| llamax, pipeline 2 |"),
        (["context-2", "--smallest", "--steps", "1", "--only", "ring"], "| ring, recompute full |"),
    ],
    "checkpoints.py": [([*ONE_ROUND, "--smallest"], "| load one rank of 8 | load unverified |")],
    "collectives.py": [([*ONE_ROUND, "--mebibytes", "0.25"], "| all_reduce | 0.25 |")],
    "first_step.py": [(["--rounds", "0"], "| llamax train --ranks 4 |")],
    "gather.py": [([*ONE_ROUND, "--tokens", "262144"], "checksums verified")],
    "generate.py": [
        (
            [*ONE_ROUND, "--smallest", "--threads", "1", "--prompt-tokens", "4"]
            + ["--new-tokens", "2", "--batches", "1"],
            "batch 1: llamax",
        )
    ],
    "graphs.py": [],  # see below: it needs torch-xla
    "imports.py": [(["--rounds", "0"], "| llamax, all of training |")],
    "instruct.py": [
        (["packing", "ROWS", "TOKENIZER", "--length", "128"], "packed / padded:"),
        (["prepare", "ROWS", "TOKENIZER"], "prepare / map:"),
        (["memory", "--documents", "50000"], "50,000 documents"),
    ],
    "limits.py": [
        (["layers", "--layers", "8", "--only", "inspect"], "| inspect |"),
        (["documents", "--megabytes", "0.1", "--only", "a.txt.gz"], "| a.txt.gz |"),
    ],
    "interop.py": [],  # it installs packages: make interop
    "lora.py": [
        (["steps", *ONE_ROUND, "--tokens", "8", "--batch", "1", "--smallest"], "| qlora int8 |"),
        (["memory", "--smallest"], "| qlora int8 | whole |"),
        (["loading", "--smallest"], "| qlora int8 |"),
    ],
    "megatron.py": [(["--documents", "9"], "vocabulary 128256: 9 sequences")],
    "nki_interpreter.py": [(["--help"], "TRITON_VIZ")],  # which no test has
    "ops.py": [([*ONE_ROUND, "--threads", "1", "--length", "16", "--tokens", "32"], "linear bf16")],
    "plan.py": [([], "| fitted |")],
    "saving.py": [
        ([*ONE_ROUND, "--smallest"], "| all files verified |"),
        (["--plan", "--smallest"], "tensors from"),
    ],
    "scale.py": [(["--smallest", *ONE_ROUND], "| watch, many ranks |")],
    "serve.py": [
        (["--smallest", "--rounds", "1", "--new-tokens", "4"], "equal answers: 16 of 16"),
    ],
    "serve_memory.py": [
        (["--smallest", "--slots", "2", "--length", "64", "--threads", "1"], "| 2 x 64 |"),
    ],
    "spikes.py": [
        (["--steps", "30", "--spikes", "3", "--window", "16"], "equal to the bit"),
    ],
    "tokenizing.py": [
        (
            ["TOKENIZER", "--paths", "TEXT", *ONE_ROUND, "--megabytes", "0.1"],
            "2 have the ids of the reference",
        )
    ],
    "training.py": [
        (["one", "--smallest", "--steps", "1", "--only", "torch"], "| torch's own modules |"),
        (["dp", "--smallest", "--steps", "1", "--only", "heap"], "| DDP, transformers, fused"),
    ],
}
NEEDS = {("instruct.py", "prepare"): "datasets"}  # packages that no requirements name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that stand for the words in capitals."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rows, text = folder / "rows.jsonl", folder / "text"
    pairs = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(60)]
    rows.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    text.mkdir()
    for name in ("a", "b"):
        (text / f"{name}.txt").write_text("A short text of a few words.\n" * 20)
    return {"ROWS": str(rows), "TEXT": str(text), "TOKENIZER": str(llama2_tokenizer(folder))}


def start(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """A finished run of a script on one thread."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )


def test_every_script_is_started() -> None:
    assert sorted(STARTS) == SCRIPTS


@pytest.mark.parametrize(
    ("script", "argv", "printed"),
    [(script, *case) for script, cases in STARTS.items() for case in cases],
    ids=[f"{script} {' '.join(argv[:1])}" for script, cases in STARTS.items() for argv, _ in cases],
)
def test_a_benchmark_runs_to_its_end(
    script: str, argv: list[str], printed: str, inputs: dict[str, str]
) -> None:
    package = NEEDS.get((script, argv[0] if argv else ""))
    if package and find_spec(package) is None:
        printed = f"skipped: {package} is not installed"
    done = start(script, *(inputs.get(word, word) for word in argv))
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed in done.stdout


def test_peers_that_are_not_installed_are_reported() -> None:
    absent = next(name for name in ("litgpt", "picotron", "torchtitan") if not find_spec(name))
    done = start("training.py", "one", "--smallest", "--steps", "1", "--only", absent)
    assert done.returncode == 0, done.stderr
    assert f"ModuleNotFoundError: No module named '{absent}" in done.stderr
    assert "skipped (" in done.stderr
    assert "| llamax |" in done.stdout


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch-xla is installed")
def test_the_graphs_benchmark_reports_that_torch_xla_is_absent() -> None:
    done = start("graphs.py")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "benchmarks/graphs.py: torch-xla is not installed, and nothing is traced without"
    ]
