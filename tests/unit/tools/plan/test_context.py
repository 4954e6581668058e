"""Context parallelism in the plan: pairs computed, keys and values, and the search over degrees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.runs import share

from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.context import (
    gathered_bytes,
    keys_at_most,
    pairs,
    pairs_at_once,
    turns,
)
from llamax.tools.plan.memory import memory
from llamax.tools.plan.nearest import flags
from llamax.tools.plan.report import show_search
from llamax.tools.plan.roofline import time
from llamax.tools.plan.search import contexts, search

STAGE = ["--parallel.pipeline=1", "--parallel.chunks=1"]
RECIPE = load_config("llama3.1-8b-128k", ["--parallel.zero=2", *STAGE])
TRN1 = load_machine("trn1.32xlarge")


def test_128k_fits_32_nodes_with_context_ranks() -> None:
    assert memory(share(RECIPE, Mesh(tp=8, cp=4, dp=32)), TRN1).fits
    whole = replace(RECIPE, data=replace(RECIPE.data, global_batch=128))
    assert not memory(share(whole, Mesh(tp=8, dp=128)), TRN1).fits


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_rank_computes_2n_plus_1_of_4n_pairs(n: int) -> None:
    whole = replace(RECIPE, data=replace(RECIPE.data, global_batch=128))
    rank = share(whole, Mesh(tp=8, cp=n, dp=128 // n))
    dense = 131072 // n * 131072 * 4
    assert pairs(rank) == dense * (2 * n + 1) // (4 * n)
    assert pairs_at_once(rank, TRN1) == 4 * (131072 // (2 * n)) ** 2


def test_keys_and_values_of_a_layer() -> None:
    rank = share(RECIPE, Mesh(tp=8, cp=4, dp=32))
    assert gathered_bytes(rank) == 64 * 2**20, "131,072 tokens x 2 x 128 features x 2 B"
    assert gathered_bytes(share(RECIPE, Mesh(tp=32, dp=32))) == 0
    lines = {line.name: line for line in time(rank, TRN1, 32).lines}
    assert "96 turns of 64 MiB keys and values over links" in lines["context collectives"].formula


def test_chunks_that_the_flash_kernel_refuses_cost_more() -> None:
    flash = share(RECIPE, Mesh(tp=8, cp=32, dp=4))
    plain = share(RECIPE, Mesh(tp=8, cp=64, dp=2))
    attention = [
        next(line.value for line in time(each, TRN1, 32).lines if line.name == "attention")
        for each in (flash, plain)
    ]
    assert attention[1] > attention[0]


def test_degrees_that_are_tried() -> None:
    assert contexts(RECIPE, 128) == [1, 2, 4, 8, 16, 32], "chunks of 2,048 tokens at least"
    assert contexts(RECIPE, 4) == [1, 2, 4, 8], "and the configured one"
    short = replace(RECIPE, data=replace(RECIPE.data, sequence_length=2048))
    assert contexts(replace(short, parallel=replace(short.parallel, context=1)), 128) == [1]


def test_the_search_finds_the_recipe_and_rings_where_gathered_keys_do_not_fit() -> None:
    plans, _ = search(RECIPE, TRN1, 32)
    staged = load_config("llama3.1-8b-128k")
    assert staged.parallel in [each.run.config.parallel for each in search(staged, TRN1, 32)[0][:2]]
    fits = {each.run.config: each.memory.fits and not each.memory.tight for each in plans}
    rings = [each for each in plans if each.run.config.parallel.context_by == "ring"]
    for each in rings:
        assert not fits[by(each.run.config, "gather")], "the ring is the slower one"
    assert any(each.memory.fits and not each.memory.tight for each in rings)
    ring = next(each for each in rings if each.memory.fits)
    assert "--parallel.context_by=ring" in flags(RECIPE, 32, ring)
    assert f" {ring.run.mesh.cp} ring " in "\n".join(show_search(RECIPE, [ring], []))


def by(config: Config, way: Any) -> Config:
    return replace(config, parallel=replace(config.parallel, context_by=way))


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_ring_sends_more_and_holds_less(mode: Any, n: int) -> None:
    whole = replace(RECIPE, run=replace(RECIPE.run, recompute=mode))
    whole = replace(whole, data=replace(whole.data, global_batch=128))
    gather, ring = (
        share(by(whole, way), Mesh(tp=8, cp=n, dp=128 // n)) for way in ("gather", "ring")
    )
    layers, keys = whole.model.num_hidden_layers, gathered_bytes(gather)
    passes = 2 if mode == "none" else 3
    assert turns(gather) == (passes * layers, keys)
    assert turns(ring) == ((passes + 1) * layers, (passes + 2) * keys / (passes + 1)), "fp32 sums"
    saved = memory(gather, TRN1).peak - memory(ring, TRN1).peak
    held = keys / n * (7 if n == 2 else 10)
    if mode == "none":  # those of every layer, whatever the moment of the peak is
        assert saved >= (layers - 1) * keys
    else:
        assert saved == pytest.approx(4 * keys - held)
    assert 0 < saved <= keys_at_most(gather, TRN1)
    times = [time(each, TRN1, 32).step_s for each in (gather, ring)]
    assert times[0] < times[1]
