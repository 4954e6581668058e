"""The text of a chat template: built in, in a file, or in a tokenizer's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamax.data.chat.templates import BUILT_IN
from llamax.runtime.errors import DataError
from llamax.runtime.files import read_input
from llamax.runtime.hub_files import CHAT_TEMPLATE
from llamax.runtime.json_reader import JsonError, parse_json


def source_of(name_or_path: str) -> str:
    """The text of a template: built in, a Jinja file, or part of a tokenizer's configuration.

    Raises DataError if there is none.
    """
    if name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = Path(name_or_path)
    if path.is_dir():
        inside = (path / CHAT_TEMPLATE, path / "tokenizer_config.json")
        path = next((file for file in inside if file.is_file()), path / "tokenizer_config.json")
    try:
        text = read_input(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) and path.exists() else ""
        raise DataError(
            f"template {name_or_path} is neither built in ({', '.join(BUILT_IN)}) nor a text "
            f"file{why}; give a name, a Jinja file or a tokenizer_config.json"
        ) from None
    return _in_config(text, path) if path.suffix == ".json" else text


def _in_config(text: str, path: Path) -> str:
    """The (default) chat template of a tokenizer's configuration."""
    try:
        found = parse_json(text)
    except JsonError as error:
        raise DataError(f"{path}: {error}; give a tokenizer_config.json") from None
    template: Any = found.get("chat_template") if isinstance(found, Mapping) else None
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template") for each in template if isinstance(each, dict)
        }
        template = named.get("default")
    if not isinstance(template, str) or not template.strip():
        raise DataError(
            f"{path}: has no chat_template; give a Jinja file, or one of {', '.join(BUILT_IN)}"
        )
    return template
