"""What a program puts in the place of llamax's own model class, learning rate and update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from llamax.model.llama import Llama
from llamax.optim.adamw import Update
from llamax.runtime.errors import ConfigError


@dataclass(frozen=True)
class Parts:
    """What a program puts in the place of llamax's own parts.

    ``model_class``: a subclass of Llama.  ``learning_rate``: the rate of a step, counted from 1.
    ``lr_scale``: the factor on it for a parameter, from its name.  ``update``: the rule of the
    optimizer in place of AdamW's.
    """

    model_class: type[Llama] = Llama
    learning_rate: Callable[[int], float] | None = None
    lr_scale: Callable[[str], float] | None = None
    update: Update | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a part that is something else."""
        kind = self.model_class
        if not (isinstance(kind, type) and issubclass(kind, Llama)):
            name = kind.__name__ if isinstance(kind, type) else f"{kind!r:.40}"
            raise ConfigError(
                f"`model_class` is {name}, not a subclass of llamax.model.llama.Llama; give the "
                "class itself, not a model made of it"
            )
        number = 'give one, or a number as optim={"lr": NUMBER}'
        _check("learning_rate", self.learning_rate, "step", number)
        _check("lr_scale", self.lr_scale, "name", "give one from a parameter's name to a factor")
        _check("update", self.update, "p, g, m, v, by", "give one as llamax.optim.adamw.update is")

    def rate(self, step: int) -> float:
        """``learning_rate`` of a step; raises ConfigError for what is no rate."""
        assert self.learning_rate is not None
        return _number(self.learning_rate(step), f"`learning_rate` gives {{}} for step {step}")

    def scale(self, name: str) -> float:
        """``lr_scale`` of a parameter; raises ConfigError for what is no factor."""
        assert self.lr_scale is not None
        return _number(self.lr_scale(name), f"`lr_scale` gives {{}} for {name}")


def _number(given: object, what: str) -> float:
    try:
        number = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"{what.format(f'{given!r:.40}')}; return a number of 0 or more")
    return number


def _check(name: str, part: object, arguments: str, remedy: str) -> None:
    """Raise ConfigError for a part that cannot be called with these arguments."""
    if part is None:
        return
    if not callable(part):
        raise ConfigError(f"`{name}={part!r:.40}` is no function of {arguments}; {remedy}")
    try:
        signature(part).bind(*arguments.split(", "))
    except TypeError as error:
        raise ConfigError(
            f"`{name}` cannot be called with {arguments}: {error}; define {name}({arguments})"
        ) from None
    except ValueError:
        pass  # a function of C may have no signature


LLAMAX = Parts()
