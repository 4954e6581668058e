"""Loading: a source of Hub tensors fills the live tensors of any rank of any mesh.

A ``FileSource`` knows, per tensor, which run lies where (``pieces``); filling a wanted run is
intersecting it with those, so a rank reads the bytes it needs and no others, one tensor at a time.
``Checkpoint`` is the source that training wrote, ``hf_folder.HfFolder`` one from elsewhere.

Numbers keep their value: a dtype is widened where a tensor wants more, and rounding is refused
unless asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llamax.checkpoint.owned_runs import slices
from llamax.checkpoint.source import Source
from llamax.parallel.placeholder import set_values
from llamax.parallel.sharding import ShardedParameters, whole_shape
from llamax.runtime.errors import CheckpointError


class Owned(Protocol):
    """A flat run of a parameter (or of its state) that a rank owns; see ``llamax.optim.zero``."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def tensor(self) -> Tensor: ...


class Whole(NamedTuple):
    """All of a rank's share of a parameter, as an ``Owned``."""

    name: str
    tensor: Tensor
    kind: str = "weight"
    start: int = 0


def load_weights(source: Source, parameters: ShardedParameters, convert: bool = False) -> None:
    """Fill a model's parameters with this tensor rank's share of a source's weights.

    Placeholders take a run of it when they are cut.  A float32 parameter takes the float32 master
    where the source keeps one.  ``convert`` allows rounding.  Raises CheckpointError where names or
    shapes differ: the first that does.
    """
    check_shapes(source, parameters)
    for name, parameter in parameters.items():
        set_values(parameter.tensor, partial(_fill_run, source, name, parameters, convert))


def load_owned(
    source: Source,
    owned: Iterable[Owned],
    parameters: ShardedParameters,
    convert: bool = False,
) -> None:
    """Fill what a rank owns (weights, masters, moments), whatever mesh the source was saved on.

    Masters missing from a float32 run are its weights.  Raises CheckpointError for what is absent.
    """
    for run in owned:
        _fill(source, run, parameters, convert)


def check_shapes(source: Source, parameters: ShardedParameters) -> None:
    """Raise CheckpointError for the first tensor that source and model do not have in common.

    What other stages of a pipeline hold is not looked at.
    """
    expected, names = parameters.hub_shapes(), list(filter(parameters.holds, source.names()))
    unknown = [name for name in names if name not in expected]
    for name in unknown:
        if not _PLAIN.fullmatch(name):
            raise CheckpointError(f"{source.folder} has {name}, which the model lacks; {_OWN}")
    for name, shape in expected.items():
        _check_shape(source, name, shape)
    for name in unknown:
        raise CheckpointError(f"{source.folder} has {name}, which the model lacks; {_REMEDY}")


_REMEDY = "use the configuration of exactly these weights; if it is, copy the folder again"
_OWN = "it is not a tensor of Llama: from Python, give the class that was trained as model_class"
_PLAIN = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm|layers\.\d+\.(\w+_layernorm|(self_attn|mlp)\."
    r"(q|k|v|o|gate|up|down)_proj(\.lora_[AB])?))\.weight"
)


def _check_shape(source: Source, name: str, shape: tuple[int, ...]) -> None:
    if name not in source.names():
        remedy = _REMEDY if _PLAIN.fullmatch(name) else "start a new run.folder with this model"
        raise CheckpointError(f"{source.folder} has no {name}, which the model has; {remedy}")
    if source.shape(name) != shape:
        raise CheckpointError(
            f"{source.folder}: {name} is {list(source.shape(name))}, the model's is "
            f"{list(shape)}; {_REMEDY}"
        )


def _fill_run(
    source: Source,
    name: str,
    parameters: ShardedParameters,
    convert: bool,
    into: Tensor,
    start: int,
) -> None:
    """Fill ``into`` with the elements of this rank's flat share of a weight from ``start`` on."""
    _fill(source, Whole(name, into, start=start), parameters, convert)


def _fill(source: Source, wanted: Owned, parameters: ShardedParameters, convert: bool) -> None:
    """Fill one run of this rank's share of a parameter, or of its state."""
    shape, flat = parameters[wanted.name].tensor.shape, wanted.tensor.detach()
    for part in parameters.parts(wanted.name):
        _check_shape(source, part.name, whole_shape(part.how, shape))
    end = 0  # what lies between slices, and after the last, is padding
    for name, run, offset in slices(parameters, wanted.name, wanted.start, len(flat)):
        flat[end:offset].zero_()
        end = offset + run.length
        kind = _kind(source, name, wanted.kind, flat.dtype)
        source.fill(name, kind, run, flat[offset:end], convert)
    flat[end:].zero_()


def _kind(source: Source, name: str, kind: str, dtype: torch.dtype) -> str:
    kept = source.kinds(name)
    if kind in ("weight", "master"):
        return "master" if "master" in kept and dtype == torch.float32 else "weight"
    if kind not in kept:
        raise CheckpointError(
            f"{source.folder} holds no {kind} of {name}: it has weights only; "
            "start from it with checkpoint.init_from"
        )
    return kind
