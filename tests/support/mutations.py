"""Damage files in a thousand ways, and read each: it must be refused in one line or read correctly.

    PYTHONPATH=tests python -m support.mutations --each 1000

Kinds: configuration, dataset index, tokenizers, safetensors, manifest.  Where a checksum guards a
file it is made to fit again, so that the parser behind it is reached too.  The reading goes on in a
fork: a traceback, a dead process, a minute for one file, or a resident size over twice that of
the same work on whole files is a finding.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers

import support.checkpoints as worlds
from llamax.checkpoint import Checkpoint
from llamax.checkpoint.safetensors_io import read_header
from llamax.config.load import load_config
from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import open_dataset
from llamax.data.header import HEADER_BYTES, MAGIC
from llamax.data.loader import Loader
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import LlamaxError
from support import tiny_run
from support.corpora import train_unlike_llama

MOST_S = 60.0
STRANGE = [b"null", b"[]", b"{}", b'""', b"-1", b"1e999", b"NaN", b"true", b"99999999999999999999"]
STRANGE += [b"18446744073709551615", b"[" * 2000, b'"../../etc/passwd"', b"\xff\xfe", b"\x00" * 9]
STRANGE += [b"0.5", b'{"a":1}', b"-9223372036854775808", b"1" * 5000]
TOKEN = re.compile(rb'-?\d+(?:\.\d+)?|"[^"]{0,60}"|true|false|[\[\]{},:=]')


class Kind(NamedTuple):
    """A file to damage, the function that reads it, and one that corrects its checksum."""

    name: str
    path: Path
    read: Callable[[], object]
    mend: Callable[[], object] | None = None


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to three changes: of bits, of runs of bytes, or of what looks like a token of text."""
    for _ in range(chance.randint(1, 3)):
        at, many = chance.randrange(len(data) + 1), min(len(data), chance.randint(1, 40))
        how = chance.randrange(8)
        if how == 0 and data:
            at = chance.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif how == 1:
            data = data[:at]
        elif how == 2:
            data = data[:at] + data[at + many :]
        elif how == 3:
            data = data[:at] + data[at : at + many] * 2 + data[at + many :]
        elif how == 4:
            data = data[:at] + chance.randbytes(many) + data[at:]
        else:
            tokens = list(TOKEN.finditer(data, 0, 1 << 16))
            if tokens:
                start, stop = chance.choice(tokens).span()
                data = data[:start] + chance.choice(STRANGE) + data[stop:]
    return data


def kinds(folder: Path) -> list[Kind]:
    """Whole files of every kind, in ``folder``."""
    (folder / "dataset").mkdir()
    dataset = tiny_run.make_dataset(folder / "dataset")
    config = tiny_run.write(tiny_run.config(dataset, folder / "run"), folder / "config.toml")
    model = worlds.llama()
    checkpoint = worlds.save(folder, model, worlds.world(model, 2, 2, True, worlds.wholes(model)))
    (folder / "sp").mkdir()
    sentencepiece = train_unlike_llama(folder / "sp")
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh ")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest, weights = checkpoint / "manifest.json", checkpoint / "weights-tp00-dp00.safetensors"
    tokens, index = dataset / "train.tokens", dataset / "dataset.json"

    def read_dataset() -> None:
        found = open_dataset(dataset, "start")
        Loader(found.train, BatchPlan(0, 32, 4, 4)).step()

    def read_checkpoint() -> None:
        source = Checkpoint(checkpoint, verify=False)
        for name in source.names():
            source.read(name)

    def fix_done() -> None:
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        (checkpoint / "done").write_text(digest)

    def fix_tokens() -> None:
        data = tokens.read_bytes()
        body = data[len(MAGIC) + 4 : HEADER_BYTES]
        crc = zlib.crc32(body).to_bytes(4, "little")
        tokens.write_bytes(MAGIC + crc + body + data[HEADER_BYTES:])

    def fix_length() -> None:
        data = weights.read_bytes()
        end = data.find(b"}}") + 2
        if end > 8:
            weights.write_bytes(struct.pack("<Q", end - 8) + data[8:])

    def read_weights() -> None:
        read_header(weights)
        read_checkpoint()

    return [
        Kind("config", config, lambda: load_config(str(config))),
        Kind("dataset: tokens", tokens, read_dataset),
        Kind("dataset: tokens, checksum mended", tokens, read_dataset, fix_tokens),
        Kind("dataset: index", index, read_dataset),
        Kind("tokenizer: sentencepiece", sentencepiece, lambda: use(sentencepiece)),
        Kind("tokenizer: json", folder / "tokenizer.json", lambda: use(folder / "tokenizer.json")),
        Kind("safetensors", weights, read_weights),
        Kind("safetensors, length mended", weights, read_weights, fix_length),
        Kind("manifest", manifest, read_checkpoint),
        Kind("manifest, hash mended", manifest, read_checkpoint, fix_done),
    ]


