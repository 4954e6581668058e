"""A ring's transfers begin before the block that hides them, and are waited for after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llamax.kernels.attention.ways import Ring


class Noting:
    """A rank of a ring of four that notes when a transfer begins and when it is waited for."""

    size, rank_index = 4, torch.zeros(1, dtype=torch.int32)

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.flying = self.most = 0

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        name = f"{'gradient' if x.dtype == torch.float64 else 'keys'} {by:+d}"
        self.notes.append(f"begin {name}")
        self.flying += 1
        self.most = max(self.most, self.flying)

        def arrived() -> Tensor:
            self.notes.append(f"wait {name}")
            self.flying -= 1
            return x.clone()

        return arrived


def test_the_next_keys_travel_while_a_block_is_computed() -> None:
    ranks = Noting()
    for place, _ in Ring(ranks).forward(torch.ones(1, 2, 2, 1)):
        ranks.notes.append(f"block {place}")
    assert ranks.notes == [
        *("begin keys -1", "block 0", "wait keys -1"),
        *("begin keys -1", "block 1", "wait keys -1"),
        *("begin keys -1", "block 2", "wait keys -1"),
        "block 3",
    ]
    assert ranks.most == 1, "one share in use and one on its way"


def test_the_next_keys_and_a_gradient_travel_in_backward() -> None:
    ranks = Noting()

    def gradients(place: int, keys: Tensor) -> Tensor:
        ranks.notes.append(f"block {place}")
        return keys.double()

    total = Ring(ranks).backward(torch.ones(1, 2, 2, 1), gradients)
    assert torch.equal(total, torch.full((1, 2, 2, 1), 4.0, dtype=torch.float64))
    assert ranks.notes == [
        *("begin keys +1", "block 0", "wait keys +1"),
        *("begin keys +1", "block 3", "wait keys +1"),
        *("begin keys +1", "begin gradient +1", "block 2", "wait gradient +1", "wait keys +1"),
        *("begin gradient +1", "block 1", "wait gradient +1"),
        *("begin gradient +1", "wait gradient +1"),
    ]
    assert ranks.flying == 0
