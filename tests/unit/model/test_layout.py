"""Weights laid out for decoding."""

from __future__ import annotations

import torch
from support.models import tiny

from llamax.model.layout import transpose_weights
from llamax.model.llama import Llama


def test_transposed_weights_have_the_same_values() -> None:
    model, ids = Llama(tiny()).init(0), torch.arange(12).view(2, 6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids)
        transpose_weights(model)
        assert (model(ids) - logits).abs().max() <= 1e-6 * logits.abs().max()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
        assert weight.is_contiguous() == ("proj" not in name and "lm_head" not in name), name


def test_weights_in_bfloat16_stay_as_they_are() -> None:
    model = Llama(tiny(), dtype=torch.bfloat16).init(0)
    transpose_weights(model)
    assert all(weight.is_contiguous() for weight in model.parameters())
