"""Every writer of an output folder on a full disk: one line, and nothing is left."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support.checkpoints as worlds
import torch
from support.saving import saved

from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.formats.convert import import_checkpoint
from llamax.checkpoint.formats.export import export
from llamax.checkpoint.formats.torch_save import save_torch
from llamax.checkpoint.shard_hf import shard
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.runtime.errors import CheckpointError, NoRoom

Writer = Callable[[Path, Path], object]
WRITERS: dict[str, Writer] = {
    "consolidate": lambda place, out: consolidate(place / "run", out, tokenizer=place / "t.model"),
    "consolidate, copied tokenizer": lambda place, out: consolidate(
        place / "run", out, tokenizer=place / "hub"
    ),
    "shard": lambda place, out: shard(place / "hub", out, 2),
    "export meta": lambda place, out: export(place / "hub", out, to="meta"),
    "export nxd": lambda place, out: export(place / "hub", out, to="nxd"),
    "import to hub": lambda place, out: import_checkpoint(place / "meta", out),
    "import to llamax": lambda place, out: import_checkpoint(place / "meta", out, to="llamax"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    saved(folder / "run", worlds.llama(vocabulary=300))
    texts = [f"def name_{i}(x): return x + {i}\n" for i in range(200)]
    train_sentencepiece(texts, 300, folder / "t.model")
    consolidate(folder / "run", folder / "hub", tokenizer=folder / "t.model")
    export(folder / "hub", folder / "meta", to="meta")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which an import copies
        (folder / "meta" / name).write_bytes((folder / "hub" / name).read_bytes())
    return folder


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Limit the size of files, as a full disk does at any byte; without the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(
        resource.RLIMIT_FSIZE, (before[0] if size < 0 else size, before[1])
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_at_every_file(
    place: Path, tmp_path: Path, name: str, limit: Callable[[int], None]
) -> None:
    """A limit below the size of each file in turn, so that each is the first not to fit."""
    WRITERS[name](place, tmp_path / "whole")
    sizes = {path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert len(sizes) > 1
    for size in sorted(sizes):
        limit(size - 1)
        try:
            with pytest.raises(NoRoom, match=r"^no room for [^\n]* \(File too large\)[^\n]*$"):
                WRITERS[name](place, tmp_path / "out")
        finally:
            limit(-1)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    WRITERS[name](place, tmp_path / "out")


def test_what_torch_cannot_save_for_another_reason_stays_its_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a.pt"):
        save_torch(tmp_path / "file" / "a.pt", {"a": torch.zeros(2)})
    with pytest.raises(TypeError), new_folder(tmp_path / "out") as folder:
        save_torch(folder / "a.pt", {"a": (number for number in range(3))})
