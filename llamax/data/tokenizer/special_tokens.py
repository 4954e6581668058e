"""The special and added tokens that the files beside a tokenizer name.

===========================  ====================================================================
``tokenizer_config.json``    named tokens (``bos_token``, ``pad_token``, ...), added tokens
                             (``added_tokens_decoder``), further special ones, ``add_bos_token``
``special_tokens_map.json``  named tokens, in folders without ``added_tokens_decoder``
``added_tokens.json``        ids of added tokens, in folders without ``added_tokens_decoder``
===========================  ====================================================================

Source: transformers 5, ``PreTrainedTokenizerBase._from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llamax.runtime.hub_files import CHAT_TEMPLATE
from llamax.runtime.json_reader import JsonError, read_object

MOST_TOKENS = 2**24  # engines need memory for all ids up to the largest
CONFIG, NAMED, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES = (CONFIG, NAMED, ADDED, CHAT_TEMPLATE)  # beside a tokenizer, and part of it


class AddedToken(NamedTuple):
    """A token outside the trained vocabulary; a special one is never made from a document's text.

    ``lstrip`` and ``rstrip``: white space before or after it belongs to it.
    """

    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass
class SpecialTokens:
    """What the files in a folder say about special tokens.

    ``named``: texts by name, such as eos_token.  ``extra``: further special tokens.  ``added``:
    added tokens by id.  ``add_bos``: whether texts begin with BOS; None: not stated.
    """

    named: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)
    add_bos: bool | None = None

    @classmethod
    def beside(cls, path: Path) -> SpecialTokens:
        """Those of the folder of the tokenizer ``path``.

        Raises ValueError for a file that is not a JSON object.
        """
        config = _object(path.with_name(CONFIG))
        decoder = config.get("added_tokens_decoder")
        older = {} if decoder else _object(path.with_name(NAMED))
        found = cls(dict(_named({**config, **older})))
        for key in ("extra_special_tokens", "additional_special_tokens"):
            for values in (config.get(key), older.get(key)):
                if isinstance(values, Mapping):
                    found.named |= {name: text for name in values if (text := _text(values[name]))}
                    values = list(values.values())
                texts = map(_text, values if isinstance(values, list) else [])
                found.extra += [text for text in texts if text and text not in found.extra]
        if isinstance(add_bos := config.get("add_bos_token"), bool):
            found.add_bos = add_bos
        special = {*found.named.values(), *found.extra}
        if not decoder:
            for text, number in _object(path.with_name(ADDED)).items():
                found.added.setdefault(token_id(number), AddedToken(text, text in special))
        for number, token in (decoder or {}).items():
            text = str(token["content"])
            strips = (bool(token.get("lstrip")), bool(token.get("rstrip")))
            is_special = bool(token.get("special")) or text in special
            found.added[token_id(number)] = AddedToken(text, is_special, *strips)
        return found


def files_beside(tokenizer: Path) -> list[Path]:
    """The files beside a tokenizer's that belong to it."""
    return [path for path in map(tokenizer.with_name, FILES) if path.is_file()]


def stripping(tokens: Iterable[AddedToken]) -> dict[str, tuple[bool, bool]]:
    """The special tokens that take white space before or after them."""
    return {
        token.text: (token.lstrip, token.rstrip)
        for token in tokens
        if token.special and (token.lstrip or token.rstrip)
    }


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The named tokens among the values of a configuration."""
    for key, value in values.items():
        if key.endswith("_token") and (text := _text(value)):
            yield key, text


def token_id(value: Any) -> int:
    """The id of a token; ValueError if it is below 0 or not below MOST_TOKENS."""
    number = int(value)
    if not 0 <= number < MOST_TOKENS:
        raise ValueError(f"{number} is not the id of a token")
    return number


def _text(value: Any) -> str:
    """The text of a token, written as text or as an object; empty for anything else."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else ""


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except JsonError as error:
        raise ValueError(f"{path.name} {error}") from None
