"""Model configurations: config.json both ways, the parameter count, unsupported models."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.configs import MODEL

from llamax.config.model import ModelConfig, RopeScaling
from llamax.runtime.errors import ConfigError


def test_heads_take_their_width_from_the_hidden_size() -> None:
    assert MODEL.head_dim == 8
    assert replace(MODEL, head_dim=32).head_dim == 32


def test_end_tokens_are_always_a_tuple() -> None:
    assert [replace(MODEL, eos_token_id=e).eos_token_ids for e in (None, 0, (1, 2))] == [
        (),
        (0,),
        (1, 2),
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [0, 32])
def test_parameters_are_counted_as_transformers_counts_them(tied: bool, head_dim: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = replace(MODEL, tie_word_embeddings=tied, head_dim=head_dim, rope_scaling=None)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**model.to_hub("float32")))
    assert model.num_parameters() == sum(p.numel() for p in theirs.parameters())


# ---- config.json

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


HUB = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 101,
}


def test_absent_keys_have_the_values_of_transformers() -> None:
    from transformers import LlamaConfig

    model, theirs = ModelConfig.from_hub(HUB), LlamaConfig(**HUB)
    for name in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(model, name) == getattr(theirs, name), name
    assert model.rms_norm_eps == 1e-6
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]
    assert model.rope_scaling is None
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"))
    assert ModelConfig.from_hub({**HUB, **nulls}) == model


def test_both_spellings_of_rope_are_read() -> None:
    scaling = RopeScaling(32.0, 1.0, 4.0, 64)
    old = ModelConfig.from_hub({**HUB, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = ModelConfig.from_hub({**HUB, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    legacy = {**LLAMA3, "type": "llama3"}
    del legacy["rope_type"]
    assert (
        old == new == ModelConfig.from_hub({**HUB, "rope_theta": 500_000, "rope_scaling": legacy})
    )
    assert (old.rope_theta, old.rope_scaling) == (5e5, scaling)
    plain = {**HUB, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert (ModelConfig.from_hub(plain).rope_theta, ModelConfig.from_hub(plain).rope_scaling) == (
        7.0,
        None,
    )


@pytest.mark.parametrize("first", [{"rope_type": "default"}, LLAMA3])
def test_the_older_spelling_of_rope_wins_as_in_transformers(first: dict[str, Any]) -> None:
    """Where a file has both and they differ; a theta of the newer one is not read then."""
    from transformers import LlamaConfig

    (second,) = (rope for rope in ({"rope_type": "default"}, LLAMA3) if rope != first)
    hub = {**HUB, "rope_scaling": first, "rope_parameters": {"rope_theta": 5e5, **second}}
    for more in ({}, {"rope_theta": 7e4}):
        model, theirs = ModelConfig.from_hub({**hub, **more}), LlamaConfig(**hub, **more)
        assert theirs.rope_parameters["rope_type"] == first["rope_type"]
        assert (model.rope_scaling is None) == (first["rope_type"] == "default")
        assert model.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_share_of_features_that_turns_may_be_null() -> None:
    rope = {"rope_theta": 7.0, "rope_type": "default", "partial_rotary_factor": None}
    assert ModelConfig.from_hub({**HUB, "rope_parameters": rope}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"model_type": "qwen2"},
            "model_type='qwen2' is not supported; llamax computes 'llama' only",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; llamax computes 'silu' only"),
        (
            {"attention_bias": True},
            "attention_bias=True is not supported; llamax computes False only",
        ),
        ({"mlp_bias": True}, "mlp_bias=True is not supported; llamax computes False only"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type='linear' is not supported; llamax computes default and llama3",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type='yarn' is not supported; llamax computes default and llama3",
        ),
        (
            {"rope_scaling": {**LLAMA3, "factor": None}},
            "factor of rope_type llama3 is None; it must be a number above 0",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported; llamax computes 1.0",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is not supported; use the unquantized model",
        ),
        (
            {"head_dim": "8"},
            "head_dim is '8'; a Llama needs a whole number from 1 to 268435456 there",
        ),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it must be a number above 0"),
        (
            {"hidden_size": "64"},
            "hidden_size is '64'; a Llama needs a whole number from 1 to 268435456 there",
        ),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000; a Llama needs a whole number from 1 to 16384 there",
        ),
        (
            {"vocab_size": 10**30},
            f"vocab_size is {10**30}; a Llama needs a whole number from 1 to 268435456 there",
        ),
        (
            {"auto_map": {"AutoModelForCausalLM": "evil.Llama"}},
            "auto_map asks for code that comes with the model; llamax runs none: remove it",
        ),
        (
            {"trust_remote_code": True},
            "trust_remote_code asks for code that comes with the model; llamax runs none: "
            "remove it",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        (
            {"eos_token_id": [2, "3"]},
            "eos_token_id is [2, '3']; it must be the number of a token, or null",
        ),
        (
            {"rope_scaling": ["llama3"], "rope_parameters": None},
            "rope_type=['llama3'] is not supported; llamax computes default and llama3",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads=3 does not divide num_attention_heads=4",
        ),
        ({"head_dim": 7}, "head_dim=7 is odd, and rotary positions turn pairs of features"),
        (
            {"hidden_size": 56},
            "hidden_size=56 and num_attention_heads=8 give no even head_dim",
        ),
        (
            {"hidden_size": 6},
            "hidden_size=6 and num_attention_heads=8 give no even head_dim",
        ),
    ],
)
def test_what_is_not_a_llama_is_refused(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hub({**HUB, **change})
    assert str(error.value) == f"config.json: {line}"


def test_all_refusals_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hub({"model_type": "gpt2", "mlp_bias": True})
    assert str(error.value).startswith("config.json: 7 problems\n  model_type='gpt2'")


models = st.builds(
    replace,
    st.just(MODEL),
    hidden_size=st.sampled_from([MODEL.hidden_size, 3]),  # heads have a width of their own
    head_dim=st.sampled_from([8, 16]),
    rope_theta=st.floats(1.0, 1e7),
    rms_norm_eps=st.floats(1e-7, 1e-3),
    tie_word_embeddings=st.booleans(),
    rope_scaling=st.none() | st.builds(RopeScaling, factor=st.floats(1.0, 64.0)),
    bos_token_id=st.none() | st.integers(0, 100),
    eos_token_id=st.none()
    | st.integers(0, 100)
    | st.lists(st.integers(0, 100), min_size=1).map(tuple),
)


@given(models)
def test_a_model_survives_config_json(model: ModelConfig) -> None:
    import json

    assert ModelConfig.from_hub(json.loads(json.dumps(model.to_hub("bfloat16")))) == model


@given(models.filter(lambda model: model.hidden_size % model.num_attention_heads == 0))
def test_transformers_reads_what_we_write(model: ModelConfig) -> None:
    import torch
    from transformers import LlamaConfig

    model = replace(model, max_position_embeddings=16384)
    theirs = LlamaConfig.from_dict(model.to_hub("bfloat16"))
    assert theirs.dtype in (torch.bfloat16, "bfloat16")
    assert theirs.rope_parameters["rope_theta"] == model.rope_theta
    if model.rope_scaling:
        assert theirs.rope_parameters["rope_type"] == "llama3"
        for each in fields(model.rope_scaling):
            assert theirs.rope_parameters[each.name] == getattr(model.rope_scaling, each.name)
    else:
        assert theirs.rope_parameters["rope_type"] == "default"
    for name in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "bos_token_id"):
        assert getattr(theirs, name) == getattr(model, name)
    assert ModelConfig.from_hub(theirs.to_dict()) == model


def test_both_generations_of_keys_are_written() -> None:
    hub = MODEL.to_hub("float32")
    assert hub["dtype"] == hub["torch_dtype"] == "float32"
    assert hub["rope_theta"] == hub["rope_parameters"]["rope_theta"] == 10_000.0
    assert hub["rope_scaling"]["rope_type"] == hub["rope_parameters"]["rope_type"] == "llama3"
    assert hub["architectures"] == ["LlamaForCausalLM"]
    plain = replace(MODEL, rope_scaling=None).to_hub("float32")
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"] == {"rope_theta": 10_000.0, "rope_type": "default"}
