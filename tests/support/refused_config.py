"""What a configuration that is refused says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from llamax.config.load import (
    parse_config,
)
from llamax.runtime.errors import ConfigError

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
}


ORIGIN = re.compile(r"^(configuration( with (--[\w.]+=.*? ?)+)?|command line): (?=\S)", re.S)


def refused(tables: dict[str, Any], *overrides: str) -> list[str]:
    """The lines of the one error that ``parse`` raises, without where it was."""
    with pytest.raises(ConfigError) as error:
        parse_config(tables, overrides)
    first, *rest = str(error.value).split("\n")
    if not rest:
        return [ORIGIN.sub("", first)]
    assert re.fullmatch(rf"(configuration|command line): {len(rest)} problems", first)
    return [ORIGIN.sub("", line.removeprefix("  ")) for line in rest]
