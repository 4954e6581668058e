"""The fingerprint of a tokenizer: equal fingerprints, equal ids.

It is the sha256 of the tokenizer's file, unless the files beside it change ids: by added tokens,
other special tokens, another BOS or EOS, or texts that begin without BOS.  Then what they change is
hashed too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from llamax.data.tokenizer.special_tokens import ADDED, CONFIG, NAMED, AddedToken

BESIDE = (CONFIG, NAMED, ADDED)
State = dict[str, Any]  # what decides ids besides the file


class WithTokens(Protocol):
    """The part of a tokenizer that decides ids besides the trained vocabulary."""

    special: dict[str, int]
    added: dict[int, AddedToken]
    strips: dict[str, tuple[bool, bool]]
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool


def fingerprint(raw: bytes, alone: State, together: State) -> str:
    """The fingerprint of the file ``raw``.

    ``alone``: what the file says by itself; ``together``: what it says with the files beside it.
    """
    digest = hashlib.sha256(raw).hexdigest()
    if alone == together:
        return digest
    text = json.dumps(together, sort_keys=True)
    return hashlib.sha256(f"{digest} {text}".encode()).hexdigest()


def state_of(tokenizer: WithTokens) -> State:
    """What decides ids besides the trained vocabulary."""
    return {
        "special": sorted(tokenizer.special.items()),
        "added": sorted([number, *token] for number, token in tokenizer.added.items()),
        "strips": sorted(tokenizer.strips.items()),
        "bos": [tokenizer.bos_id, tokenizer.adds_bos],
        "eos": tokenizer.eos_id,
    }
