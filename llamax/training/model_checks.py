"""Checks of a program's own modules where ranks share sequences, which no gradient would show.

With context parallelism a rank has two chunks of each sequence, and with sequence parallelism its
layers have a run of it in between.  Tokens of other ranks are reached through the ``attend`` that a
step hands to ``loss``, and in no other way: a module that mixes neighbouring tokens, or a loss with
another attention, would compute something else on every mesh.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm, pooling

from llamax.model.llama import Attend, Attention, Llama
from llamax.parallel.collectives import Axes
from llamax.runtime.errors import ConfigError

SIGNATURE = (
    "loss(self, ids_BS, labels_BS, positions_BS=None, *, documents_BS=None, attend=None, "
    "keys_B=None, places_S=None)"
)
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


def _check_loss(model: Llama, axes: Axes) -> None:
    """Raise ConfigError if the model's ``loss`` cannot be called as a step calls it."""
    if type(model).loss is Llama.loss:
        return
    options = ("attend", "keys_B", "places_S") if axes.cp.size > 1 else ("documents_BS", "keys_B")
    try:
        inspect.signature(model.loss).bind(None, None, None, **dict.fromkeys(options))
    except TypeError as error:
        context = f" with parallel.context={axes.cp.size}" if axes.cp.size > 1 else ""
        raise ConfigError(
            f"a step cannot call the loss of {type(model).__qualname__}{context}: {error}; define "
            f"{SIGNATURE}"
        ) from None


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
