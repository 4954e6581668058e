"""Checks of a program's own modules where ranks share sequences or layers.

With context parallelism a rank has two chunks of each sequence, and with sequence parallelism its
layers have a run of it in between.  Tokens of other ranks are reached through the ``attend`` that a
step hands to ``loss``, and in no other way: a module that mixes neighbouring tokens, or a loss with
another attention, would compute something else on every mesh.  With a pipeline a stage computes its
layers in ``hidden``, and the last one also the loss: a loss that changes how its layers compute
would do so on the last stage alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm, pooling

from llamax.model.llama import Attend, Attention, Llama
from llamax.parallel.collectives import Axes
from llamax.runtime.errors import ConfigError

SIGNATURE = (
    "loss(self, ids_BS, labels_BS, positions_BS=None, *, documents_BS=None, attend=None, "
    "keys_B=None, places_S=None)"
)
IN_STAGES = "loss(self, ids_BS, labels_BS, positions_BS=None, **options)"
# Modules of torch that compute over more than one place of [batch, sequence, features].
MIXING = (
    conv._ConvNd,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    batchnorm._BatchNorm,
    instancenorm._InstanceNorm,
    nn.GroupNorm,
    pooling._AvgPoolNd,
    pooling._MaxPoolNd,
)


def check_model(model: Llama, axes: Axes) -> None:
    """Raise ConfigError if a step cannot train ``model`` on the mesh of ``axes``."""
    _check_loss(model, axes)
    _check_modules(model, axes)
    check_stage(model, axes)


def _check_loss(model: Llama, axes: Axes) -> None:
    """Raise ConfigError if the model's ``loss`` cannot be called as a step calls it."""
    if type(model).loss is Llama.loss:
        return
    options = ("attend", "keys_B", "places_S") if axes.cp.size > 1 else ("documents_BS", "keys_B")
    if axes.pp.size > 1:
        options = (*options, "x_BsD", *(["layers"] if len(model.stage) > 1 else []))
    try:
        inspect.signature(model.loss).bind(None, None, None, **dict.fromkeys(options))
    except TypeError as error:
        mesh = f" with parallel.context={axes.cp.size}" if axes.cp.size > 1 else ""
        mesh = f" with parallel.pipeline={axes.pp.size}" if axes.pp.size > 1 else mesh
        signature = IN_STAGES if axes.pp.size > 1 else SIGNATURE
        raise ConfigError(
            f"a step cannot call the loss of {type(model).__qualname__}{mesh}: {error}; define "
            f"{signature}"
        ) from None


def check_sums(model: Llama, result: Any) -> tuple[Tensor, Tensor]:
    """What a ``loss`` of a program's own has returned; ConfigError if a step cannot add it up."""
    if type(model).loss is not Llama.loss:
        wrong = _not_sums(result)
        if wrong:
            raise ConfigError(
                f"the loss of {type(model).__qualname__} returns {wrong}; return the sum of the "
                "losses of this rank's tokens and their number, two 0-d tensors"
            )
        if torch.is_grad_enabled() and not result[0].requires_grad:
            raise ConfigError(
                f"the loss of {type(model).__qualname__} has no gradient; compute it from what "
                "the model returns, without detach, item or no_grad"
            )
    total, count = result
    return total, count


def _not_sums(result: Any) -> str:
    """What a loss returns instead of two 0-d tensors; empty if it returns these."""
    if not isinstance(result, tuple | list):
        return type(result).__name__
    if len(result) != 2:
        return f"{len(result)} values"
    if not isinstance(result[1], Tensor):
        return f"a number of tokens that is {type(result[1]).__name__}"
    for value in result:
        if not isinstance(value, Tensor):
            return f"a sum that is {type(value).__name__}"
        if value.dim():
            return f"a tensor of {list(value.shape)}"
    return ""


