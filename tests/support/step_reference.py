"""One training step of a tiny Llama: the model, the global batch, and every gradient summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from llamax.config.rules.pipeline import evenly
from llamax.config.schema import OptimConfig
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.model.recompute import Recompute
from llamax.optim import Zero
from llamax.parallel import context_parallel, pipeline, sharding
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.mesh import Mesh
from llamax.parallel.sharding import Cut
from llamax.training.step import TrainState
from support.metering import Meter, Metered
from support.models import TINY as MODEL
from support.world import axes

# With the usual eps AdamW would turn the rounding of a gradient near 0 into a whole step.
OPTIM = OptimConfig(lr=1e-3, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
SEQUENCE, GLOBAL_BATCH = 16, 8


def batch() -> Batch:
    """The global batch: two documents per sequence, a quarter of the labels ignored."""
    generator = torch.Generator().manual_seed(1)
    shape = (GLOBAL_BATCH, SEQUENCE)
    ids = torch.randint(MODEL.vocab_size, shape, generator=generator)
    labels = torch.randint(MODEL.vocab_size, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.25, -100)
    first = 3 + torch.arange(GLOBAL_BATCH).unsqueeze(1)
    places = torch.arange(SEQUENCE).expand(shape)
    documents = (places >= first).int()
    return Batch(ids, labels, torch.where(documents > 0, places - first, places), documents)


def rows(whole: Batch, start: int, stop: int) -> Batch:
    return Batch(*(part[start:stop] for part in whole))


def share(axes: Axes, accumulation: int) -> list[Batch]:
    """This data rank's microbatches, or its part of their sequences."""
    each = GLOBAL_BATCH // axes.dp.size // accumulation
    first = axes.dp.rank * each * accumulation
    whole = part_of(batch(), axes)
    return [rows(whole, first + i * each, first + (i + 1) * each) for i in range(accumulation)]


def part_of(whole: Batch, axes: Axes) -> Batch:
    """A context rank's part of whole sequences, as a loader cuts them."""
    if axes.cp.size == 1:
        return whole
    rank, size = axes.part
    ids, labels, positions = (context_parallel.cut(x, rank, size) for x in whole[:3])
    documents = whole.documents
    if documents is not None:
        documents = context_parallel.in_rank_order(documents, size)
    return Batch(ids, labels, positions, documents)


