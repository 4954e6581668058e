"""The records of a run and their writers: JSONL, TensorBoard, W&B, trackio.

One ``Record`` per log step, and per skipped step, is the truth, kept as a line of JSON; everything
else is a view of it::

    Record ──┬─> metrics.jsonl   each step once, floats to the last bit, also after a resume
             ├─> console         one aligned line (llamax.training.console)
             └─> TensorBoard     loss, reduced_train_loss, grad_norm, throughput, lr, mfu, ...

Model FLOPs and MFU are defined in ``llamax.config.flops``.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import StringIO
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llamax.config.schema import RunConfig
from llamax.runtime.errors import BackendError, DataError
from llamax.runtime.files import (
    make_folder,
    plain_file,
    read_file,
    refuse_link,
    same_file,
    write_atomic,
)
from llamax.runtime.json_reader import parse_object
from llamax.runtime.logging import logger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# ---- the record

WHOLE = (
    "step",
    "consumed_tokens",
    "memory_bytes",
    "validations_waited",
    "overflowed_steps",
    "rewinds",
)
LONGEST_LINE = 2**20
ANY_NUMBER = ("loss", "grad_norm", "validation_loss")
SKIPPED, OWN = "skipped_samples", "metrics"


@dataclass(frozen=True)
class Record:
    """One reported or skipped step of a run."""

    step: int
    consumed_tokens: int
    seconds: float  # since the start of the run
    step_s: float
    loss: float  # nats per token, mean over the global batch
    grad_norm: float
    lr: float
    tokens_per_s: float
    memory_bytes: int  # peak of this rank
    mfu: float = 0.0  # 0 where the peak of the devices is not known, as on CPUs
    validation_loss: float | None = None
    validations_waited: int | None = None  # that were no better in a row; with run.patience
    loss_scale: float | None = None  # of the next step; in float16
    overflowed_steps: int | None = None  # of the run so far, for a gradient that overflowed
    skipped_samples: list[int] | None = None  # of a step without an update: its global batch
    rewinds: int | None = None  # how often the run has gone back to a checkpoint, if ever
    metrics: dict[str, float] | None = None  # of a program's own: means over the tokens

    def known(self) -> dict[str, Any]:
        """The numbers by name, without those that are not known."""
        found = {k: v for k, v in asdict(self).items() if v is not None}
        if not self.mfu:
            del found["mfu"]
        return found

    def to_json(self) -> str:
        """One line of JSON without what is not known; repr keeps every bit of a float."""
        return json.dumps(self.known())

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """The record of a line; ValueError or TypeError if it is not one.

        Only losses and gradients may be infinite or NaN; all other numbers are 0 or more.
        """
        values = parse_object(line, strict=False)
        for name, value in values.items():
            if name == SKIPPED:
                if not is_ids(value):
                    raise ValueError(f"{name} is not a list of sample ids")
                continue
            if name == OWN:
                if not is_own(value):
                    raise ValueError(f"{name} are not numbers by name")
                continue
            kinds = (int,) if name in WHOLE else (int, float)
            if type(value) not in kinds or (name not in ANY_NUMBER and not 0 <= value < 2**63):
                raise ValueError(f"{name} is not a number of a record")
            float(value)
        return cls(**values)


def is_ids(value: Any) -> bool:
    """Whether ``value`` is a list of sample ids."""
    return type(value) is list and all(type(n) is int and 0 <= n < 2**63 for n in value)


def is_own(value: Any) -> bool:
    """Whether ``value`` has numbers of a program's own, by name."""
    return type(value) is dict and all(type(number) in (int, float) for number in value.values())


# ---- the views


def check_installed(run: RunConfig) -> None:
    """Raise BackendError if a view that ``run`` asks for needs a package that is not installed."""
    views = (
        (
            run.tensorboard,
            "tensorboard=true",
            "'llamax[tensorboard]', or use run.tensorboard=false",
        ),
        (run.wandb != "off", f"wandb={run.wandb}", "'llamax[wandb]', or use run.wandb=off"),
        (run.trackio, f"trackio={run.trackio}", "'llamax[trackio]', or leave run.trackio out"),
    )
    for asked, setting, remedy in views:
        package = setting.partition("=")[0]
        # A folder of this name, such as run.folder/wandb, is found too, but has no origin.
        if asked and getattr(find_spec(package), "origin", None) is None:
            raise BackendError(
                f"run.{setting} needs the package {package}, which is not installed; pip install "
                f"{remedy}"
            )


class Writer(Protocol):
    """A view of a run's records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def read_jsonl(path: Path) -> list[Record]:
    """All records of a log; a last line cut short is left out, any other raises DataError."""
    if not path.exists():
        return []
    with open(path, "rb", opener=plain_file) as file:
        records = list[Record]()
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                records.append(Record.from_json(line))
            except (ValueError, TypeError, OverflowError):
                if file.read(1):
                    raise DataError(f"{path}:{number}: not a record; remove this line") from None
    return records


class JsonlWriter:
    """Appends a line of JSON per record, on disk before ``write`` returns.

    Records that find no room there wait for it: a full disk must not end a run that can go on.
    A run resumed at ``resumed_step`` keeps the records up to that step and drops later ones, which
    the run will make again: the log holds each step once.  The rewrite is atomic.  A run from the
    start (0) renames an earlier log to ``metrics.jsonl.past``, ``.past-2``, ...

    ``kept`` are the records kept; ``went_back`` is true if the earlier log had others.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = list[Record]()
        if resumed_step:
            records = read_jsonl(path)
            self.kept = [record for record in records if record.step <= resumed_step]
            self.went_back = len(self.kept) < len(records)
        else:
            self.went_back = _set_aside(path)
        write_atomic(path, "".join(f"{record.to_json()}\n" for record in self.kept).encode())
        self.path, self.waiting, self.warned = path, b"", False
        self.fd = same_file(path, os.O_WRONLY | os.O_APPEND)

    def write(self, record: Record) -> None:
        self.waiting += f"{record.to_json()}\n".encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.fd, self.waiting) :]
            self.warned = False
        except OSError as error:
            if not self.warned:
                logger.warning("cannot write %s: %s; records wait", self.path, error.strerror)
            self.warned = True

    def close(self) -> None:
        if self.waiting:
            logger.warning("%s lacks its last %d bytes", self.path, len(self.waiting))
        os.close(self.fd)


