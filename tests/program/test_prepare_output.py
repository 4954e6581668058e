"""``llamax prepare`` replaces and removes no file of the user in the folder that it fills."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.corpora import train_unlike_llama

from llamax.cli.prepare import main
from llamax.data.prepare.output_folder import MARKER, make_parts_folder
from llamax.runtime.errors import DataError, LinkError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_unlike_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Some words of a text.\n" * 20)
    return path


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def prepare(text: Path, tokenizer: Path | int, out: Path, *more: str) -> None:
    which = "--train-tokenizer" if isinstance(tokenizer, int) else "--tokenizer"
    assert main([str(text), which, str(tokenizer), "--out", str(out), "--workers", "1", *more]) == 0


NAMES = (
    "train.tokens",
    "test.tokens",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja", "validation_text_document.bin"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_no_file_of_the_user_is_replaced(
    text: Path, tokenizer: Path, tmp_path: Path, name: str, kind: str
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (tmp_path / "precious").write_text("mine")
    if kind == "file":
        (out / name).write_text("mine")
    elif kind == "folder":
        (out / name).mkdir()
    else:
        (out / name).symlink_to("../precious")
    before = content(tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{name} exists already, and .*model is not a data"):
            prepare(text, tokenizer, out)
    assert content(tmp_path) == before
    assert [path.name for path in out.iterdir()] == [name]


def test_no_folder_of_the_user_is_removed(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    parts = tmp_path / "out" / ".parts"
    parts.mkdir(parents=True)
    (parts / "of-a-car.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(DataError, match=r"\.parts was not made by llamax prepare; remove it"):
            prepare(text, tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == {".parts/of-a-car.txt": b"mine"}
    parts.rename(tmp_path / "parts")
    prepare(text, tokenizer, tmp_path / "out")
    (tmp_path / "parts").rename(parts)
    with pytest.raises(DataError, match=r"\.parts was not made by llamax prepare; remove it"):
        prepare(text, tokenizer, tmp_path / "out")
    assert (parts / "of-a-car.txt").read_text() == "mine"


def test_a_linked_folder_of_parts_is_refused(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".parts").symlink_to("../elsewhere")
    with pytest.raises(LinkError, match=r"\.parts is a link to \.\./elsewhere; remove it"):
        prepare(text, tokenizer, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_other_files_stay_beside_the_dataset(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)  # empty: a program was killed before it marked it
    (out / "notes.txt").write_text("mine")
    prepare(text, 280, out)
    prepare(text, 280, out)
    assert content(out)["notes.txt"] == b"mine"
    assert not (out / ".parts").exists()


def test_the_tokenizer_may_lie_in_the_folder(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    copy = shutil.copy(tokenizer, out / "tokenizer.model")
    before = Path(copy).stat()
    prepare(text, Path(copy), out)
    after = Path(copy).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (out / "dataset.json").exists()


def test_a_template_of_the_user_beside_the_tokenizer_stays(tmp_path: Path) -> None:
    """Rows bring a chat template, text does not."""
    (tmp_path / "chat_template.jinja").write_text("mine")
    with pytest.raises(DataError, match=r"chat_template\.jinja exists already"):
        make_parts_folder(tmp_path, tmp_path, "text", True)
    assert (make_parts_folder(tmp_path, tmp_path, "text", False) / MARKER).is_file()


def test_a_bad_row_leaves_nothing_where_nothing_is_done(tokenizer: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": \n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row is not JSON \(character 9: Expec"):
        prepare(rows, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="the row is not JSON"):
        prepare(rows, tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == {"mine": b""}


def test_a_bad_row_says_what_is_kept(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of more than a MiB is a part of its own."""
    folder, out = tmp_path / "rows", tmp_path / "out"
    folder.mkdir()
    (folder / "a.jsonl").write_text(f'{{"text": "{"one " * 100}"}}\n' * 3000)
    (folder / "b.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1"):
        prepare(folder, tokenizer, out)
    said = capsys.readouterr().err
    assert f"{out}/.parts keeps what is done, and the same command goes on from there" in said
    (folder / "b.jsonl").write_text('{"text": "two"}\n')
    prepare(folder, tokenizer, out)
    assert not (out / ".parts").exists()
