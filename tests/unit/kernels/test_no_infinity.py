"""What a NeuronCore computes holds no infinity, of which its transposes make NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamax.inference.static_decoding import choose
from llamax.kernels.attention.traced import attention_cached
from llamax.kernels.cross_entropy import op
from llamax.optim.adamw import _correction
from llamax.parallel.collectives import Solo
from llamax.parallel.cross_entropy import vocab_parallel_loss

AXIS = Solo("tp", torch.device("cpu"))


class Watch(TorchDispatchMode):
    """Notes the operations with an infinite result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.isinf().any():
                self.found.append(str(func))
        return result


@contextmanager
def no_infinity() -> Iterator[None]:
    with Watch() as watch:
        yield
    assert watch.found == []


def test_the_watch_sees_one() -> None:
    with pytest.raises(AssertionError, match="masked_fill"), no_infinity():
        torch.zeros(2).masked_fill(torch.tensor([True, False]), -torch.inf)


def test_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    mask = torch.ones(2, 5, 5).tril().bool()
    with no_infinity():
        found = attention_cached(q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_the_loss_over_a_padded_vocabulary() -> None:
    x = torch.randn(1, 6, 4, requires_grad=True)
    weight = torch.randn(10, 4, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3, 6, 0]])
    with no_infinity():
        loss, _ = vocab_parallel_loss(x, weight, labels, AXIS, 7)
        loss.backward()
    expected = torch.nn.functional.cross_entropy((x @ weight[:7].T)[0], labels[0], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert weight.grad is not None
    assert not weight.grad[7:].any()


def test_the_gradients_of_the_loss_for_a_token_without_one() -> None:
    x, weight, columns = torch.randn(3, 4), torch.randn(10, 4), torch.tensor([1, -1, -1])
    padding = torch.arange(10) >= 7
    with no_infinity():
        top, total, _ = op.statistics(x, weight, columns, padding)
        log_sums = torch.stack((*(top + total.log())[:2], torch.tensor(1e9)))
        dx, _ = op.gradients(x, weight, columns, log_sums, padding)
    assert dx[:2].any(1).all()
    assert not dx[2].any()


def test_the_choice_of_a_token() -> None:
    with no_infinity():
        chosen, finite = choose(torch.tensor([[1.0, 3.0, 2.0, 9.0]]), AXIS, 3)
    assert chosen.tolist() == [1]
    assert finite.tolist() == [True]


def test_a_moment_that_forgets_all() -> None:
    with no_infinity():
        assert _correction(0.0, torch.tensor(3.0)) == 1.0