def _set_aside(path: Path) -> bool:
    """Rename an earlier log, to a name that is free; whether there was one."""
    refuse_link(path)
    if not path.exists() or not path.stat().st_size:
        return False
    names = chain([".past"], (f".past-{number}" for number in count(2)))
    past = next(p for n in names if not os.path.lexists(p := path.with_name(path.name + n)))
    os.rename(path, past)
    logger.info("this run starts anew; the earlier records are kept in %s", past)
    return True


class TensorBoardWriter:
    """Events for TensorBoard in ``folder``, under the tags other Llama trainers use.

    A run resumed at ``resumed_step`` makes readers drop the later events of earlier starts, so that
    each step is shown once.  Some readers do so only if every start, also the first, asks for it.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make_folder(folder)
        self.events: SummaryWriter = SummaryWriter(
            str(folder), purge_step=resumed_step + 1 if resumed_step else 0
        )

    def write(self, record: Record) -> None:
        for tag, value in tagged(record).items():
            self.events.add_scalar(tag, value, record.step)

    def close(self) -> None:
        self.events.close()


def tagged(record: Record) -> dict[str, float]:
    """What of a record the other views show, under the tags other Llama trainers use."""
    tags = {
        "loss": record.loss,
        "reduced_train_loss": record.loss,
        "grad_norm": record.grad_norm,
        "throughput": record.tokens_per_s,
        "lr": record.lr,
        "mfu": record.mfu or None,
        "consumed_tokens": record.consumed_tokens,
        "validation_loss": record.validation_loss,
        "loss_scale": record.loss_scale,
        "overflowed_steps": record.overflowed_steps,
        "skipped": None if record.skipped_samples is None else 1.0,
    }
    return {**(record.metrics or {}), **{t: v for t, v in tags.items() if v is not None}}


class WandbWriter:
    """A run of W&B named after the folder; ``mode`` offline or online, ``settings`` its config.

    A resumed run continues under the same id, which the folder keeps in ``wandb-id``.  W&B drops
    steps at or below the last one that it has; so a run that went back (``went_back``) gets a new
    id, in the group of the first, and its records so far (``kept``) are logged again.  Offline they
    always are: each start writes a folder, and a later one replaces an earlier one of the same id.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        mode: str,
        settings: dict[str, Any],
        kept: Sequence[Record] = (),
        went_back: bool = False,
    ) -> None:
        import wandb  # type: ignore[import-not-found, import-untyped, unused-ignore]

        make_folder(folder / "wandb")  # where W&B would follow a link
        first, run_id = _ids(folder / "wandb-id", went_back)
        self.run: Any = wandb.init(
            project=project,
            name=folder.name,
            id=run_id,
            group=first,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            mode=mode,
            config=settings,
        )
        self.next_step = int(self.run.step)  # W&B drops lower ones, with a message in its own log
        for record in kept:
            if record.step >= self.next_step:
                self.write(record)

    def write(self, record: Record) -> None:
        if record.step < self.next_step:
            logger.warning("W&B already has later steps than %d and drops it", record.step)
        self.run.log(tagged(record), step=record.step)

    def close(self) -> None:
        self.run.finish()


class TrackioWriter:
    """A run of trackio in ``project``, named after the folder; ``settings`` are its config.

    A resumed run continues under the same name, with an id that the folder keeps in ``trackio-id``;
    records that a kill lost there are logged again.  trackio drops no steps, so a run that went
    back (``went_back``) gets a new id, in the group of the first, and its records so far
    (``kept``).  Where trackio writes is for TRACKIO_DIR and TRACKIO_SPACE_ID to say.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        settings: dict[str, Any],
        kept: Sequence[Record] = (),
        went_back: bool = False,
    ) -> None:
        import trackio  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self._finish: Callable[[], None] = trackio.finish
        first, run_id = _ids(folder / "trackio-id", went_back)
        with redirect_stdout(StringIO()):  # it greets there
            self.run: Any = trackio.init(
                project=project,
                name=f"{folder.name}-{run_id}",
                group=f"{folder.name}-{first}",
                config=settings,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        for record in kept:
            if record.step >= self.run._next_step:
                self.write(record)

    def write(self, record: Record) -> None:
        self.run.log(tagged(record), step=record.step)

    def close(self) -> None:
        with redirect_stdout(StringIO()):
            self._finish()  # that of the module: the run's own leaves it to be finished again


def _ids(path: Path, renew: bool) -> tuple[str, str]:
    """The first id and the current id in ``path``, which holds one a line; ``renew`` adds one."""
    try:
        ids = read_file(path).decode().split()
    except FileNotFoundError:
        ids = []
    if renew or not ids:
        ids.append(secrets.token_hex(4))
        write_atomic(path, "\n".join(ids).encode())
    return ids[0], ids[-1]
