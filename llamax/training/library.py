"""``llamax.train`` as a function of a program or notebook: its configuration, ranks and result.

::

    configuration ── config_of ──> Config ──┬─ this process ─ borrowed_process ─> train
                                            └─ ranks=N ────── run_programs ────> N programs
    metrics.jsonl ── TrainedRun.of ──> the result
"""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llamax.checkpoint.listing import newest_checkpoint
from llamax.config.base_model import supply_model
from llamax.config.constants import CHECKPOINTS_FOLDER, METRICS_FILE
from llamax.config.load import (
    dump_config,
    find_config,
    is_recipe,
    parse_config,
    source_name,
    take_place,
)
from llamax.config.schema import Config
from llamax.config.toml import parse_toml, read_toml
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime import errors, signals
from llamax.runtime.errors import ConfigError, LlamaxError, check_whole, refuse
from llamax.runtime.logging import logger, setup_logging, show_line
from llamax.training.local_ranks import STOPPED, exit_code, rank_environment, wait_for
from llamax.training.metrics import read_jsonl

_TRAINING = threading.Lock()  # logging, signals and random state are one for the whole process


@dataclass(frozen=True)
class TrainedRun:
    """A run that ``llamax.train`` has ended.

    ``folder``: the run folder, which ``llamax.load`` takes.  ``metrics``: the records of its
    reported steps, those of earlier starts included.  ``stopped``: whether it was interrupted, and
    saved, before its last step; call ``llamax.train`` again to go on.
    """

    folder: Path
    config: Config = field(repr=False)
    metrics: list[dict[str, Any]] = field(repr=False)
    step: int
    loss: float
    """Training loss of the last reported step, in nats per token; NaN without a report."""
    validation_loss: float | None
    """Loss of the last validation, in nats per token; None without one."""
    checkpoint: Path | None
    """Newest complete checkpoint."""
    stopped: bool = False

    @classmethod
    def of(cls, config: Config, stopped: bool = False) -> TrainedRun:
        """The run of a configuration, as its folder describes it."""
        folder = Path(config.run.folder)
        records = read_jsonl(folder / METRICS_FILE)
        validated = [r.validation_loss for r in records if r.validation_loss is not None]
        return cls(
            folder,
            config,
            [record.known() for record in records],
            records[-1].step if records else 0,
            records[-1].loss if records else float("nan"),
            validated[-1] if validated else None,
            newest_checkpoint(folder / CHECKPOINTS_FOLDER),
            stopped,
        )


def check_ranks(ranks: int, where: Rendezvous, *, own_parts: bool) -> None:
    """Raise ConfigError unless a program can start ``ranks`` ranks on this machine; 0: none.

    ``own_parts``: whether it trains with parts of its own, which other programs do not know.
    """
    if check_whole("ranks", ranks, "use 0 for none") < 0:
        raise ConfigError(f"`ranks={ranks}` is below 0; use 0 for none")
    if ranks and where.launcher:
        raise ConfigError(
            f"`ranks={ranks}` inside a program that {where.launcher} started; leave `ranks` out"
        )
    if ranks and own_parts:
        raise ConfigError(
            f"`ranks={ranks}` starts programs that know the configuration alone; with "
            "parts of its own, such as `model_class`, leave it out and start this program with "
            f"torchrun --nproc-per-node {ranks}"
        )


def config_of(
    config: str | Path | Config | Mapping[str, Any],
    overrides: Mapping[str, Any],
    world_size: int,
) -> Config:
    """The configuration of a recipe's name, a file, a Config or tables, with overrides on top.

    Keys are sections with a mapping inside, or "section.key".  Raises ConfigError that lists every
    unknown name, wrong type and broken rule.
    """
    recipe = False
    if isinstance(config, Config):
        tables, where = parse_toml(dump_config(config)), "configuration"
    elif isinstance(config, Mapping):
        tables, where = {}, "configuration"
        _merge(tables, config)
    elif isinstance(config, str | Path):
        path = find_config(str(config))
        tables, where, recipe = read_toml(path), source_name(path), is_recipe(path)
    else:
        raise ConfigError(
            f"a configuration is a recipe's name, a path, a Config or a dict, not {config!r:.60}"
        )
    settings, given = copy.deepcopy(tables), dict[str, Any]()
    _merge(settings, overrides)
    supply_model(tables, settings, recipe)
    _merge(given, overrides)
    keys = {
        f"{name}.{key}": value
        for name, table in given.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }
    refuse([*take_place(tables, keys)], where)
    _merge(tables, overrides)
    found = parse_config(tables, (), None, where)
    if world_size % found.parallel.tensor:
        tensor = found.parallel.tensor
        raise ConfigError(
            f"{where}: parallel.tensor={tensor} does not divide the number of ranks, {world_size}; "
            f'give `ranks={tensor}` or a multiple, or parallel={{"tensor": 1}}'
        )
    return parse_config(tables, (), world_size, where)


