"""Loss spikes: the update of a step whose loss or gradient norm is an outlier is skipped.

A step is compared with a rolling window of the accepted steps before it, as in OLMo-core
(``SkipStepOptimizer``)::

    window   l1 l2 l3 ... lW     losses, and gradient norms, of the last W accepted steps
    bound    mean + sigma * standard deviation          for the next step: from W / 2 values on
    step     loss and norm at most their bounds?        yes: update, and into the window
                                                        no: weights, moments and window stay

An outlier does not enter the window: a second one would hide behind it.  AdamW's bias correction
counts updates, so that moments that stayed are corrected as before; the learning rate counts steps.

Everything is on the device and without a branch, so that a step is the same program with and
without a spike.  The bounds of rank 0 count: they travel in the all-reduce that sums the loss, so
that ranks whose programs round differently, as stages of a pipeline may, decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llamax.backends.transfer import moved
from llamax.config.choices import EAGER_BACKENDS
from llamax.config.constants import SPIKES_STATE as STATE
from llamax.config.schema import OptimConfig
from llamax.runtime.errors import CheckpointError

LARGEST = torch.finfo(torch.float32).max  # a bound that every finite number keeps


class SpikeFilter:
    """The rolling window of a run and the decision about each step; one on each rank.

    ``window`` [3,W]: loss, gradient norm, and 1 where a step was accepted; the last one is on the
    right.  ``skipped`` [1]: the number of steps skipped so far, with a dim because a traced program
    would have the first value of a 0-d tensor in it.
    """

    def __init__(self, optim: OptimConfig) -> None:
        self.length, self.sigma = optim.spike_window, optim.spike_sigma
        self.window, self.skipped = torch.zeros(3, self.length), torch.zeros(1)
        chosen = [optim.skip_spikes in (name, "both") for name in ("loss", "norm")]
        self.judged = torch.tensor(chosen)

    @classmethod
    def of(cls, optim: OptimConfig, device: torch.device) -> SpikeFilter | None:
        """The filter of a new run, or None; on a device that traces, ``to`` moves it there."""
        if optim.skip_spikes == "off":
            return None
        made = cls(optim)
        if device.type in EAGER_BACKENDS:
            made.to(device)
        return made

    def to(self, device: torch.device | str) -> None:
        """Move the window to the device of the run."""
        self.window, self.skipped = moved(self.window, device), moved(self.skipped, device)
        self.judged = moved(self.judged, device)

    def bounds(self) -> Tensor:
        """The largest loss and the largest norm that are no outlier, [2]; ``LARGEST`` for any."""
        values, known = self.window[:2], self.window[2]
        one, count = torch.ones_like(known[0]), known.sum()
        # Counted from the last value, equal values have deviation 0 whatever their rounding.
        last = values[:, -1:]
        away = (values - last) * known
        mean = away.sum(1, keepdim=True) / torch.maximum(count, one)
        squares = ((away - mean) * known).square().sum(1)
        deviation = (squares / torch.maximum(count - one, one)).sqrt()
        bound = (last + mean).squeeze(1) + deviation * self.sigma
        most = torch.full_like(bound, LARGEST)
        enough = count >= torch.full_like(count, float(self.length // 2))
        return torch.where(self.judged & enough, torch.minimum(bound, most), most)

    def accepts(self, bounds: Sequence[Tensor], loss: Tensor, norm: Tensor) -> Tensor:
        """Whether loss and norm of a step keep ``bounds``, 0-d; NaN and infinity do not."""
        return (loss <= bounds[0]) & (norm <= bounds[1])

    def add(self, bounds: Sequence[Tensor], loss: Tensor, norm: Tensor) -> None:
        """Take a step into the window, or count it as skipped."""
        accepted = self.accepts(bounds, loss, norm)
        newest = torch.stack((loss, norm, torch.ones_like(loss))).unsqueeze(1)
        window = torch.cat((self.window[:, 1:], newest), 1)
        # Not copied into: a tensor written in place is read by another program than before.
        self.window = torch.where(accepted, window, self.window)
        more = self.skipped + torch.ones_like(self.skipped)
        self.skipped = torch.where(accepted, self.skipped, more)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, exact to the bit; waits for the device."""
        window, skipped = self.window.cpu(), self.skipped.cpu()
        losses, norms = (row[window[2] > 0].tolist() for row in window[:2])
        return {STATE: {"losses": losses, "norms": norms, "skipped": int(skipped)}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the window of a checkpoint's ``state``, its newest part if it is longer.

        Raises CheckpointError if it is damaged.  Without one the window stays empty.
        """
        if STATE not in state:
            return
        try:
            losses, norms, skipped = (state[STATE][key] for key in ("losses", "norms", "skipped"))
            known = torch.tensor([losses, norms], dtype=torch.float32).reshape(2, -1)
            sound = len(losses) == len(norms) and bool(known.isfinite().all())
            sound = sound and type(skipped) is int and 0 <= skipped < 2**24
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            sound = False
        if not sound:
            raise CheckpointError(
                f"the checkpoint to resume has {STATE}={state[STATE]!r:.40}, which is no window of "
                "losses and gradient norms; resume another one, or use optim.skip_spikes=off"
            )
        known = known[:, -self.length :]
        self.window[:, self.length - known.shape[1] :] = torch.cat(
            (known, torch.ones_like(known[:1]))
        )
        self.skipped.fill_(skipped)
