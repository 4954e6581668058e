"""Logits, loss and every gradient against transformers' LlamaForCausalLM, for each family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from support.models import tiny

from llamax.config.model import ModelConfig, RopeScaling
from llamax.inference.sampling import generate_tokens
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import ConfigError, DataError

LLAMA2 = tiny(
    num_hidden_layers=3,
    num_key_value_heads=4,
    vocab_size=320,
    max_position_embeddings=128,
    initializer_range=0.02,
)
FAMILIES = {
    "llama2": LLAMA2,
    "llama2-70b (grouped queries)": dataclasses.replace(LLAMA2, num_key_value_heads=2),
    "llama3": dataclasses.replace(LLAMA2, num_key_value_heads=1, rope_theta=500_000.0),
    "llama3.1": dataclasses.replace(
        LLAMA2,
        num_key_value_heads=2,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
    ),
    "llama3.2": dataclasses.replace(
        LLAMA2,
        num_key_value_heads=2,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64),
        tie_word_embeddings=True,
        head_dim=32,
    ),
}
TOLERANCE = 1e-5


def judge(model: ModelConfig, seed: int = 0) -> transformers.LlamaForCausalLM:
    """transformers' Llama of the same shape with random weights (norms too)."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**model.to_hub("float32"), attn_implementation="eager")
    reference = transformers.LlamaForCausalLM(config).float()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    return reference


@torch.no_grad()
def copy_weights(reference: transformers.LlamaForCausalLM, mine: Llama) -> None:
    weights = dict(reference.named_parameters())
    for name, parameter in mine.named_parameters():
        stacked = [weights[part.name] for part in mine.sharded_parameters().parts(name)]
        parameter.copy_(torch.cat(stacked))


def gradients(mine: Llama) -> dict[str, torch.Tensor]:
    """My gradients under Hub names."""
    found = {}
    for name, parameter in mine.named_parameters():
        for part in mine.sharded_parameters().parts(name):
            whole = parameter.grad if part.length < 0 else None
            if whole is None:
                whole = parameter.grad.narrow(part.how.dim, part.start, part.length)
            found[part.name] = whole
    return found


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return ((mine - theirs).abs().max() <= tolerance * theirs.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_agrees_with_transformers(family: str, recompute: str) -> None:
    reference = judge(FAMILIES[family])
    mine = Llama(FAMILIES[family], recompute=recompute)
    copy_weights(reference, mine)
    ids = torch.randint(320, (3, 49))
    expected = reference(ids, labels=ids)
    expected.loss.backward()

    assert close(mine(ids), expected.logits)
    labels = torch.cat((ids[:, 1:], ids.new_full((3, 1), -100)), dim=1)
    total, count = mine.loss(ids, labels, chunk_tokens=16)
    (total / count).backward()

    assert count == 3 * 48
    assert abs((total / count).item() / expected.loss.item() - 1) < TOLERANCE
    found = gradients(mine)
    assert set(found) == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert close(found[name], parameter.grad), name


@pytest.mark.parametrize("family", ["llama2", "llama3.1"])
def test_packed_documents_equal_each_document_alone(family: str) -> None:
    reference = judge(FAMILIES[family])
    mine = Llama(FAMILIES[family])
    copy_weights(reference, mine)
    lengths = [[5, 17, 10], [31, 1]]
    rows = [[torch.randint(320, (n,)) for n in row] for row in lengths]
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    ).int()

    packed = mine(ids, positions, documents_BS=documents)

    for b, row in enumerate(rows):
        alone = torch.cat([reference(document[None]).logits[0] for document in row])
        assert close(packed[b], alone)
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % 320
    again = mine(changed, positions, documents_BS=documents)
    assert torch.equal(again[0, 5:], packed[0, 5:])
    assert not torch.equal(again[0, :5], packed[0, :5])


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    model = dataclasses.replace(LLAMA2, initializer_range=0.05)
    one, same, other = (Llama(model).init(seed) for seed in (1, 1, 2))
    for (name, a), (_, b), (_, c) in zip(
        one.named_parameters(), same.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert "norm" in name or not torch.equal(a, c), name
    weight = one.model.layers["0"].mlp.down_proj.weight
    assert abs(weight.std().item() / model.initializer_range - 1) < 0.05
    assert not torch.equal(weight, one.model.layers["1"].mlp.down_proj.weight)


def test_hub_names_and_count_are_those_of_transformers() -> None:
    for model in FAMILIES.values():
        reference, mine = judge(model), Llama(model)
        expected = {name: tuple(p.shape) for name, p in reference.named_parameters()}
        assert mine.sharded_parameters().hub_shapes() == expected
        assert sum(p.numel() for p in mine.parameters()) == model.num_parameters()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("ids", "labels", "says"),
    [
        (IDS[0], IDS[0], r"labels are \[6\]; a model takes"),
        (IDS[:, :0], IDS[:, :0], r"ids are \[2, 0\]|labels are \[2, 0\]"),
        (IDS + 309, IDS, "ids hold 320, and the model has ids 0 to 319"),
        (IDS - 100, IDS, "ids hold -100,"),
        (IDS, IDS + 310, "labels hold 321, .* use -100 where none counts"),
        (IDS, IDS - 1, "labels hold -1,"),
        (IDS, IDS[:, 1:], r"labels are \[2, 5\], and ids \[2, 6\]"),
        (IDS.float(), IDS, r"ids are torch\.float32; a model takes int32 or int64"),
        (IDS.to(torch.uint8), IDS, r"ids are torch\.uint8; a model takes int32 or int64"),
    ],
)
def test_tokens_that_are_not_of_the_model(
    ids: torch.Tensor, labels: torch.Tensor, says: str
) -> None:
    """Where the vocabulary is cut they would pass for another rank's, and the loss be wrong."""
    model = Llama(LLAMA2).init(seed=0)
    with pytest.raises(DataError, match=says):
        model.loss(ids, labels)