def _merge(tables: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put changes into tables, at any depth; "a.b" is b in a, and None takes a key away."""
    for key, value in changes.items():
        first, _, rest = str(key).partition(".")
        if rest:
            value, key = {rest: value}, first
        if isinstance(value, Mapping):
            inside = tables.setdefault(str(key), {})
            if not isinstance(inside, dict):
                raise ConfigError(f"{key} is {inside!r:.40} and no section; leave {key}.* out")
            _merge(inside, value)
        elif value is None:
            tables.pop(str(key), None)
        else:
            tables[str(key)] = _plain(value)


def _plain(value: Any) -> Any:
    """A value as TOML has it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else copy.deepcopy(value)


@contextmanager
def borrowed_process(where: Rendezvous, environ: MutableMapping[str, str]) -> Iterator[None]:
    """Log and handle signals as the training program does; afterwards all is as it was.

    That is: log handlers, signal handlers, torch's threads, random state and modes, and the
    variables of the environment, ``environ``, that the backend sets.  Raises ConfigError while
    another run trains in this process.
    """
    if not _TRAINING.acquire(blocking=False):
        raise ConfigError(
            "another run is training in this process; wait for it, or give `ranks` to train in "
            "programs of its own"
        )
    with ExitStack() as ending:
        ending.callback(_TRAINING.release)
        ending.enter_context(_usual_torch())
        ending.enter_context(_restored(where, environ))
        yield


@contextmanager
def _usual_torch() -> Iterator[None]:
    """Gradients, float32 and the CPU as torch's defaults, whatever the program has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu") if device.type != "cpu" else nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _restored(where: Rendezvous, environ: MutableMapping[str, str]) -> Iterator[None]:
    """Set up logging and signals; restore them, torch's state and the environment."""
    handlers, level, propagate = [*logger.handlers], logger.level, logger.propagate
    threads, random, environment = torch.get_num_threads(), torch.get_rng_state(), {**environ}
    setup_logging(f"rank {where.rank}", main=where.rank == 0)
    try:
        with signals.borrowed():
            yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        for name in {*environ} - {*environment}:
            del environ[name]
        environ.update(environment)


def run_programs(config: Config, ranks: int, environ: Mapping[str, str]) -> bool:
    """Train with ``ranks`` programs on this machine; return whether they were stopped and saved.

    Ctrl-C lets them save and stop, a second one ends them.  Raises the LlamaxError of the rank that
    failed first, and KeyboardInterrupt if nothing was saved.
    """
    with tempfile.TemporaryDirectory(prefix="llamax-") as folder:
        path = Path(folder) / "config.toml"
        path.write_text(dump_config(config), encoding="utf-8")
        programs = [
            _Program(path, {**variables, "PYTHONUNBUFFERED": "1"})
            for variables in rank_environment(environ, ranks)
        ]
        try:
            return _wait(programs, Path(config.run.folder))
        finally:
            for program in programs:
                program.kill()


class _Program:
    """The training program of one rank; its messages go to this process's stderr."""

    def __init__(self, config: Path, environment: Mapping[str, str]) -> None:
        self.lines: deque[str] = deque(maxlen=50)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llamax.train", "--config", str(config)],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches the caller alone, which decides
        )
        self.reader = threading.Thread(target=self._show, daemon=True)
        self.reader.start()

    def _show(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            show_line(line.rstrip("\n"), sys.stderr)

    @property
    def exitcode(self) -> int | None:
        """Exit code, below 0 that of a signal; None while the program runs."""
        return self.process.poll()

    def kill(self) -> None:
        """End the program if it still runs, and wait for its last messages."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def error(self) -> Exception:
        """Why the program failed."""
        self.reader.join()
        code = self.process.returncode
        own = [line.removeprefix("llamax: ") for line in self.lines if line.startswith("llamax: ")]
        kinds = {
            kind.exit_code: kind
            for kind in reversed(list(vars(errors).values()))
            if isinstance(kind, type) and issubclass(kind, LlamaxError)
        }
        if code in kinds and own:
            return kinds[code](own[-1])
        shown = "\n".join(self.lines)
        return RuntimeError(f"a rank ended with exit code {code}:\n{shown}")


def _wait(programs: list[_Program], folder: Path) -> bool:
    try:
        code = wait_for(programs)
    except KeyboardInterrupt:
        for program in programs:
            program.process.send_signal(signal.SIGINT)
        code = wait_for(programs)
    if code in STOPPED:
        if newest_checkpoint(folder / CHECKPOINTS_FOLDER) is None:
            raise KeyboardInterrupt
        return True
    if code:
        raise next(program.error for program in programs if exit_code(program) == code)
    return False
