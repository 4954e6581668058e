"""ZeRO: AdamW with its state cut over the data ranks (Rajbhandari et al. 2020, section 5).

Parameters live in flat vectors, cut into buckets; of each bucket a data rank owns one shard,
and keeps AdamW's moments, and float32 masters of narrower weights, for its shards alone.
A step, the same on one rank as on thousands::

    0  embeddings that are tied over the first and last stage of a pipeline: sum both   (ends)
    1  key/value heads held by several tensor ranks: sum the parts of their gradient    (kv)
    2  bucket by bucket, sum gradients over the data ranks, each rank keeping its shard (shard)
       and over the ranks that keep the same shard, if there are several                (replica)
    3  replicas with a different gradient on each rank: sum those gradients             (tp)
    4  the norm of the whole model's gradient, every element counted once               (world)
    5  clip; where the norm is not accepted, because it is not finite or an outlier, nothing below
       changes anything
    6  AdamW on the owned shards
    7  bucket by bucket, gather the new weights of all shards                           (shard)

Parameters are grouped by dtype, by decay (matrices, embeddings among them, decay; vectors, which
are norms, do not) and by how the norm counts them.  Weights are views of their group's flat vector,
so step 7 needs no copy per parameter, and so is, in float32, the rank's master shard.

Each gradient is added to a flat float32 vector as soon as backward has made it, and freed:
microsteps sum in float32, all of them trace the same graph, and nothing is copied to be sent.  Only
float32 gradients that are never sent stay in ``parameter.grad``, or an embedding's in blocks of its
rows, and take no memory during forward.  On eager devices the products of layers add to these sums
themselves (``llamax.parallel.weight_gradient``).

The data ranks own one shard each, or, with ``parallel.zero_ranks``, groups of neighbours do, and
each group owns everything (hybrid sharding: Zhao et al. 2023, section 3.2.2).  Then all that goes
on in a microstep stays in a group, a node say, and groups meet once a step, over reduced shards.

Bytes a rank holds for n elements of width w over d data ranks, or those of a group::

    n w + 4 n + 8 n / d      float32; without the 4 n where no gradient is sent
    n w + 4 n + 12 n / d     narrower: masters as well
    n w / d + ...            ZeRO-3 cuts the weights of layers too, ZeRO-2 and 3 the 4 n

With ``optim.state_bits`` 8 the 8 n of the moments are 2 n and 1/32 n; with ``optim.offload``
moments and masters lie in host memory, and pass through the device bucket by bucket in step 6.

Here n is each flat vector padded to a multiple of d; elements whose weight in the norm differs
within a parameter cost 4 n / d more.  Without ZeRO d is 1 and step 2 leaves all ranks the whole
sum.  In ZeRO-2 and 3 its first sum happens in backward, and in ZeRO-3 layers gather their weights
themselves, in place of step 7 (``llamax.optim.gradients``).  Parameters that every tensor rank
holds are treated as in ZeRO-1.

No Python number that depends on the rank or the step enters a step: one graph serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.backends import cpu
from llamax.config.constants import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    NORM_WEIGHT_BYTES,
    moments_bytes,
)
from llamax.config.schema import OptimConfig
from llamax.optim import adamw
from llamax.optim.blockwise import bits_of
from llamax.optim.buckets import Segment, segments, weight
from llamax.optim.clip import clip_factor, is_finite, sum_of_squares
from llamax.optim.groups import Group, Key, Owned
from llamax.optim.layouts import is_eager, kept, replaced, split_like
from llamax.optim.replicas import ReplicaCheck
from llamax.optim.state import Bucket
from llamax.parallel.collectives import Axes
from llamax.parallel.reductions import Reductions
from llamax.parallel.sharding import Replica, ShardedParameters
from llamax.parallel.weight_gradient import GradientSum
from llamax.runtime.errors import ConfigError


class Zero:
    """AdamW over ``axes`` for a model's parameters; make one per model.

    ``parameters`` are this rank's shares and move into flat vectors: load them before, or through
    ``owned`` and ``gather_parameters``; frozen ones are left alone.  After backward a gradient may
    lie elsewhere and ``parameter.grad`` be None: see or change it in a hook that
    ``parameter.register_hook`` takes.  ``torch.autograd.grad`` returns gradients and sums none.
    ``sequence_parallel``: each tensor rank saw its own part of the sequence, so that gradients of
    replicas are partial.  ``zero``: the stage; in 3, weights of layers are placeholders from then
    on, if not before.  ``bucket_bytes`` of float32 gradient travel at once.  ``undeclared``: names
    of replicas that do not say whether their gradients are partial, to be checked.  ``update``: a
    rule in place of AdamW's, which ``llamax.optim.adamw.update`` is.  ``lr_scale``: the factor on
    the learning rate of a parameter, from its name.
    """

    def __init__(
        self,
        parameters: ShardedParameters,
        optim: OptimConfig,
        axes: Axes,
        *,
        sequence_parallel: bool,
        zero: int = 1,
        bucket_bytes: int = 64 * 2**20,
        undeclared: Collection[str] = (),
        update: adamw.Update | None = None,
        lr_scale: Callable[[str], float] | None = None,
    ) -> None:
        self.optim, self.axes = optim, axes
        self.update = update or adamw.update
        self.shard, self.replica = axes.owners(zero)
        members = self._members(parameters, sequence_parallel, zero, lr_scale)
        unsure = {name: parameters[name].tensor for name in undeclared}
        self.replicas = ReplicaCheck(unsure, axes, sequence_parallel)
        if not members:
            here, fewer = "", ""
            if axes.pp.size > 1:
                here, fewer = f" of stage {axes.pp.rank}", ", or use fewer stages"
            raise ConfigError(
                f"every parameter{here} is frozen, so there is nothing to train; set "
                f"requires_grad of some before Zero is made{fewer}"
            )
        self._reductions = Reductions()
        self.groups = [
            Group(
                key,
                named,
                self._counted(key, named, parameters),
                axes,
                self.shard,
                bucket_bytes,
                self._reductions,
                parameters.layers[key.alone] if key.zero == 3 else None,
            )
            for key, named in members.items()
        ]
        sums: dict[str, GradientSum] = {}
        for group in self.groups:
            sums |= zip(group.names, group.gradients.sums, strict=False)
        self._layers = {n: layer for n, layer in parameters.layers.items() if n in sums}
        for name, layer in self._layers.items():
            layer.gradient_sum = sums[name]
        if self.gathers and axes.data.rank_index.device.type == "cpu":
            cpu.unmap_large_blocks()

    def _members(
        self,
        parameters: ShardedParameters,
        sequence_parallel: bool,
        zero: int,
        lr_scale: Callable[[str], float] | None,
    ) -> dict[Key, dict[str, Parameter]]:
        """The parameters to train by name, those together that are treated alike."""
        members: dict[Key, dict[str, Parameter]] = {}
        seen: set[int] = set()  # tied weights are one parameter with two names
        degree, optim = parameters.degree, self.optim
        for name, (parameter, how) in parameters.trained().items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            assert isinstance(parameter, Parameter)
            partial = isinstance(how, Replica) and (
                sequence_parallel if how.partial is None else how.partial
            )
            counts, tied = weight(how, degree), name in parameters.tied
            stage = min(zero, 1) if isinstance(how, Replica) or self.shard.size == 1 else zero
            if stage == 3 and name not in parameters.layers:
                stage = 2
            key = Key(
                parameter.dtype,
                decays=parameter.dim() > 1,
                weight=counts and counts / (1 + tied),
                partial=partial and degree > 1,
                zero=stage,
                alone=name if stage == 3 else "",
                tied=tied,
                bits=bits_of(parameters, name) if optim.state_bits == 8 else 32,
                offload=optim.offload,
                lr_scale=lr_scale(name) if lr_scale else 1.0,
            )
            members.setdefault(key, {})[name] = parameter
        return members

    def _counted(
        self, key: Key, members: Mapping[str, Parameter], parameters: ShardedParameters
    ) -> list[Segment]:
        """How the norm counts the elements of a group's members, in flat order.

        Raises ConfigError where ``axes.kv`` does not join the ranks that hold the same heads.
        """
        counted = [
            segment._replace(weight=segment.weight / (1 + key.tied))
            for name, parameter in members.items()
            for segment in segments(
                parameter.shape, parameters[name].cut, parameters.degree, parameters.rank
            )
        ]
        for ranks in {round(1 / segment.weight) for segment in counted if segment.shared}:
            if ranks != self.axes.kv.size:
                raise ConfigError(
                    f"{ranks} tensor ranks hold each key/value head, and axes.kv joins "
                    f"{self.axes.kv.size}; give the mesh kv={ranks}"
                )
        return counted

    @property
    def gathers(self) -> bool:
        """Whether layers gather weights that are cut over the data ranks, on an eager device."""
        return any(group.store and is_eager(group.store.local) for group in self.groups)

    @torch.no_grad()
    def step(
        self,
        lr: Tensor,
        step: Tensor,
        scale: Tensor,
        accepts: Callable[[Tensor], Tensor] = is_finite,
    ) -> Tensor:
        """One optimizer step on the accumulated gradients times ``scale``; returns their norm.

        All are 0-d tensors; ``step`` counts from 1.  The norm is that before clipping; where
        ``accepts`` does not accept it, the step has changed nothing, on any rank.  Gradients are
        zero afterwards.
        """
        for group in self.groups:
            group.gradients.finish()
            for name, parameter in zip(group.names, group.parameters, strict=True):
                if not parameter.requires_grad:
                    raise ConfigError(
                        f"{name} was frozen after this optimizer was made, which would go on to "
                        "decay it; make a new Zero"
                    )
        self._sum_tied()
        self.replicas.check(self._gradients_of)
        every = [(group, bucket) for group in self.groups for bucket in group.buckets]
        shards = [self._reduce(group, bucket) for group, bucket in every]
        squares = [self._squares(*place, shard) for place, shard in zip(every, shards, strict=True)]
        norm = self.axes.world.all_reduce(torch.stack(squares).sum()).sqrt() * scale
        factor = clip_factor(norm, self.optim.max_grad_norm) * scale
        accepted, step = accepts(norm), step.float()
        for (group, bucket), shard in zip(every, shards, strict=True):
            key = group.key
            decay = self.optim.weight_decay if key.decays else 0.0
            rate = lr if key.lr_scale == 1.0 else lr * key.lr_scale
            with bucket.state(accepted) as (master, exp_avg, exp_avg_sq):
                self.update(
                    split_like(master, shard),
                    shard,
                    split_like(exp_avg, shard),
                    split_like(exp_avg_sq, shard),
                    adamw.Step(rate, step, factor, accepted, decay, self.optim, key.bits == 8),
                )
            del master, exp_avg, exp_avg_sq  # streamed copies, before the next bucket's are made
        self.gather_parameters()
        self.zero_grad()
        return norm

    @property
    def tied(self) -> bool:
        """Whether gradients are summed over the first and the last stage of a pipeline."""
        return any(group.key.tied for group in self.groups)

    def _sum_tied(self) -> None:
        """Give both ends of a pipeline the whole gradient of what is tied over them."""
        for group in self.groups:
            for gradient in group.gradients.stored if group.key.tied else ():
                gradient.copy_(self.axes.ends.all_reduce(gradient))

    def _reduce(self, group: Group, bucket: Bucket) -> list[Tensor]:
        """This rank's shard of the bucket's gradient, summed over the ranks with a part of it."""
        kv, shard, tp = self.axes.kv, self.shard, self.axes.tp
        parts = group.gradients.of(bucket)
        if not group.accumulates:  # nothing is to be sent
            return parts
        (gradient,) = parts
        if bucket.shared:
            places = [gradient[start:stop] for start, stop in bucket.shared]
            total = kv.all_reduce(torch.cat(places))
            gradient = replaced(gradient, bucket.shared, split_like(total, places))
        if (mask := bucket.shared_mask) is not None:
            gradient = gradient * (1.0 - mask) + kv.all_reduce(gradient * mask)
        local, total = gradient[: bucket.master.numel()], gradient
        if shard.size > 1 and group.key.zero < 2:
            total = shard.reduce_scatter(gradient, 0)
        total = self.replica.all_reduce(total)
        if total is not gradient:
            local = kept(local, total)
        if group.key.partial:
            local = kept(local, tp.all_reduce(local))
        return [local]

    def _squares(self, group: Group, bucket: Bucket, shard: list[Tensor]) -> Tensor:
        """This shard's part of the squared norm; the world's sum counts each element once."""
        held_by = self.replica.size
        if bucket.root is not None:
            weighted = torch._foreach_mul(shard, split_like(bucket.root, shard))
            return sum_of_squares(weighted) / held_by
        assert group.key.weight is not None
        return sum_of_squares(shard) * (group.key.weight / held_by)

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Set every rank's weights from the masters, at the end of a step or of loading state."""
        for group in self.groups:
            for bucket in group.buckets:
                values = bucket.master
                if group.key.offload and bucket.weights is not None:
                    values = bucket.weights  # as a step or loading left it
                if self.shard.size > 1 and group.key.zero < 3:
                    values = self.shard.all_gather(values.to(group.key.dtype), 0)
                    group.weights.put(bucket, values)
                elif group.separate and not group.key.offload:
                    group.weights.put(bucket, values)

    def to(self, device: torch.device | str) -> None:
        """Move weights and state, once all is loaded, to a device that traces programs.

        The Parameters stay the same objects; their gradients are cleared.  From then on ``owned``
        gives copies on the host: for saving, not for loading.
        """
        for layer in self._layers.values():
            layer.gradient_sum = None
        for group in self.groups:
            group.to(device)

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        self._reductions.finish()  # of a backward that failed
        for group in self.groups:
            group.gradients.clear()

    def owned(self) -> Iterator[Owned]:
        """All shards that this rank owns, possibly several of one parameter.

        Over the ranks of ``shard`` they tile each parameter exactly; those of ``replica`` own the
        same.
        """
        for group in self.groups:
            yield from group.owned()

    def _gradients_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """The gradients that this rank has accumulated, of those parameters that have one."""
        found: dict[str, Tensor] = {}
        for group in self.groups:
            found |= group.gradients_of(names)
        return found

    def state_bytes(self) -> int:
        """Bytes of weights and state on the device of this rank, by the formula above."""
        total, ranks = 0, self.shard.size
        for group in self.groups:
            weight, gradient = group.key.dtype.itemsize, GRADIENT_BYTES * group.accumulates
            gathered, reduced = group.key.zero == 3, group.key.zero > 1
            whole = weight * (not gathered) + gradient * (not reduced)
            shard = weight * gathered + gradient * reduced
            shard += NORM_WEIGHT_BYTES if group.key.weight is None else 0
            kept = moments_bytes(group.key.bits) + (MASTER_BYTES if group.separate else 0)
            shard_length = group.length // ranks
            total += whole * group.length + shard * shard_length
            total += 0 if group.key.offload else round(kept * shard_length)
        return total