def whole_weights(mesh: Mesh, results: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Weights joined from what each rank returned: its "weights" and their "cuts", by name."""
    found: dict[str, Tensor] = {}
    for stage in range(mesh.pp):
        ranks = mesh.groups("tp")[stage * mesh.dp * mesh.cp]
        parts = [results[rank] for rank in ranks]
        for name, how in parts[0]["cuts"].items():
            found[name] = sharding.join([part["weights"][name] for part in parts], how)
    return found


def loss(llama: Llama, micro: Batch, axes: Axes) -> Tensor:
    """The summed loss of a microbatch, or of a rank's part of it."""
    documents, attend = micro.documents, None
    if axes.cp.size > 1:
        documents, attend = None, context_parallel.across(axes.cp, documents)
    total, _ = llama.loss(
        micro.ids, micro.labels, micro.positions, documents_BS=documents, attend=attend
    )
    return total


def build(
    model: ModelConfig, axes: Axes, sequence: bool, layers: tuple[int, ...] | None = None
) -> Llama:
    """This rank's share of the model; ``layers`` of each chunk, by default one on each stage."""
    counts = layers or evenly(model.num_hidden_layers, axes.pp.size)
    stage = pipeline.layers_of(*axes.pp, counts)
    llama = Llama(model, axes.tp, sequence_parallel=sequence, stage=stage).init(0)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" in name:  # not the ones of init: a gradient must not look right by luck
                parameter.copy_(1 + torch.arange(len(parameter)) / 50)
    return llama


def gradients(llama: Llama, axes: Axes) -> dict[str, Tensor]:
    """Every gradient, summed as the optimizer must sum it."""
    return summed(llama, axes, {n: p.grad.clone() for n, p in llama.named_parameters()})


def summed(llama: Llama, axes: Axes, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's gradients ``grads``, summed as the optimizer must sum them."""
    parameters, found = llama.sharded_parameters(), {}
    for name, grad in grads.items():
        how = parameters.cuts[name]
        grad = axes.ends.all_reduce(grad) if name in parameters.tied else grad
        if isinstance(how, sharding.Replica):
            grad = axes.tp.all_reduce(grad) if llama.sequence_parallel else grad
        else:
            for part in sharding.parts(name, how, axes.tp.size):
                if sharding.replicas(part.how.blocks[0], axes.tp.size) > 1:
                    rows_ = grad.narrow(part.how.dim, part.start, part.length)
                    rows_.copy_(axes.kv.all_reduce(rows_))
        found[name] = axes.data.all_reduce(grad)
    return found


def training(llama: Llama, axes: Axes, zero: int = 1, bucket_bytes: int = 4096) -> TrainState:
    """What steps with the reference's optimizer settings."""
    optimizer = Zero(
        llama.sharded_parameters(),
        OPTIM,
        axes,
        sequence_parallel=llama.sequence_parallel,
        zero=zero,
        bucket_bytes=bucket_bytes,
    )
    tokens = GLOBAL_BATCH * SEQUENCE
    return TrainState(llama, optimizer, axes, step_tokens=tokens, learning_rate=lambda _: OPTIM.lr)


def differences(
    mine: dict[str, Any],
    whole: dict[str, Any],
    cuts: Mapping[str, Cut],
    tp: Axis,
    tolerance: float,
) -> list[str]:
    """Gradients, weights, losses and norms of a rank that differ from its share of the whole's.

    ``whole["rounding"]``, if there, is what each gradient's and weight's error may have beside
    ``tolerance``.
    """
    found, rounding = [], whole.get("rounding", {})
    for what in ("grads", "weights"):
        assert mine[what].keys() == whole[what].keys()
        for name, theirs in whole[what].items():
            expected = sharding.cut(theirs, cuts[name], tp.size, tp.rank)
            error = (mine[what][name] - expected).abs().max() / theirs.abs().max()
            if not error <= tolerance + rounding.get(name, 0.0):
                found.append(f"{what} {name} {error:.1e}")
    for what in ("loss", "norm"):
        for n, (a, b) in enumerate(zip(mine[what], whole[what], strict=True), 1):
            if not abs(a - b) <= 2 * tolerance * abs(b):
                found.append(f"{what} of step {n}: {a!r} {b!r}")
    return found


def noted(optimizer: Zero) -> dict[str, Tensor]:
    """The gradients that this rank has summed when its next step updates, in float64."""
    sums: dict[str, Tensor] = {}
    update = optimizer.step

    def noting(*arguments: Any) -> Tensor:
        names = [name for group in optimizer.groups for name in group.names]
        sums.update({n: g.double() for n, g in optimizer._gradients_of(names).items()})
        optimizer.step = update  # type: ignore[method-assign]
        return update(*arguments)

    optimizer.step = noting  # type: ignore[method-assign]
    return sums


def context_sent(
    model: ModelConfig, size: int, recompute: Recompute, dtype: torch.dtype = torch.float32
) -> dict[tuple[str, str], tuple[int, int]]:
    """On a rank: calls and bytes on the context axis in a forward and a backward pass."""
    meter, there = Meter(), axes(Mesh(cp=size))
    counted = replace(there, cp=Metered(there.cp, meter))
    llama = build(model, there, False).to(dtype)
    llama.model.mode = recompute
    loss(llama, share(counted, 1)[0], counted).backward()
    return {key: (meter.calls[key], meter.sent_bytes[key]) for key in meter.calls}
