"""What a refused configuration suggests is accepted: no other rule refuses it then."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, note, settings
from hypothesis import strategies as st
from support.configs import changed
from support.suggestions import suggestions

from llamax.config.rules import Rule, World
from llamax.config.schema import Config
from llamax.config.validate import RULES, problems

small = st.sampled_from
BASES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "parallel.tensor": small([1, 2, 3, 4, 5, 6, 8, 16]),
        "parallel.context": small([1, 1, 1, 2, 3, 4]),
        "parallel.context_by": small(["gather", "gather", "ring"]),
        "parallel.pipeline": small([1, 1, 1, 2, 3, 4, 7]),
        "parallel.chunks": small([1, 1, 2, 3, 5]),
        "parallel.data": small([0, 0, 0, 1, 2, 3]),
        "parallel.layers_per_stage": small(["", "", "1,1", "2,2", "3,2,2", "x"]),
        "parallel.zero": small([0, 1, 2, 3]),
        "parallel.zero_ranks": small([0, 0, 0, 2, 3, 4, 8]),
        "parallel.sequence": st.booleans(),
        "model.num_attention_heads": small([4, 6, 8, 12]),
        "model.num_key_value_heads": small([1, 2, 3, 4, 6, 8]),
        "model.head_dim": small([7, 8, 16]),
        "model.intermediate_size": small([90, 96, 105, 128]),
        "model.num_hidden_layers": small([2, 4, 5, 7, 8, 12]),
        "model.max_position_embeddings": small([64, 100, 126, 2048]),
        "data.sequence_length": small([15, 64, 96, 101, 120, 126, 128]),
        "data.global_batch": small([1, 3, 4, 6, 8, 10, 48]),
        "data.micro_batch": small([1, 1, 2, 3]),
        "optim.min_lr": small([0.0, 1.0]),
        "optim.state_bits": small([32, 32, 8]),
        "run.backend": small(["cpu", "xla", "neuron"]),
        "run.dtype": small(["float32", "bfloat16", "float16"]),
        "run.recompute": small(["none", "selective", "full"]),
        "run.stochastic_rounding": small([False, False, True]),
        "finetune.method": small(["full", "full", "lora", "qlora"]),
        "finetune.quant": small(["nf4", "int8"]),
        "checkpoint.init_from": small(["", "base"]),
        "checkpoint.also_hf": st.booleans(),
    }
)
# ranks of the world, and those of a node
WORLDS = small(
    [(None, None), (1, None), (4, None), (5, None), (12, 6), (16, 8), (32, 32), (64, 16)]
)


def refusals(config: Config, world: World) -> dict[Rule, str]:
    """The first problem that each rule finds, by rule."""
    found = ((rule, next(rule(config, world), "")) for _, rule in RULES)
    return {rule: line for rule, line in found if line}


def names(line: str, changes: dict[str, Any]) -> bool:
    """Whether a line names one of the changes as written."""
    words = re.split(r"[ ;:]|,(?= )", line)
    return any(f"{key}={value}" in words for key, value in changes.items())


@settings(max_examples=200, deadline=None)
@given(BASES, WORLDS)
def test_no_rule_refuses_what_another_one_suggests(
    base: dict[str, Any], sizes: tuple[int | None, int | None]
) -> None:
    config, world = changed(base), World(*sizes)
    before = refusals(config, world)
    for rule, line in before.items():
        for changes in suggestions(line, config):
            note(f"{line}\n  -> {changes}")
            after = refusals(changed(changes, config), world)
            assert rule not in after, after[rule]
            new = [text for other, text in after.items() if other not in before]
            assert not any(names(text, changes) for text in new), new


@settings(max_examples=100, deadline=None)
@given(BASES, WORLDS)
def test_suggestions_followed_one_by_one_come_to_an_end(
    base: dict[str, Any], sizes: tuple[int | None, int | None]
) -> None:
    config, (ranks, node_ranks) = changed(base), sizes
    for _ in range(20):
        lines = problems(config, ranks, (), node_ranks)
        ways = [changes for line in lines for changes in suggestions(line, config)]
        if not ways:
            break
        note(f"{lines}\n  -> {ways[0]}")
        config = changed(ways[0], config)
    else:
        raise AssertionError(lines)
