"""Saving: each rank writes what it owns, in the background, and nothing half-done is ever seen.

::

    all ranks   copy what they own to host memory         training stops for this alone;
                                                          the memory stays for the next save, and
                                                          ``prepare`` has it ready for the first
    thread      step-00000100.tmp/weights-tp00-dp00...    written, hashed, made durable
                step-00000100.tmp/rank-tp00-dp00.json     names its runs and their files
    rank 0      waits for the notes of all ranks -> index.bin, manifest.json
                -> rename to step-00000100 -> done -> older checkpoints go, ``done`` first
    all ranks   with ``also_hf``: step-00000100/hub.part/model-00002-of-00008.safetensors ...
    rank 0      waits for the files of all ranks -> rename to step-00000100/hub

Ranks agree over the file system, so that no collective runs beside training's.  What replicates is
written once: by the first tensor rank that holds it, and by the data rank that owns the run; of
several that own it, each writes an equal part.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.checkpoint import listing
from llamax.checkpoint import manifest as files
from llamax.checkpoint.atomic import (
    explain_write_errors,
    failure_note,
    failure_of,
    read_note,
    write_note,
)
from llamax.checkpoint.hf_beside import write_hf_folder_beside
from llamax.checkpoint.load import Owned, Whole
from llamax.checkpoint.owned_runs import is_writer, slices
from llamax.checkpoint.retention import clean_up, delete_or_warn, move_to_past, publish, sweep
from llamax.checkpoint.runs import Run
from llamax.checkpoint.safetensors_io import TAGS, TensorStream, as_bytes, write_safetensors
from llamax.config.schema import CheckpointConfig
from llamax.config.step_folders import STEP_FOLDER, list_checkpoints, step_name, step_of
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Seat
from llamax.parallel.sharding import ShardedParameters, whole_shape
from llamax.runtime.errors import CheckpointError, LlamaxError, NoRoom
from llamax.runtime.files import make_folder, sync_folder
from llamax.runtime.versions import LLAMAX


class Kept(NamedTuple):
    """A run on its way to a file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    run: Run
    tensor: Tensor


