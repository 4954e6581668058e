"""The loss scale of float16 training, decided on the device (Micikevicius et al. 2018, sec. 3.2).

::

    loss  <- scale x loss            before backward: small gradients stay above float16's least
    g     <- g / scale               before the norm, clipping and the update
    scale <- scale x GROWTH          after ``interval`` updates in a row
             scale x BACKOFF         after a step without an update, as some gradient overflowed
             scale                   after a step without a label, which has no gradient

These are the decisions of torch.amp.GradScaler.  They follow from the norm of the gradient, which
is the same on every rank, and so is the scale, without a collective.  A scale that a growth would
make infinite stays.  As there, AdamW's bias correction counts updates, and no step without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llamax.config.constants import LOSS_SCALE_STATE as STATE
from llamax.optim.clip import is_finite
from llamax.runtime.errors import CheckpointError

GROWTH, BACKOFF = 2.0, 0.5  # exact in float16: a changed scale rounds nothing


@dataclass(frozen=True)
class LossScaleState:
    """The numbers of a loss scale on the host.

    ``good_steps``: updates since the scale last changed; ``overflowed_steps``: steps of the run
    without an update.
    """

    scale: float
    good_steps: int = 0
    overflowed_steps: int = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> LossScaleState:
        """The state in fetched values, in the order of ``LossScale.tensors``."""
        scale, good_steps, overflowed_steps = values
        return cls(scale, int(good_steps), int(overflowed_steps))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {STATE: asdict(self)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> LossScaleState | None:
        """The state in that of a checkpoint; None if it was trained without a loss scale.

        Raises CheckpointError if it is damaged.
        """
        if STATE not in state:
            return None
        try:
            found = cls(**state[STATE])
        except TypeError:
            found = cls(math.nan)
        counts = found.good_steps, found.overflowed_steps
        sound = type(found.scale) in (int, float) and 0 < found.scale < 2.0**128  # in float32
        if not sound or not all(type(n) is int and 0 <= n < 2**24 for n in counts):
            raise CheckpointError(
                f"the checkpoint to resume has {STATE}={state[STATE]!r:.40}, which is no loss "
                "scale with counts of steps; resume another one"
            )
        return found


class LossScale:
    """A factor of the loss that follows the gradients; float32 tensors [1] on ``device``.

    ``interval``: the updates in a row after which the scale grows.
    """

    def __init__(self, state: LossScaleState, device: torch.device, interval: int) -> None:
        self.interval, self.device = interval, device
        self.load(state)

    def load(self, state: LossScaleState) -> None:
        """Take the numbers of a checkpoint."""
        counts = float(state.good_steps), float(state.overflowed_steps)
        # In tensors of one dimension, because XLA would take a 0-d 0 for a constant.
        numbers = torch.tensor([state.scale, *counts]).split(1)
        on_device = [number.clone().to(self.device) for number in numbers]
        self.scale, self.good_steps, self.overflowed_steps = on_device

    @property
    def tensors(self) -> list[Tensor]:
        """The numbers on the device, of this moment."""
        return [self.scale, self.good_steps, self.overflowed_steps]

    def update(self, grad_norm: Tensor, labels: Tensor) -> None:
        """Follow a step with this norm and number of labels; it updated if the norm is finite.

        New tensors replace the old, which a caller may keep.  No Python number changes from step to
        step, so that a traced step stays one program.
        """
        none, one = torch.zeros_like(self.scale), torch.ones_like(self.scale)
        updated, empty = is_finite(grad_norm), labels == none
        good = self.good_steps + one
        enough = good >= torch.full_like(good, float(self.interval))
        grown = self.scale * GROWTH
        grown = torch.where(is_finite(grown), grown, self.scale)
        kept = torch.where(enough, grown, self.scale)
        lower = torch.where(empty, self.scale, self.scale * BACKOFF)
        self.scale = torch.where(updated, kept, lower)
        begun = torch.where(empty, self.good_steps, none)
        self.good_steps = torch.where(updated, torch.where(enough, none, good), begun)
        self.overflowed_steps = self.overflowed_steps + torch.where(updated, none, one)