def check_stage(model: Llama, axes: Axes) -> None:
    """Raise ConfigError for layers or a parameter that a stage of a pipeline has no use for."""
    if axes.pp.size > 1 and sum(map(len, model.stage)) == model.config.num_hidden_layers:
        raise ConfigError(
            f"{type(model).__qualname__} has all layers on stage {axes.pp.rank} of {axes.pp.size}; "
            "make it with stage=layers_of(*axes.pp, run.chunk_layers) of llamax.parallel.pipeline"
        )
    parameters = model.sharded_parameters()
    for name in parameters:
        if not all(parameters.holds(part.name) for part in parameters.parts(name)):
            raise ConfigError(
                f"{type(model).__qualname__} makes {name} on stage {axes.pp.rank} of {axes.pp.size}"
                ", where only the last stage has parameters outside of layers and embedding; make "
                "it where self.model.norm is not None, or use parallel.pipeline=1"
            )


@contextmanager
def loss_checked(
    model: Llama, axes: Axes, layers: range, given: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The options for a call of the model's ``loss`` in the block, which note what it calls.

    Raises ConfigError where it computes its layers in another way than the mesh needs.
    """
    options, called = dict(given), set[int]()
    if axes.cp.size > 1:
        options["attend"] = noted(given["attend"], called)
    with hidden_checked(model, options):
        yield options
    if axes.cp.size > 1:
        check_attended(model, called, layers)


@contextmanager
def hidden_checked(model: Llama, given: Mapping[str, Any]) -> Iterator[None]:
    """Raise ConfigError if the loss in this block does not call ``hidden`` with what is given.

    ``given``: the options of the last stage of a pipeline.
    """
    if "x_BsD" not in given or type(model).loss is Llama.loss:
        yield
        return
    own, signature, called = model.hidden, inspect.signature(Llama.hidden), False

    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f"the loss of {type(model).__qualname__} {what}, so the layers of the last stage would "
            "not compute as those of other stages; take **options, call self.hidden(ids_BS, "
            "positions_BS, **options), and change attention in `hidden`"
        )

    def hidden(*arguments: Any, **options: Any) -> Tensor:
        nonlocal called
        called = True
        known = {name: x for name, x in options.items() if name in signature.parameters}
        passed = signature.bind(model, *arguments, **known).arguments
        expected = {"attend": None, **given}
        if changed := [name for name, x in expected.items() if passed.get(name) is not x]:
            raise refuse(f"calls self.hidden with another {changed[0]} than it was given")
        return own(*arguments, **options)

    vars(model)["hidden"] = hidden
    try:
        yield
    finally:
        del vars(model)["hidden"]
    if not called:
        raise refuse("does not call self.hidden")


def _check_modules(model: Llama, axes: Axes) -> None:
    """Raise ConfigError for a module of torch that mixes tokens which lie on several ranks."""
    cuts = {
        f"parallel.context={axes.cp.size}": axes.cp.size > 1,
        "parallel.sequence=true": model.sequence_parallel,
    }
    if not (cut := [name for name, cuts_it in cuts.items() if cuts_it]):
        return
    for name, module in model.named_modules():
        if not isinstance(module, MIXING):
            continue
        if isinstance(module, conv._ConvNd) and set(module.kernel_size) == {1}:
            continue
        raise ConfigError(
            f"{name} ({type(module).__name__}) computes over several tokens, and with "
            f"{' and '.join(cut)} a rank has a part of each sequence; use parallel.context=1 and "
            "parallel.sequence=false with it"
        )


def noted(attend: Attend, called: set[int]) -> Attend:
    """``attend`` that also adds the layer to ``called``."""

    def attend_and_note(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        called.add(layer)
        return attend(q, k, v, layer)

    return attend_and_note


def check_attended(model: Llama, called: Collection[int], layers: range) -> None:
    """Raise ConfigError if attention of ``layers`` did not call the ``attend`` of context ranks."""
    expected = {m.layer for m in model.modules() if isinstance(m, Attention)} & {*layers}
    if left := sorted(expected - {*called}):
        some = ", ".join(map(str, left[:5])) + ", ..." * (len(left) > 5)
        raise ConfigError(
            f"attention of {type(model).__qualname__} in layers {some} does not call the `attend` "
            "that its loss was given, so it sees this rank's part of each sequence alone; call it, "
            "or use parallel.context=1"
        )
