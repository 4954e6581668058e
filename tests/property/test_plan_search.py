"""Every layout that the search offers keeps the rules, and is what the plan says of its options."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamax.config.hardware import Machine, load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.config.validate import problems
from llamax.tools.plan import nearest, plan, search
from llamax.tools.plan.nearest import flags, stages

STAGES = ("--parallel.pipeline=2", "--run.recompute=full")
CASES = st.tuples(
    st.sampled_from(["llama2-7b", "llama3.2-1b", "gsm8k-lora", "dolly-llama3.1-8b"]),
    st.sampled_from(["trn1.32xlarge", "trn1.2xlarge", "p4d.24xlarge", "g5.xlarge"]),
    st.integers(1, 5),
    st.sampled_from(
        [
            [],
            ["--parallel.sequence=false"],
            ["--data.global_batch=96"],
            [*STAGES, "--parallel.zero=1", "--model.tie_word_embeddings=false"],
            ["--parallel.zero=0", "--run.backend=cuda"],
            ["--parallel.zero=3", "--run.recompute=full"],
        ]
    ),
)


def rules(config: Config, machine: Machine, nodes: int) -> list[str]:
    """What a run on these machines is refused for: with the backend as configured, and theirs."""
    there = replace(config, run=replace(config.run, backend=machine.backend))
    world = nodes * machine.ranks
    ranks = machine.ranks
    return [line for c in (config, there) for line in problems(c, world, (), ranks, advises=False)]


@settings(max_examples=8, deadline=None)
@given(CASES, st.data())
def test_what_the_search_offers_can_be_planned_and_fits(
    case: tuple[str, str, int, list[str]], data: st.DataObject
) -> None:
    name, instance, nodes, overrides = case
    machine, config = load_machine(instance), load_config(name, overrides)
    plans, refused = search(config, machine, nodes)
    for each in plans[::7]:
        assert rules(each.run.config, machine, nodes) == []
    for each in refused[::7]:
        broken = [line.partition(";")[0] for line in rules(each.config, machine, nodes)]
        assert each.reason.partition(";")[0] in broken
    fitting = [each for each in plans if each.memory.fits]
    near = nearest(config, machine, nodes)
    if fitting:
        offered = data.draw(st.sampled_from(fitting))
        changes = flags(config, nodes, offered)
        again = plan(name, machine, nodes, overrides=[*overrides, *changes])
        assert again.memory.fits
        assert (again.memory.peak, again.time) == (offered.memory.peak, offered.time)
        if offered.run.config.parallel.zero in stages(config, machine):
            assert near is not None
            assert near.plan.nodes == nodes
    if near is not None and near.fits:
        options = [each for each in near.flags if not each.startswith("--nodes=")]
        again = plan(name, machine, near.plan.nodes, overrides=[*overrides, *options])
        assert again.memory.fits
        assert again.time.tokens_per_s == pytest.approx(near.plan.time.tokens_per_s)
