"""Generation on a device that compiles programs: one for each bucket of prompts, one for decoding.

::

    prefill, 64    prompts [B, 64], last places   ─> next tokens, positions, the cache
    prefill, 128   prompts [B, 128], ...             padded to the next power of two
    decode         tokens, positions, the cache   ─> next tokens, positions, the cache

Batch, width of a bucket and length of the cache are shapes; tokens and positions are inputs.  So a
program is the same on every rank, at every step and in every batch: a smaller batch is filled up
with prompts that nobody reads.

Greedy tokens are chosen in the program: every rank finds the best of its share of the vocabulary,
and three numbers a sequence are gathered.  A step then starts before the token of the step before
is read, and the device waits for no host.  Draws need the logits of the whole vocabulary on the
host, where they are the draws of the other backends, with all filters and the same seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamax import ops
from llamax.backends.base import Device
from llamax.config.hidden import HIDDEN
from llamax.config.model import ModelConfig
from llamax.inference.kv_pool import KVPool
from llamax.inference.sampling import Prompts, Sampling, check_finite, check_prompts
from llamax.model.llama import Llama
from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.runtime.errors import ConfigError

SMALLEST = 64  # tokens of the smallest bucket


class Result(NamedTuple):
    """The result of a program: greedy tokens and whether their logits are finite, or the logits."""

    tokens_B: Tensor | None = None
    finite_B: Tensor | None = None
    logits_BV: Tensor | None = None


def bucket(tokens: int, longest: int) -> int:
    """The padded width of ``tokens``: a power of two, at least SMALLEST, at most ``longest``."""
    return min(max(SMALLEST, 1 << (tokens - 1).bit_length()), longest)


def buckets(length: int) -> list[int]:
    """The widths of all prompts that leave room for a new token in a cache of ``length``."""
    return sorted({bucket(tokens, length) for tokens in range(1, max(2, length))})


def programs(length: int) -> list[str]:
    """The names of all programs for a cache of ``length``."""
    return [*(f"prefill of {width} tokens" for width in buckets(length)), "decode"]


def cache_length(config: ModelConfig, prompts: Prompts, max_new_tokens: int, asked: int = 0) -> int:
    """The places of a cache: as ``asked``, or those that the prompts need, as a bucket.

    Raises ConfigError where ``asked`` is too small for them or beyond the model's context.
    """
    needed, longest = max(map(len, prompts)) + max_new_tokens, config.max_position_embeddings
    if not asked:
        return bucket(needed, longest)
    if asked > longest:
        raise ConfigError(
            f"`length={asked}` is beyond max_position_embeddings={longest} of the model; use that "
            "or less"
        )
    if asked < needed:
        raise ConfigError(
            f"`length={asked}` is too short: the longest prompt has {needed - max_new_tokens} "
            f"tokens, and {max_new_tokens} more are asked for; use {needed} or more"
        )
    return asked


class StaticDecoder:
    """Continues ``batch`` prompts at once in a cache of ``length`` places.

    ``greedy``: whether programs choose the tokens.  ``vocab_size``: the ids that may be chosen, by
    default all of the model's.  ``memory``: as of KVPool.  Raises ConfigError if there is no memory
    for the cache.
    """

    def __init__(
        self,
        model: Llama,
        backend: Device,
        batch: int,
        length: int,
        greedy: bool,
        vocab_size: int | None = None,
        memory: bool = True,
    ) -> None:
        self.model, self.backend, self.batch, self.length = model, backend, batch, length
        self.greedy = greedy
        self.vocab_size = min(filter(None, (vocab_size, model.config.vocab_size)))
        self.device = model.tp.rank_index.device
        self.pool = KVPool(model, batch, length, memory, "batch")

    def prefill(self, prompts: Prompts) -> Result:
        """Start the program of up to ``batch`` prompts: the token after each of them."""
        width = bucket(max(map(len, prompts)), self.length)
        rows = [*prompts, *[[0]] * (self.batch - len(prompts))]
        padded = [[*row, *[0] * (width - len(row))] for row in rows]
        ids_BS, last_B = self._sent(padded), self._sent([len(row) - 1 for row in rows])
        result = self._prefilled(ids_BS, last_B)
        self.backend.step_boundary()
        return result

    def decode(self, tokens_B: Tensor) -> Result:
        """Start the program of one more token of each sequence: the token after ``tokens_B``."""
        result = self._decoded(tokens_B)
        self.backend.step_boundary()
        return result

    # Every tensor that still has a name at the boundary would be an output of the program.

    @torch.no_grad()
    def _prefilled(self, ids_BS: Tensor, last_B: Tensor) -> Result:
        positions_1S = torch.arange(ids_BS.shape[1], dtype=torch.int32, device=self.device)[None]
        attend = self.pool.prefill(range(self.batch))
        x_BSD = self.model.hidden(ids_BS, positions_1S, attend=attend)
        last_B1 = last_B[:, None]
        self._positions_B1 = last_B1 + torch.ones_like(last_B1)
        return self._chosen(ops.at_places(x_BSD, last_B))

    @torch.no_grad()
    def _decoded(self, tokens_B: Tensor) -> Result:
        positions_B1 = self._positions_B1
        attend = self.pool.decode(positions_B1, self.length)
        x_B1D = self.model.hidden(tokens_B[:, None], positions_B1, attend=attend)
        self._positions_B1 = positions_B1 + torch.ones_like(positions_B1)
        return self._chosen(x_B1D)

    def _chosen(self, x_B1D: Tensor) -> Result:
        """The result from the activations of one place of each sequence."""
        share_Bv = self.model.head.project(x_B1D)[:, 0]
        if self.greedy:
            return Result(*choose(share_Bv, self.model.tp, self.vocab_size))
        return Result(logits_BV=regions.join(share_Bv, self.model.tp, 1))

    def read(
        self, result: Result, sampling: Sampling, streams: Sequence[torch.Generator], first: bool
    ) -> tuple[list[int], Tensor]:
        """The next token of the sequence of each stream, on the host and for ``decode``.

        ``first``: whether to raise CheckpointError where the model's logits are not finite.
        """
        count = len(streams)
        if result.tokens_B is not None and result.finite_B is not None:
            if first:
                check_finite(bool(result.finite_B.cpu()[:count].all()))
            return result.tokens_B.cpu()[:count].tolist(), result.tokens_B
        assert result.logits_BV is not None
        logits_BV = result.logits_BV.cpu()[:count]
        if first:
            check_finite(bool(logits_BV.isfinite().all()))
        tokens = sampling.pick(logits_BV[:, : self.vocab_size], streams).tolist()
        return tokens, self._sent([*tokens, *[0] * (self.batch - count)])

    def run_all(self, prompts: int = 1) -> None:
        """Start every program once, on ``prompts`` made-up prompts, in the order of ``programs``.

        Their results are not looked at: while programs are only collected they are zeros.
        """
        for width in buckets(self.length):
            self.prefill([[0] * width] * prompts)
        self.decode(self._sent([0] * self.batch))

    def _sent(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device)


def choose(logits_Bv: Tensor, tp: Axis, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The most likely token, and whether all logits are finite: -> int32 [B], bool [B].

    ``logits_Bv``: of this rank's share of the vocabulary; ids from ``vocab_size`` on are left out.
    Of equal logits the lowest id counts, as in ``argmax``.
    """
    B, v = logits_Bv.shape
    device, wide_Bv = logits_Bv.device, logits_Bv.float()
    hidden, limit = (
        torch.full((), value, dtype=dtype, device=device)
        for value, dtype in ((HIDDEN, torch.float32), (vocab_size, torch.int32))
    )
    ids_v = torch.arange(v, dtype=torch.int32, device=device) + tp.rank_index * v
    known_Bv = torch.where(ids_v < limit, wide_Bv, hidden)
    best_B1 = known_Bv.amax(1, keepdim=True)
    id_B1 = torch.where(known_Bv == best_B1, ids_v, limit).amin(1, keepdim=True)
    difference_Bv = torch.where(ids_v < limit, wide_Bv - wide_Bv, torch.zeros_like(wide_Bv))
    finite_B1 = (difference_Bv == torch.zeros_like(wide_Bv)).all(1, keepdim=True)
    found_B3 = torch.cat((best_B1, id_B1.float(), finite_B1.float()), 1)  # ids are below 2^24
    found_BR3 = tp.all_gather(found_B3, 1).view(B, -1, 3)
    best_BR, id_BR, finite_BR = found_BR3.unbind(2)
    chosen_BR = torch.where(best_BR == best_BR.amax(1, keepdim=True), id_BR, limit.float())
    return chosen_BR.amin(1).to(torch.int32), finite_BR.amin(1) > torch.zeros_like(finite_BR[:, 0])


def static_tokens(
    decoder: StaticDecoder,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
) -> Iterator[list[int | None]]:
    """What ``generate_tokens`` yields, by a decoder; a step starts before the last one is read."""
    check_prompts(decoder.model.config, prompts, max_new_tokens)
    streams, live = sampling.streams(len(prompts)), [True] * len(prompts)
    result: Result | None = decoder.prefill(prompts)
    for made in range(1, max_new_tokens + 1):
        assert result is not None
        last, following = made == max_new_tokens, None
        if result.tokens_B is not None and not last:
            following = decoder.decode(result.tokens_B)
        tokens, tokens_B = decoder.read(result, sampling, streams, made == 1)
        yield [token if alive else None for token, alive in zip(tokens, live, strict=True)]
        live = [a and token not in stop_ids for a, token in zip(live, tokens, strict=True)]
        if last or not any(live):
            return
        result = decoder.decode(tokens_B) if following is None else following
