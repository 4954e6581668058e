"""adapter_config.json: what PEFT's settings say of each module of a Llama.

=======================================  ==========================================================
``target_modules``, ``exclude_modules``  modules with LoRA factors: names, their ends, or a pattern
``layers_to_transform, layers_pattern``  only in these layers
``rank_pattern``, ``alpha_pattern``      other ranks and alphas in some modules
``use_rslora``, ``use_dora``             alpha / sqrt(r); rows of a given length
``modules_to_save``                      modules whose weights are replaced
``trainable_token_indices``              rows of an embedding that are replaced
=======================================  ==========================================================

A Llama has no biases, so ``bias`` changes nothing.  Every other setting that would is refused by
its name.  Source: peft 0.21, ``tuners/tuners_utils.py`` (check_target_module_exists),
``utils/other.py`` (get_pattern_key, set_additional_trainable_modules).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from llamax.config.rules.finetune import LINEAR

# Settings that change the result, and the only value that llamax computes.
SUPPORTED_VALUES: dict[str, object] = {
    "fan_in_fan_out": False,
    "target_parameters": None,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
# Settings of training, or of how PEFT stores and initialises adapters.
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "bias"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config", "lora_dropout"),
}
READ = {
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"),
    *("init_lora_weights", "ensure_weight_tying"),
}
# Initialisations that leave the base unchanged; PiSSA, OLoRA, CorDA, LoftQ, ... subtract from it.
SUPPORTED_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal")
DEFAULT_TARGETS = ("q_proj", "v_proj")  # of PEFT, for a Llama
EMBEDDINGS = "embed_tokens"


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value < high  # type: ignore[operator]


def is_name(value: object) -> bool:
    """Whether a value can be the name of a model or folder, or is absent."""
    return value is None or (isinstance(value, str) and value.isprintable())


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: object) -> bool:
    return _is_number(value, 0, 1e30) and value != 0


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(value: object) -> bool:
    try:
        re.compile(value)  # type: ignore[call-overload]
    except (TypeError, re.error, RecursionError, OverflowError):
        return False
    return True


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_modules(value: object) -> bool:
    return value is None or _are_names(value) or (isinstance(value, str) and _is_pattern(value))


def _are_saved(value: object) -> bool:
    return value is None or (_are_names(value) and all(map(_is_pattern, value)))  # type: ignore[call-overload]


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _are_layers(value: object) -> bool:
    return value is None or type(value) is int or _are_ids(value)


def _are_tokens(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and name and _are_ids(i) for name, i in value.items())
    return value is None or _are_ids(value)


def _are_layer_names(value: object) -> bool:
    names = [value] if isinstance(value, str) else value
    return names is None or (_are_saved(names))


def _by_pattern(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        if value is None:
            return True
        return isinstance(value, dict) and all(
            isinstance(key, str) and _is_pattern(key) and fits(each) for key, each in value.items()
        )

    return check


# Settings that llamax reads: what they must be, in words and as a test.
SETTINGS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a whole number above 0", _is_rank),
    "lora_alpha": ("a number above 0", _is_alpha),
    "lora_dropout": ("0 or more and below 1", lambda v: v is None or _is_number(v, 0, 1)),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "ensure_weight_tying": ("true or false", _is_flag),
    "base_model_name_or_path": ("the name of a model", is_name),
    "target_modules": ("a list of names or a regular expression", _are_modules),
    "exclude_modules": ("a list of names or a regular expression", _are_modules),
    "layers_to_transform": ("a layer or a list of layers", _are_layers),
    "layers_pattern": ("a name or a list of names", _are_layer_names),
    "rank_pattern": ("an object of patterns and ranks", _by_pattern(_is_rank)),
    "alpha_pattern": ("an object of patterns and numbers", _by_pattern(_is_alpha)),
    "modules_to_save": ("a list of names", _are_saved),
    "trainable_token_indices": ("a list of tokens, or one for each module", _are_tokens),
}


@dataclass(frozen=True)
class PeftSettings:
    """The settings of an adapter_config.json that change what the model computes.

    ``stated``: whether it names target modules; only then each of them must have factors.
    """

    r: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    targets: str | Sequence[str] = DEFAULT_TARGETS
    excluded: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    layer_names: Sequence[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    saved: Sequence[str] = ()
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tying: bool = False
    stated: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PeftSettings:
        """The settings of a configuration in which ``problems`` found none."""
        layers, names = config.get("layers_to_transform"), config.get("layers_pattern") or ()
        tokens = config.get("trainable_token_indices")
        tokens = tokens if isinstance(tokens, dict) else {EMBEDDINGS: tokens} if tokens else {}
        targets = config.get("target_modules")
        return cls(
            config["r"],
            float(config["lora_alpha"]),
            bool(config.get("use_rslora")),
            bool(config.get("use_dora")),
            LINEAR if targets == "all-linear" else DEFAULT_TARGETS if targets is None else targets,
            config.get("exclude_modules") or (),
            [layers] if type(layers) is int else layers or None,
            [names] if isinstance(names, str) else names,
            config.get("rank_pattern") or {},
            config.get("alpha_pattern") or {},
            config.get("modules_to_save") or (),
            tokens,
            bool(config.get("ensure_weight_tying")),
            targets is not None,
        )

    @property
    def special(self) -> list[str]:
        """The settings by which scales differ, or by which more than factors change the model."""
        settings: dict[str, object] = {
            "use_dora": self.dora,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "modules_to_save": self.saved,
            "trainable_token_indices": self.tokens,
        }
        return [name for name, value in settings.items() if value]

    def adapts(self, module: str) -> bool:
        """Whether a module has LoRA factors."""
        if isinstance(self.excluded, str):
            if re.fullmatch(self.excluded, module):
                return False
        elif _ends_with(module, self.excluded):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        return _ends_with(module, self.targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.layer_names]
        matches = (re.match(p, module) for p in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        match = next((match for match in matches if match), None)
        return match is not None and int(match["idx"]) in self.layers

    def saves(self, module: str) -> bool:
        """Whether the weights of a module are replaced."""
        names = module.split(".")
        above = (".".join(names[: n + 1]) for n in range(len(names)))
        return any(path.endswith(name) for path in above for name in self.saved)

    def token_rows(self, module: str) -> Sequence[int]:
        """The rows of an embedding that are replaced; none of other modules."""
        return next((ids for name, ids in self.tokens.items() if module.endswith(name)), ())

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return next((r for key, r in self.ranks.items() if _matches(key, module)), self.r)

    def scale(self, module: str) -> float:
        """The factor on the product of a module's factors."""
        r = self.rank(module)
        return next(self._alphas(module), self.alpha) / (sqrt(r) if self.rslora else r)

    def scale_is_doubtful(self, module: str) -> bool:
        """Whether the adapter may have been trained with another scale than ``scale``.

        PEFT sorts keys when it saves: of several that match, another one is then the first.
        """
        keys = [*self.alphas]
        return keys == sorted(keys) and len({*self._alphas(module)}) > 1

    def _alphas(self, module: str) -> Iterator[float]:
        """The alphas of the patterns that match a module; the first one counts."""
        return (alpha for key, alpha in self.alphas.items() if _matches(key, module))


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _ends_with(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Everything in an adapter_config.json that llamax does not support, a line each."""
    if config.get("peft_type") != "LORA":
        kind = shown(config.get("peft_type"))
        yield f"peft_type={kind} is not supported; llamax reads LORA"
    for key, plain in SUPPORTED_VALUES.items():
        if (value := config.get(key)) not in (plain, None, False) and value not in ({}, []):
            yield f"{key}={shown(value)} is not supported; llamax computes {plain!r} only"
    for key, value in config.items():
        if key not in READ | WITHOUT_EFFECT | SUPPORTED_VALUES.keys() and value:
            yield (
                f"{shown(key)}={shown(value)} is a setting that llamax does not know; remove it if "
                "it does not change what the adapter computes"
            )
    first = config.get("init_lora_weights")
    if not isinstance(first, str | bool | None) or str(first).lower() not in SUPPORTED_INITS:
        yield (
            f"init_lora_weights={shown(first)} changes the base of the adapter; save it as "
            "LoRA of the original base with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, (words, fits) in SETTINGS.items():
        if not fits(value := config.get(key)):
            yield f"{key}={shown(value)} is not {words}; save the adapter again"


def shown(value: object) -> str:
    """A value from a file, for a message of one line."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
