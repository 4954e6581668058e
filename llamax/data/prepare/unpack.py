"""The bytes of packed files, unpacked a block at a time.

::

    .gz        members           by gzip
    .bz2 .xz   streams           by bz2 and lzma
    .zst       frames of blocks  by compression.zstd of Python 3.14, else by the package zstandard

A file may hold any number of members, streams or frames, as programs with several threads write
them; each must be whole, and nothing else may follow.  A decoder of .zst receives one block at a
time, which unpacks to at most 128 KiB: memory stays small even if a few bytes stand for gigabytes.

Source: RFC 8878 (frames and blocks of Zstandard), the .xz file format 1.1 (padding of streams).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

from llamax.runtime.errors import DataError

BLOCK_BYTES = 2**18  # read from a file, and unpacked, at once
MOST_WINDOW = 2**31  # bytes that a decoder may look back: zstd --long=31
FRAME = b"\x28\xb5\x2f\xfd"
PASSED_OVER = tuple(bytes([number, 0x2A, 0x4D, 0x18]) for number in range(0x50, 0x60))


class Decoder(Protocol):
    """Unpacks one stream or frame."""

    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, /) -> bytes: ...


Blocks = Callable[[IO[bytes]], Iterator[bytes]]


def open_packed(path: Path, ending: str) -> IO[bytes]:
    """Open a file that is packed as its ``ending`` in UNPACK says, or as .gz, to read its bytes.

    Reading raises OSError or EOFError for a file that is damaged or cut.  Raises DataError if a
    package is missing, see ``check_decoder``.
    """
    if ending == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    check_decoder(path, ending)
    return io.BufferedReader(_Unpacked(path.open("rb"), UNPACK[ending]), BLOCK_BYTES)


def check_decoder(path: Path, ending: str) -> None:
    """Raise DataError if the package that unpacks ``ending`` is not installed."""
    try:
        if ending == ".zst":
            _zstd_decoders()
    except ImportError:
        raise DataError(
            f"{path}: .zst needs the package zstandard, which is not installed; pip install "
            "'llamax[zstd]', or unpack the file"
        ) from None


class _Unpacked(io.RawIOBase):
    """A file of the bytes in blocks; going back begins again at the start, as gzip does."""

    def __init__(self, file: IO[bytes], blocks: Blocks) -> None:
        self._file, self._blocks_of = file, blocks
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._blocks, self._held, self._at = self._blocks_of(self._file), memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._held:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._held = memoryview(block)
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        self._at += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "the size is not known"
        if offset < self._at:
            self._begin()
        passed = memoryview(bytearray(BLOCK_BYTES))
        while self._at < offset and self.readinto(passed[: offset - self._at]):
            pass
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()


def _bz2_blocks(file: IO[bytes]) -> Iterator[bytes]:
    return _streams(file, bz2.BZ2Decompressor)


def _xz_blocks(file: IO[bytes]) -> Iterator[bytes]:
    return _streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MOST_WINDOW), b"\0")


def _streams(
    file: IO[bytes],
    new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor],
    padding: bytes = b"",
) -> Iterator[bytes]:
    """Streams one after another, perhaps with padding after each."""
    raw = file.read(BLOCK_BYTES)
    while raw:
        decoder = new()
        while not decoder.eof:
            if decoder.needs_input and not (raw := raw or file.read(BLOCK_BYTES)):
                raise EOFError("it is cut: it ends inside a stream")
            try:
                yield decoder.decompress(raw, BLOCK_BYTES)
            except lzma.LZMAError as error:
                raise OSError(str(error)) from None
            raw = b""
        raw = decoder.unused_data.lstrip(padding)
        while not raw and (raw := file.read(BLOCK_BYTES)):
            raw = raw.lstrip(padding)


def _zstd_decoders() -> tuple[Callable[[], Decoder], type[Exception]]:
    """What makes a decoder of a frame, and the error that it raises; ImportError without any."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        options = {zstd.DecompressionParameter.window_log_max: MOST_WINDOW.bit_length() - 1}
        return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj, (
        zstandard.ZstdError
    )


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The frames of a .zst one after another; those that are to be passed over are."""
    new, error = _zstd_decoders()
    while magic := file.read(4):
        if magic in PASSED_OVER:
            left = int.from_bytes(_exactly(file, 4), "little")
            while left:
                left -= len(_exactly(file, min(left, BLOCK_BYTES)))
        elif magic == FRAME:
            decoder = new()
            for part in _frame(file):
                try:
                    yield decoder.decompress(part)
                except error as problem:
                    raise OSError(str(problem)) from None
            if not decoder.eof:
                raise OSError("a frame is damaged")
        else:
            raise OSError("it is not packed by zstd, or it is damaged")


def _frame(file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a frame after its first four: the header, each block, the checksum."""
    descriptor = _exactly(file, 1)
    flags = descriptor[0]
    only_segment = flags >> 5 & 1
    size = (1 - only_segment) + (0, 1, 2, 4)[flags & 3] + (only_segment, 2, 4, 8)[flags >> 6]
    yield FRAME + descriptor + _exactly(file, size)
    last = False
    while not last:
        head = _exactly(file, 3)
        number = int.from_bytes(head, "little")
        last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
        yield head + _exactly(file, 1 if kind == 1 else size)  # 1: one byte, repeated
    if flags >> 2 & 1:
        yield _exactly(file, 4)


def _exactly(file: IO[bytes], size: int) -> bytes:
    if len(raw := file.read(size)) < size:
        raise EOFError("it is cut: it ends inside a frame")
    return raw


UNPACK: dict[str, Blocks] = {".bz2": _bz2_blocks, ".xz": _xz_blocks, ".zst": _zstd_blocks}
