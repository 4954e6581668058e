"""One optimizer step, and the loss over held-out batches: training without the run around it.

::

    state = TrainState.build(run, model, axes, backend)
    state.step(batches, number)     microsteps: forward, backward       one program each
                                    update: reduce, clip, AdamW, gather one program
    state.validate(batches)         forward alone

With a pipeline a rank does its stage's part of each microstep (``llamax.training.pipeline``).

Only ``Step.result`` waits for the device, and no Python number that differs between ranks or steps
enters.  On a device that traces programs, ``backend.step_boundary`` ends one: a step is as many
runs of the same program as it has microsteps, and one of the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llamax.backends.base import EAGER_DEVICE, Device
from llamax.backends.transfer import sent
from llamax.checkpoint.plain_llama import own_names
from llamax.config.rules.pipeline import splits
from llamax.config.types import ContextBy
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.model.placement import move_model
from llamax.optim.loss_scale import LossScale, LossScaleState
from llamax.optim.replicas import check_equal
from llamax.optim.schedule import lr_at
from llamax.optim.spikes import SpikeFilter
from llamax.optim.zero import Zero
from llamax.parallel import context_parallel, regions
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.fsdp import gathered_again, prefetched
from llamax.parallel.pipeline import Micro, Schedule, forwards, schedule
from llamax.parallel.prefetch import Prefetch
from llamax.parallel.sharding import Replica
from llamax.training import model_checks
from llamax.training.parts import LLAMAX, Parts
from llamax.training.pipeline import Compute, Stage, apart, with_loss
from llamax.training.resolve import ResolvedRun
from llamax.training.step_result import SAVE_REQUEST, Step


@dataclass(frozen=True)
class TrainState:
    """A model and its optimizer on one rank, with the axes and the device they work on.

    ``step_tokens`` is the number of tokens of a global batch; ``learning_rate`` gives the rate of a
    step, counted from 1; ``loss_scale`` keeps the gradients of a float16 model in range; ``spikes``
    decides which updates are skipped as outliers.
    """

    model: Llama
    optimizer: Zero
    axes: Axes
    backend: Device = EAGER_DEVICE
    _: KW_ONLY
    step_tokens: int
    learning_rate: Callable[[int], float]
    context_by: ContextBy = "gather"
    loss_scale: LossScale | None = None
    spikes: SpikeFilter | None = None

    @classmethod
    def build(
        cls,
        run: ResolvedRun,
        model: Llama,
        axes: Axes,
        backend: Device = EAGER_DEVICE,
        parts: Parts = LLAMAX,
    ) -> TrainState:
        """The state of a new run: an optimizer, as configured, for all of ``model`` that trains.

        ``parts``: what a program puts in the place of the update and the learning rate.
        Raises ConfigError for a replica with other values on another rank, and for a model class
        that cannot be trained on such a mesh.
        """
        model_checks.check_model(model, axes)
        parallel, optim = run.config.parallel, run.config.optim
        axes = apart(axes, backend.step_boundary)
        parameters = model.sharded_parameters()
        own = own_names(parameters.hub_shapes(), model.config)
        replicas = {n: p for n, p in parameters.trained().items() if isinstance(p.cut, Replica)}
        own_replicas = {name: replicas[name] for name in own if name in replicas}
        check_equal({name: p.tensor for name, p in own_replicas.items()}, axes)
        optimizer = Zero(
            parameters,
            optim,
            axes,
            sequence_parallel=model.sequence_parallel,
            zero=parallel.zero,
            bucket_bytes=parallel.bucket_bytes,
            undeclared=[n for n, p in own_replicas.items() if p.cut == Replica()],
            update=parts.update,
            lr_scale=parts.scale if parts.lr_scale else None,
        )
        scale, device = None, axes.data.rank_index.device
        if run.config.run.dtype == "float16":
            first = LossScaleState(optim.loss_scale)
            scale = LossScale(first, device, optim.loss_scale_interval)

        def scheduled(step: int) -> float:
            return lr_at(step, optim, run.steps)

        return cls(
            model,
            optimizer,
            axes,
            backend,
            step_tokens=run.step_tokens,
            learning_rate=parts.rate if parts.learning_rate else scheduled,
            context_by=parallel.context_by,
            loss_scale=scale,
            spikes=SpikeFilter.of(optim, device),
        )

    def to(self, device: torch.device) -> None:
        """Move everything, once all is loaded, to a device that traces programs."""
        self.optimizer.to(device)
        move_model(self.model, device)  # frozen weights
        if self.spikes is not None:
            self.spikes.to(device)

    def step(
        self, batches: Iterable[Batch], number: int, stop: bool = False, save: bool = False
    ) -> Step:
        """Accumulate this data rank's microbatches, then update once; ``number`` counts from 1.

        With context parallelism they are this rank's share of them (``llamax.data.loader``).

        ``stop`` is this rank's request to stop, ``save`` that of rank 0 for a checkpoint; all
        ranks see both in the result.

        The loss is the mean over all counted tokens of the global batch, the same on every rank:
        microsteps sum ``loss / step_tokens``, and the optimizer scales gradients by step over
        counted tokens, which is 1 where no label is ignored.
        """
        sums = self._accumulate([*batches], number)
        return self._update(number, sums, 1.0 if stop else SAVE_REQUEST if save else 0.0)

    def _accumulate(self, micros: Sequence[Batch], number: int) -> Tensor:
        """Add up the gradients of the microbatches of step ``number``.

        Returns this rank's sums of the loss, of counted tokens and of the model's own metrics.
        """
        device, scaling = self.axes.data.rank_index.device, self.loss_scale
        own_metrics = len(self.model.metric_names)
        sums = sent(torch.zeros(2 + own_metrics), device)  # so the first microstep is as the others

        def mean_of(total: Tensor) -> Tensor:
            mean = total / self.step_tokens
            return mean if scaling is None else mean * scaling.scale.squeeze(0)

        def compute(micro: Micro, x_BsD: Tensor | None) -> Tensor:
            nonlocal sums
            batch, layers = micros[micro.number], self.model.stage[micro.chunk]
            keys_B = self._keys(batch, number, micro.number)
            with gathered_again() if self.optimizer.gathers else nullcontext():
                if self._ends(layers):
                    total, count = self._loss(batch, keys_B, x_BsD, layers)
                    extra = self._auxiliary_loss(layers)
                    total = total if extra is None else total + extra
                    own = model_checks.metric_sums(self.model)
                    sums = sums + torch.stack((total.detach(), count, *own))
                    return mean_of(total)
                y_BsD = self._hidden(batch, keys_B, x_BsD, layers)
                if (extra := self._auxiliary_loss(layers)) is None:
                    return y_BsD
                sums = sums + pad(extra.detach()[None], (0, 1 + own_metrics))
                return with_loss(y_BsD, mean_of(extra))

        self._prefetch.begin("step")
        chunks, mode = len(self.model.stage), self.model.model.mode
        split = splits(self.axes.pp.size, chunks, mode, device.type)
        self._run(partial(schedule, split=split), micros, compute)
        return sums

    def _update(self, number: int, sums: Tensor, request: float) -> Step:
        """Update by the accumulated gradients; ``sums`` are those of ``_accumulate``.

        ``request``: this rank's, as of ``Step``.
        """
        scaling, spikes, names = self.loss_scale, self.spikes, self.model.metric_names
        # Tensor ranks hold the same loss: the first one's counts. NaN on any rank makes a sum NaN.
        first = _of_first(self.axes.tp, sums)
        self._sum_check.check(sums, first)
        inputs = torch.tensor([self.learning_rate(number), float(number), request])
        lr, step, asked = sent(inputs, sums.device).split(1)
        numbers, updates = torch.cat((first, asked)), step
        accepts: list[Callable[[Tensor], Tensor]] = []
        if spikes is not None:
            numbers = torch.cat((numbers, _of_first(self.axes.world, spikes.bounds())))
        total, count, *more = self.axes.world.all_reduce(numbers)
        metrics, (requests, *bounds) = more[: len(names)], more[len(names) :]
        loss = total / count
        factor = self.step_tokens / count + (total - total)  # NaN, which cancels the update, or 0
        if scaling is not None:
            factor, updates = factor / scaling.scale.squeeze(0), step - scaling.overflowed_steps
        if spikes is not None:
            accepts, updates = [partial(spikes.accepts, bounds, loss)], step - spikes.skipped
        grad_norm = self.optimizer.step(lr.squeeze(0), updates.squeeze(0), factor, *accepts)
        done = Step(number, loss, grad_norm, count, requests, self.backend, bounds)
        done.metrics = {n: metric / count for n, metric in zip(names, metrics, strict=True)}
        if scaling is not None:
            scaling.update(grad_norm, count)
            done.loss_scale = scaling.tensors
        if spikes is not None:
            spikes.add(bounds, loss, grad_norm)
        self.backend.step_boundary()
        done.mark_begun()
        return done

    @torch.no_grad()
    def validate(self, batches: Iterable[Sequence[Batch]]) -> Tensor:
        """Mean loss in nats over the counted tokens of some global batches, 0-d on the device.

        ``batches`` are this data rank's microbatches of each.  The result is the same on every
        rank.
        """
        sums = mean = sent(torch.zeros(2), self.axes.data.rank_index.device)
        one_stage = self.axes.pp.size == 1

        def compute(micros: Sequence[Batch], micro: Micro, x_BsD: Tensor | None) -> Tensor:
            nonlocal sums, mean
            batch, layers = micros[micro.number], self.model.stage[micro.chunk]
            if not self._ends(layers):
                return self._hidden(batch, None, x_BsD, layers)
            sums = sums + torch.stack(self._loss(batch, None, x_BsD, layers))
            if one_stage:  # the mean of all so far: every batch runs the same program
                mean = self._mean(sums)
            return sums

        for microbatches in batches:
            self._prefetch.begin("validation")
            self._run(forwards, microbatches, partial(compute, microbatches))
        if not one_stage:
            mean = self._mean(sums)
            self.backend.step_boundary()
        return mean

    @cached_property
    def _stage(self) -> Stage:
        chunks = len(self.model.stage)
        return Stage(self.axes, self.backend.step_boundary, self.model.dropout, chunks)

    @cached_property
    def _sum_check(self) -> model_checks.SumCheck:
        return model_checks.SumCheck(self.model, self.axes)

    @cached_property
    def _prefetch(self) -> Prefetch:
        return prefetched(self.model)

    def _ends(self, layers: range) -> bool:
        """Whether the last of all layers is among ``layers``."""
        return layers.stop == self.model.config.num_hidden_layers

    def _run(
        self,
        works: Callable[[int, int, int, int], Schedule],
        micros: Sequence[Batch],
        compute: Compute,
    ) -> None:
        """This stage's part of the microbatches."""
        rows, length = micros[0].ids.shape
        if self.model.sequence_parallel:
            length //= self.axes.tp.size
        shape = rows, length, self.model.config.hidden_size
        like = torch.empty(shape, dtype=next(self.model.parameters()).dtype, device="meta")
        schedule = works(*self.axes.pp, len(micros), len(self.model.stage))
        self._stage.run(schedule, compute, like)

    def _mean(self, sums: Tensor) -> Tensor:
        """The mean loss over the world, from this rank's sums of losses and counted tokens."""
        total, count = self.axes.world.all_reduce(_of_first(self.axes.tp, sums))
        mean: Tensor = total / count
        return mean

    def _keys(self, batch: Batch, number: int, place: int) -> Tensor | None:
        """Numbers that tell the samples of a microbatch apart, the same on every mesh."""
        if self.model.dropout is None:
            return None
        rows, dp = batch.ids.shape[0], self.axes.dp
        return self.model.dropout.keys(number, (place * dp.size + dp.rank) * rows, rows)

    def _loss(
        self, batch: Batch, keys_B: Tensor | None, x_BsD: Tensor | None, layers: range
    ) -> tuple[Tensor, Tensor]:
        """Summed loss and counted tokens of a microbatch; ``x_BsD`` comes from the stage before."""
        labels = sent(batch.labels.int(), self.model.tp.rank_index.device)
        ids, positions, more = self._inputs(batch, keys_B, x_BsD, layers)
        inputs = ids, labels, positions
        return model_checks.loss_of(self.model, self.axes, layers, inputs, more)

    def _auxiliary_loss(self, layers: range) -> Tensor | None:
        """The model's auxiliary loss of ``layers``, the same on every tensor rank."""
        found = model_checks.check_auxiliary(self.model, self.model.auxiliary_loss(layers))
        if found is None or not self.model.sequence_parallel:
            return found
        return regions.leave(found, self.model.tp, False)

    def _hidden(
        self, batch: Batch, keys_B: Tensor | None, x_BsD: Tensor | None, layers: range
    ) -> Tensor:
        """What leaves ``layers`` of this stage of a microbatch."""
        ids, positions, more = self._inputs(batch, keys_B, x_BsD, layers)
        return self.model.hidden(ids, positions, **more)

    def _inputs(
        self, batch: Batch, keys_B: Tensor | None, x_BsD: Tensor | None, layers: range
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Ids, positions and other arguments of the model, on its device."""
        device, cp = self.model.tp.rank_index.device, self.axes.cp
        send: Callable[[Tensor], Tensor] = partial(sent, device=device)
        ids, positions = send(batch.ids.int()), send(batch.positions.int())
        documents = None if batch.documents is None else send(batch.documents)
        keys_B = None if keys_B is None else send(keys_B)
        more: dict[str, Any] = {"keys_B": keys_B}
        if x_BsD is not None:
            more["x_BsD"] = x_BsD
        if len(self.model.stage) > 1:
            more["layers"] = layers
        if cp.size == 1:
            return ids, positions, {**more, "documents_BS": documents}
        attend = context_parallel.across(cp, documents, self.context_by)
        places = context_parallel.places(cp, ids.shape[1])
        return ids, positions, {**more, "attend": attend, "places_S": places}


def _of_first(axis: Axis, x: Tensor) -> Tensor:
    """x on the axis's first rank, zeros elsewhere."""
    return x * (axis.rank_index == torch.zeros_like(axis.rank_index))
