"""Weights that no rank holds whole: their values are drawn or read a shard at a time.

::

    built on the meta device ── make_weights ──> Placeholder ── set_values ──> how to draw or read
    Zero is made             ── a shard on each data rank (llamax.parallel.fsdp) <── its values

The placeholder stays where the weight was, and refuses to be computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from llamax.runtime.errors import ConfigError

# Fills a contiguous flat tensor with the elements of a weight from this place on.
Values = Callable[[Tensor, int], None]


class Placeholder(Parameter):
    """A weight that is sharded over the data ranks: name, shape and dtype, on the meta device.

    Before it is cut it has a ``home``, where its shards will be, and perhaps ``initial`` values.
    Raises ConfigError where values of it are asked for, or changed; torch would compute with
    whatever memory holds, and change nothing.
    """

    weight_name = "a weight"
    home: torch.device | None = None
    initial: Values | None = None

    @staticmethod
    def replace(weight: Parameter, name: str, home: torch.device | None = None) -> None:
        """Make ``weight`` a placeholder: every reference to it follows."""
        shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        placeholder = Placeholder(shape, weight.requires_grad)
        placeholder.weight_name, placeholder.home = name, home
        torch.utils.swap_tensors(weight, placeholder)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            f"{self.weight_name} cannot be pickled, because each data rank keeps a shard of it "
            "with parallel.zero=3; load a checkpoint for whole weights, or use parallel.zero=2"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = next(leaf.weight_name for leaf in tensors if isinstance(leaf, Placeholder))
        called = func.__name__
        if changes(called):
            raise ConfigError(
                f"{called} would change {name}, of which each data rank keeps a shard with "
                "parallel.zero=3; change the shards that the optimizer's owned() gives, or use "
                "parallel.zero=2"
            )
        try:
            if not all(isinstance(leaf, Placeholder) or leaf.is_meta for leaf in tensors):
                raise NotImplementedError("not on the meta device")
            result = Tensor.__torch_function__.__func__(  # type: ignore[attr-defined]
                cls, func, types, args, kwargs or {}
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"{called} reads {name}, of which each data rank keeps a shard with "
                "parallel.zero=3; use layer.dense(), which gathers it, in place of layer.weight, "
                "or parallel.zero=2"
            ) from error
        if isinstance(result, Placeholder):
            result.weight_name = name
        return result


def changes(method: str) -> bool:
    """Whether a method of a tensor, by its name, changes its values in place."""
    in_place = method.endswith("_") and not method.endswith("__")
    return (in_place and method != "requires_grad_") or method == "__setitem__"


def set_values(weight: Tensor, values: Values) -> None:
    """Give a weight its values: at once, or where it is a placeholder, when its shard is made.

    Raises ConfigError where it is sharded already.
    """
    if not isinstance(weight, Placeholder):
        values(weight.detach().view(-1), 0)
    elif weight.home is None:
        raise ConfigError(
            f"{weight.weight_name} is sharded over the data ranks; give it values before the "
            "optimizer is made, or through the optimizer's owned()"
        )
    else:
        weight.initial = values


def make_weights(model: nn.Module, later: Collection[str], like: Tensor) -> None:
    """Make the weights of a model that was built on the meta device, uninitialised, like ``like``.

    Those named in ``later`` become placeholders.
    """
    for name, weight in [*model.named_parameters()]:
        if not weight.is_meta or isinstance(weight, Placeholder):
            continue
        if name in later:
            Placeholder.replace(weight, name, like.device)
        else:
            made = Parameter(like.new_empty(weight.shape), weight.requires_grad)
            torch.utils.swap_tensors(weight, made)
