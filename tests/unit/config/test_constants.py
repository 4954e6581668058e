"""The sizes that runtime code and planner share stand in one place, llamax/config/constants.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llamax.config import constants

ROOT = Path(__file__).resolve().parents[3]
FILES = [
    path
    for folder in ("llamax", "kernels", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(constants.__file__)
]
NAMES = [name for name, value in vars(constants).items() if name.isupper()]
FUNCTIONS = ["flash_refusal", "loss_chunk_tokens", "nf4_bits", "nki_loss_refusal", "nki_refusal"]


def imported(path: Path) -> set[str]:
    """The names that a file imports from the constants."""
    return {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "llamax.config.constants"
        for alias in node.names
    }


def assigned(path: Path) -> set[str]:
    """The names that a file assigns at its top level."""
    return {
        target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for part in node.targets
        for target in (part.elts if isinstance(part, ast.Tuple) else [part])
        if isinstance(target, ast.Name)
    }


def test_no_other_module_defines_a_shared_size() -> None:
    assert len(NAMES) >= 12
    for path in FILES:
        assert assigned(path).isdisjoint([*NAMES, *FUNCTIONS]), path


def test_every_size_is_used_by_the_code_it_describes_and_by_a_tool_that_computes_with_it() -> None:
    inside = set(constants.loss_chunk_tokens.__code__.co_names)
    inside |= set(constants.nf4_bits.__code__.co_names)
    inside |= set(constants.flash_refusal.__code__.co_names)
    inside |= set(constants.nki_refusal.__code__.co_names)
    inside |= set(constants.nki_loss_refusal.__code__.co_names)
    tools, runtime = set[str](inside), set[str](inside)
    for path in FILES:
        is_tool = path.is_relative_to(ROOT / "llamax" / "tools")
        (tools if is_tool else runtime).update(imported(path))
    config_only = {"DTYPE_BYTES"}  # run.dtype -> bytes: torch dtypes know their own
    assert {*NAMES, *FUNCTIONS} - tools == set()
    assert {*NAMES, *FUNCTIONS} - runtime - config_only - {"nf4_bits"} == set()


@pytest.mark.parametrize(
    ("rows", "tokens"), [(32000 // 8, 4096), (128256, 128), (2**24, 1), (2001, 8320)]
)
def test_a_chunk_of_the_loss_is_64_mib_of_logits_at_most(rows: int, tokens: int) -> None:
    assert constants.loss_chunk_tokens(rows) == tokens


def test_bits_of_a_weight_in_nf4() -> None:
    assert constants.nf4_bits(False) == 4 + 32 / 64
    assert constants.nf4_bits(True) == pytest.approx(4.127, abs=1e-4)


@pytest.mark.parametrize(
    ("length", "head_dim", "documents", "why"),
    [
        (4096, 128, False, ""),
        (4097, 128, False, "the sequence length 4097 is not a multiple of 2048"),
        (2048, 160, False, "head_dim=160 is above 128"),
        (2048, 128, True, "documents are kept apart (data.separate_documents=true)"),
    ],
)
def test_inputs_that_the_flash_kernel_refuses(
    length: int, head_dim: int, documents: bool, why: str
) -> None:
    assert constants.flash_refusal(length, head_dim, documents) == why
