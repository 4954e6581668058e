"""Downloads from a stand-in of the Hub, by the real huggingface_hub."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir
from support.hub import TOKEN, Hub, served_hub, use

from llamax.runtime import hub as hub_module
from llamax.runtime.errors import HubError, LinkError, LlamaxError, NoRoom
from llamax.runtime.hub import download, local_folder, resolve
from llamax.runtime.hub_errors import explained
from llamax.runtime.hub_files import CONFIG, MODEL, TOKENIZER
from llamax.runtime.hub_name import HubName

NAME = HubName("model", "org/base")
WEIGHTS = os.urandom(40_000)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"number": 0}',
    "tokenizer.json": b'{"number": 1}',
    "tokenizer_config.json": b'{"number": 2}',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[:300],
    "model.safetensors.index.json": b'{"number": 3}',
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "original/consolidated.00.pth": b"pickle",
    "original/tokenizer.model": b"x",
    "README.md": b"---\nlicense: mit\n---",
    "modeling_evil.py": b"print('run')",
    ".gitattributes": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub() as served:
        served.add("org/base", {**FILES, **UNWANTED})
        use(served, tmp_path / "home", monkeypatch)
        yield served


def present(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(name: HubName = NAME, kind: type[LlamaxError] = HubError) -> str:
    with pytest.raises(kind) as caught:
        download(name, MODEL)
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


def leftovers() -> list[Path]:
    """Files in the cache that are no whole file of a snapshot, nor a note or a lock."""
    blobs = Path(constants.HF_HUB_CACHE).glob("*/blobs/*")
    links = {p.resolve() for p in Path(constants.HF_HUB_CACHE).glob("*/snapshots/**/*")}
    return [path for path in blobs if path.resolve() not in links]


def test_only_what_is_needed_is_downloaded_and_once(hub: Hub) -> None:
    folder = download(NAME, MODEL)
    assert present(folder) == FILES
    assert sorted(hub.downloads()) == sorted(FILES)
    asked = len(hub.requests)
    commit = hub.repositories["org/base"].refs["main"]
    assert folder.name == commit
    assert download(NAME._replace(revision=commit), MODEL) == folder
    assert len(hub.requests) == asked, "a commit that is here needs no connection"
    (repository,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert repository.size_on_disk == sum(map(len, FILES.values()))
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings, (
        "the cache is as huggingface_hub wants it"
    )


def test_each_need_takes_its_files(hub: Hub) -> None:
    folder = download(NAME, CONFIG)
    assert sorted(present(folder)) == ["config.json", "generation_config.json"]
    assert download(NAME, TOKENIZER) == folder
    assert sorted(present(folder)) == sorted(n for n in FILES if not n.startswith("model"))
    hub.add("org/one", {"model.safetensors": WEIGHTS, **FILES})
    assert "model.safetensors" in present(download(HubName("model", "org/one"), MODEL))
    assert not any("-of-" in name for name in hub.downloads())


def test_a_revision_stands_for_a_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.repositories["org/base"]
    first = resolve(NAME)
    second = repository.commit({"config.json": b'{"new": 1}'})
    assert resolve(NAME) == first, "ranks that start together agree"
    monkeypatch.setattr(hub_module, "SHARED_S", 0.0)
    assert resolve(NAME).revision == second
    assert present(download(first, CONFIG))["config.json"] == FILES["config.json"]
    repository.commit({"config.json": b"{}"}, "refs/pr/1")
    folder = download(NAME._replace(revision="refs/pr/1"), CONFIG)
    assert present(folder)["config.json"] == b"{}"
    text = refused(NAME._replace(revision="v9"))
    assert text.startswith("org/base on the Hub has no revision v9; http://127.0.0.1:")


def test_without_a_connection_the_cache_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = download(NAME, MODEL)
    monkeypatch.setattr(hub_module, "SHARED_S", 0.0)
    monkeypatch.setattr("llamax.runtime.hub.logger.propagate", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert download(NAME, MODEL) == folder
    assert "HF_HUB_OFFLINE is set" in caplog.text
    assert len(hub.requests) == asked
    other = refused(HubName("model", "org/other"))
    assert other.startswith("org/other is not on this machine and HF_HUB_OFFLINE is set; ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert download(NAME, MODEL) == folder
    text = refused(HubName("model", "org/other"))
    assert "http://127.0.0.1:9 cannot be reached" in text


def test_a_repository_that_cannot_be_written_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused_write() -> str:
        with pytest.raises(HubError) as caught, explained(NAME, writing=True):
            raise ConnectionResetError("cut")
        return str(caught.value)

    assert refused_write() == (
        f"org/base is not written: {hub.endpoint} cannot be reached or the connection was cut "
        "(cut); check the network, and start again"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused_write() == ("cannot write to org/base while HF_HUB_OFFLINE is set; unset it")


def test_what_another_program_has_downloaded_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    folder = snapshot_download("org/base", allow_patterns=["*.json", "*.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(NAME, MODEL) == Path(folder)


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {}, "is neither a folder on this machine nor a repository of http://127.0.0.1:"),
        (404, {"X-Error-Code": "RepoNotFound"}, "check the spelling, or log in (hf auth login, or"),
        (
            429,
            {"Retry-After": "77"},
            "the Hub limits the requests from here (429); start again in ",
        ),
        (429, {}, "start again in some minutes, or log in (hf auth login, or HF_TOKEN) for a high"),
        (500, {}, "the Hub answers 500 for org/base"),
        (503, {}, "the Hub answers 503 for org/base"),
        (418, {}, "the Hub answers 418 for org/base"),
    ],
)
@pytest.mark.parametrize("where", ["api/models/org/base", "model-00002-of-00002.safetensors"])
def test_answers_that_are_refusals(
    hub: Hub, status: int, headers: dict[str, str], words: str, where: str
) -> None:
    hub.fail, hub.headers = {where: status}, headers
    assert words in refused()
    assert not leftovers()
    hub.fail = {}
    assert present(download(NAME, MODEL)) == FILES, "the next start is not disturbed"


def test_a_token_is_sent_and_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/base"].private = True
    assert "if it is private" in refused()
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("hf_wrong")
    text = refused()
    assert "is neither a folder" in text
    assert "log in" not in text
    hub.fail = {"api/models/org/base": 401}
    assert refused().startswith(f"the Hub refuses the token of {path} for org/base (401); use one")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token of HF_TOKEN for org/base" in refused()
    hub.fail = {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert present(download(NAME, MODEL)) == FILES
    assert hub.tokens == {"hf_wrong", TOKEN}
    kept = (path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file())
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)


def test_a_gated_repository_names_the_page_to_accept(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/base"].gated = True
    page = f"accept its terms at {hub.endpoint}/org/base with your account"
    assert refused() == (
        f"org/base is gated: {page}, then log in here (hf auth login, or HF_TOKEN)"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_ofAnother")
    assert refused().endswith("; the token in use has none yet")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert present(download(NAME, MODEL)) == FILES


def test_a_connection_that_is_cut_is_taken_up_again(hub: Hub) -> None:
    hub.cut = {"00001-of-00002.safetensors": 2}
    assert present(download(NAME, MODEL)) == FILES
    assert hub.downloads().count("model-00001-of-00002.safetensors") == 3


def test_a_connection_that_stays_cut_leaves_nothing_behind(hub: Hub) -> None:
    hub.cut = {"00002-of-00002.safetensors": 99}
    hub.other = {"00002-of-00002.safetensors": b""}
    assert "org/base" in refused()
    assert not leftovers()
    hub.cut, hub.other = {}, {}
    assert present(download(NAME, MODEL)) == FILES
    assert hub.downloads().count("model-00001-of-00002.safetensors") == 1, "whole files stay"


@pytest.mark.parametrize("path", ["model-00001-of-00002.safetensors", "config.json"])
def test_other_bytes_of_the_same_length_are_refused(hub: Hub, path: str) -> None:
    hub.other = {path: b"?" * len(FILES[path])}
    text = refused()
    assert text.startswith(f"{path} of org/base@")
    assert "arrived damaged: its hash is" in text
    assert not leftovers()
    hub.other = {}
    assert present(download(NAME, MODEL)) == FILES


EVIL = ("../../../evil.safetensors", "/etc/evil.safetensors", "a/../../model.safetensors", "..")


def test_names_from_the_hub_are_data(hub: Hub, tmp_path: Path) -> None:
    evil = {path: b"evil" for path in (*EVIL, "a\\..\\model.safetensors", "x\n/model.safetensors")}
    hub.repositories["org/base"].commit(evil)
    assert present(download(NAME, MODEL)) == FILES
    assert not [*tmp_path.rglob("*evil*")]
    hub.add("org/evil", evil)
    assert "org/evil" in refused(HubName("model", "org/evil"))
    hub.sha = "../../../../evil"
    assert "names '../../../../evil' as the commit of org/third, which it is not" in (
        hub.add("org/third", FILES) and refused(HubName("model", "org/third"))
    )
    assert not [*tmp_path.rglob("*evil*")] or all(
        "models--org--evil" in str(path) for path in tmp_path.rglob("*evil*")
    )


def test_pickles_alone_are_refused(hub: Hub) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    text = refused(HubName("model", "org/old"))
    assert "on the Hub has no weights in safetensors, and llamax opens no pickles; give" in text
    assert not hub.downloads()


def test_room_is_checked_before(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "free_bytes", lambda path: 1000)
    text = refused(kind=NoRoom)
    assert text.endswith("has 1000 B free; free some, or set HF_HOME to a folder on a larger disk")
    assert not hub.downloads()


def test_a_cache_that_cannot_be_written_is_reported(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert "set HF_HOME to a folder that can be written" in refused()


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = refused()
    assert text.endswith("not installed; check the path, or pip install 'llamax[hub]'")
    assert text.startswith("org/base is not a folder on this machine, and the Hugging Face Hub nee")


def _download(barrier: object) -> str:
    barrier.wait()  # type: ignore[attr-defined]
    return str(download(NAME, MODEL))


def test_one_process_downloads_while_others_wait(hub: Hub) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)

    def run(queue: object) -> None:
        queue.put(_download(barrier))  # type: ignore[attr-defined]

    queue = fork.Queue()
    ranks = [fork.Process(target=run, args=(queue,)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    folders = {queue.get(timeout=300) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(folders) == 1
    assert present(Path(*folders)) == FILES
    assert sorted(hub.downloads()) == sorted(FILES)
    assert sum("api/models/org/base" in line for line in hub.requests) == 1


def test_unfinished_downloads_of_killed_processes_are_removed(hub: Hub) -> None:
    blobs = download(NAME, CONFIG).parents[1] / "blobs"
    for name, age in (("old", 7200), ("new", 0)):
        (blobs / f"{name}.incomplete").write_bytes(b"half")
        os.utime(blobs / f"{name}.incomplete", (time.time() - age,) * 2)
    download(NAME, MODEL)
    assert [path.name for path in blobs.glob("*.incomplete")] == ["new.incomplete"]


@pytest.mark.parametrize(
    "note",
    ["[" * 20_000, '{"config.json": [1]}', '{"config.json": ["1", "", ""]}', "[]", "a pipe"],
)
def test_a_damaged_list_of_files_is_asked_for_again(hub: Hub, note: str) -> None:
    folder = download(NAME, MODEL)
    (kept,) = folder.parents[1].glob("llamax/*.json")
    revision = kept.parent / "revisions" / "main"
    (folder / "config.json").unlink()
    for path in (kept, revision):
        path.unlink(missing_ok=True)
        if note == "a pipe":
            os.mkfifo(path)
        else:
            path.write_text(note)
    if note == "a pipe":
        assert "is not a regular file" in refused(kind=LinkError)
        return
    assert download(NAME, MODEL) == folder
    assert present(folder) == FILES


def test_a_folder_stays_a_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org/base").mkdir(parents=True)
    assert local_folder("org/base", MODEL, within=tmp_path) == tmp_path / "org/base"
    assert not hub.requests
    assert json.loads(
        (local_folder("hf://org/base", CONFIG, within=tmp_path) / "config.json").read_text()
    )
