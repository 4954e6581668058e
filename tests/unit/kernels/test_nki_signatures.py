"""Every call of the NKI kernels against the documented signatures of nki 0.2.0 and 0.6.0."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from llamax.kernels.simulator import isa, language, signatures

KERNELS = sorted((Path(__file__).resolve().parents[3] / "kernels").glob("*/nki_*.py"))
KERNELS = [path for path in KERNELS if "import nki.isa" in path.read_text()]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_kernel_calls_what_both_versions_document(path: Path) -> None:
    assert [*signatures.problems(path)] == []


def test_there_are_kernels() -> None:
    assert len(KERNELS) >= 5


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nisa.tensor_copy(dst=a, src=b, dtype=c)", "tensor_copy(dtype=...) is no parameter"),
        ("nisa.nc_matmul(dst=a, stationary=b, moving=c, accumulate=True)", "in nki 0.2.0"),
        ("nisa.dma_copy(dst=a, src=b, dst_rmw_op=c)", "in nki 0.6.0"),
        ("nisa.affine_select(a, b, 0, c, d, 0.0)", ""),
        ("nisa.affine_select(dst=a, pattern=b)", "affine_select needs offset= in nki 0.2.0"),
        ("nisa.range_select(a)", "nisa.range_select is not in the table"),
        ("nl.load(a)", "nl.load is not in the table"),
        ("nl.ds(1, 2, 3)", "ds has 3 arguments, more than 2"),
    ],
)
def test_what_a_version_lacks_is_found(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(f"def kernel(a, b, c, d):\n    {line}\n")
    found = [*signatures.problems(path)]
    assert all(each.startswith("kernel.py:2: ") for each in found)
    assert any(problem in each for each in found) if problem else not found


def test_the_simulator_takes_the_documented_parameters() -> None:
    for table, module in ((signatures.INSTRUCTIONS, isa), (signatures.FUNCTIONS, language)):
        for name, rows in table.items():
            accepted = set(inspect.signature(getattr(module, name)).parameters)
            documented = {word.removesuffix("=") for word in rows[0].split()}
            assert documented <= accepted, (name, documented - accepted)
