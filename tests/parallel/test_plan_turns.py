"""The planner's traffic beside counted traffic: what a step on gloo ranks sends, byte by byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.metering import Meter, Metered
from support.models import tiny
from support.runs import share as share_of
from support.world import Worlds, axes

from llamax.config.schema import Config, DataConfig, OptimConfig, ParallelConfig, RunConfig
from llamax.model.llama import DTYPES, Llama
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.roofline import turns

# Wide enough for hidden states to outweigh the loss's numbers; a vocabulary without padding.
MODEL = tiny(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=128)


def sent(config: Config, mesh: Mesh) -> dict[tuple[str, str], int]:
    """In a rank: bytes sent in a step, by axis and verb."""
    meter, here = Meter(), axes(mesh)
    counted = Axes(*(Metered(axis, meter) for axis in (here.tp, here.data, here.kv, here.world)))
    model = Llama(
        MODEL,
        counted.tp,
        sequence_parallel=config.parallel.sequence,
        dtype=DTYPES[config.run.dtype],
        recompute=config.run.recompute,
    ).init(0)
    optimizer = Zero(
        model.sharded_parameters(),
        OptimConfig(),
        counted,
        sequence_parallel=model.sequence_parallel,
    )
    meter.clear()
    ids = torch.randint(MODEL.vocab_size, (2, 2, config.data.sequence_length))
    model.loss(ids[0], ids[1])[0].backward()
    optimizer.step(*torch.ones(3))
    return dict(meter.sent_bytes)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence", [True, False])
def test_planned_traffic_is_what_is_sent(worlds: Worlds, sequence: bool, mode: str) -> None:
    mesh = Mesh(tp=2, dp=2)
    config = Config(
        MODEL,
        ParallelConfig(tensor=2, sequence=sequence),
        data=DataConfig(sequence_length=64, micro_batch=2, global_batch=4),
        run=RunConfig(dtype="bfloat16"),
    )
    config = replace(config, run=replace(config.run, recompute=mode))
    found, share = worlds(4).run(sent, config, mesh)[0], share_of(config, mesh)
    hidden = share.tokens * MODEL.hidden_size * share.width
    tensor = sum(size for (axis, _), size in found.items() if axis == "tp")
    # Beside hidden states a few numbers a token cross: the loss's maxima, sums and labels.
    assert tensor == pytest.approx(turns(share) * hidden / 2, rel=0.05)
    elements = sum(group.elements for group in share.groups)
    assert found["data", "reduce_scatter"] == pytest.approx(4 * elements / 2, rel=0.01)
    assert found["data", "all_gather"] == pytest.approx(share.width * elements / 2, rel=0.01)
