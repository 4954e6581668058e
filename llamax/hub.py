"""``config.json`` of the Hugging Face Hub, both ways.

transformers 4 spells rotary positions ``rope_theta`` + ``rope_scaling`` and the precision
``torch_dtype``; transformers 5 spells them ``rope_parameters`` and ``dtype``.  Both are read; both
are written, because version 4 ignores the new keys without a word.  What is absent has the value
that transformers' ``LlamaConfig`` gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from llamax.config import Model, RopeScaling, refuse

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
PLAIN = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read(hub: Mapping[str, Any]) -> Model:
    """The model of a ``config.json``; raises one ConfigError that lists all that does not fit."""
    rope = _rope(hub)
    refuse(list(_problems(hub, rope)), "config.json")
    eos = hub.get("eos_token_id", 2)
    scaling = {name: rope[name] for name in SCALING} if rope["rope_type"] == "llama3" else None
    return Model(
        **{name: hub[name] for name in SHAPE},
        **{name: _given(hub, name, default) for name, default in DEFAULTS.items()},
        num_key_value_heads=hub.get("num_key_value_heads") or hub["num_attention_heads"],
        head_dim=hub.get("head_dim") or 0,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=RopeScaling(**scaling) if scaling else None,
        bos_token_id=hub.get("bos_token_id", 1),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
    )


def write(model: Model, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model, as transformers 4 and 5 both read it."""
    shape = asdict(model)
    theta, scaling = shape.pop("rope_theta"), shape.pop("rope_scaling")
    typed = scaling and {"rope_type": "llama3", **scaling}
    if isinstance(model.eos_token_id, tuple):
        shape["eos_token_id"] = list(model.eos_token_id)
    return {
        "architectures": ["LlamaForCausalLM"],
        **PLAIN,
        **shape,
        "rope_theta": theta,
        "rope_scaling": typed,
        "rope_parameters": {"rope_theta": theta, **(typed or {"rope_type": "default"})},
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _given(hub: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of a key; the default where it is absent or null."""
    value = hub.get(name)
    return default if value is None else value


def _rope(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in the new spelling, from either."""
    rope = dict(hub.get("rope_parameters") or hub.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", _given(hub, "rope_theta", 10_000.0))
    return rope


def _problems(hub: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[str]:
    for name, only in PLAIN.items():
        if (found := hub.get(name, only)) != only:
            yield f"{name}={found!r} is not supported; llamax computes {only!r} only"
    if hub.get("quantization_config"):
        yield "quantization_config is not supported; use the unquantized model"
    if (partial := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        yield f"partial_rotary_factor={partial} is not supported; llamax computes 1.0"
    for name in SHAPE:
        if not isinstance(found := hub.get(name), int):
            yield f"{name} is {found!r}; a Llama needs a whole number there"
    for name in ("num_key_value_heads", "head_dim", *DEFAULTS):
        if not isinstance(found := _given(hub, name, 0), (int, float)):
            yield f"{name} is {found!r}; it must be a number, true, false or null"
    if not isinstance(found := rope["rope_theta"], (int, float)):
        yield f"rope_theta is {found!r}; it must be a number"
    if rope["rope_type"] not in ("default", "llama3"):
        yield (
            f"rope_type={rope['rope_type']!r} is not supported; llamax computes default and llama3"
        )
    if rope["rope_type"] == "llama3":
        for name in SCALING:
            if not isinstance(found := rope.get(name), (int, float)):
                yield f"{name} of rope_type llama3 is {found!r}; it must be a number"
