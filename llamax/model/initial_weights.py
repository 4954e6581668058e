"""Draws initial weights that are the same on every mesh: each whole from a stream of its own."""

from __future__ import annotations

import hashlib

import torch

from llamax.parallel.sharding import Replica, ShardedParameters, cut


def draw(parameters: ShardedParameters, name: str, deviation: float, seed: int) -> None:
    """Fill this rank's share of a cut parameter with values from N(0, deviation)."""
    share = parameters[name].tensor
    for part in parameters.parts(name):
        assert not isinstance(part.how, Replica)
        shape = list(share.shape)
        shape[part.how.dim] = part.how.blocks[0].size
        whole = torch.empty(shape).normal_(0.0, deviation, generator=generator(seed, part.name))
        rows = cut(whole, part.how, parameters.degree, parameters.rank)
        share.narrow(part.how.dim, part.start, part.length).copy_(rows)


def generator(seed: int, name: str) -> torch.Generator:
    """The stream of random numbers that a tensor of this name is drawn from."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