def test_a_model_that_is_moved_or_narrowed_keeps_exact_positions() -> None:
    """The frequencies are fp32 wherever the weights go: angles grow with the position."""
    narrow, far = Llama(LLAMA2).init(seed=0).to(torch.bfloat16), IDS + 5000
    assert torch.equal(narrow(IDS, far), Llama(LLAMA2, dtype=torch.bfloat16).init(0)(IDS, far))
    drawn = Llama(LLAMA2, device="meta").to_empty(device="cpu").init(seed=0)
    assert torch.equal(drawn(IDS, far), Llama(LLAMA2).init(seed=0)(IDS, far))


def test_hooks_see_every_layer_but_the_output_projection() -> None:
    """It is part of the loss."""
    model, seen = Llama(LLAMA2).init(seed=0), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(IDS)
    assert {*dict(model.named_modules())} - seen == {"model.layers", "lm_head"}


def test_a_subclass_may_take_the_options_of_hidden_by_name() -> None:
    class Noted(Llama):
        def hidden(self, ids_BS: Any, positions_BS: Any = None, **options: Any) -> torch.Tensor:
            self.options = options
            return super().hidden(ids_BS, positions_BS, **options)

    model, plain = Noted(LLAMA2).init(seed=0), Llama(LLAMA2).init(seed=0)
    documents = torch.zeros_like(IDS)
    given = {"documents_BS": documents}
    assert model.loss(IDS, IDS, **given)[0] == plain.loss(IDS, IDS, **given)[0]
    assert model.options["documents_BS"] is documents
    assert torch.equal(model(IDS, **given), plain(IDS, **given))


def test_the_last_token_and_ignored_labels_are_of_the_model() -> None:
    model = Llama(LLAMA2).init(seed=0)
    _, count = model.loss(IDS + 308, torch.where(IDS > 3, IDS + 308, -100))
    assert count == 8


def test_sequence_parallelism_wants_even_places() -> None:
    class Two(Solo):
        size = 2

    model = Llama(LLAMA2, Two("tp"), sequence_parallel=True)
    with pytest.raises(DataError, match="5 places are not divided by 2 tensor ranks"):
        model(IDS[:, 1:])
    with pytest.raises(ConfigError, match="build it with sequence_parallel=False"):
        generate_tokens(model, [[1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"head_dim": 5}, "model.head_dim=5 is odd"),
        ({"num_key_value_heads": 3}, "model.num_key_value_heads=3 does not divide"),
        ({"num_attention_heads": 0}, "model.num_attention_heads=0 is out of range"),
        ({"num_hidden_layers": 0, "vocab_size": 0}, r"2 problems\n.*hidden_layers=0.*\n.*vocab_"),
    ],
)
def test_a_model_that_cannot_be_is_refused_when_it_is_built(
    wrong: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Llama(dataclasses.replace(LLAMA2, **wrong))


def test_ranks_beyond_the_heads_and_unknown_recompute_are_refused() -> None:
    class Eight(Solo):
        size = 8

    with pytest.raises(ConfigError, match=r"parallel\.tensor=8 does not divide .*heads=4; use"):
        Llama(LLAMA2, Eight("tp"))
    with pytest.raises(ConfigError, match="recompute='ful' is unknown; use none, selective or"):
        Llama(LLAMA2, recompute="ful")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"positions_BS": IDS[:, 1:]}, r"positions are \[2, 5\], and ids \[2, 6\]"),
        ({"positions_BS": IDS[0]}, r"positions are \[6\], and ids \[2, 6\]"),
        ({"documents_BS": IDS[:, 1:]}, r"documents are \[2, 5\], and ids \[2, 6\]"),
        ({"documents_BS": IDS[:1]}, r"documents are \[1, 6\], and ids \[2, 6\]"),
    ],
)
def test_positions_and_documents_are_of_the_ids(given: dict[str, torch.Tensor], says: str) -> None:
    """Documents of another length would be read beyond their end, with a wrong loss."""
    model = Llama(LLAMA2).init(seed=0)
    assert torch.equal(model(IDS, torch.arange(6)[None]), model(IDS))
    with pytest.raises(DataError, match=says):
        model(IDS, **given)
