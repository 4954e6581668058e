"""The packed-token file: all documents of a corpus, end to end, in one file with checksums.

::

    0      magic "llamax1\\n", crc32 of the header, JSON padded with spaces        4096 bytes
    4096   tokens of all documents, uint16 or uint32, little-endian
           document offsets, uint64: offsets[i]:offsets[i+1] are document i's tokens
           counted, one bit per token, lowest first: whether it counts in the loss
             (instruction data only; without this section every token counts)
           checksums, uint32: crc32 of every 1 MiB block from byte 4096 up to here

The header has a checksum of itself and of the table of checksums, so any flipped bit is found; a
file that is cut short is found by its length.  crc32 finds *every* error burst of up to 32 bits,
comes with Python and runs outside the interpreter's lock, so all cores check at once.  A reader
maps the file: time and memory of opening grow only by four bytes of checksum per MiB.
"""

from __future__ import annotations

import mmap
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from llamax.data.header import BLOCK_BYTES, HEADER_BYTES, REMEDY, Header
from llamax.data.shuffle import Integers
from llamax.data.stream import GoOn, Stream
from llamax.runtime.cores import workers
from llamax.runtime.errors import DataError
from llamax.runtime.files import new_file, plain_file, refuse_link, sync_folder, sync_handle
from llamax.runtime.mapping import check_size, map_file

ALIGN_BYTES = 64

Verify = Literal["start", "read", "off"]


