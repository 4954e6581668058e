"""The ids of a tokenizer, computed many times faster by gigatoken.

The engine that defines the ids (sentencepiece, tokenizers, tiktoken) is the reference: it judges
the fast engine on a sample before any document is encoded, and encodes

* tokenizers of kinds that gigatoken does not know (``llamax.data.tokenizer.fast_settings``);
* texts with characters that Unicode has classified lately: engines of different age split them
  differently.

gigatoken keeps the ids of every distinct word and never forgets one, so it is loaded anew when it
has grown by CACHE_BYTES.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llamax.data.tokenizer.cuts import Ids
from llamax.data.tokenizer.fast_settings import Unsupported
from llamax.data.tokenizer.unicode_ages import has_recent

Encode = Callable[[str], Sequence[int]]

CACHE_BYTES = 64 * 2**20
CHECKED = 2**20  # characters between two looks at the memory
WORDS = 2000  # of the vocabulary in the sample
RELOADED = 2**22  # characters that are encoded at least before it is loaded anew
UNSEEN = 2**26  # characters after which it is loaded anew where its memory cannot be seen

STATM = Path("/proc/self/statm")


class FastEngine:
    """gigatoken with the settings of a tokenizer.json, or the ranks of a tiktoken file.

    ``by_class``: whether texts are split by classes of characters.  The engine is loaded by its
    first use, also in a process that received this object.
    """

    def __init__(self, source: str | Path, by_class: bool, prefix: str = "") -> None:
        self._source, self._by_class, self._prefix = source, by_class, prefix
        self._engine: Any = None
        self._since_check = self._since_load = self._base_bytes = 0

    def encode(self, text: str, reference: Encode, begins: bool = True) -> Ids:
        """The ids of a text; ``begins``: whether it begins a document, perhaps with a space."""
        if self._by_class and not text.isascii() and has_recent(text):
            return np.array(reference(text), np.uint32)
        if begins and self._prefix and text:
            text = self._prefix + text
        self._since_check += len(text)
        if self._engine is None or (self._since_check > CHECKED and self._is_full()):
            self._load()
        ids: Ids = self._engine.encode(text)
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def _load(self) -> None:
        from gigatoken import gigatoken_rs

        self._engine = None  # free the old one first
        if isinstance(self._source, Path):
            self._engine = gigatoken_rs.BPETokenizer.from_tiktoken(self._source, "olmo3")
        else:
            self._engine = gigatoken_rs.load_hf_json(self._source)
        self._since_check = self._since_load = 0
        self._base_bytes = resident_bytes()

    def _is_full(self) -> bool:
        self._since_load += self._since_check
        self._since_check = 0
        if not (resident := resident_bytes()):
            return self._since_load > UNSEEN
        return self._since_load > RELOADED and resident - self._base_bytes > CACHE_BYTES


def judged(
    make: Callable[[], FastEngine], reference: Encode, special: Sequence[str], words: Sequence[str]
) -> tuple[FastEngine | None, str]:
    """The engine that ``make`` makes, if it agrees with the reference; else None, and why.

    ``special`` are names of special tokens, ``words`` texts of the vocabulary.
    """
    if not find_spec("gigatoken"):
        return None, "the package gigatoken is not installed"
    try:
        engine = make()
        for text in _samples(special, words[:: max(1, len(words) // WORDS)]):
            if engine.encode(text, reference).tolist() != list(reference(text)):
                return None, f"gigatoken encodes {text[:40]!a} differently"
    except Unsupported as error:
        return None, str(error)
    except BaseException as error:  # a panic of Rust is a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return None, f"gigatoken cannot read it: {' '.join(str(error).split())[:200]}"
    return engine, ""


@contextmanager
def without_gc() -> Iterator[None]:
    """Look for no garbage inside: a vocabulary makes 10^5 objects, and none of them is."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def resident_bytes() -> int:
    """The resident memory of this process; 0 where the system does not show it."""
    try:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _samples(special: Sequence[str], words: Sequence[str]) -> Iterator[str]:
    """Texts on which engines that are not the same differ."""
    yield from (" " * count for count in (*range(1, 70), 128, 129, 1000))
    yield from ("x" + " " * count + "y" + "\n" * count + "\t" * count for count in range(20))
    for name in special:
        yield from (name, f"a{name}b", f" {name} \n{name}{name}")
    yield from ("=" * 100, "aaaaaaaaa" * 12, "1234567 12 1,000.5", "\r\n\r\n \n  \r x", "\0\1\x7f")
    yield from ("I'm we've you'LL 'S 's'd \u017f '\u017f it\u2019s", "HTTPServer camelCase_x ")
    yield from ("\x85 \xa0\u2003\u200b\u2028\u3000\ufeff|\x1c\x1d \u180e", "▁ ▁▁a ▁\u2581b", "")
    yield "Ünïcödé e\u0301 ﬁ Ⅷ ½ ² ٣٤ 한국어 문장, 日本語。中文 ไทย हिन्दी עברית العربية"
    yield "\U0001f469\u200d\U0001f4bb\U0001f1f0\U0001f1f7 \U0001d400\U00020000 \ue000 <0x41> <unk>"
    yield "def f(self, *args):\n    return [x**2 for x in args]  # ok\n\n\n\tif (a!=b){c();}\r\n"
    yield from words
    yield " ".join(words)
