"""The collectives of the parallel layers and of ZeRO by formula, to compare with a trace.

With T tokens in a microbatch, D features of w bytes, t tensor ranks and L layers, a collective
between the layers sends T D w (t - 1) / t bytes from each rank, an all-reduce twice as many.  With
sequence parallelism (Korthikanti et al. 2022, figure 5):

=================  ================  =================  ==================
in a microstep     all-gather        reduce-scatter     all-reduce
=================  ================  =================  ==================
a layer, forward   qkv, gate-up      o, down
a layer, backward  qkv twice, ...    qkv, gate-up
embedding          its gradient      its output
loss               its input         input's gradient   2 a chunk of tokens
=================  ================  =================  ==================

Backward gathers the inputs of qkv and gate-up again, and the gradients of o and down: a layer has 6
all-gathers and 4 reduce-scatters.  Recomputing whole layers repeats those of forward, except that
of down, whose result backward does not need.  Without sequence parallelism a layer has 4
all-reduces.  Context ranks gather keys and values of whole sequences in every layer, again where
attention is recomputed, and reduce-scatter their gradients.  Around a ring those
of n - 1 other ranks arrive one by one, in backward once more, and gradients, in float32, as often.
An optimizer step has one reduce-scatter and one all-gather for each bucket, and where groups of
data ranks own the same, an all-reduce of each reduced run over them.  From ZeRO-2 on the
reduce-scatter is in every microstep instead, and in ZeRO-3 so are the all-gathers of a weight: in
forward, and for layers again where they are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamax.config.constants import DTYPE_BYTES, GRADIENT_BYTES
from llamax.config.schema import Config
from llamax.optim.zero import Zero
from llamax.parallel.mesh import Mesh
from llamax.parallel.pipeline import LAYER
from llamax.tools.audit.census import Traffic

SCALARS_BYTES = 3 * 4  # loss, token count, requests
BOUNDS_BYTES = 2 * 4  # of loss and gradient norm, with optim.skip_spikes


@dataclass(frozen=True)
class GroupShape:
    """A group of the optimizer: padded elements of ``width_bytes`` in ``buckets``.

    ``partial``: its gradients are summed over tp; ``shared``: elements summed over kv ranks.
    ``zero``: the stage; ``layer``: whether it is a weight of a layer that is recomputed.
    """

    elements: int
    width_bytes: int
    buckets: int
    partial: bool
    shared: int
    shared_buckets: int
    zero: int = 1
    layer: bool = False


def group_shapes(optimizer: Zero) -> list[GroupShape]:
    """The groups of an optimizer, as the formulas need them."""
    return [
        GroupShape(
            group.length,
            group.key.dtype.itemsize,
            len(group.buckets),
            group.key.partial,
            sum(bucket.shared_elements for bucket in group.buckets),
            sum(bucket.shared_elements > 0 for bucket in group.buckets),
            group.key.zero,
            bool(LAYER.match(group.names[0])),
        )
        for group in optimizer.groups
    ]


def microstep(
    config: Config, mesh: Mesh, chunks: int, groups: Sequence[GroupShape] = ()
) -> list[Traffic]:
    """The collectives of a forward and a backward pass; the loss has ``chunks`` chunks."""
    again = config.run.recompute == "full"
    found = _passes(config, mesh, chunks, (6 + 2 * again, 4 + again, 4 + again), 2)
    found += _context(config, mesh, 1 if config.run.recompute == "none" else 2, 1)
    reduced = [group for group in groups if group.zero > 1]
    return [*found, *_gathered(mesh, groups, 2), *_scattered(mesh, reduced)]


def forward(
    config: Config, mesh: Mesh, chunks: int, groups: Sequence[GroupShape] = ()
) -> list[Traffic]:
    """The collectives of a forward pass and of the mean of the loss over the world."""
    found = _passes(config, mesh, chunks, (2, 2, 2), 1)
    found += [*_context(config, mesh, 1, 0), *_gathered(mesh, groups, 1)]
    return [*found, *_scalars(mesh, 1, 2 * 4)]


def swap(config: Config, mesh: Mesh, axis: str) -> list[Traffic]:
    """The exchange of an activation and its gradient between two stages, as a gather of both."""
    tokens = config.data.micro_batch * config.data.sequence_length // mesh.cp
    tokens //= mesh.tp if config.parallel.sequence else 1
    sent = tokens * config.model.hidden_size * DTYPE_BYTES[config.run.dtype]
    return [Traffic("all-gather", axis, 1, sent)]


def _context(config: Config, mesh: Mesh, forwards: int, backwards: int) -> list[Traffic]:
    """Keys and values, and their gradients, that context ranks exchange so often in a layer."""
    if mesh.cp == 1:
        return []
    model = config.model
    heads = max(1, model.num_key_value_heads // mesh.tp)
    tokens = config.data.micro_batch * config.data.sequence_length
    elements, width = 2 * tokens * heads * model.head_dim, DTYPE_BYTES[config.run.dtype]
    sent, layers = elements * width * (mesh.cp - 1) // mesh.cp, model.num_hidden_layers
    if config.parallel.context_by == "ring":
        keys, gradients = forwards + backwards, backwards * GRADIENT_BYTES // width
        shifts = layers * (keys + backwards) * (mesh.cp - 1)
        return [Traffic("collective-permute", "cp", shifts, layers * (keys + gradients) * sent)]
    kinds = {"all-gather": forwards, "reduce-scatter": backwards}
    return [
        Traffic(kind, "cp", count * layers, count * layers * sent)
        for kind, count in kinds.items()
        if count
    ]


def _passes(
    config: Config, mesh: Mesh, chunks: int, a_layer: tuple[int, int, int], around: int
) -> list[Traffic]:
    """``a_layer``: gathers, scatters, or all-reduces in a layer; ``around``: outside layers."""
    t, layers = mesh.tp, config.model.num_hidden_layers
    if t == 1:
        return []
    tokens = config.data.micro_batch * config.data.sequence_length // mesh.cp
    part = (t - 1) / t
    sent = tokens * config.model.hidden_size * DTYPE_BYTES[config.run.dtype] * part
    loss = round(2 * part * tokens * 3 * 4)  # maximum; sum of exponentials and the label's logit
    if not config.parallel.sequence:
        count = a_layer[2] * layers + around
        return [Traffic("all-reduce", "tp", count + 2 * chunks, round(2 * sent * count) + loss)]
    gathers, scatters = a_layer[0] * layers + around, a_layer[1] * layers + around
    return [
        Traffic("all-gather", "tp", gathers, round(sent * gathers)),
        Traffic("reduce-scatter", "tp", scatters, round(sent * scatters)),
        Traffic("all-reduce", "tp", 2 * chunks, loss),
    ]


def update(
    mesh: Mesh, groups: Sequence[GroupShape], zero: int, kv: int, spikes: bool = False
) -> list[Traffic]:
    """The collectives of an optimizer step; ``spikes``: whether it skips outliers."""
    d, copies, axis = mesh.owners, mesh.copies, "replica"
    if not zero:
        d, copies, axis = 1, mesh.dp * mesh.cp, "data"
    found = list[Traffic]()
    if zero:
        found += _scattered(mesh, [group for group in groups if group.zero == 1])
        found += _weights(mesh, [group for group in groups if group.zero < 3])
    if copies > 1:
        run = sum(GRADIENT_BYTES * group.elements for group in groups) // d
        buckets = sum(group.buckets for group in groups)
        found += [Traffic("all-reduce", axis, buckets, round(2 * run * (copies - 1) / copies))]
    if partial := [group for group in groups if group.partial]:
        run = sum(GRADIENT_BYTES * group.elements for group in partial) // d
        count = sum(group.buckets for group in partial)
        found += [Traffic("all-reduce", "tp", count, round(2 * run * (mesh.tp - 1) / mesh.tp))]
    if shared := sum(group.shared for group in groups):
        count = sum(group.shared_buckets for group in groups)
        found += [
            Traffic("all-reduce", "kv", count, round(2 * GRADIENT_BYTES * shared * (kv - 1) / kv))
        ]
    scalars = SCALARS_BYTES + (BOUNDS_BYTES if spikes else 0)
    return [*found, *_scalars(mesh, 2, scalars + 4)]


def _gathered(mesh: Mesh, groups: Sequence[GroupShape], passes: int) -> list[Traffic]:
    """Weights gathered in use: those of layers in each of ``passes``, others once."""
    spread = [group for group in groups if group.zero == 3]
    layers = [group for group in spread if group.layer]
    return _weights(mesh, spread + layers * (passes - 1))


def _weights(mesh: Mesh, groups: Sequence[GroupShape]) -> list[Traffic]:
    """One all-gather for each bucket."""
    whole = sum(group.width_bytes * group.elements for group in groups)
    return _over_owners(mesh, "all-gather", groups, whole)


def _scattered(mesh: Mesh, groups: Sequence[GroupShape]) -> list[Traffic]:
    """One reduce-scatter for each bucket."""
    whole = sum(GRADIENT_BYTES * group.elements for group in groups)
    return _over_owners(mesh, "reduce-scatter", groups, whole)


def _over_owners(mesh: Mesh, kind: str, groups: Sequence[GroupShape], whole: int) -> list[Traffic]:
    d, count = mesh.owners, sum(group.buckets for group in groups)
    axis = "shard" if mesh.copies > 1 else "data"
    return [Traffic(kind, axis, count, round(whole * (d - 1) / d))] if d > 1 and count else []


def _scalars(mesh: Mesh, count: int, nbytes: int) -> list[Traffic]:
    world = mesh.world_size
    sent = round(2 * nbytes * (world - 1) / world)
    return [Traffic("all-reduce", "world", count, sent)] if world > 1 else []
