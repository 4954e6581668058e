"""The shape of a network, and its conversion from and to ``config.json`` of Hugging Face.

transformers 4 writes rotary positions as ``rope_theta`` and ``rope_scaling`` and the precision as
``torch_dtype``; transformers 5 writes ``rope_parameters`` and ``dtype``.  Both spellings are read
and written, because version 4 silently ignores the new keys.  An absent key has the value that
transformers' ``LlamaConfig`` gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llamax.config.types import Count, Natural, Positive
from llamax.runtime.errors import refuse

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
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
MAX_SIZE, MAX_LAYERS = 1 << 28, 1 << 14  # a hundred times those of any model
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of low rotary frequencies (rope type "llama3")."""

    factor: Positive = 8.0
    """Stretching of low frequencies [times]."""
    low_freq_factor: Positive = 1.0
    """Turns in the original context below which a frequency is stretched in full [turns]."""
    high_freq_factor: Positive = 4.0
    """Turns in the original context above which a frequency is kept [turns]."""
    original_max_position_embeddings: Count = 8192
    """Context length before stretching [tokens]."""


@dataclass(frozen=True)
class ModelConfig:
    """The network's shape; ``head_dim`` 0 becomes hidden_size / num_attention_heads."""

    hidden_size: Count
    """Width of the residual stream [features]."""
    intermediate_size: Count
    """Width of the feed-forward [features]."""
    num_hidden_layers: Count
    """Depth [layers]."""
    num_attention_heads: Count
    """Query heads [heads]."""
    num_key_value_heads: Count
    """Key/value heads, shared by query heads [heads]."""
    vocab_size: Count
    """Vocabulary of the tokenizer [tokens]."""
    head_dim: Count = 0
    """Width of a head; 0: hidden_size / num_attention_heads [features]."""
    max_position_embeddings: Count = 2048
    """Longest context that the model is meant for [tokens]."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's rotary scaling; absent: none."""
    rms_norm_eps: Positive = 1e-5
    """Term added to the mean square in norms."""
    tie_word_embeddings: bool = False
    """One matrix for embedding and output."""
    initializer_range: Positive = 0.02
    """Standard deviation of initial weights."""
    bos_token_id: Natural | None = None
    """Token that starts a text; absent: none [id]."""
    eos_token_id: Natural | tuple[Natural, ...] | None = None
    """Token or tokens that end a text; absent: none [id]."""

    def __post_init__(self) -> None:
        if not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text, always as a tuple."""
        if isinstance(self.eos_token_id, tuple):
            return self.eos_token_id
        return () if self.eos_token_id is None else (self.eos_token_id,)

    def kv_replicas(self, tp: int) -> int:
        """The number of ranks, of ``tp`` tensor ranks, that hold the same key/value head."""
        return max(1, tp // self.num_key_value_heads)

    def num_parameters(self) -> int:
        """The exact number of weights of the whole model, tied ones counted once."""
        D, E = self.hidden_size, self.head_dim
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * D * self.intermediate_size + 2 * D
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + D

    def differences(self, other: ModelConfig) -> list[str]:
        """The fields that make ``other`` compute something else with the same weights."""
        harmless = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id")
        names = [each.name for each in fields(self) if each.name not in harmless]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @classmethod
    def from_hub(cls, hub: Mapping[str, Any]) -> ModelConfig:
        """The model that a Hugging Face ``config.json`` describes.

        The file may come from anyone, so sizes beyond any model and requests to run code are
        refused before anything is allocated.  Raises one ConfigError that lists everything that is
        not a Llama or that llamax does not compute.
        """
        rope = _rope(hub)
        refuse(list(_problems(hub, rope)), "config.json")
        eos = hub.get("eos_token_id", 2)
        scaling = {name: rope[name] for name in SCALING} if rope["rope_type"] == "llama3" else None
        return cls(
            **{name: hub[name] for name in SHAPE},
            **{name: _value(hub, name, default) for name, default in DEFAULTS.items()},
            num_key_value_heads=hub.get("num_key_value_heads") or hub["num_attention_heads"],
            head_dim=hub.get("head_dim") or 0,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=RopeScaling(**scaling) if scaling else None,
            bos_token_id=hub.get("bos_token_id", 1),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )

    def to_hub(self, dtype: str) -> dict[str, Any]:
        """The ``config.json`` of this model, for transformers 4 and 5.

        ``dtype`` is float32, bfloat16 or float16.
        """
        shape = asdict(self)
        theta, scaling = shape.pop("rope_theta"), shape.pop("rope_scaling")
        typed = scaling and {"rope_type": "llama3", **scaling}
        if isinstance(self.eos_token_id, tuple):
            shape["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": ["LlamaForCausalLM"],
            **FIXED,
            **shape,
            "rope_theta": theta,
            "rope_scaling": typed,
            "rope_parameters": {"rope_theta": theta, **(typed or {"rope_type": "default"})},
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
        }


def _value(hub: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of a key; the default where it is absent or null."""
    value = hub.get(name)
    return default if value is None else value


