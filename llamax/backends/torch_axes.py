"""The axes of torch.distributed: gloo on CPUs, nccl on GPUs, neuron on trn2 and trn3.

The all-gather and reduce-scatter of gloo copy what they send and receive and take up to 2.4 times
as long as an all-to-all of the same bytes (``benchmarks/collectives.py``), and its reduce-scatter
adds in the dtype of the tensor.  So on gloo these verbs are sends and receives between each two
ranks: a gather receives in place, and a reduce-scatter sends share j to rank j and adds the
received shares in rank order and in float32, which gives the same bits in every run.

gloo works in a thread, which releases the tensors of its own collectives some time after a call has
returned.  Activations passed to it would be freed late and out of order, and the heap would grow.
Messages of up to ``STAGED_BYTES`` therefore pass through two permanent buffers, where they are not
received in place.  Longer reduce-scatters along the first dim do so in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from llamax.config.constants import STAGED_BYTES
from llamax.parallel.collectives import Axis, Reduction

# The names of torch 2.13, whose older ones warn; torch 2.9 has only these.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class TorchAxis(Axis):
    """An axis over a process group; ``ranks``: its global ranks in the order of the axis."""

    def __init__(
        self, name: str, ranks: Sequence[int], device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self.name, self.size, self.ranks, self.group = name, len(ranks), tuple(ranks), group
        self.rank = self.ranks.index(dist.get_rank())
        self.rank_index = torch.tensor([self.rank], dtype=torch.int32, device=device)

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, OPS[op], group=self.group)
        return y

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        arrived = x.new_empty((self.size, *x.shape))
        _all_gather(arrived.view(-1), x.reshape(-1), group=self.group)
        return _join(arrived, dim)

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        whole = x.new_empty(self.size * len(x), *x.shape[1:])
        work = _all_gather(whole, x, group=self.group, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return whole

        return arrived

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        parts = self._split(x, dim).contiguous()
        part = torch.empty_like(parts[0])
        _reduce_scatter(part.view(-1), parts.view(-1), group=self.group)
        return part

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        part = torch.empty_like(self._split(x, 0)[0])
        work = _reduce_scatter(part.view(-1), x.view(-1), group=self.group, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return part

        return arrived

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        parts = self._split(x, split).contiguous()
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts, group=self.group)
        return _join(arrived, concat)

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        x, arrived = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        target, source = (self.ranks[(self.rank + step) % self.size] for step in (by, -by))
        if by % self.size == 0:
            return lambda: arrived.copy_(x)
        exchange = [
            dist.P2POp(dist.isend, x, target, self.group),
            dist.P2POp(dist.irecv, arrived, source, self.group),
        ]
        requests = dist.batch_isend_irecv(exchange)

        def shifted() -> Tensor:
            for request in requests:
                request.wait()
            return arrived

        return shifted

    def _split(self, x: Tensor, dim: int) -> Tensor:
        """[.., size * n, ..] -> [size, .., n, ..], a view."""
        dim %= x.dim()
        if x.shape[dim] % self.size:
            raise ValueError(
                f"{self.name}: dim {dim} of {tuple(x.shape)} is not divisible by {self.size}"
            )
        parts: Tensor = x.unflatten(dim, (self.size, -1)).movedim(dim, 0)
        return parts


class GlooAxis(TorchAxis):
    """An axis over gloo, with two permanent buffers for messages."""

    def __init__(
        self, name: str, ranks: Sequence[int], device: torch.device, group: dist.ProcessGroup
    ) -> None:
        super().__init__(name, ranks, device, group)
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._staged = {role: torch.empty(0, dtype=torch.uint8) for role in ("out", "in")}

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        if x.nbytes > STAGED_BYTES:
            return super().all_reduce(x, op)
        y = self._buffer("out", x).copy_(x)
        dist.all_reduce(y, OPS[op], group=self.group)
        return y.clone()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        if dim % x.dim() == 0:
            return self.start_all_gather(x)()
        return _join(self._exchange(x.unsqueeze(0).expand(self.size, *x.shape)), dim)

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        whole = x.new_empty(self.size, *x.shape)
        whole[self.rank] = x
        with _unrecorded():
            sent, received = whole[self.rank], [whole[rank] for rank in self._others]
            requests = self._begin([sent] * len(received), received)

        def arrived() -> Tensor:
            for request in requests:
                request.wait()
            return whole.flatten(0, 1)

        return arrived

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        parts = self._split(x, dim)
        if dim % x.dim() or x.nbytes <= STAGED_BYTES:
            return _sum(self._exchange(parts), x.dtype)
        flat, total = parts.reshape(self.size, -1), x.new_empty(parts.shape[1:])
        step = max(1, STAGED_BYTES // (self.size * x.element_size()))
        for start in range(0, flat.shape[1], step):
            piece = slice(start, start + step)
            total.view(-1)[piece] = _sum(self._exchange(flat[:, piece]), x.dtype)
        return total

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        if x.nbytes > STAGED_BYTES:
            total = self.reduce_scatter(x, 0)
            return lambda: total
        parts = self._split(x, 0)
        arrived = torch.empty_like(parts[1:])
        with _unrecorded():
            requests = self._begin([parts[rank] for rank in self._others], [*arrived])

        def arrived_sum() -> Tensor:
            for request in requests:
                request.wait()
            return _sum(self._own(parts, arrived), x.dtype)

        return arrived_sum

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        return _join(self._exchange(self._split(x, split)), concat)

    def _exchange(self, parts: Tensor) -> list[Tensor]:
        """Send part j to rank j; the parts that are for this rank, in rank order.

        They lie in the permanent buffer until the next exchange, but for the rank's part of
        ``parts`` itself.
        """
        arrived, sent = self._buffer("in", parts[1:]), [parts[rank] for rank in self._others]
        if not parts[0].is_contiguous():
            staged = self._buffer("out", parts[1:])
            sent = [place.copy_(part) for place, part in zip(staged, sent, strict=True)]
        for request in self._begin(sent, [*arrived]):
            request.wait()
        return self._own(parts, arrived)

    def _own(self, parts: Tensor, arrived: Tensor) -> list[Tensor]:
        """The parts that are for this rank, in rank order: of all ranks, its own among them."""
        return [*arrived[: self.rank], parts[self.rank], *arrived[self.rank :]]

    def _begin(self, sent: Sequence[Tensor], arrived: Sequence[Tensor]) -> list[dist.Work]:
        """Begin to send a tensor to each other rank, in order, and to receive one from it."""
        moves = [
            dist.P2POp(move, part, self.ranks[rank], self.group)
            for move, parts in ((dist.isend, sent), (dist.irecv, arrived))
            for rank, part in zip(self._others, parts, strict=True)
        ]
        return dist.batch_isend_irecv(moves)

    def _buffer(self, role: str, like: Tensor) -> Tensor:
        if like.nbytes > STAGED_BYTES:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        if self._staged[role].nbytes < like.nbytes:
            self._staged[role] = torch.empty(like.nbytes, dtype=torch.uint8)
        return self._staged[role][: like.nbytes].view(like.dtype).view(like.shape)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Keep transfers that begin in this block out of a profile, which may end before they do."""
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of all ranks' parts in rank order, in float32 where it is narrower."""
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = parts[0].to(wide) + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(dtype).contiguous()


def _join(parts: Tensor | Sequence[Tensor], dim: int) -> Tensor:
    """[size, .., n, ..] -> [.., size * n, ..], a contiguous copy."""
    return torch.cat([*parts], dim).contiguous()
