"""The numbers of one optimizer step: on the device as ``Step``, on the host as ``StepResult``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from llamax.backends.base import EAGER_DEVICE, Device
from llamax.optim.loss_scale import LossScaleState
from llamax.optim.spikes import LARGEST

SAVE_REQUEST = 0.5  # of rank 0 alone; a request to stop is 1, so the sum tells both apart


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimizer step on the host, the same on every rank.

    ``loss`` and ``validation_loss`` are means in nats; ``stop``: whether some rank wants to stop;
    ``save``: whether rank 0 wants a checkpoint, unknown where some rank wants to stop;
    ``loss_scale``: what the next step begins with, None where the loss is not scaled.  Above
    ``loss_bound`` and ``norm_bound`` a step is an outlier.  ``labels``: how many counted.
    ``metrics``: means over tokens of a program's own numbers, by name.
    """

    number: int
    loss: float
    grad_norm: float
    stop: bool
    save: bool = False
    validation_loss: float | None = None
    loss_scale: LossScaleState | None = None
    loss_bound: float = LARGEST
    norm_bound: float = LARGEST
    labels: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether the step made no update: loss or norm is not finite, or an outlier."""
        return not (self.loss <= self.loss_bound and self.grad_norm <= self.norm_bound)

    @property
    def overflowed(self) -> bool:
        """Whether it made no update because a gradient overflowed, which a lower scale cures."""
        scale, usual = self.loss_scale, self.loss <= self.loss_bound
        overflow = usual and not self.grad_norm <= LARGEST
        return scale is not None and scale.scale >= 1.0 and overflow


class Step:
    """One optimizer step; its numbers are on the device, 0-d, and the same on every rank.

    Mean loss in nats, norm of the gradient, counted tokens, sum of the ranks' requests: 1 to stop,
    ``SAVE_REQUEST`` to save.  ``bounds``, if any, are those of loss and norm.
    Where loss or norm is not finite, the norm is not.  Then, and where one is above its bound, no
    rank has made an update.
    """

    def __init__(
        self,
        number: int,
        loss: Tensor,
        grad_norm: Tensor,
        tokens: Tensor,
        requests: Tensor,
        device: Device = EAGER_DEVICE,
        bounds: Sequence[Tensor] = (),
    ) -> None:
        self.number, self.device, self.bounds = number, device, bounds
        self.loss, self.grad_norm, self.tokens, self.requests = loss, grad_norm, tokens, requests
        self.validation_loss: Tensor | None = None
        self.loss_scale: list[Tensor] = []  # that the next step begins with
        self.metrics: dict[str, Tensor] = {}  # of a program's own
        self._fetch: Callable[[Sequence[Tensor]], list[float]] = device.fetch

    def mark_begun(self) -> None:
        """Note that the device has all work of this step: ``result`` waits for none begun later.

        But for that of a ``validation_loss``, where there is one.
        """
        self._fetch = self.device.fetch_from_here()

    @cached_property
    def result(self) -> StepResult:
        """The numbers on the host: fetched when first read, all at once, and then kept.

        Waits for the device: read it while the next step runs.  A ``validation_loss`` is set
        before.
        """
        values = [self.loss, self.grad_norm, self.tokens, self.requests, *self.loss_scale]
        last = [] if self.validation_loss is None else [self.validation_loss]
        fetch = self.device.fetch if last else self._fetch
        fetched = fetch([*values, *self.bounds, *self.metrics.values(), *last])
        loss, grad_norm, labels, requests, *more = fetched
        scale, more = more[: len(self.loss_scale)], more[len(self.loss_scale) :]
        bounds, more = more[: len(self.bounds)], more[len(self.bounds) :]
        metrics = dict(zip(self.metrics, more, strict=False))
        validation = more[len(metrics) :]
        loss_bound, norm_bound = bounds or (LARGEST, LARGEST)
        return StepResult(
            self.number,
            loss,
            grad_norm,
            stop=requests >= 1.0,
            save=0.0 < requests < 1.0,
            validation_loss=validation[0] if validation else None,
            loss_scale=LossScaleState.of(scale) if scale else None,
            loss_bound=loss_bound,
            norm_bound=norm_bound,
            labels=labels,
            metrics=metrics,
        )
