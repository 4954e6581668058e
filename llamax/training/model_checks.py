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
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm, pooling

from llamax.config.choices import EAGER_BACKENDS
from llamax.model.llama import Attend, Attention, Llama
from llamax.parallel.collectives import Axes
from llamax.runtime.errors import ConfigError

SIGNATURE = (
    "loss(self, ids_BS, labels_BS, positions_BS=None, *, documents_BS=None, attend=None, "
    "keys_B=None, places_S=None)"
)
IN_STAGES = "loss(self, ids_BS, labels_BS, positions_BS=None, **options)"
SAME_LOSS = 1e-5  # relative distance between the losses of tensor ranks, which rounding alone makes
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


class SumCheck:
    """Checks in the first step that a program's own loss is the same on all tensor ranks.

    On devices that trace programs nothing is checked.
    """

    def __init__(self, model: Llama, axes: Axes) -> None:
        self.name, self.axes = type(model).__qualname__, axes
        eager = axes.tp.rank_index.device.type in EAGER_BACKENDS
        self.pending = eager and axes.tp.size > 1 and type(model).loss is not Llama.loss

    def check(self, sums: Tensor, first: Tensor) -> None:
        """Raise ConfigError on every rank where ``sums`` differ from those of the first rank.

        ``first``: these on the first rank, zeros elsewhere.
        """
        if not self.pending:
            return
        self.pending = False
        first = self.axes.tp.all_reduce(first)
        apart = (sums - first).abs() / first.abs().clamp(min=1e-30)
        if float(self.axes.world.all_reduce(apart.max(), "max")) > SAME_LOSS:
            raise ConfigError(
                f"the loss of {self.name} differs between tensor ranks, as a sum over this rank's "
                "part of the sequence does; return such a part from auxiliary_loss(self, layers), "
                "which a step sums over them, or use parallel.sequence=false"
            )


def metric_sums(model: Llama) -> list[Tensor]:
    """The sums of a program's own numbers that ``loss`` has left; ConfigError for other ones."""
    found = getattr(model, "metric_sums", {})
    for name in model.metric_names:
        value = found.get(name)
        if not isinstance(value, Tensor) or value.dim():
            raise ConfigError(
                f"the loss of {type(model).__qualname__} leaves no 0-d tensor for {name!r} of "
                f'metric_names; set self.metric_sums = {{"{name}": SUM_OVER_TOKENS}} in it'
            )
    return [found[name].detach().float() for name in model.metric_names]


def check_auxiliary(model: Llama, found: Any) -> Tensor | None:
    """What an ``auxiliary_loss`` has returned, in float32.

    Raises ConfigError if it is no 0-d tensor with a gradient.
    """
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.dim():
        what = f"a tensor of {list(found.shape)}" if isinstance(found, Tensor) else repr(found)[:40]
        raise ConfigError(
            f"auxiliary_loss of {type(model).__qualname__} returns {what}; return a sum over this "
            "rank's tokens as a 0-d tensor, or None"
        )
    if not found.requires_grad:
        raise ConfigError(
            f"auxiliary_loss of {type(model).__qualname__} has no gradient; compute it from what "
            "layers have made, without detach and, with run.backend=xla, without "
            "run.recompute=full, or return None"
        )
    return found.float()


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


def loss_of(
    model: Llama, axes: Axes, layers: range, inputs: Sequence[Tensor], given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """``model.loss`` of ids, labels and positions, with the options ``given``: its two sums.

    Raises ConfigError where it computes its layers in another way than the mesh needs.
    """
    options, called = dict(given), set[int]()
    if axes.cp.size > 1:
        options["attend"] = noted(given["attend"], called)
    if "x_BsD" in given and type(model).loss is not Llama.loss:
        total, count = _loss_of_stage(model, inputs, options)
    else:
        total, count = check_sums(model, model.loss(*inputs, **options))
    if axes.cp.size > 1:
        check_attended(model, called, layers)
    return total, count


def _loss_of_stage(
    model: Llama, inputs: Sequence[Tensor], given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The loss on the last stage of a pipeline, by a ``loss`` of a program's own.

    Raises ConfigError if it does not call ``hidden`` with what is given, or takes more from the
    layers than that returns.
    """
    own, signature, results = model.hidden, inspect.signature(Llama.hidden), list[Tensor]()

    def refuse(what: str, remedy: str) -> ConfigError:
        return ConfigError(f"the loss of {type(model).__qualname__} {what}; {remedy}")

    others = ", so the layers of the last stage would not compute as those of other stages"
    call = (
        "take **options, call self.hidden(ids_BS, positions_BS, **options), and change attention "
        "in `hidden`"
    )

    def hidden(*arguments: Any, **options: Any) -> Tensor:
        known = {name: x for name, x in options.items() if name in signature.parameters}
        passed = signature.bind(model, *arguments, **known).arguments
        expected = {"attend": None, **given}
        if changed := [name for name, x in expected.items() if passed.get(name) is not x]:
            raise refuse(
                f"calls self.hidden with another {changed[0]} than it was given{others}", call
            )
        results.append(own(*arguments, **options))
        return results[-1]

    vars(model)["hidden"] = hidden
    try:
        total, count = check_sums(model, model.loss(*inputs, **given))
    finally:
        del vars(model)["hidden"]
    if not results:
        raise refuse(f"does not call self.hidden{others}", call)
    if _depends_on(total, given["x_BsD"], beside=results):
        raise refuse(
            "takes more from its layers than self.hidden returns, which it cannot from the layers "
            "of other stages",
            "return what they add to the loss from auxiliary_loss(self, layers), or use "
            "parallel.pipeline=1",
        )
    return total, count


def _depends_on(y: Tensor, x: Tensor, beside: Sequence[Tensor]) -> bool:
    """Whether backward would reach the leaf x from y on a way that is not through ``beside``."""
    seen = {tensor.grad_fn for tensor in beside}
    ways = [y.grad_fn]
    while ways:
        node = ways.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is x:
            return True
        seen.add(node)
        ways += [following for following, _ in node.next_functions]
    return False


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
