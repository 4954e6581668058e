"""The files of a model's folder, and which of them llamax needs of a repository: those alone.

Pickles, ``original/`` and weights of other frameworks are never among them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llamax.runtime.hub import Wanted

CONFIG_JSON, GENERATION_CONFIG = "config.json", "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
CONFIG_FILES = (CONFIG_JSON, GENERATION_CONFIG, ADAPTER_CONFIG)
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
)
BASE_JSON, PROMPT_JSON = "base.json", "llamax_prompt.json"  # what llamax adds to a folder
SINGLE_FILE, INDEX_JSON = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NUMBERED = re.compile(r"(model|shard-\d{5}-model)-\d{5}-of-\d{5}\.safetensors")


def _config(names: Sequence[str]) -> list[str]:
    return [name for name in CONFIG_FILES if name in names]


def _tokenizer(names: Sequence[str]) -> list[str]:
    chosen = [name for name in TOKENIZER_FILES if name in names]
    ranks = [name for name in names if "/" not in name and name.endswith(".tiktoken")]
    if not ranks and not {"tokenizer.json", "tokenizer.model"} & {*chosen}:
        return []
    return chosen + ranks


def _model(names: Sequence[str]) -> list[str]:
    if SINGLE_FILE in names:
        weights = [SINGLE_FILE]
    else:
        weights = [name for name in names if NUMBERED.fullmatch(name)]
        weights += [INDEX_JSON] if INDEX_JSON in names else []
    weights += [ADAPTER_WEIGHTS] if ADAPTER_WEIGHTS in names else []
    beside = [name for name in (BASE_JSON, PROMPT_JSON) if name in names]
    return [*_config(names), *_tokenizer(names), *beside, *weights] if weights else []


CONFIG = Wanted("config.json", _config)
TOKENIZER = Wanted("tokenizer.json, tokenizer.model or *.tiktoken", _tokenizer)
MODEL = Wanted("weights in safetensors, and llamax opens no pickles", _model)