class TokenFile(Stream):
    """A mapped token file: ``tokens`` [tokens], ``documents`` [documents + 1] and ``counted``.

    ``verify`` sets when checksums are checked: "start", all of them now; "read", each block before
    its first use through ``touch``; "off", never.  Header and length always are.  Raises DataError
    for a file that is missing or damaged.
    """

    def __init__(self, path: str | Path, verify: Verify = "start") -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb", opener=plain_file) as file:
                self.header = Header.from_bytes(file.read(HEADER_BYTES), self.path)
                self._map = map_file(file.fileno(), self.path)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be opened ({error.strerror}); give a dataset made by "
                "llamax prepare"
            ) from None
        # The hash of the header, and so of the checksums of everything else.
        self.identity = sha256(self.header.to_bytes()).hexdigest()
        size, end = len(self._map), sum(self.header.sections["checksums"])
        if size != end:
            raise DataError(f"{self.path}: has {size} bytes where its header says {end}: {REMEDY}")
        self.tokens = self._section("tokens", self.header.dtype)
        self.documents = self._section("documents", np.dtype("<u8"))
        self._counted: npt.NDArray[np.uint8] | None = None
        self.masked = "counted" in self.header.sections
        if self.masked:
            self._counted = self._section("counted", np.dtype("u1"))
        self._checksums: npt.NDArray[np.uint32] = self._section("checksums", np.dtype("<u4"))
        self._unseen = np.ones(len(self._checksums) if verify != "off" else 0, bool)
        if verify != "off" and zlib.crc32(self._checksums.data) != self.header.checksums_crc32:
            raise DataError(f"{self.path}: its checksum table is not the one written: {REMEDY}")
        if verify == "start":
            self.verify()

    def verify(
        self, share: int = 0, of: int = 1, go_on: GoOn | None = None, threads: int = 0
    ) -> float:
        """Check every block not yet checked; the rate in bytes per second.

        A rank checks part ``share`` of ``of`` while ``go_on`` is true, with ``threads``, or on all
        cores.  Raises DataError on damage.
        """
        blocks, start = np.flatnonzero(self._unseen)[share::of], time.perf_counter()
        with ThreadPoolExecutor(threads or workers()) as pool:
            for number, _ in enumerate(pool.map(self._check, blocks.tolist())):
                if go_on and not go_on():
                    pool.shutdown(cancel_futures=True)
                    return 0.0
                if number % 16 == 15:
                    self.release()
        self._unseen[:] = False
        self.release()
        return len(blocks) * BLOCK_BYTES / (time.perf_counter() - start)

    def counted(self, places: Integers) -> npt.NDArray[np.bool_]:
        if self._counted is None:
            return super().counted(places)
        bits: npt.NDArray[np.bool_] = (self._counted[places >> 3] >> (places & 7)) & 1 == 1
        return bits

    def release(self) -> None:
        """Give back the memory of pages that were read; they are read again when needed."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def touch(self, starts: Integers, stops: Integers, section: str = "tokens") -> None:
        """Check the length, and the unchecked blocks with elements starts[i]:stops[i]."""
        check_size(self._map, self.path)
        if not np.count_nonzero(self._unseen):
            return
        offset, _ = self.header.sections[section]
        bits = {"documents": 64, "counted": 1}.get(section, 8 * self.header.dtype.itemsize)
        first = (starts * bits // 8 + offset - HEADER_BYTES) // BLOCK_BYTES
        last = ((stops * bits - 1) // 8 + offset - HEADER_BYTES) // BLOCK_BYTES
        for start, stop in zip(first.tolist(), last.tolist(), strict=True):
            for block in range(start, stop + 1):
                if self._unseen[block]:
                    self._check(block)

    def _section(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        offset, size = self.header.sections[name]
        return np.frombuffer(self._map, dtype, size // dtype.itemsize, offset)

    def _check(self, block: int) -> None:
        start = HEADER_BYTES + block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.header.sections["checksums"][0])
        if zlib.crc32(memoryview(self._map)[start:stop]) != self._checksums[block]:
            offset, size = self.header.sections["tokens"]
            place = "tokens" if start < offset + size else "document offsets or counted bits"
            raise DataError(
                f"{self.path}: bytes {start} to {stop} ({place}) do not match their checksum: "
                f"{REMEDY}"
            )
        self._unseen[block] = False


class TokenWriter:
    """Writes a token file document by document, in constant memory.

    Use it in a ``with`` block: the file appears under its name, complete and on disk, when the
    block ends without an error, and not at all otherwise.  If not ``durable`` it may be lost, or
    damaged, where the machine fails soon after.
    """

    def __init__(self, path: str | Path, header: Header, durable: bool = True) -> None:
        self.path = Path(path)
        self.header, self.durable = header, durable
        kinds = ("partial", "offsets", "bits")
        self._scratch = [self.path.with_name(f".{self.path.name}.{kind}") for kind in kinds]
        self._tokens = self._documents = self._text_bytes = self._counted = 0
        self._odd_bits = np.zeros(0, bool)  # fewer than 8, not yet written
        self._masked = False

    def __enter__(self) -> TokenWriter:
        for path in (self.path, *self._scratch):
            refuse_link(path)
        self._file = open(self._scratch[0], "wb", opener=new_file)
        self._offsets = open(self._scratch[1], "w+b", opener=new_file)
        self._bits = open(self._scratch[2], "w+b", opener=new_file)
        self._file.write(bytes(HEADER_BYTES))
        self._body = _Blocks(self._file)
        self._offsets.write(np.zeros(1, "<u8").tobytes())
        return self

    def add(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[Any],
        text_bytes: int,
        counted: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Append documents: tokens end to end, the length of each, and the bytes of their text.

        Tokens beyond the last length begin a document that the next call ends.  ``counted``: which
        tokens count in the loss, if not all.  Raises DataError for one outside the vocabulary.
        """
        if len(tokens) and int(tokens.max()) >= self.header.vocab_size:
            raise DataError(
                f"{self.path}: token {int(tokens.max())} is outside the vocabulary of "
                f"{self.header.vocab_size}; the tokenizer contradicts itself, use another"
            )
        self._body.write(np.ascontiguousarray(tokens, self.header.dtype).view(np.uint8).data)
        self._offsets.write((self._tokens + np.cumsum(lengths, dtype="<u8")).tobytes())
        if counted is not None:
            bits = np.concatenate([self._odd_bits, counted])
            whole = len(bits) // 8 * 8
            self._bits.write(np.packbits(bits[:whole], bitorder="little").tobytes())
            self._odd_bits = bits[whole:]
            self._counted += int(counted.sum())
            self._masked = True
        self._tokens += len(tokens)
        self._documents += len(lengths)
        self._text_bytes += text_bytes

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            with self._file, self._offsets, self._bits:
                if error is None:
                    self._finish()
            if error is None:
                os.replace(self._scratch[0], self.path)
                if self.durable:
                    sync_folder(self.path.parent)
        finally:
            for path in self._scratch:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        sections = {"tokens": (HEADER_BYTES, self._tokens * self.header.dtype.itemsize)}
        self._body.pad()
        sections["documents"] = (self._body.position, 8 * (self._documents + 1))
        self._append(self._offsets)
        if self._masked:
            self._bits.write(np.packbits(self._odd_bits, bitorder="little").tobytes())
            sections["counted"] = (self._body.position, -(-self._tokens // 8))
            self._append(self._bits)
        table = np.array(self._body.checksums(), "<u4")
        sections["checksums"] = (self._body.position, table.nbytes)
        self._file.write(table.tobytes())
        self.header = Header(
            self.header.tokenizer,
            self.header.vocab_size,
            self.header.bos_id,
            self.header.eos_id,
            self._tokens,
            self._documents,
            self._text_bytes,
            zlib.crc32(table.data),
            sections,
            self._counted if self._masked else None,
        )
        self._file.seek(0)
        self._file.write(self.header.to_bytes())
        self._file.flush()
        if self.durable:
            sync_handle(self._file.fileno(), Path(self._file.name))

    def _append(self, scratch: IO[bytes]) -> None:
        """Append a section that was collected in a file, then pad for the next section."""
        scratch.seek(0)
        while piece := scratch.read(BLOCK_BYTES):
            self._body.write(memoryview(piece))
        self._body.pad()


class _Blocks:
    """Writes bytes after the header and collects the crc32 of every block."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._done: list[int] = []
        self._crc = self._filled = 0

    @property
    def position(self) -> int:
        return HEADER_BYTES + len(self._done) * BLOCK_BYTES + self._filled

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        while data:
            room = BLOCK_BYTES - self._filled
            piece, data = data[:room], data[room:]
            self._crc = zlib.crc32(piece, self._crc)
            self._filled += len(piece)
            if self._filled == BLOCK_BYTES:
                self._done.append(self._crc)
                self._crc = self._filled = 0

    def pad(self) -> None:
        self.write(memoryview(bytes(-self.position % ALIGN_BYTES)))

    def checksums(self) -> list[int]:
        return [*self._done, self._crc] if self._filled else self._done
