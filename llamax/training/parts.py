"""What a program puts in the place of llamax's own model class and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from llamax.model.llama import Llama
from llamax.runtime.errors import ConfigError


@dataclass(frozen=True)
class Parts:
    """What a program puts in the place of llamax's own parts.

    ``model_class``: a subclass of Llama.  ``learning_rate``: the rate of a step, counted from 1.
    """

    model_class: type[Llama] = Llama
    learning_rate: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a part that is something else."""
        kind, rate = self.model_class, self.learning_rate
        if not (isinstance(kind, type) and issubclass(kind, Llama)):
            name = kind.__name__ if isinstance(kind, type) else f"{kind!r:.40}"
            raise ConfigError(
                f"`model_class` is {name}, not a subclass of llamax.model.llama.Llama; give the "
                "class itself, not a model made of it"
            )
        if rate is not None and not callable(rate):
            raise ConfigError(
                f"`learning_rate={rate!r:.40}` is no function of the step; give one, or a number "
                'as optim={"lr": NUMBER}'
            )
        if rate is not None:
            _check_takes_step(rate)

    def rate(self, step: int) -> float:
        """``learning_rate`` of a step; raises ConfigError for what is no rate."""
        assert self.learning_rate is not None
        given = self.learning_rate(step)
        try:
            rate = float(given)
        except (TypeError, ValueError):
            rate = math.nan
        if not 0 <= rate < math.inf:
            raise ConfigError(
                f"`learning_rate` gives {given!r:.40} for step {step}; return a number of 0 or more"
            )
        return rate


def _check_takes_step(rate: Callable[[int], float]) -> None:
    try:
        signature(rate).bind(1)
    except TypeError as error:
        raise ConfigError(
            f"`learning_rate` cannot be called with a step: {error}; define learning_rate(step)"
        ) from None
    except ValueError:
        pass  # a function of C may have no signature


LLAMAX = Parts()