def _rope(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in the spelling of transformers 5, from either spelling.

    Where a file has both, every version of transformers takes ``rope_scaling``.
    """
    given = hub.get("rope_scaling") or hub.get("rope_parameters") or {}
    rope = dict(given) if isinstance(given, dict) else {"rope_type": given}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", _value(hub, "rope_theta", 10_000.0))
    return rope


def _problems(hub: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[str]:
    for name in CODE_KEYS:
        if hub.get(name):
            yield f"{name} asks for code that comes with the model; llamax runs none: remove it"
    for name, only in FIXED.items():
        if (found := hub.get(name, only)) != only:
            yield f"{name}={found!r} is not supported; llamax computes {only!r} only"
    if hub.get("quantization_config"):
        yield "quantization_config is not supported; use the unquantized model"
    if (partial := _value(rope, "partial_rotary_factor", 1.0)) != 1.0:
        yield f"partial_rotary_factor={partial} is not supported; llamax computes 1.0"
    sizes = {name: hub.get(name) for name in SHAPE}
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        if hub.get(name) is not None:
            sizes[name] = hub[name]
    wrong = False
    for name, found in sizes.items():
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if type(found) is not int or not 1 <= found <= most:
            wrong = True
            yield f"{name} is {found!r:.40}; a Llama needs a whole number from 1 to {most} there"
    if not wrong:
        yield from _heads(sizes)
    for name in ("rms_norm_eps", "initializer_range"):
        if not _positive(found := _value(hub, name, DEFAULTS[name])):
            yield f"{name} is {found!r:.40}; it must be a number above 0"
    if not isinstance(found := _value(hub, "tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings is {found!r:.40}; it must be true or false"
    for name in ("bos_token_id", "eos_token_id"):
        found = hub.get(name)
        for token in found if isinstance(found, list) and name[0] == "e" else [found]:
            if token is not None and (type(token) is not int or token < 0):
                yield f"{name} is {found!r:.40}; it must be the number of a token, or null"
    if not _positive(found := rope["rope_theta"]):
        yield f"rope_theta is {found!r:.40}; it must be a number above 0"
    if rope["rope_type"] not in ("default", "llama3"):
        yield (
            f"rope_type={rope['rope_type']!r:.40} is not supported; llamax computes default and "
            "llama3"
        )
    if rope["rope_type"] == "llama3":
        for name in SCALING:
            if not _positive(found := rope.get(name)):
                yield f"{name} of rope_type llama3 is {found!r:.40}; it must be a number above 0"


def _heads(sizes: Mapping[str, Any]) -> Iterator[str]:
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv = sizes.get("num_key_value_heads", heads)
    if heads % kv:
        yield f"num_key_value_heads={kv} does not divide num_attention_heads={heads}"
    given, whole = sizes.get("head_dim"), hidden // heads
    if given is not None and given % 2:
        yield f"head_dim={given} is odd, and rotary positions turn pairs of features"
    elif given is None and (whole % 2 or not whole):
        yield f"hidden_size={hidden} and num_attention_heads={heads} give no even head_dim"


def _positive(number: object) -> bool:
    return type(number) in (int, float) and 0 < number < math.inf  # type: ignore[operator]
