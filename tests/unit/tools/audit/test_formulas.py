"""Collectives of a step by formula."""

from __future__ import annotations

from llamax.config.model import ModelConfig
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.parallel.mesh import Mesh
from llamax.tools.audit import formulas
from llamax.tools.audit.census import Traffic
from llamax.tools.audit.formulas import GroupShape

# --- formulas and report


CONFIG = Config(
    model=ModelConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    ),
    parallel=ParallelConfig(tensor=2),
    data=DataConfig(sequence_length=32, global_batch=4, micro_batch=2),
    run=RunConfig(dtype="bfloat16"),
)


def test_collectives_by_hand() -> None:
    one = 2 * 32 * 64 * 2 // 2  # a whole activation's half
    loss = Traffic("all-reduce", "tp", 2, 2 * 32 * 3 * 4)
    assert formulas.microstep(CONFIG, Mesh(tp=2), 1) == [
        Traffic("all-gather", "tp", 14, 14 * one),
        Traffic("reduce-scatter", "tp", 10, 10 * one),
        loss,
    ]
    assert formulas.microstep(CONFIG, Mesh(tp=1, dp=2), 1) == []
    *rest, scalars = formulas.forward(CONFIG, Mesh(tp=2, dp=2), 1)
    assert rest == [
        Traffic("all-gather", "tp", 5, 5 * one),
        Traffic("reduce-scatter", "tp", 5, 5 * one),
        loss,
    ]
    assert scalars == Traffic("all-reduce", "world", 1, 2 * 8 * 3 // 4)


def test_collectives_of_an_update_by_hand() -> None:
    groups = [GroupShape(1000, 2, 3, False, 40, 2), GroupShape(20, 2, 1, True, 0, 0)]
    world = Traffic("all-reduce", "world", 2, 2 * 16 * 3 // 4)
    assert formulas.update(Mesh(tp=2, dp=2), groups, True, 2) == [
        Traffic("reduce-scatter", "data", 4, 2 * 1020),
        Traffic("all-gather", "data", 4, 1020),
        Traffic("all-reduce", "tp", 1, 4 * 10),
        Traffic("all-reduce", "kv", 2, 4 * 40),
        world,
    ]
    *_, bounds = formulas.update(Mesh(tp=2, dp=2), groups, True, 2, spikes=True)
    assert bounds == Traffic("all-reduce", "world", 2, 2 * 24 * 3 // 4)
    whole, *_ = formulas.update(Mesh(tp=2, dp=2), groups, False, 2)
    assert whole == Traffic("all-reduce", "data", 4, 4 * 1020)
    assert formulas.update(Mesh(), groups[:0], True, 1) == []