def use(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.encode("a bad cabbage, \u00e4\u20ac\U0001f600")


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tally:
    """Numbers that a fork and its parent share."""

    FIELDS = ("number", "read", "refused", "found")

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 64)

    def __getitem__(self, field: str) -> int:
        return int(struct.unpack_from("<q", self.map, 8 * self.FIELDS.index(field))[0])

    def add(self, field: str) -> None:
        struct.pack_into("<q", self.map, 8 * self.FIELDS.index(field), self[field] + 1)

    def find(self, kind: Kind, what: str) -> None:
        self.add("found")
        if self["found"] <= 5:
            print(f"FOUND {kind.name} {self['number']}: {what}", flush=True)


def work(kind: Kind, whole: bytes, tally: Tally, each: int, seed: int) -> None:
    """In a fork: damage and read until all is done."""
    done = kind.path.parent / "done"
    guard = done.read_bytes() if done.exists() else b""
    kind.read()
    normal = resident_bytes()
    while tally["number"] < each:
        chance = random.Random(f"{kind.name} {seed} {tally['number']}")
        kind.path.write_bytes(mutate(whole, chance))
        if kind.mend:
            kind.mend()
        try:
            kind.read()
            tally.add("read")
        except LlamaxError as error:
            tally.add("refused")
            if not str(error).strip() or "Traceback" in str(error):
                tally.find(kind, f"an empty or raw message: {error!r}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            last = next((f for f in reversed(where) if "/llamax/" in f.filename), where[-1])
            tally.find(kind, f"{error!r:.150} at {last.filename}:{last.lineno}")
        kind.path.write_bytes(whole)
        if guard:
            done.write_bytes(guard)
        if resident_bytes() > 2 * normal:
            tally.find(kind, f"{resident_bytes()} bytes, {normal} are normal")
            normal = resident_bytes()
        tally.add("number")


def drill(kind: Kind, each: int, seed: int) -> int:
    """Damage one kind ``each`` times; how many findings."""
    whole, tally = kind.path.read_bytes(), Tally()
    while tally["number"] < each:
        child = os.fork()
        if child == 0:
            try:
                work(kind, whole, tally, each, seed)
                os._exit(0)
            finally:
                os._exit(1)
        number, since, ended = -1, time.monotonic(), 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if tally["number"] != number:
                number, since = tally["number"], time.monotonic()
            if not ended and time.monotonic() - since > MOST_S:
                tally.find(kind, f"no end within {MOST_S:.0f} s")
                os.kill(child, signal.SIGKILL)
                since = time.monotonic()
            time.sleep(0.005)
        kind.path.write_bytes(whole)
        if status:
            tally.find(kind, f"the process died, status {status}")
            tally.add("number")
    print(
        f"{kind.name:<34} {each:>5} mutations: {tally['refused']} refused, {tally['read']} read, "
        f"{tally['found']} found",
        flush=True,
    )
    return tally["found"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--each", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    try:
        chosen = [kind for kind in kinds(folder) if args.only in kind.name]
        found = sum(drill(kind, args.each, args.seed) for kind in chosen)
    finally:
        shutil.rmtree(folder)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
