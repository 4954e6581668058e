"""Loading: a source of Hub tensors fills the live tensors of any rank of any mesh.

A ``Source`` knows, per tensor, which run lies where (``pieces``); filling a wanted run is
intersecting it with those, so a rank reads the bytes it needs and no others, one tensor at a time.
``Checkpoint`` is the source that training wrote, ``hub.HubFolder`` one from elsewhere.

Numbers keep their value: a dtype is widened where a tensor wants more, and rounding is refused
unless asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llamax.checkpoint import manifest as files
from llamax.checkpoint.blocks import Blocks, opened
from llamax.checkpoint.container import (
    DTYPES,
    SLAB_BYTES,
    Entry,
    Progress,
    read,
    read_header,
    silent,
)
from llamax.checkpoint.layout import Copy, Run, overlaps, slices, whole_shape
from llamax.checkpoint.layout import whole as whole_run
from llamax.errors import CheckpointError
from llamax.shard import Cut, local_shape, parts


class Owned(Protocol):
    """A flat run of a parameter (or of its state) that a rank owns; see ``llamax.optim.zero1``."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def tensor(self) -> Tensor: ...


class Whole(NamedTuple):
    """All of a rank's share of a parameter, as an ``Owned``."""

    name: str
    tensor: Tensor
    kind: str = "weight"
    start: int = 0


class Piece(NamedTuple):
    """A run, and where its bytes start."""

    path: Path
    offset: int
    run: Run


