"""The state that a rank keeps of a bucket: AdamW's moments and masters of its shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llamax.optim.blockwise import Blockwise
from llamax.optim.buckets import Piece

Kind = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Elements [start, stop) of a group, communicated and updated at once.

    ``master``, moments and ``root`` are of this rank's shard, and so are ``weights``: the master
    itself where they are float32, and None where programs are traced, which make them of it.
    """

    number: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    shared: tuple[tuple[int, int], ...]  # where kv replicas have parts of the summed gradient
    shared_mask: Tensor | None = None  # 1.0 at ``shared``, where spans would tell ranks apart
    root: Tensor | None  # square roots of the weights in the norm, where they differ by element
    weights: Tensor | None
    master: Tensor
    exp_avg: Tensor | Blockwise
    exp_avg_sq: Tensor | Blockwise
    offload: bool  # whether master and moments lie in host memory

    @property
    def shared_elements(self) -> int:
        """The number of elements that are summed over key/value replicas."""
        if self.shared_mask is not None:
            return len(self.shared_mask)
        return sum(stop - start for start, stop in self.shared)

    @property
    def moments(self) -> tuple[Tensor | Blockwise, Tensor | Blockwise]:
        """AdamW's moments, in the order of ``MOMENTS``."""
        return self.exp_avg, self.exp_avg_sq

    @contextmanager
    def state(self, accepted: Tensor) -> Iterator[list[Tensor]]:
        """Master and moments in float32 on the device, to be changed in place by one step.

        They are kept where ``accepted`` is true.
        """
        kept = (self.master, *self.moments)
        fetched = [self._fetched(x) for x in kept]
        yield fetched
        for x, changed in zip(kept, fetched, strict=True):
            if isinstance(x, Blockwise):
                x.take(changed, accepted)
            elif x is not changed:
                x.copy_(changed, non_blocking=True)
        if self.weights is not None and self.master is not fetched[0]:
            self.weights.copy_(fetched[0])

    def _fetched(self, x: Tensor | Blockwise) -> Tensor:
        if isinstance(x, Blockwise):
            return x.values()
        if self.offload and self.weights is not None and x is not self.weights:
            return x.to(self.weights.device, non_blocking=True, copy=True)
        return x

    @contextmanager
    def saved(self, dtype: torch.dtype) -> Iterator[dict[Kind, Tensor]]:
        """What a checkpoint keeps of weights of ``dtype`` and their state.

        Writing into it changes the live state: moments in 8 bits are taken back at the end.  Where
        programs are traced it is a copy on the host.
        """
        if self.weights is None:
            kept = (self.master, *self.moments)
            master, exp_avg, exp_avg_sq = (x.cpu() for x in kept if isinstance(x, Tensor))
            weights = master.to(dtype)
            yield dict(weight=weights, master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
            return
        found: dict[Kind, Tensor] = {"weight": self.weights}
        if self.master is not self.weights:
            found["master"] = self.master
        copies: list[tuple[Blockwise, Tensor, Tensor]] = []
        for kind, moment in zip(MOMENTS, self.moments, strict=True):
            if isinstance(moment, Blockwise):
                found[kind] = values = moment.exact()
                copies.append((moment, values, values.clone()))
            else:
                found[kind] = moment
        yield found
        for quantized, values, before in copies:
            if not values.equal(before):
                quantized.load(values)
