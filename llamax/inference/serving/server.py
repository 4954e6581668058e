"""``serve``: load a model, open a port, answer until a signal."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llamax.backends import choose, cpu
from llamax.backends.base import INFERENCE
from llamax.checkpoint.peft import is_adapter
from llamax.inference.checks import check_computing
from llamax.inference.engine import open_model
from llamax.inference.sampling import warn_not_applied
from llamax.inference.serving.adapters import build_served
from llamax.inference.serving.scheduler import Scheduler
from llamax.inference.serving.service import Served, Service
from llamax.model import int8
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    Terminated,
)
from llamax.runtime.files import read_input
from llamax.runtime.logging import logger
from llamax.runtime.progress import reported
from llamax.runtime.units import show_bytes

LENGTH = 4096  # of requests, where the model could take more
Show = Callable[[str], None]


@dataclass(frozen=True)
class ServeSettings:
    """How a model is served.  Raises ConfigError for a value out of range."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of the machine."""
    port: int = 8000
    """Port to listen on; 0: a free one."""
    name: str = ""
    """Name of the model in requests; by default that of its folder."""
    slots: int = 16
    """Number of requests computed at once."""
    queue: int = 256
    """Number of requests that may wait; further ones are refused with status 429."""
    connections: int = 512
    """Number of open connections; further ones are refused with status 503."""
    length: int = 0
    """Tokens of a prompt and its answer; 0: the model's context, at most 4096."""
    max_new_tokens: int = 0
    """Largest number of new tokens of a request; 0: what ``length`` leaves."""
    max_body: int = 1 << 20
    """Largest body of a request in bytes."""
    template: str = ""
    """Template of conversations; by default that of training, else the folder's."""
    api_key_file: str = ""
    """File with the keys of clients, one per line; empty: none is needed."""
    dtype: str = ""
    """Type of the weights, such as "bfloat16"; empty: that of the files, float16 only on GPUs."""
    backend: str = "cpu"
    """Backend: "cpu", "cuda" or "neuron"."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    quantize: str = ""
    """Linear layers in 8 bits, "int8", on backend "cpu"; empty: in ``dtype``."""

    def __post_init__(self) -> None:
        check_computing(1, self.threads, self.dtype, self.backend, quantize=self.quantize)
        smallest = {"slots": 1, "connections": 1, "max_body": 1, "queue": 0, "max_new_tokens": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"`{name}={getattr(self, name)}` is too small; use {least} or more"
                )
        if not 0 <= self.port < 65536:
            raise ConfigError(f"`port={self.port}` is no port; use 0 to 65535")
        if self.length < 0 or self.length == 1:
            raise ConfigError(f"`length={self.length}` holds no answer; use 2 or more, or 0")


def serve(
    model: str | Path,
    settings: ServeSettings = ServeSettings(),
    *,
    adapters: Mapping[str, str | Path] | None = None,
    tokenizer: str | Path = "",
    base: str | Path = "",
    show: Show = logger.info,
) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM.

    Args:
        model: Hugging Face folder, run, checkpoint or folder of adapters.
        settings: How it is served.
        adapters: Folders of adapters beside the model, by the name with which requests choose them.
        tokenizer: Tokenizer file or folder; by default the model's or that of its dataset.
        base: Base model of adapters, if ``model`` is a folder of some and it is not where they say.
        show: Called with the line that says where the server listens.

    Raises:
        ConfigError: For settings that do not fit the model, or adapters that cannot share it.
        DataError: For a tokenizer, template or key file that cannot be used.
        CheckpointError: For a model that is missing or damaged.
        BackendError: For a port that is taken, or packages that are missing.
    """
    try:
        import uvicorn

        from llamax.inference.serving.app import build_app
        from llamax.inference.serving.connection import REFUSED, SPARE_FILES, Connection, Server
        from llamax.inference.serving.metrics import Metrics
    except ImportError as error:
        raise BackendError(
            f"serving needs {error.name}; install it with pip install 'llamax[serve]'"
        ) from None
    keys = read_keys(settings.api_key_file)
    loaded = open_model(Path(model), str(tokenizer), str(base))
    name = settings.name or Path(model).resolve().name
    if name in (adapters or {}):
        raise ConfigError(f"`adapter`: {name} is the name of the model itself; choose another")
    for key, folder in (adapters or {}).items():
        if not Path(folder).is_dir():
            raise CheckpointError(f"`adapter` {key}: there is no folder {folder}; check the path")
        if not is_adapter(Path(folder)):
            raise ConfigError(f"`adapter` {key}: {folder} holds no adapters; serve it by itself")
    tuned = {
        key: open_model(Path(folder), str(tokenizer), str(loaded.source.folder))
        for key, folder in (adapters or {}).items()
    }
    models = {name: Served(loaded, "", settings.template)}
    models |= {key: Served(each, key, settings.template) for key, each in tuned.items()}
    for each in (loaded, *tuned.values()):
        warn_not_applied(each.generation)
    longest = loaded.model.max_position_embeddings
    length = settings.length or min(longest, LENGTH)
    if length > longest:
        raise ConfigError(
            f"`length={length}` is beyond max_position_embeddings={longest} of the model; use that"
        )
    allow_files(settings.connections, settings.connections + SPARE_FILES)
    listener = bind(settings.host, settings.port)
    with _until_sigterm(), listener:
        backend = choose(settings.backend, Rendezvous(), settings.threads, words=INFERENCE)
        cpu.bound_heap()
        with reported("loading the model"):
            built, beside = build_served(
                loaded, tuned, backend.device, settings.dtype, settings.quantize
            )
        scheduler = Scheduler(built, beside, settings.slots, length, settings.queue, Metrics())
        service = Service(scheduler, models, name, settings.max_new_tokens)
        app = build_app(service, settings.max_body, keys)
        config = uvicorn.Config(
            app,
            http=partial(Connection, limit=settings.connections),  # type: ignore[arg-type]
            backlog=REFUSED,  # connections accepted in one turn
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        scheduler.start()
        listener.listen(config.backlog)  # who connects from now on waits for an answer
        try:
            host, port = listener.getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            show(
                f"{', '.join(models)} on http://{where}:{port} (weights "
                f"{show_bytes(int8.num_bytes(built))}, cache "
                f"{show_bytes(scheduler.pool.num_bytes)} for {settings.slots} requests of "
                f"{length:,} tokens)"
            )
            Server(config, scheduler.end).run(sockets=[listener])
        finally:
            scheduler.stop()


@contextmanager
def _until_sigterm() -> Iterator[None]:
    """Leave the block on SIGTERM; as KeyboardInterrupt, it ends what is in progress.

    Only in the main thread, and where the program has no handler of its own: then the signal does
    what the program does with it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)  # uvicorn raises the signal again once requests have ended
    try:
        yield
    except Terminated as asked:
        logger.info("%s", asked)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.  Raises BackendError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise BackendError(
            f"cannot listen on port {port} of {host}: {error.strerror}; choose another `port` or "
            "`host`"
        ) from None
    return listener


def allow_files(connections: int, files: int) -> None:
    """Let this process open so many files; ConfigError if its hard limit is below."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < files:
        raise ConfigError(
            f"`connections={connections}` takes up to {files} open files, and this process may "
            f"have {hard}; use {max(hard - files + connections, 1)} or fewer, or raise `ulimit -Hn`"
        )
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def read_keys(path: str) -> tuple[str, ...]:
    """The keys in a file, one per line.  Raises DataError if there are none."""
    if not path:
        return ()
    try:
        lines = read_input(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({why}); check `api_key_file`") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise DataError(f"{path}: holds no key; write one per line")
    return keys