class Source(ABC):
    """Hub tensors in files; ``model`` is the Hub's config.json."""

    folder: Path
    model: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """What the program that wrote the files said beside them: nothing, where none did."""
        return {}

    @abstractmethod
    def names(self) -> list[str]:
        """The Hub names of all weights."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    @abstractmethod
    def kinds(self, name: str) -> tuple[str, ...]:
        """What is kept of a tensor: weight, and perhaps master, exp_avg, exp_avg_sq."""

    @abstractmethod
    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """The dtype of one kind in its files."""

    @abstractmethod
    def pieces(self, name: str, kind: str) -> Sequence[Piece]:
        """Where the elements of one kind lie; they tile the tensor."""

    def read(
        self,
        name: str,
        kind: str = "weight",
        dim: int | None = None,
        start: int = 0,
        stop: int = -1,
    ) -> Tensor:
        """Entries [start, stop) along ``dim`` (0 or 1), or all of a tensor, as a new one."""
        shape = list(self.shape(name))
        run = whole_run(shape)
        if dim is not None:
            stop = shape[dim] if stop < 0 else stop
            if dim == 0:
                run = Run(0, run.width, start * run.width, (stop - start) * run.width)
            else:
                inner = math.prod(shape[2:])
                width = (stop - start) * inner
                run = Run(start * inner, width, 0, shape[0] * width)
            shape[dim] = stop - start
        into = torch.empty(shape, dtype=self.dtype(name, kind))
        self.fill(name, kind, run, into)
        return into

    def fill(self, name: str, kind: str, run: Run, into: Tensor, convert: bool = False) -> None:
        """Write a run into the ``run.length`` elements of a contiguous tensor on any device.

        Raises CheckpointError where a dtype would have to be rounded and ``convert`` is not given.
        """
        stored, flat = self.dtype(name, kind), into.detach().view(-1)
        if stored == flat.dtype and flat.device.type == "cpu":
            self._fetch(name, kind, run, flat)
            return
        if not convert and torch.promote_types(stored, flat.dtype) != flat.dtype:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}) is {_word(stored)}; taking it as "
                f"{_word(flat.dtype)} would round it; use {_word(stored)} or convert it first"
            )
        most = SLAB_BYTES // stored.itemsize
        for start in range(0, run.length, most):
            length = min(most, run.length - start)
            slab = torch.empty(length, dtype=stored)
            self._fetch(name, kind, Run(run.left, run.width, run.start + start, length), slab)
            flat[start : start + length].copy_(slab)

    def _fetch(self, name: str, kind: str, run: Run, into: Tensor) -> None:
        for piece in self.pieces(name, kind):
            if copies := list(overlaps(piece.run, run)):
                self.read_run(piece, copies, into)

    def read_run(self, piece: Piece, copies: Iterable[Copy], into: Tensor) -> None:
        """Copy elements of a run into a flat host tensor; a source that knows checksums checks."""
        read(piece.path, piece.offset, copies, into)


class Checkpoint(Source):
    """A complete training checkpoint; with ``verify`` what is read of it is checked."""

    def __init__(self, folder: Path | str, verify: bool = True) -> None:
        self.folder = Path(folder)
        with files.advice(self.folder):
            self.manifest = files.read_manifest(self.folder)
        self.model = self.manifest.model
        self._paths = [self.folder / file.name for file in self.manifest.files]
        self._files = dict(zip(self._paths, self.manifest.files, strict=True))
        self._headers: dict[Path, dict[str, Entry]] = {}
        self._blocks: dict[Path, Blocks] = {}  # of the files whose header was read
        self._verify = verify

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """What the training program gave to ``Saver.save``."""
        return self.manifest.state

    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.manifest.tensors[name].shape

    def kinds(self, name: str) -> tuple[str, ...]:
        return tuple(self.manifest.tensors[name].kinds)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return DTYPES[self.manifest.tensors[name].kinds[kind].dtype]

    def pieces(self, name: str, kind: str) -> list[Piece]:
        found = []
        kept = self.manifest.tensors[name].kinds[kind]
        for file, *numbers in kept.runs:
            path, run = self._paths[file], Run(*numbers)
            entry = self._header(path).get(files.key(name, kind, run))
            if entry is None or entry[:2] != (DTYPES[kept.dtype], (run.length,)):
                raise CheckpointError(f"{path} does not hold {name} ({kind}) as the manifest says")
            found.append(Piece(path, entry.offset, run))
        return found

    def read_run(self, piece: Piece, copies: Iterable[Copy], into: Tensor) -> None:
        with files.advice(self.folder):
            blocks = self._blocks[piece.path] if self._verify else None
            read(piece.path, piece.offset, copies, into, blocks)

    def rng(self, tp_rank: int, data_rank: int) -> Tensor | None:
        """The random state that this rank saved, or None where the mesh had no such rank."""
        path = self.folder / files.file_name("optimizer", tp_rank, data_rank)
        return self._rng(path) if path in self._paths else None

    def check_rng(self, share: int, of: int) -> None:
        """Check the random states of every ``of``-th file from ``share`` on.

        What else a checkpoint has is read, and so checked, by one rank or another of any mesh.
        """
        for path in self._paths[share::of]:
            self._rng(path)

    def verify(self, progress: Progress = silent) -> None:
        """Hash all files as a whole; ``progress`` takes bytes.

        Raises CheckpointError that names a changed file, both hashes and what to use instead.
        """
        with files.advice(self.folder):
            files.verify(self.folder, self.manifest.files, progress)

    def _rng(self, path: Path) -> Tensor | None:
        entry = self._header(path).get(files.RNG)
        if entry is None:
            return None
        state, run = torch.empty(entry.shape, dtype=entry.dtype), whole_run(entry.shape)
        self.read_run(Piece(path, entry.offset, run), overlaps(run, run), state)
        return state

    def _header(self, path: Path) -> dict[str, Entry]:
        if path not in self._headers:
            with files.advice(self.folder):
                try:
                    header = read_header(path)
                    if self._verify:
                        self._blocks[path] = self._checked(path, header)
                except CheckpointError:
                    files.verify(self.folder, [self._files[path]])  # says more: both hashes
                    raise
            self._headers[path] = header
        return self._headers[path]

    def _checked(self, path: Path, header: Mapping[str, Entry]) -> Blocks:
        """The blocks of a file whose header is what was saved."""
        file = self._files[path]
        ends = [*sorted({entry.offset for entry in header.values()}), file.size_bytes]
        blocks = Blocks(path, ends, file.sums)
        with opened(path) as fd:
            blocks.read(fd, 0, np.empty(ends[0], np.uint8))
        return blocks


def load_weights(
    source: Source,
    parameters: Mapping[str, Tensor],
    shards: Mapping[str, Cut],
    tp_degree: int = 1,
    tp_rank: int = 0,
    convert: bool = False,
) -> None:
    """Fill a model's parameters with this tensor rank's share of a source's weights.

    A float32 parameter takes the float32 master where the source keeps one.  ``convert`` allows
    rounding.  Raises CheckpointError where names or shapes differ: the first that does.
    """
    check_shapes(source, parameters, shards, tp_degree)
    for name, parameter in parameters.items():
        flat = parameter.detach().view(-1)
        _fill(source, name, "weight", flat, 0, shards[name], tp_degree, tp_rank, convert)


def load_owned(
    source: Source,
    owned: Iterable[Owned],
    shards: Mapping[str, Cut],
    tp_degree: int = 1,
    tp_rank: int = 0,
    convert: bool = False,
) -> None:
    """Fill what a rank owns (weights, masters, moments), whatever mesh the source was saved on.

    Masters missing from a float32 run are its weights.  Raises CheckpointError for what is absent.
    """
    for mine in owned:
        how, flat = shards[mine.name], mine.tensor.detach()
        _fill(source, mine.name, mine.kind, flat, mine.start, how, tp_degree, tp_rank, convert)


def check_shapes(
    source: Source, parameters: Mapping[str, Tensor], shards: Mapping[str, Cut], tp_degree: int = 1
) -> None:
    """Refuse a source whose tensors are not those of the model, naming the first that differs."""
    expected = {
        part.name: whole_shape(part.how, parameter.shape)
        for name, parameter in parameters.items()
        for part in parts(name, shards[name], tp_degree)
    }
    found = source.names()
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source.folder} has no {name}, which the model has; {_REMEDY}")
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder}: {name} is {list(source.shape(name))}, the model's is "
                f"{list(shape)}; {_REMEDY}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{source.folder} has {name}, which the model lacks; {_REMEDY}")


_REMEDY = "give the model section the values of the folder's own configuration"


def _fill(
    source: Source,
    name: str,
    kind: str,
    flat: Tensor,
    start: int,
    how: Cut,
    tp_degree: int,
    tp_rank: int,
    convert: bool,
) -> None:
    for part in parts(name, how, tp_degree):
        if part.name not in source.names():
            raise CheckpointError(f"{source.folder} has no {part.name}; {_REMEDY}")
        shape = source.shape(part.name)
        if shape != whole_shape(part.how, shape):
            raise CheckpointError(
                f"{source.folder}: {part.name} is {list(shape)}, the model's is "
                f"{list(whole_shape(part.how, shape))}; {_REMEDY}"
            )
    elements = math.prod(local_shape(shape, how, tp_degree))
    if start + len(flat) > elements:
        raise CheckpointError(
            f"{source.folder}: a rank's share of {name} has {elements} elements, the model's has "
            f"more; {_REMEDY}"
        )
    end = 0  # what lies between slices, and after the last, is padding
    for hub, run, offset in slices(name, how, shape, tp_degree, tp_rank, start, len(flat)):
        flat[end:offset].zero_()
        end = offset + run.length
        source.fill(hub, _kind(source, hub, kind, flat.dtype), run, flat[offset:end], convert)
    flat[end:].zero_()


def _kind(source: Source, name: str, kind: str, dtype: torch.dtype) -> str:
    kept = source.kinds(name)
    if kind in ("weight", "master"):
        return "master" if "master" in kept and dtype == torch.float32 else "weight"
    if kind not in kept:
        raise CheckpointError(
            f"{source.folder} holds no {kind} of {name}: it has weights only; "
            "start from it with checkpoint.init_from"
        )
    return kind


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
