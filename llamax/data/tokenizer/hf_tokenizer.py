"""A Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llamax.data.tokenizer.cuts import Ids, compiled, cuts_of_engine, steps_of
from llamax.data.tokenizer.fast_engine import FastEngine, judged, without_gc
from llamax.data.tokenizer.fast_settings import Unsupported, byte_letters, of_engine
from llamax.data.tokenizer.fingerprint import fingerprint, state_of
from llamax.data.tokenizer.special_tokens import (
    AddedToken,
    SpecialTokens,
    stripping,
    token_id,
)
from llamax.runtime.logging import logger

if TYPE_CHECKING:
    import tokenizers

BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
SPACE = re.compile(r"[\s:,]*")  # between the keys and values of JSON
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}
PLACES = ("whole", "inside", "rest")
ENGINES = ("engine", "_engines")  # attributes that each process loads for itself


class HuggingFace:
    """A Hugging Face ``tokenizer.json``; BOS and EOS by the files beside it, or by name."""

    memory = 256

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path, self._raw = path, raw
        self._beside = SpecialTokens()
        self._fast: dict[str, FastEngine] = {}  # by place, after speed_up
        self.engine.encode_special_tokens = False
        self.named: dict[str, str] = {}
        self._find_special()
        alone = state_of(self)
        self._beside = beside = SpecialTokens.beside(path)
        self._add(self.engine)
        ids = self.engine.get_vocab(with_added_tokens=False).values()
        self.base_size = max(ids, default=-1) + 1
        added = self.engine.get_added_tokens_decoder()
        self.vocab_size = token_id(max([self.base_size - 1, *added])) + 1
        self.named, self.space_after_bos = beside.named, False
        self._find_special()
        if self.bos_id is not None and beside.add_bos not in (None, self.adds_bos):
            _warn_of_add_bos(path, self.adds_bos)
        self.fingerprint = fingerprint(raw, alone, state_of(self))
        self.engine.encode_special_tokens = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ENGINES}

    @cached_property
    def _engines(self) -> dict[str, Any]:
        """The engines of places that are not as the whole."""
        return {}

    @cached_property
    def engine(self) -> tokenizers.Tokenizer:
        """The engine of tokenizers, to which the names of special tokens are text."""
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(self._raw.decode())
        engine.no_truncation()
        engine.no_padding()
        self._add(engine)
        engine.encode_special_tokens = True
        return engine

    def _find_special(self) -> None:
        """Set the special tokens, and BOS and EOS among them, from the engine and the names."""
        self.bos_id = self._special("bos_token", BOS)
        self.eos_id = self._special("eos_token", EOS)
        # As in transformers 5: beside a tokenizer.json its add_bos_token has no effect.
        first = self.engine.encode("a").ids[:1]
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        added = self.engine.get_added_tokens_decoder()
        self.special = {str(token): i for i, token in added.items() if token.special}
        self.added = {
            i: AddedToken(token.content, token.special, token.lstrip, token.rstrip)
            for i, token in added.items()
        }
        self.strips = stripping(self.added.values())

    def _add(self, engine: Any) -> None:
        """Add the tokens that the files beside it name and it lacks, as transformers does."""
        import tokenizers

        beside = self._beside
        known = {token.content for token in engine.get_added_tokens_decoder().values()}
        tokens = [token for _, token in sorted(beside.added.items())]
        names = (*beside.named.values(), *beside.extra)
        tokens += [AddedToken(name, True) for name in names]
        for token in tokens:
            if token.text not in known:
                known.add(token.text)
                strips = {"lstrip": token.lstrip, "rstrip": token.rstrip}
                kind = {"special": token.special, "normalized": not token.special}
                engine.add_tokens([tokenizers.AddedToken(token.text, **strips, **kind)])

    def _special(self, key: str, usual: Iterable[str]) -> int | None:
        names = [self.named[key]] if key in self.named else []
        ids = (self.engine.token_to_id(name) for name in (*names, *usual))
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return list(self.engine.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.engine.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        piece, decoder = self.engine.id_to_token(token), self._decoder
        if piece is not None and token not in self.added:
            if "ByteLevel" in decoder and set(piece) <= set(BYTES):
                return bytes(BYTES[letter] for letter in piece)
            if "ByteFallback" in decoder and (byte := BYTE.fullmatch(piece)):
                return bytes.fromhex(byte[1])
            if "▁" in decoder:
                return str(piece).replace("▁", " ").encode()
        return self.decode([token]).encode()

    @cached_property
    def _decoder(self) -> str:
        """The settings of the decoder as text."""
        return json.dumps(_state(self.engine.decoder), ensure_ascii=False)

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        return [self._ids("whole", text) for text in texts]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        return [self._ids("inside", text) for text in texts]

    def encode_rest(self, text: str) -> Ids:
        return self._ids("rest", text)

    def _ids(self, place: str, text: str) -> Ids:
        """The ids of a text at a place: "whole", "inside" a document, or the "rest" after a cut."""
        if (fast := self._fast.get(place)) is not None:
            return fast.encode(text, partial(self._reference, place))
        return np.array(self._reference(place, text), np.uint32)

    def _reference(self, place: str, text: str) -> list[int]:
        """The ids of a text at a place by the engine of tokenizers."""
        return list(self._engine_at(place).encode(text, add_special_tokens=False).ids)

    def _engine_at(self, place: str) -> Any:
        import tokenizers

        if place not in self._places.settings:
            return self.engine
        if place not in self._engines:
            engine = tokenizers.Tokenizer.from_str(self._places.settings[place])
            engine.encode_special_tokens = True
            self._engines[place] = engine
        return self._engines[place]

    @without_gc()
    def speed_up(self) -> str:
        settings, model = self._settings()
        self._places = places_of(settings)
        words = list(settings["model"].get("vocab") or ())
        try:
            sources = {"whole": _fast_settings(settings, model)}
            del settings, model  # some hundred bytes for each token
            for place, text in self._places.settings.items():
                sources[place] = _fast_settings(json.loads(text))
        except Unsupported as error:
            return str(error)
        engines: dict[str, FastEngine] = {}
        for place, (text, by_class) in sources.items():
            engine, fault = judged(
                partial(FastEngine, text, by_class),
                partial(self._reference, place),
                [*self.special],
                words,
            )
            if engine is None:
                return fault
            engines[place] = engine
        self._fast = {place: engines.get(place, engines["whole"]) for place in PLACES}
        return ""

    @property
    def cuts(self) -> re.Pattern[str] | None:
        return self._places.cuts

    @cached_property
    def _places(self) -> Places:
        return places_of(self._settings()[0])

    def _settings(self) -> tuple[dict[str, Any], str]:
        """The settings of the engine as ``to_str`` gives them, in a quarter of its time.

        The vocabulary and the merges are those of the file; beside the settings is the text of
        ``model`` there, which takes longer to write than to read; empty if it does not say its
        type.
        """
        given, engine = dict[str, Any](), self.engine
        texts = dict[str, str]()
        for key, value, text in members(self._raw.decode()):
            given[key], texts[key] = value, text
        kind = type(engine.model).__name__
        model = texts["model"] if given["model"].get("type") == kind else ""
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        settings = {
            **given,
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, **{name: getattr(token, name) for name in names}}
                for i, token in sorted(engine.get_added_tokens_decoder().items())
            ],
            "normalizer": _state(engine.normalizer),
            "pre_tokenizer": _state(engine.pre_tokenizer),
            "model": {**given["model"], "type": kind},
        }
        return settings, model


@cache
def _warn_of_add_bos(path: Path, adds_bos: bool) -> None:
    """Warn, once for each file, of an ``add_bos_token`` beside it that says something else."""
    logger.warning(
        "%s: add_bos_token=%s beside it has no effect, as in transformers 5: texts begin with%s "
        "BOS; transformers 4 does what it says: let post_processor say the same",
        path,
        str(not adds_bos).lower(),
        "" if adds_bos else "out",
    )


def _state(step: Any) -> Any:
    """The settings of a step of the engine."""
    return None if step is None else json.loads(step.__getstate__())


class Places(NamedTuple):
    """Where texts can be cut, and other settings of the engine for texts "inside" or the "rest"."""

    cuts: re.Pattern[str] | None
    settings: dict[str, str]


def places_of(settings: dict[str, Any]) -> Places:
    """Where texts can be cut, and the settings for texts that do not begin a document.

    Only Metaspace's prepend_scheme "first" asks for the place of a text; the other ways to put a
    space before texts put one before each text between special tokens.
    """
    changed: dict[str, str] = {}
    cuts, after_cut = cuts_of_engine(settings)
    if after_cut is not settings:
        changed["rest"] = json.dumps(after_cut)
    step = settings.get("pre_tokenizer")
    steps = [
        {**part, "prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else part
        for part in steps_of(step, "pretokenizers")
    ]
    if steps != steps_of(step, "pretokenizers"):
        inside = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
        changed["inside"] = json.dumps({**settings, "pre_tokenizer": inside})
    return Places(compiled(cuts), changed)


def members(text: str) -> Iterator[tuple[str, Any, str]]:
    """The keys and values of a JSON object that is sound, and the text of each value."""

    def read(at: int) -> tuple[Any, int, int]:
        """The value after a place, its end and its begin."""
        between = SPACE.match(text, at)
        assert between is not None
        return *json.JSONDecoder().raw_decode(text, between.end()), between.end()

    at = text.index("{") + 1
    while SPACE.fullmatch(text, at, text.rindex("}")) is None:
        key, at, _ = read(at)
        value, at, start = read(at)
        yield key, value, text[start:at]


def _fast_settings(settings: dict[str, Any], model: str = "") -> tuple[str, bool]:
    """The text of a tokenizer.json for the fast engine, and whether it splits text by classes.

    ``model``: the text of that setting, if it is known.  Raises Unsupported.
    """
    found = of_engine(settings)
    by_class = not found["model"].get("byte_fallback")
    if model:
        rest = {key: value for key, value in found.items() if key != "model"}
        return f'{json.dumps(rest, ensure_ascii=False)[:-1]}, "model": {model}}}', by_class
    return json.dumps(found, ensure_ascii=False), by_class
