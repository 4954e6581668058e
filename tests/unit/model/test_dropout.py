"""Dropout masks are a function of step, sample and place, equal on every mesh, and look random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamax.model.dropout import FIRST, MASK31, SECOND, Dropout, feature_keys, kept, mix, signed

ZERO = torch.tensor(0)
KNOWN = [-70621661, -1612614897, 2040716355]
KNOWN_FEATURES = [1135282066, -1776748652, -1777806674, -400827416]


def mask(p: float, module: int = 3, step: int = 1, samples: int = 4, features: int = 512) -> Tensor:
    dropout = Dropout(p, seed=7)
    dropout.begin(dropout.keys(step, 0, samples), 128)
    assert dropout.tokens_BS is not None
    return kept(dropout.tokens_BS, feature_keys(module, features, ZERO), p)


def test_mix_is_what_python_integers_give() -> None:
    def by_hand(x: int) -> int:
        x = signed((x ^ (x & MASK31) >> 16) * FIRST)
        x = signed((x ^ (x & MASK31) >> 15) * SECOND)
        return signed(x ^ (x & MASK31) >> 16)

    numbers = [0, 1, -1, 2**31 - 1, -(2**31), 123456789, -987654321]
    assert mix(torch.tensor(numbers, dtype=torch.int32)).tolist() == [*map(by_hand, numbers)]
    every = mix(torch.arange(-(2**17), 2**17, dtype=torch.int32))
    assert len(every.unique()) == 2**18


def test_known_keys_never_change() -> None:
    """A run resumed by a later version drops what it would have dropped."""
    keys = Dropout(0.1, seed=7).keys(1, 0, 3)
    assert keys is not None
    assert keys.tolist() == KNOWN
    assert feature_keys(3, 4, ZERO).tolist() == KNOWN_FEATURES


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_stays_is_right_in_every_row_and_column(p: float) -> None:
    stays = mask(p).float()
    n = stays.numel()
    assert abs(stays.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    for dims in ((0, 1), (2,)):  # of a feature, of a token
        spread = stays.mean(dims).std()
        expected = (p * (1 - p) * stays.mean(dims).numel() / n) ** 0.5
        assert 0.85 * expected < spread < 1.15 * expected


@pytest.mark.parametrize(
    "other", [{"module": 4}, {"step": 2}], ids=lambda changed: next(iter(changed))
)
def test_masks_of_different_places_have_nothing_in_common(other: dict[str, int]) -> None:
    a, b = mask(0.5).float() - 0.5, mask(0.5, **other).float() - 0.5
    assert (a * b).mean().abs() < 4 * 0.25 / a.numel() ** 0.5
    tokens = mask(0.5, features=2048).flatten(0, 1).float() - 0.5
    correlation = (tokens[:1] * tokens[1:]).mean(1).abs() * 4
    assert correlation.max() < 5 / 2048**0.5


def test_a_share_of_samples_or_features_has_its_part_of_the_mask() -> None:
    whole = mask(0.3)
    dropout = Dropout(0.3, seed=7)
    dropout.begin(dropout.keys(1, 2, 2), 128)
    assert dropout.tokens_BS is not None
    keys = feature_keys(3, 256, torch.tensor(256))
    assert torch.equal(kept(dropout.tokens_BS, keys, 0.3), whole[2:, :, 256:])


def test_what_stays_is_scaled_and_without_keys_all_stays() -> None:
    dropout, x = Dropout(0.5), torch.ones(1, 2, 2)
    stays = torch.tensor([[[True, False], [False, True]]])
    assert dropout(x, stays).tolist() == [[[2, 0], [0, 2]]]
    assert dropout(x, None) is x
    dropout.begin(None, 8)
    assert dropout.tokens_BS is None
    assert Dropout(0.0).keys(1, 0, 4) is None
