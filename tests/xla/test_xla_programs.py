"""What the two programs of a step are made of, read from the text that would be compiled."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from support.models import TINY as MODEL
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, build, share

from llamax.model.recompute import Recompute
from llamax.optim.zero import Zero
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.tools.audit import hlo
from llamax.tools.audit.trace import Programs
from llamax.training.step import TrainState

MESH = Mesh(tp=2, dp=2)
LAYERS = MODEL.num_hidden_layers


def programs(_: int, modes: list[Recompute], dtype: torch.dtype) -> dict[str, list[str]]:
    """The microstep's and the optimizer's program on rank 3 of ``MESH``, for each mode."""
    from llamax.backends.tracing import Tracer

    tracer = Tracer(Rendezvous(), debug=False)
    texts: dict[str, list[str]] = {}
    for mode in modes:
        axes = tracer.axes(MESH, 3)
        model = build(MODEL, axes, True).to(dtype)
        model.model.mode = mode
        optimizer = Zero(model.sharded_parameters(), OPTIM, axes, sequence_parallel=True)
        optimizer.to(axes.tp.rank_index.device)
        programs = Programs(tracer)
        programs.expect([("microstep", ""), ("update", "")])
        state = TrainState(
            model,
            optimizer,
            axes,
            programs,
            step_tokens=GLOBAL_BATCH * SEQUENCE,
            learning_rate=lambda step: OPTIM.lr,
        )
        state.step(share(axes, 1), 1)
        texts[mode] = [boundary.text for boundary in programs.recorded]
    return texts


def counts(text: str) -> Counter[str]:
    return Counter(each.opcode for each in hlo.read(text).instructions)


def test_what_a_step_is_made_of() -> None:
    (found,) = ranks.run(1, programs, ["none", "selective", "full"], torch.float32)
    for texts in found.values():
        assert len(texts) == 2
        assert not any("64[" in text for text in texts), "neither f64, s64 nor u64"
    micro = {mode: counts(texts[0]) for mode, texts in found.items()}
    update = counts(found["none"][1])
    # a gather that became a pad and an all-reduce, as pinned layouts do, would show as the latter
    maximum_and_sums_of_the_loss = 2
    assert micro["none"]["all-reduce"] == maximum_and_sums_of_the_loss
    # forward: the embedding scatters, a layer gathers and scatters twice, the loss gathers;
    # backward: the same the other way round, and a layer gathers its inputs again for the weights
    assert micro["none"]["reduce-scatter"] == 1 + 2 * LAYERS + 2 * LAYERS + 1
    assert micro["none"]["all-gather"] == 1 + 2 * LAYERS + 4 * LAYERS + 1
    # recompute: a barrier; the scores again, or a layer but for its last product and the sum of it
    assert [micro[mode]["opt-barrier"] for mode in found] == [0, LAYERS, LAYERS]
    assert micro["selective"]["dot"] - micro["none"]["dot"] == 1 * LAYERS
    assert micro["full"]["dot"] - micro["none"]["dot"] == 5 * LAYERS
    assert micro["full"]["all-gather"] - micro["none"]["all-gather"] == 2 * LAYERS
    assert micro["full"]["reduce-scatter"] - micro["none"]["reduce-scatter"] == LAYERS
    # of matrices, the padded vocabulary and norms each: gradients scattered, weights gathered;
    # all-reduced: the norms' gradients together over tp, the loss, the norm of the gradient
    assert update["dot"] == 0
    assert update["all-gather"] == update["reduce-scatter"] == 3
    assert update["all-reduce"] == 3


def test_products_of_bfloat16_are_in_bfloat16() -> None:
    (found,) = ranks.run(1, programs, ["none"], torch.bfloat16)
    products = [each for each in hlo.read(found["none"][0]).instructions if each.opcode == "dot"]
    wide = [each for each in products if each.shape.dtype != "bf16"]
    assert products
    assert wide == []
