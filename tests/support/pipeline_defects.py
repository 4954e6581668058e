"""Defects planted in the stages of a pipeline, each of which a comparison must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llamax.model import lora
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel import pipeline as schedules
from llamax.parallel.collectives import Axes
from llamax.parallel.pipeline import Micro
from llamax.training import pipeline
from llamax.training import step as training_step
from llamax.training.step import TrainState
from support.planted import defect, replaced


def newest_first(original: Any) -> Any:
    """The newest microbatch goes backward first."""

    def backward(self: Any, micro: Micro, down: Any) -> None:
        flying, newest = self._flying, max(self._flying)
        flying[micro], flying[newest] = flying[newest], flying[micro]
        original(self, micro, down)

    return backward


def labels_of_another(original: Any) -> Any:
    def loss_of(self: TrainState, batch: Any, *more: Any) -> Any:
        last = getattr(self, "last_labels", batch.labels)
        object.__setattr__(self, "last_labels", batch.labels)
        usable = last.shape == batch.labels.shape
        return original(self, batch._replace(labels=last) if usable else batch, *more)

    return loss_of


def mean_of_each_micro(original: Any) -> Any:
    def loss_of(self: TrainState, *arguments: Any) -> tuple[Tensor, Tensor]:
        total, count = original(self, *arguments)
        return total / count.clamp(min=1) * (self.step_tokens / 8), count

    return loss_of


def sent_comes_back(original: Any) -> Any:
    def start_swap(axis: Any, x: Tensor) -> Callable[[], Tensor]:
        original(axis, x)()
        return x.clone

    return start_swap


def times(factor: float) -> Any:
    """The gradient that goes down is ``factor`` of what it should be."""

    def make(original: Any) -> Any:
        def backward(self: Any, micro: Micro, down: Any) -> None:
            original(self, micro, down)
            if below := schedules.back(micro, self.number):
                down.leaving[below] = factor * down.leaving[below]

        return backward

    return make


def one_left_out(original: Any) -> Any:
    """The first stage leaves out the backward of microbatch 3."""

    def backward(self: Any, micro: Micro, down: Any) -> None:
        if micro.number == 3 and self.first:
            del self._flying[micro], down.arrived[micro]
        else:
            original(self, micro, down)

    return backward


def put_off_left_out(original: Any) -> Any:
    """Gradients of weights that microbatch 3 has put off are never added."""

    def weights(self: Any, micro: Micro) -> None:
        if micro.number == 3:
            self._later.pop(micro)
        original(self, micro)

    return weights


def of_the_first(field: str) -> Callable[[Any], Any]:
    """A field of the first microbatch is that of all, in the stages after the first."""

    def make(original: Any) -> Any:
        def inputs(self: TrainState, batch: Any, keys: Any, x: Any, layers: range) -> Any:
            own = getattr(batch, field)
            first = getattr(self, f"first_{field}", own)
            object.__setattr__(self, f"first_{field}", first)
            if x is not None and first.shape == own.shape:
                batch = batch._replace(**{field: first})
            return original(self, batch, keys, x, layers)

        return inputs

    return make


def norm_of_a_stage(original: Any) -> Any:
    """The norm is of this stage alone: its sum leaves out other stages."""

    def __init__(self: Zero, parameters: Any, optim: Any, axes: Axes, **more: Any) -> None:
        original(self, parameters, optim, replace(axes, world=axes.tp), **more)

    return __init__


def norms_not_summed(original: Any) -> Any:
    def __init__(self: Zero, *arguments: Any, sequence_parallel: bool, **more: Any) -> None:
        original(self, *arguments, sequence_parallel=False, **more)

    return __init__


def of_one_end(original: Any) -> Any:
    """The first stage keeps its own part of the tied gradient."""

    def _sum_tied(self: Zero) -> None:
        kept = [
            g.clone() for group in self.groups if group.key.tied for g in group.gradients.stored
        ]
        original(self)
        ours = [g for group in self.groups if group.key.tied for g in group.gradients.stored]
        for gradient, before in zip(ours, kept, strict=True):
            gradient.copy_(before if self.axes.pp.rank == 0 else gradient)

    return _sum_tied


def counted_twice(original: Any) -> Any:
    """The norm counts what is tied on both stages."""

    def _squares(self: Zero, group: Any, *more: Any) -> Tensor:
        return original(self, group, *more) * (1 + group.key.tied)

    return _squares


def counted_on_every_stage(original: Any) -> Any:
    def of_first(axis: Any, x: Tensor) -> Tensor:
        return original(axis, x) + (x.sum() == 0) * torch.tensor([0.0, 1.0])

    return of_first


def other_layers(original: Any) -> Any:
    """The stages hold layers in the order of the ranks from the end."""

    def holds(stage: int, *more: Any) -> tuple[range, ...]:
        (own,) = original(stage, *more)
        return (range(max(own.start - 1, 0), own.stop) if stage else own,)

    return holds


STEP: dict[str, Callable[[], Any]] = {
    "newest microbatch goes backward first": defect(pipeline.Stage, "_backward", newest_first),
    "labels of another microbatch": defect(TrainState, "_loss", labels_of_another),
    "mean of each microbatch": defect(TrainState, "_loss", mean_of_each_micro),
    "what was sent comes back": defect(pipeline, "start_swap", sent_comes_back),
    "no gradients are sent": defect(pipeline.Stage, "_backward", times(0.0)),
    "gradients doubled": defect(pipeline.Stage, "_backward", times(2.0)),
    "a backward left out": defect(pipeline.Stage, "_backward", one_left_out),
    "gradients of weights left out": defect(pipeline.Stage, "_weights", put_off_left_out),
    "positions of the first microbatch": defect(TrainState, "_inputs", of_the_first("positions")),
    "documents of the first microbatch": defect(TrainState, "_inputs", of_the_first("documents")),
    "norm of one stage": defect(Zero, "__init__", norm_of_a_stage),
    "norms not summed over tensor ranks": defect(Zero, "__init__", norms_not_summed),
    "tokens counted on every stage": defect(training_step, "_of_first", counted_on_every_stage),
    "a layer on two stages": defect(schedules, "layers_of", other_layers),
}


TWICE: dict[str, Callable[[], Any]] = {
    "tied gradient of one end": defect(Zero, "_sum_tied", of_one_end),
    "tied gradient counted twice in the norm": defect(Zero, "_squares", counted_twice),
}


def dropout_forgets(original: Any) -> Any:
    """Backward computes layers again with the tokens of the newest microbatch."""

    def backward(self: Any, micro: Micro, down: Any) -> None:
        dropout, self.dropout = self.dropout, None
        try:
            original(self, micro, down)
        finally:
            self.dropout = dropout

    return backward


def numbers_from_zero(original: Any) -> Any:
    """Adapters are numbered from the first layer of their stage."""

    def replace_layer(model: Llama, name: str, *more: Any) -> None:
        original(model, name, *more)
        layer = model.get_submodule(name)
        layer.adapters = tuple(
            each._replace(number=each.number - 7 * model.stage[0].start) for each in layer.adapters
        )

    return replace_layer


DROPPED: dict[str, Callable[[], Any]] = {
    "dropout of the newest microbatch": defect(pipeline.Stage, "_backward", dropout_forgets),
    "adapters numbered by stage": defect(lora, "_replace", numbers_from_zero),
}
MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(pipeline, "start_swap", pipeline.start_swap),
    **STEP,
    **DROPPED,
    **TWICE,
}
