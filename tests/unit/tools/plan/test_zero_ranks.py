"""ZeRO over a part of the data ranks, as it is planned, searched and shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamax.config.hardware import Machine, load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.runtime.units import show_fine_time
from llamax.tools.plan import Plan, plan
from llamax.tools.plan.report import as_json, headline, notes, show_search
from llamax.tools.plan.search import search
from llamax.tools.plan.sizes import Share

H100 = load_machine("p5.48xlarge")
# Its links and network do not keep up with what a microstep computes.
SLOW = replace(H100, link_gbps=H100.link_gbps / 32, network_gbps=H100.network_gbps / 32)


def planned(nodes: int, *options: str, machine: Machine = H100) -> Plan:
    more = ["--run.backend=cuda", "--parallel.tensor=1", "--run.recompute=full"]
    more += ["--data.micro_batch=1", *options]
    return plan("llama3.1-8b", machine, nodes, overrides=more)


def lines(planned: Plan) -> dict[str, Any]:
    return {line.name: line for line in (*planned.memory.lines, *planned.time.lines)}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_rank_needs_what_one_of_a_single_node_needs(zero: int) -> None:
    stage = f"--parallel.zero={zero}"
    alone, hybrid = planned(1, stage), planned(4, stage, "--parallel.zero_ranks=8")
    whole = planned(4, stage)
    assert {n: line.value for n, line in lines(alone).items() if n in STATE} == {
        n: line.value for n, line in lines(hybrid).items() if n in STATE
    }
    assert hybrid.memory.peak == alone.memory.peak > whole.memory.peak


STATE = ("weights", "gradients", "masters", "moments")


def test_links_carry_microsteps_and_the_network_a_step() -> None:
    hybrid = planned(4, "--parallel.zero=3", "--parallel.zero_ranks=8", machine=SLOW)
    alone = planned(1, "--parallel.zero=3", machine=SLOW)
    n = hybrid.run.accumulation / alone.run.accumulation
    data, replica = (lines(hybrid)[f"{kind} collectives"] for kind in ("data", "replica"))
    assert data.value == pytest.approx(n * lines(alone)["data collectives"].value)
    assert " over links at " in data.formula
    assert " over network at " in replica.formula
    elements = Share(hybrid.run).elements
    share = 1e9 * SLOW.network_gbps * SLOW.network_efficiency / 8  # eight rings leave a node
    at_least = 2 * 3 / 4 * 4 * elements / 8 / share
    assert at_least < replica.value < 1.02 * at_least
    assert "replica collectives" not in lines(planned(4, "--parallel.zero=3"))


def test_it_is_shown() -> None:
    hybrid = planned(4, "--parallel.zero=3", "--parallel.zero_ranks=8")
    assert "x data 32, ZeRO-3 over 8, 16 microsteps" in headline(hybrid.run, "4")
    assert as_json(hybrid)["zero_ranks"] == 8
    assert not any("zero_ranks" in note for note in notes(hybrid))
    over_all = notes(planned(4, "--parallel.zero=3", machine=SLOW))
    (note,) = (note for note in over_all if "zero_ranks" in note)
    assert note.startswith("parallel.zero_ranks=8, ZeRO within each node, would take ")
    assert note.endswith(" from each step for 11.6 GiB of memory")


def found(config: Config, nodes: int) -> set[tuple[int, int, int, int]]:
    """Data ranks of a node, ranks of a stage, ZeRO stage and ranks of the layouts tried."""
    plans, refused = search(config, H100, nodes)
    assert all("zero_ranks" not in each.reason for each in refused)
    return {
        (
            H100.ranks // each.run.mesh.tp,
            each.run.mesh.dp * each.run.mesh.cp,
            each.run.config.parallel.zero,
            each.run.config.parallel.zero_ranks,
        )
        for each in plans
    }


def test_a_search_tries_the_data_ranks_of_a_node() -> None:
    config = load_config("llama3.1-8b", ["--run.backend=cuda"])
    tried = found(config, 2)
    assert {ranks for _, _, zero, ranks in tried if zero < 2} == {0}
    for node, data, zero, _ in tried:
        if zero > 1:
            both = {ranks for n, d, z, ranks in tried if (n, d, z) == (node, data, zero)}
            assert both == ({0, node} if 1 < node < data else {0})
    assert {ranks for *_, ranks in found(config, 1)} == {0}
    own = found(load_config("llama3.1-8b", ["--run.backend=cuda", "--parallel.zero_ranks=4"]), 2)
    assert {ranks for _, data, zero, ranks in own if zero == 1} == {0, 4}, "0 where 4 is too many"


def test_a_search_shows_over_how_many_ranks() -> None:
    config = load_config("llama3.2-3b")
    plans, refused = search(config, load_machine("trn1.32xlarge"), 4)
    text = list(show_search(config, plans, refused))
    assert any(" 2/8 " in line for line in text)
    assert "zero 3/8: ZeRO-3 over 8 data ranks, with the same in every such group" in text


@pytest.mark.parametrize("zero", [2, 3])
def test_on_gpus_a_microstep_sends_while_it_computes(zero: int) -> None:
    def sent(plan: Plan) -> str:
        return str(lines(plan)["data collectives"].formula)

    def data(machine: Machine, *options: str) -> float:
        stage = planned(4, f"--parallel.zero={zero}", *options, machine=machine)
        return sum(x.value for n, x in lines(stage).items() if n == "data collectives")

    whole, run = planned(4, f"--parallel.zero={zero}", machine=SLOW), 2 / (4 + 2)
    names = ("matmuls", "attention", "element-wise", "logits")
    computed = sum(lines(whole)[name].value for name in names)
    eager = replace(SLOW, backend="neuron")
    assert data(SLOW) == pytest.approx(data(eager) - computed, rel=1e-3)
    assert f"{show_fine_time(computed)} of it behind products" in sent(whole)
    assert " of it behind products" in sent(planned(4, f"--parallel.zero={zero}"))
    once = data(H100, "--parallel.zero=1") * run if zero == 2 else 0.0
    assert data(H100) == pytest.approx(once, rel=0.05), "the links of an H100 keep up"
