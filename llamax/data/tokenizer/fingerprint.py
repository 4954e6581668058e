"""The fingerprint of a tokenizer: equal fingerprints, equal ids.

It is the sha256 of the tokenizer's file, unless the files beside it change ids: by added tokens,
other special tokens, another BOS or EOS, or texts that begin without BOS.  Then what they change is
hashed too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from llamax.data.tokenizer.special_tokens import ADDED, CONFIG, NAMED

BESIDE = (CONFIG, NAMED, ADDED)
State = dict[str, Any]  # what decides ids besides the file


def fingerprint(raw: bytes, alone: State, together: State) -> str:
    """The fingerprint of the file ``raw``.

    ``alone``: what the file says by itself; ``together``: what it says with the files beside it.
    """
    digest = hashlib.sha256(raw).hexdigest()
    if alone == together:
        return digest
    text = json.dumps(together, sort_keys=True)
    return hashlib.sha256(f"{digest} {text}".encode()).hexdigest()
