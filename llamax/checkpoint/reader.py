"""A checkpoint of llamax as a source of tensors and of optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint import manifest as files
from llamax.checkpoint.checksums import BlockVerifier
from llamax.checkpoint.listing import suggest_intact
from llamax.checkpoint.manifest_index import near
from llamax.checkpoint.runs import Run, StridedCopy, overlaps, whole_run
from llamax.checkpoint.safetensors_io import (
    DTYPES,
    Progress,
    TensorEntry,
    no_progress,
    read_elements,
    read_header,
)
from llamax.checkpoint.source import FileSource, Piece
from llamax.checkpoint.verify import check_header, read_checked, verify_files
from llamax.parallel.mesh import ALONE, Seat
from llamax.runtime.errors import CheckpointError


class Checkpoint(FileSource):
    """A complete training checkpoint; with ``verify`` what is read of it is checked."""

    def __init__(self, folder: Path | str, verify: bool = True) -> None:
        self.folder = Path(folder)
        with suggest_intact(self.folder):
            self.manifest = files.read_manifest(self.folder)
        self.model = self.manifest.model
        self._paths = [self.folder / file.name for file in self.manifest.files]
        self._files = dict(zip(self._paths, self.manifest.files, strict=True))
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        self._blocks: dict[Path, BlockVerifier] = {}  # of the files whose header was read
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

    def pieces(self, name: str, kind: str, run: Run) -> list[Piece]:
        """The pieces near a run; the headers of other files are not read."""
        found = []
        kept = self.manifest.tensors[name].kinds[kind]
        for file, *numbers in near(kept.runs, run).tolist():
            path, stored = self._paths[file], Run(*numbers)
            entry = self._header(path).get(files.run_key(name, kind, stored))
            if entry is None or entry[:2] != (DTYPES[kept.dtype], (stored.length,)):
                raise CheckpointError(f"{path} does not hold {name} ({kind}) as the manifest says")
            found.append(Piece(path, entry.offset, stored))
        return found

    def read_run(self, piece: Piece, copies: Iterable[StridedCopy], into: Tensor) -> None:
        with suggest_intact(self.folder):
            blocks = self._blocks[piece.path] if self._verify else None
            read_elements(piece.path, piece.offset, copies, into, blocks)

    def rng(self, tp_rank: int, data_rank: int, stage: Seat = ALONE) -> Tensor | None:
        """The random state that this rank saved, or None where the mesh had no such rank."""
        path = self.folder / files.file_name("optimizer", tp_rank, data_rank, stage)
        return self._rng(path) if path in self._paths else None

    def check_rng(self, share: int, of: int) -> None:
        """Check the random states of every ``of``-th file from ``share`` on.

        What else a checkpoint has is read, and so checked, by one rank or another of any mesh.
        """
        for path in self._paths[share::of]:
            self._rng(path)

    def verify(self, progress: Progress = no_progress) -> None:
        """Read and check all files; ``progress`` takes bytes.

        Raises CheckpointError that names a changed file, both checksums and what to use instead.
        """
        with suggest_intact(self.folder):
            verify_files(self.folder, self.manifest.files, progress)

    def _rng(self, path: Path) -> Tensor | None:
        entry = self._header(path).get(files.RNG)
        if entry is None:
            return None
        state, run = torch.empty(entry.shape, dtype=entry.dtype), whole_run(entry.shape)
        self.read_run(Piece(path, entry.offset, run), overlaps(run, run), state)
        return state

    def _header(self, path: Path) -> dict[str, TensorEntry]:
        if path not in self._headers:
            with suggest_intact(self.folder):
                if self._verify:
                    header, self._blocks[path] = read_checked(path, self._files[path])
                else:
                    try:
                        header = read_header(path)
                    except CheckpointError:
                        check_header(path, self._files[path])  # says more: both checksums
                        raise
            self._headers[path] = header
        return self._headers[path]
