"""Every layout that the search offers keeps the rules, and is what the plan says of its options."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.validate import problems
from llamax.tools.plan import nearest, plan, search
from llamax.tools.plan.nearest import flags

STAGES = ("--parallel.pipeline=2", "--run.recompute=full")
CASES = st.tuples(
    st.sampled_from(["llama2-7b", "llama3.2-1b", "gsm8k-lora", "dolly-llama3.1-8b"]),
    st.sampled_from(["trn1.32xlarge", "trn1.2xlarge", "p4d.24xlarge", "g5.xlarge"]),
    st.integers(1, 4),
    st.sampled_from(
        [
            [],
            ["--parallel.sequence=false"],
            ["--data.global_batch=96"],
            [*STAGES, "--parallel.zero=1", "--model.tie_word_embeddings=false"],
            ["--parallel.zero=0", "--run.backend=cuda"],
        ]
    ),
)


@settings(max_examples=8, deadline=None)
@given(CASES, st.data())
def test_what_the_search_offers_can_be_planned_and_fits(
    case: tuple[str, str, int, list[str]], data: st.DataObject
) -> None:
    name, instance, nodes, overrides = case
    machine, config = load_machine(instance), load_config(name, overrides)
    plans, refused = search(config, machine, nodes)
    world = nodes * machine.ranks
    for each in plans[::7]:
        assert problems(each.run.config, world, (), machine.ranks) == []
    for each in refused[::7]:
        assert each.reason in problems(each.config, world, (), machine.ranks)
    fitting = [each for each in plans if each.memory.fits]
    near = nearest(config, machine, nodes)
    if fitting:
        offered = data.draw(st.sampled_from(fitting))
        changes = flags(config, nodes, offered)
        again = plan(name, machine, nodes, overrides=[*overrides, *changes])
        assert again.memory.fits
        assert (again.memory.peak, again.time) == (offered.memory.peak, offered.time)
        assert near is not None
        assert near.plan.nodes == nodes
    if near is not None and near.fits:
        options = [each for each in near.flags if not each.startswith("--nodes=")]
        again = plan(name, machine, near.plan.nodes, overrides=[*overrides, *options])
        assert again.memory.fits
        assert again.time.tokens_per_s == pytest.approx(near.plan.time.tokens_per_s)
