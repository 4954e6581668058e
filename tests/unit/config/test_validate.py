"""Rules of a configuration: each is tripped alone and kept on the edge."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.configs import GOOD, changed
from support.rule_cases import CASES

from llamax.config.rules import divisors
from llamax.config.schema import (
    sections,
)
from llamax.config.types import descriptions, range_of, type_hints
from llamax.config.validate import RULES, check, problems
from llamax.runtime.errors import ConfigError


def test_a_good_configuration_has_no_problems() -> None:
    assert problems(GOOD) == problems(GOOD, 2) == problems(GOOD, 8) == []
    check(GOOD, 4)


def test_every_rule_has_a_case() -> None:
    assert [function.__name__ for _, function in RULES] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rule_is_tripped_alone_and_kept_on_the_edge(name: str) -> None:
    bad, good = CASES[name]
    for changes, world, problem in bad:
        ranks, node_ranks = world if isinstance(world, tuple) else (world, None)
        assert problems(changed(changes), ranks, (), node_ranks) == [problem]
        assert "\n" not in problem
    for changes in good:
        found = problems(changed(changes), 4 if "parallel.data" in changes else None, (), 16)
        assert found == []


def test_every_number_has_a_range_and_leaving_it_is_reported() -> None:
    numbers = 0
    for prefix, section in sections(GOOD):
        for each in fields(section):
            value = getattr(section, each.name)
            allowed = range_of(type_hints(type(section))[each.name])
            assert descriptions(type(section))[each.name].endswith("."), each.name
            if type(value) in (int, float):
                numbers += 1
                for bad in (-1, math.nan, math.inf):
                    key = f"{prefix}.{each.name}"
                    found = problems(changed({key: bad}), 4)
                    assert f"{key}={bad} is out of range; use {allowed.words}" in found
    assert numbers > 25
    for key in ("model.bos_token_id", "model.eos_token_id"):
        assert f"{key}=-1 is out of range; use 0 or more" in problems(changed({key: -1}))
    assert problems(changed({"model.eos_token_id": (2, -1)})) == [
        "model.eos_token_id=(2, -1) is out of range; use 0 or more"
    ]


@pytest.mark.parametrize(
    ("key", "below", "edge"),
    [
        ("parallel.tensor", 0, 1),
        ("parallel.data", -1, 0),
        ("optim.lr", 0.0, 1e-9),
        ("optim.spike_window", 15, 16),
        ("optim.spike_sigma", 0.0, 1e-3),
        ("optim.beta2", 1.0, 0.999),
        ("optim.max_grad_norm", -0.1, 0.0),
        ("run.steps", 0, 10),
        ("model.num_attention_heads", 0, 8),
    ],
)
def test_ranges_end_where_they_should(key: str, below: Any, edge: Any) -> None:
    assert any(
        line.startswith(f"{key}={below} is out of range")
        for line in problems(changed({key: below}))
    )
    kept = {key: edge, "optim.min_lr": 0.0}
    assert problems(changed(kept)) == []


@pytest.mark.parametrize(
    ("key", "use"),
    [
        ("optim.schedule", "cosine, linear, wsd or constant"),
        ("data.verify", "start, read or off"),
        ("run.backend", "cpu, cuda, xla or neuron"),
        ("run.dtype", "float32, bfloat16 or float16"),
        ("run.recompute", "none, selective or full"),
        ("run.progress", "auto, on or off"),
    ],
)
def test_unknown_choices_are_reported(key: str, use: str) -> None:
    assert problems(changed({key: "fast"})) == [f"{key}='fast' is unknown; use {use}"]


def test_all_problems_come_together_and_a_broken_field_is_reported_once() -> None:
    bad = changed(
        {"parallel.tensor": 0, "optim.min_lr": 1.0, "data.micro_batch": 3, "run.steps": 0}
    )
    assert [line.split("=")[0] for line in problems(bad, 4)] == [
        "parallel.tensor",
        "run.steps",
        "optim.min_lr",
    ]
    with pytest.raises(ConfigError, match=r"^configuration: 3 problems\n  parallel.tensor=0 is"):
        check(bad, 4)
    with pytest.raises(ConfigError, match=r"^configuration: optim.min_lr=1.0 is above .*less$"):
        check(changed({"optim.min_lr": 1.0}))


@given(st.integers(1, 16), st.integers(1, 24), st.integers(1, 24))
def test_what_the_rules_let_through_can_be_cut(tensor: int, heads: int, kv: int) -> None:
    from llamax.parallel.sharding import Block, span

    config = changed(
        {
            "model.head_dim": 8,
            "model.num_attention_heads": heads,
            "model.num_key_value_heads": kv,
            "model.intermediate_size": 48 * tensor,
            "parallel.tensor": tensor,
            "parallel.sequence": False,
        }
    )
    try:
        for n in (heads, kv):
            span(Block(n * 8, unit=8), tensor, 0)
        fits = heads % tensor == 0 and heads % kv == 0
    except ConfigError:
        fits = False
    assert (problems(config) == []) == fits


def test_divisors_of_a_number_of_any_size() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(2**62)[:4] == [1, 2, 4, 8]  # at once


def test_suggestions_for_a_pipeline_work_together() -> None:
    """Stages that do not divide the layers, with more chunks than layers."""
    wanted = {
        "parallel.pipeline": 3,
        "parallel.chunks": 2,
        "model.num_hidden_layers": 4,
        "data.global_batch": 2,
        "parallel.tensor": 1,
    }
    first, second = problems(changed(wanted), 3)
    assert first.endswith("num_hidden_layers=4; use parallel.layers_per_stage=2,1,1")
    assert second.endswith("; use parallel.chunks=1 and parallel.layers_per_stage=2,1,1")
    mended = {"parallel.chunks": 1, "parallel.layers_per_stage": "2,1,1"}
    assert problems(changed({**wanted, **mended}), 3) == []
