"""The length of the run that a plan prices, and where it comes from.

::

    run.steps, run.epochs                        as configured
    steps, tokens, epochs, samples of ``plan``   one of them instead; samples also with epochs

Epochs need the number of samples in one: of the data set, where it is there, or as ``samples``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamax.config.schema import Config
from llamax.runtime.errors import ConfigError
from llamax.runtime.units import count
from llamax.training.resolve import visible_samples

KEYS = ("run.steps", "run.epochs")


@dataclass(frozen=True)
class Length:
    """A configuration with its length, and what else ``resolve`` needs to know of it.

    ``samples``: number of samples in an epoch, None where it is not known or decides nothing;
    ``reason``: why they were not counted; ``origin``: where the length comes from.
    """

    config: Config
    samples: int | None
    reason: str
    origin: str


@dataclass(frozen=True)
class GivenLength:
    """The length that the caller of ``plan`` gives instead of the configuration's, if any."""

    steps: int | None = None
    tokens: int | None = None
    epochs: int | None = None
    samples: int | None = None

    def check(self, overrides: Sequence[str] = ()) -> None:
        """Raise ConfigError for a length below 1, or one that is given twice."""
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"`{name}={value}` is out of range; use 1 or more")
        passes = "samples" if self.epochs is None else "epochs"
        given = [
            f"`{name}`" for name in ("steps", "tokens", passes) if getattr(self, name) is not None
        ]
        written = [item.partition("=")[0].removeprefix("--") for item in overrides]
        given += [f"--{key}" for key in KEYS if given and key in written]
        if given[1:] == ["--run.epochs"] and given[0] == "`samples`":
            return
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} both give the length; use one of them")


def length_of(config: Config, given: GivenLength = GivenLength()) -> Length:
    """The length of ``config`` on its data set, or as ``given``.

    Raises ConfigError for epochs without a data set to count samples in.
    """
    run = config.run
    if given.steps is not None:
        run = replace(run, steps=given.steps, epochs=0)
        return Length(replace(config, run=run), None, "", f"`steps={given.steps:,}`")
    if given.tokens is not None:
        step = config.data.global_batch * config.data.sequence_length
        run = replace(run, steps=-(-given.tokens // step), epochs=0)
        return Length(
            replace(config, run=run), None, "", f"`tokens={given.tokens:,}`, up to a whole step"
        )
    samples: int | None
    epochs = given.epochs or run.epochs or (1 if given.samples else 0)
    config = replace(config, run=replace(run, epochs=epochs))
    if given.samples is None:
        samples, reason = visible_samples(config)
        source = config.data.path
    else:
        samples, reason, source = given.samples, "", f"`samples={given.samples:,}`"
    named = f"`epochs={epochs}`" if given.epochs else f"run.epochs={epochs}"
    if not epochs:
        return Length(config, samples, reason, f"run.steps={run.steps:,}")
    if samples is None and given.epochs:
        raise ConfigError(
            f"{named} needs the samples of an epoch: {reason}; give `samples` as well"
        )
    if samples is None:
        return Length(config, None, reason, f"assumed, run.steps={run.steps:,}")
    if not (given.epochs or run.epochs):
        return Length(config, samples, reason, source)
    counted = f"{count(samples, 'sample')} " if given.samples is None else ""
    of = f"{named} of {counted}{'in ' if counted else ''}{source}"
    return Length(config, samples, reason, of)
