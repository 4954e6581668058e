"""Checks of settings that several programs of inference share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from llamax.config.choices import EAGER_BACKENDS, MODEL_DTYPES, QUANTIZED
from llamax.config.model import ModelConfig
from llamax.config.schema import Config, DataConfig, ParallelConfig
from llamax.config.validate import problems
from llamax.runtime.errors import ConfigError, check_whole, refuse
from llamax.runtime.units import count


def check_computing(
    batch: int,
    threads: int,
    dtype: str,
    backend: str = "cpu",
    backends: Sequence[str] = EAGER_BACKENDS,
    quantize: str = "",
) -> None:
    """Raise ConfigError for a batch, threads, dtype or backend that cannot be."""
    for name, value, least in (("batch", batch, 1), ("threads", threads, 0)):
        if check_whole(name, value) < least:
            raise ConfigError(f"`{name}={value}` is out of range; use {least} or more")
    for name, chosen, known in (
        ("dtype", dtype, ("", *MODEL_DTYPES)),
        ("backend", backend, backends),
        ("quantize", quantize, ("", *QUANTIZED)),
    ):
        if chosen not in known:
            use = ", ".join(filter(None, known))
            raise ConfigError(f"`{name}={chosen}` is not known; use {use}")
    if quantize and backend != "cpu":
        raise ConfigError(
            f"`quantize={quantize}` runs on the cpu alone, not with `backend={backend}`; leave one "
            "of them out"
        )


def check_ranks(model: ModelConfig, ranks: int) -> None:
    """Raise ConfigError for a number of ranks that cannot share a model."""
    parallel, data = ParallelConfig(tensor=ranks, sequence=False), DataConfig(sequence_length=1)
    found = problems(Config(model, parallel, data=data))  # other ranks would be another world
    world = f"a world of {count(ranks, 'rank')}"
    refuse([each.replace(f"parallel.tensor={ranks}", world) for each in found], "the model")


def check_number(name: str, value: Any) -> float:
    """The value of a setting; ConfigError if it is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"`{name}={value!r:.40}` is not a number; write one")
    return float(value)


def check_stops(stop: Sequence[str], stop_ids: Sequence[int] = ()) -> None:
    """Raise ConfigError for an empty stop text, and for stops that are no texts or no ids."""
    is_list = isinstance(stop, Iterable) and not isinstance(stop, str)
    if not is_list or not all(isinstance(text, str) for text in stop):
        raise ConfigError(f"`stop={stop!r:.40}` is no list of texts; give the texts to stop at")
    if "" in stop:
        raise ConfigError("`stop` is empty; give the text to stop at")
    if not isinstance(stop_ids, Iterable):
        raise ConfigError(f"`stop_ids={stop_ids!r:.40}` is no list; give the tokens to stop at")
    for number in stop_ids:
        check_whole("stop_ids", number)