class HostCopies:
    """Copies of tensors on the host, in memory that the next save of the same tensors uses again.

    A process gets new memory page by page, each filled with zeros: that takes longer than the copy.
    """

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def allocate(self, kinds: Sequence[tuple[torch.dtype, torch.Size]]) -> None:
        """Get memory for tensors of these dtypes and shapes, unless it is that of before."""
        if kinds != [(copy.dtype, copy.shape) for copy in self._copies]:
            self._copies = []  # before the new ones are there
            self._copies = [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]

    def touch(self) -> None:
        """Make the system provide the memory now; by numpy, which starts no threads for it."""
        for copy in self._copies:
            as_bytes(copy).fill(0)

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of this moment, valid until the next call."""
        self.allocate([(tensor.dtype, tensor.shape) for tensor in tensors])
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor.detach())
        return self._copies


class Saver:
    """Saves checkpoints of one run into ``folder``; made by all ranks of ``axes`` together.

    ``parameters`` say what the names in ``Owned`` mean; Parameters that are frozen by now, which
    nobody owns, are kept as weights alone.  ``config`` says which checkpoints stay and whether
    files are written in the background.  Ranks that own the same, all data ranks with ``zero`` 0,
    write an equal share of it each.  ``timeout_s``: how long rank 0 waits for the files of the
    others.  ``barrier``: how ranks meet, unless by a collective.
    At most one save is in flight; what goes wrong in it is raised by the next call of any method.
    """

    def __init__(
        self,
        folder: Path | str,
        axes: Axes,
        parameters: ShardedParameters,
        config: CheckpointConfig | None = None,
        *,
        zero: int = 1,
        timeout_s: float = 1800.0,
        barrier: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.parameters = Path(folder), parameters
        self.config = config = config or CheckpointConfig()
        self.frozen = {
            name: tensor
            for name, tensor in parameters.tensors.items()
            if isinstance(tensor, Parameter) and not tensor.requires_grad
        }
        self.axes, self.tp, self.data, self.pp = axes, axes.tp, axes.data, axes.pp
        self.shard, self.replica = axes.owners(zero)
        self.rank_name = files.rank_name(axes.tp.rank, axes.data.rank, axes.pp)
        self.zero, self.timeout_s = zero, timeout_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._host = HostCopies()
        self._scores: dict[int, float] = {}
        if self._first:
            with explain_write_errors(self.folder, 0):
                self.folder.mkdir(parents=True, exist_ok=True)
                clean_up(self.folder)
                self._scores = listing.validation_losses(self.folder) if config.keep_best else {}
        if barrier is None:
            axes.world.all_reduce(torch.zeros(1, device=axes.world.rank_index.device)).cpu()
        else:
            barrier()  # what a fast rank saves must not be swept

    def prepare(self, owned: Iterable[Owned]) -> None:
        """Get the memory for copies of ``owned`` in the background.

        Then training waits for the first save no longer than for the others.
        """
        self.wait()
        self._host.allocate([(one.tensor.dtype, one.tensor.shape) for one in self._kept(owned)])
        self._thread = threading.Thread(target=self._host.touch, name="llamax-memory")
        self._thread.start()

    def save(
        self,
        step: int,
        owned: Iterable[Owned],
        state: Mapping[str, Any],
        model: Mapping[str, Any],
        config_text: str,
        rng: Tensor | None = None,
        score: float | None = None,
    ) -> None:
        """Take a checkpoint of this moment; returns when the host holds a copy of it.

        Called by every rank with the same ``step``, ``state`` (JSON values), ``model`` (the Hub's
        config.json) and ``config_text``; ``rng`` is this rank's own random state (uint8);
        ``score`` is the validation loss of this moment, where there is one.
        """
        self.wait()
        kept = self._kept(owned)
        copies = self._host.take([one.tensor for one in kept])
        kept = [one._replace(tensor=copy) for one, copy in zip(kept, copies, strict=True)]
        rng = None if rng is None else rng.detach().to("cpu", copy=True)
        manifest = files.Manifest(
            format=files.FORMAT_VERSION,
            step=step,
            llamax=LLAMAX,
            torch=torch.__version__,
            mesh=self._mesh(),
            model=dict(model),
            state=dict(state),
            files=[],
            score=score,
        )
        self._thread = threading.Thread(
            target=self._guarded, args=(kept, rng, manifest, config_text), name="llamax-checkpoint"
        )
        self._thread.start()
        if not self.config.background:
            self.wait()

    def check(self) -> None:
        """Raise what went wrong in the background since the last call; cheap."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when the save in flight is done: on rank 0 when all ranks' files are committed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Return when the save in flight has ended, however it did."""
        if self._thread is not None:
            self._thread.join()

    @property
    def _first(self) -> bool:
        return self.tp.rank == 0 and self.data.rank == 0 and self.pp.rank == 0

    def _mesh(self) -> dict[str, int]:
        """The degrees of the mesh, by their names in a configuration."""
        context = {"context": self.axes.cp.size} if self.axes.cp.size > 1 else {}
        pipeline = {"pipeline": self.pp.size} if self.pp.size > 1 else {}
        data = self.axes.dp.size
        found = {"tensor": self.tp.size, **context, **pipeline, "data": data, "zero": self.zero}
        return {**found, "zero_ranks": self.shard.size} if self.axes.group is not None else found

    def _kept(self, owned: Iterable[Owned]) -> list[Kept]:
        """The runs that this rank writes, of ``owned`` and of the frozen parameters."""
        frozen = self.frozen if self.shard.rank == 0 else {}
        unowned = (Whole(name, tensor.detach().view(-1)) for name, tensor in frozen.items())
        elsewhere = self.parameters.tied if self.pp.rank else ()  # the first stage keeps these
        kept = []
        for owner in (one for one in (*owned, *unowned) if one.name not in elsewhere):
            shape, flat = self.parameters[owner.name].tensor.shape, owner.tensor
            rank, ranks = self.replica.rank, self.replica.size
            low, high = (len(flat) * (rank + i) // ranks for i in (0, 1))
            cuts = {part.name: part.how for part in self.parameters.parts(owner.name)}
            for name, run, at in slices(self.parameters, owner.name, owner.start + low, high - low):
                if is_writer(cuts[name], self.tp.size, self.tp.rank):
                    tensor = flat[low + at : low + at + run.length]
                    whole = whole_shape(cuts[name], shape)
                    kept.append(Kept(name, owner.kind, whole, run, tensor))
        return kept

    def _guarded(
        self, kept: list[Kept], rng: Tensor | None, manifest: files.Manifest, config_text: str
    ) -> None:
        folder = self.folder / (step_name(manifest.step) + ".tmp")
        try:
            with explain_write_errors(folder, 0):
                if self._first:
                    for leftover in self.folder.glob("step-*.tmp"):  # of saves that failed
                        step = STEP_FOLDER.fullmatch(leftover.stem)
                        if step and leftover.name < folder.name and leftover.is_dir():
                            sweep(leftover)
                make_folder(folder)
            self._write(folder, kept, rng)
            if self._first:
                self._commit(folder, manifest, config_text)
        except BaseException as error:
            self._error = self._withdraw(folder, error, manifest.step)
            return
        if self.config.also_hf:
            self._also_hf(folder, manifest.step)

    def _also_hf(self, folder: Path, step: int) -> None:
        rank = (self.pp.rank * self.data.size + self.data.rank) * self.tp.size + self.tp.rank
        world_size = self.pp.size * self.data.size * self.tp.size
        try:
            write_hf_folder_beside(
                self.folder / step_name(step), folder, rank, world_size, self.timeout_s
            )
        except LlamaxError as error:
            kind = NoRoom if isinstance(error, NoRoom) else CheckpointError
            self._error = kind(f"{error}; step {step} is saved, but without a Hugging Face folder")
        except BaseException as error:
            self._error = error

    def _write(self, folder: Path, kept: list[Kept], rng: Tensor | None) -> None:
        """Write this rank's files, then the note that says what is in them."""
        note: list[dict[str, Any]] = []
        for role in ("weights", "optimizer"):
            chosen = [one for one in kept if (one.kind == "weight") == (role == "weights")]
            tensors = [
                TensorStream(
                    files.run_key(one.name, one.kind, one.run),
                    one.tensor.dtype,
                    (one.run.length,),
                    [one.tensor],
                )
                for one in chosen
            ]
            if role == "optimizer" and rng is not None:
                tensors.append(TensorStream(files.RNG, rng.dtype, rng.shape, [rng]))
            if tensors:
                name = files.file_name(role, self.tp.rank, self.data.rank, self.pp)
                written = write_safetensors(folder / name, tensors)
                runs = [
                    [one.name, one.kind, TAGS[one.tensor.dtype], one.shape, one.run]
                    for one in chosen
                ]
                size_bytes, header_bytes, sums = written
                note.append({"file": [name, size_bytes, header_bytes, sums.hex()], "runs": runs})
        if self.pp.rank > 0 and self.tp.rank == self.data.rank == 0:
            note.append({"names": [*self.parameters.hub_cuts()]})
        with explain_write_errors(folder, 0):
            sync_folder(folder)
        write_note(folder / f"rank-{self.rank_name}.json", json.dumps(note))

    def _withdraw(self, folder: Path, error: BaseException, step: int) -> BaseException:
        """Make room again; what to raise.  A rank other than the first tells it what happened."""
        try:
            if self._first:
                shutil.rmtree(folder, ignore_errors=True)
            elif not folder.is_symlink():
                for path in folder.glob(f"*-{self.rank_name}.*"):
                    path.unlink()
                write_note(folder / f"failed-{self.rank_name}.json", failure_note(error))
            last = listing.newest_checkpoint(self.folder)
        except (OSError, CheckpointError):
            return error  # the disk is beyond help: rank 0 will miss this rank
        if not isinstance(error, CheckpointError):
            return error
        stays = f"{last} stays" if last else "no earlier checkpoint of this run exists"
        return type(error)(f"{error}; step {step} is not saved, {stays}")

    def _commit(self, folder: Path, manifest: files.Manifest, config_text: str) -> None:
        names = [*self.parameters.hub_cuts()]
        for note in self._notes(folder):
            for one in note:
                if "names" in one:  # of another stage
                    names += one["names"]
                    continue
                index, (name, size_bytes, header_bytes, sums) = len(manifest.files), one["file"]
                manifest.files.append(
                    files.FileRecord(name, size_bytes, header_bytes, bytes.fromhex(sums))
                )
                for name, kind, tag, shape, run in one["runs"]:
                    manifest.kind(name, kind, tuple(shape), tag).add(index, Run(*run))
        for name in names:
            if name not in manifest.tensors:
                raise CheckpointError(f"no rank owns any of {name}")
        for path in folder.glob("rank-*.json"):
            path.unlink()
        files.write_manifest(folder, manifest, config_text)
        publish(folder, self.folder / step_name(manifest.step))
        self._retire(manifest)

    def _retire(self, manifest: files.Manifest) -> None:
        """Delete the checkpoints that nothing keeps."""
        self._scores.pop(manifest.step, None)  # of a run that was taken back before this step
        if self.config.keep_best and manifest.score is not None and math.isfinite(manifest.score):
            self._scores[manifest.step] = manifest.score
        for later in list_checkpoints(self.folder):  # the run has gone back behind these
            if (step := step_of(later)) > manifest.step:
                self._scores.pop(step, None)
                move_to_past(later)
        best = min(self._scores, key=self._scores.__getitem__, default=None)
        keep, keep_every = self.config.keep, self.config.keep_every
        for old in list_checkpoints(self.folder)[:-keep] if keep else []:
            step = step_of(old)
            for_good = keep_every and step % keep_every == 0
            if step not in (manifest.step, best) and not for_good:
                delete_or_warn(old)
                self._scores.pop(step, None)

    def _notes(self, folder: Path) -> list[list[dict[str, Any]]]:
        """The notes of all ranks, when the last has come."""
        ranks = [
            files.rank_name(tp, data, Seat(stage, self.pp.size))
            for stage in range(self.pp.size)
            for data in range(self.data.size)
            for tp in range(self.tp.size)
        ]
        deadline = time.monotonic() + self.timeout_s
        while True:
            present = set(os.listdir(folder))
            missing = [rank for rank in ranks if f"rank-{rank}.json" not in present]
            if not missing:
                return [read_note(folder / f"rank-{r}.json") for r in ranks]
            for rank in missing:
                if f"failed-{rank}.json" in present:
                    note = read_note(folder / f"failed-{rank}.json")
                    raise failure_of(note, f"rank {rank} could not save")
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder}: no files from rank {', '.join(missing)} within "
                    f"{self.timeout_s:.0f} s; see that rank's own log"
                )
            time.sleep(0.02)
