"""A compile cache that machines share: whole entries alone, whatever happens on the way.

Judged with fsspec's local and memory file systems, with the Hub's own client against a stand-in,
and with moto's S3 over HTTP where moto and s3fs are installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from support.compiled import COMPILER, FOLDER, compiled
from support.hub import TOKEN, environment, served_hub

from llamax.runtime.errors import BackendError
from llamax.tools.audit import shared_cache
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.compile_cache import Note, missing, write_notes
from llamax.tools.audit.shared_cache import CompileTime, check, modules, pull, push

fsspec = pytest.importorskip("fsspec")
HASHES = {"microstep": "a1" * 32, "update": "b2" * 32}
FLAGS = {"NEURON_CC_FLAGS": "--model-type transformer"}
NOTE = Note(COMPILER, FLAGS["NEURON_CC_FLAGS"])
S3 = all(map(importlib.util.find_spec, ("moto", "s3fs")))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.skipif(not S3, reason="no moto"))])  # noqa: E501  # fmt: skip
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        bucket = request.getfixturevalue("s3")
        place = Place(bucket)
        if not place.fs.exists("bucket"):
            place.fs.mkdir("bucket")
        return f"{bucket}/{uuid4().hex}"
    return str(tmp_path / "shared") if request.param == "local" else f"memory://{uuid4().hex}"


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"neuronx-cc": COMPILER, "torch-xla": "2.9.0"}
    monkeypatch.setattr("llamax.tools.audit.compile_cache.installed", versions.get)


def content(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and "llamax-programs" not in path.parts
    }


def test_a_cache_arrives_as_it_was(tmp_path: Path, url: str) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2", "MODULE_3+4")
    (first / FOLDER / "MODULE_1+2" / "sub").mkdir()
    (first / FOLDER / "MODULE_1+2" / "sub" / "more").write_bytes(b"")
    write_notes(first, HASHES, FLAGS)
    sent = push(first, Place(url))
    assert (len(sent.copied), sent.present, sent.refused) == (2, [], {})
    taken = pull(Place(url), tmp_path / "b", COMPILER)
    assert taken.copied == sent.copied == [f"{FOLDER}/MODULE_1+2", f"{FOLDER}/MODULE_3+4"]
    assert content(tmp_path / "b") == content(first)
    assert not [path for path in (tmp_path / "b").rglob("*") if "partial" in path.name]
    again = push(first, Place(url)), pull(Place(url), tmp_path / "b", COMPILER)
    assert [(each.copied, each.sent_bytes, len(each.present)) for each in again] == [([], 0, 2)] * 2
    assert pull(Place(url), tmp_path / "c", "2.24.5133.0").copied == []
    assert len(pull(Place(url), tmp_path / "c", None).copied) == 2


def test_check_answers_by_the_hashes_of_the_audit(tmp_path: Path, url: str) -> None:
    first, place = compiled(tmp_path / "a", "MODULE_1+2", "MODULE_3+4"), Place(url)
    assert check(place, HASHES, NOTE) == ([], ["microstep", "update"], 0, None)
    write_notes(first, {"microstep": HASHES["microstep"]}, FLAGS)
    push(first, place)
    assert check(place, HASHES, NOTE) == (["microstep"], ["update"], 2, None)
    write_notes(first, HASHES, FLAGS)
    push(first, place)
    shared_cache.write_time(place, FOLDER, CompileTime(1860.0, 2))
    assert check(place, HASHES, NOTE) == (["microstep", "update"], [], 2, CompileTime(1860.0, 2))
    (tmp_path / "b" / FOLDER / "MODULE_3+4").mkdir(parents=True)
    pull(place, tmp_path / "b", COMPILER)
    assert missing(tmp_path / "b", HASHES, NOTE) == []
    part = compiled(tmp_path / "c", "MODULE_9+9")
    pull(place, part, "2.24.5133.0")
    assert missing(part, HASHES, NOTE) == ["microstep", "update"]
    assert check(place, HASHES, Note(None, NOTE.flags)).missing == []
    for other in (Note("2.24.5133.0", NOTE.flags), Note(COMPILER, "--optlevel=1")):
        assert check(place, HASHES, other).missing == ["microstep", "update"]
    place.remove(f"{FOLDER}/MODULE_3+4/entry.json")  # what the notes promise is not there
    assert check(place, HASHES, NOTE).missing == ["microstep", "update"]


@pytest.mark.parametrize("writes", range(8))
def test_an_upload_that_is_cut_off_is_not_taken_and_goes_on(
    tmp_path: Path, url: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2", "MODULE_3+4")
    write_notes(first, HASHES, FLAGS)
    send, done = Place._send, [0]

    def cut(place: Place, path: str, data: bytes | Path) -> None:
        if done[0] == writes:
            if not place.url.startswith("s3"):  # S3 shows an object when it is complete
                place.fs.pipe_file(path, b"half")
            raise ConnectionResetError("Connection reset by peer")
        done[0] += 1
        send(place, path, data)

    monkeypatch.setattr(Place, "_send", cut)
    with pytest.raises(BackendError, match=r"cannot be written: Connection reset by peer$"):
        push(first, Place(url))
    monkeypatch.setattr(Place, "_send", send)
    names = Place(url).names()
    assert not [name for name in names if "partial" in name]
    taken = pull(Place(url), tmp_path / "b", COMPILER)
    got, whole = content(tmp_path / "b"), content(first)
    assert got == {name: whole[name] for name in got}
    assert len(taken.copied) == writes // 4
    assert check(Place(url), HASHES, NOTE).present == []
    push(first, Place(url))
    assert check(Place(url), HASHES, NOTE).missing == []
    pull(Place(url), tmp_path / "b", COMPILER)
    assert content(tmp_path / "b") == whole


def test_a_download_that_is_cut_off_leaves_nothing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2")
    push(first, Place(url))

    def cut(place: Place, name: str, target: Path) -> None:
        target.write_bytes(b"half")
        with place.talking("read"):
            raise TimeoutError

    fetch = Place.fetch
    monkeypatch.setattr(Place, "fetch", cut)
    with pytest.raises(BackendError, match=r"cannot be read: TimeoutError$"):
        pull(Place(url), tmp_path / "b", COMPILER)
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    monkeypatch.setattr(Place, "fetch", fetch)
    pull(Place(url), tmp_path / "b", COMPILER)
    assert content(tmp_path / "b") == content(first)


def test_damage_is_found_by_size_and_by_sha256(tmp_path: Path, url: str) -> None:
    first, place = compiled(tmp_path / "a", "MODULE_1+2", "MODULE_3+4", "MODULE_5+6"), Place(url)
    push(first, place)
    sizes = {name: size for name, size in place.names().items() if size > 1000}
    (one, two, three) = sorted(name for name in sizes if not name.endswith("json"))
    place.write(one, b"short")
    place.write(two, b"x" * sizes[two])
    report = pull(Place(url), tmp_path / "b", COMPILER)
    assert list(report.refused.values()) == [
        "a file is missing or has another size",
        f"model.neff differs from its sha256; remove {url}/{FOLDER}/MODULE_3+4",
    ]
    assert {path.parent.name for path in (tmp_path / "b").rglob("model.neff")} == {"MODULE_5+6"}
    push(first, place)  # the size shows that one is not whole
    assert pull(Place(url), tmp_path / "b", COMPILER).copied == [f"{FOLDER}/MODULE_1+2"]
    assert three in place.names()


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"../../x": [4, "a" * 64], "model.neff": [4, "a" * 64]}, "names the file '../../x'"),
        ({"/etc/x": [4, "a" * 64], "model.neff": [4, "a" * 64]}, "names the file '/etc/x'"),
        ({"a/../b": [4, "a" * 64], "model.neff": [4, "a" * 64]}, "names the file 'a/../b'"),
        ({"": [4, "a" * 64], "model.neff": [4, "a" * 64]}, "names the file ''"),
        ({"model.neff": [4, "../x"]}, "has no size and sha256 of 'model.neff'"),
        ({"model.neff": ["4", "a" * 64]}, "has no size and sha256 of 'model.neff'"),
        ({"model.neff": [True, "a" * 64]}, "has no size and sha256 of 'model.neff'"),
        ({"model.hlo.pb": [4, "a" * 64]}, "lists no files"),
        ([], "lists no files"),
    ],
)
def test_what_a_place_says_is_data(tmp_path: Path, files: Any, why: str) -> None:
    place = Place(f"memory://{uuid4().hex}")
    place.write(f"{FOLDER}/MODULE_1+2/entry.json", json.dumps({"files": files}).encode())
    report = pull(place, tmp_path / "b", COMPILER)
    assert report.refused == {f"{FOLDER}/MODULE_1+2": f"its entry.json {why}"}
    assert not (tmp_path / "b").exists()


def test_names_that_are_no_entries_are_passed_by(tmp_path: Path) -> None:
    place = Place(f"memory://{uuid4().hex}")
    names = (f"{FOLDER}/../MODULE_1", f"{FOLDER}/MODULE_1;rm", "x/MODULE_1", f"{FOLDER}/a/MODULE_1")
    for name in names:
        place.write(f"{name}/entry.json", b"{}")
    place.write(f"{FOLDER}/MODULE_2/entry.json", b'{"files"')
    place.write(f"llamax-programs/{FOLDER}/{'a1' * 32}.json", b"[]")
    place.write(f"llamax-programs/{FOLDER}/compile-time.json", b'{"seconds": "x", "programs": 1}')
    report = pull(place, tmp_path / "b", None)
    assert list(report.refused) == [f"{FOLDER}/MODULE_2"]
    assert check(place, HASHES, NOTE) == ([], ["microstep", "update"], 0, None)


def test_two_writers_and_two_readers_at_once(tmp_path: Path, url: str) -> None:
    if url.startswith("memory"):
        pytest.skip("readers of fsspec's memory file system share one position in a file")
    names = [f"MODULE_{i}+0" for i in range(4)]
    caches = [compiled(tmp_path / each, *names, neff=each.encode()) for each in ("a", "b")]
    whole = [content(cache) for cache in caches]
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(push, cache, Place(url)) for cache in caches]
        readers = [pool.submit(pull, Place(url), tmp_path / "c", COMPILER) for _ in range(2)]
        for each in (*writers, *readers):
            assert each.result().refused == {}
    pull(Place(url), tmp_path / "c", COMPILER)
    got = content(tmp_path / "c")
    assert len(modules(tmp_path / "c")) == 4
    for name in names:  # each entry is one writer's, whole
        mine = {key: value for key, value in got.items() if name in key}
        assert mine in [{key: w[key] for key in mine} for w in whole]


def test_a_reader_whose_listing_is_old_takes_the_entry_of_another_writer(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [compiled(tmp_path / each, "MODULE_1+2", neff=each.encode()) for each in ("a", "b")]
    push(caches[0], Place(url))
    listings = [Place(url).names()]
    Place(url).remove(f"{FOLDER}/MODULE_1+2/entry.json")
    push(caches[1], Place(url))
    names = Place.names
    monkeypatch.setattr(Place, "names", lambda self: listings.pop() if listings else names(self))
    assert pull(Place(url), tmp_path / "c", COMPILER).refused == {}
    assert content(tmp_path / "c") == content(caches[1])


def test_the_entry_of_a_faster_process_stays(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(compiled(tmp_path / "a", "MODULE_1+2"), Place(url))
    fetch, numbers = Place.fetch, list[int]()
    neff = tmp_path / "b" / FOLDER / "MODULE_1+2" / "model.neff"

    def overtaken(place: Place, name: str, target: Path) -> None:
        monkeypatch.setattr(Place, "fetch", fetch)
        pull(Place(url), tmp_path / "b", COMPILER)
        numbers.append(neff.stat().st_ino)
        fetch(place, name, target)

    monkeypatch.setattr(Place, "fetch", overtaken)
    assert pull(Place(url), tmp_path / "b", COMPILER).refused == {}
    assert numbers == [neff.stat().st_ino]
    assert [path.name for path in neff.parents[1].iterdir()] == ["MODULE_1+2"]


def test_a_failed_compilation_is_not_sent_and_is_replaced(tmp_path: Path, url: str) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2")
    write_notes(first, HASHES, FLAGS)
    failed = first / FOLDER / "MODULE_3+4"
    failed.mkdir()
    (failed / "model.log").write_text("error")
    report = push(first, Place(url))
    assert report.refused == {f"{FOLDER}/MODULE_3+4": "it has no model.neff"}
    assert check(Place(url), HASHES, NOTE) == ([], ["microstep", "update"], 1, None)
    push(compiled(tmp_path / "b", "MODULE_3+4"), Place(url))
    assert pull(Place(url), first, COMPILER).copied == [f"{FOLDER}/MODULE_3+4"]
    assert sorted(path.name for path in failed.parent.iterdir()) == ["MODULE_1+2", "MODULE_3+4"]
    assert not (failed / "model.log").exists()


def test_a_place_and_a_cache_that_can_only_be_read(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2")
    write_notes(first, HASHES, FLAGS)
    push(first, Place(url))

    def refuse(place: Place, path: str, data: bytes | Path) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Place, "_send", refuse)
    assert push(first, Place(url)).present == [f"{FOLDER}/MODULE_1+2"]  # nothing is to be written
    assert len(pull(Place(url), tmp_path / "b", COMPILER).copied) == 1
    with pytest.raises(BackendError, match=r"cannot be written: Permission denied$"):
        push(compiled(tmp_path / "c", "MODULE_5+6"), Place(url))
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"/file/x cannot be written: Not a directory; see"):
        pull(Place(url), tmp_path / "file" / "x", COMPILER)


HUB = """
import sys
from pathlib import Path
from llamax.cli.cache import main
place = "--place=hf://datasets/me/cache/neuron"
for action, cache in (("push", "a"), ("pull", "b"), ("push", "a")):
    assert main([action, place, f"--cache={sys.argv[1]}/{cache}"]) == 0
"""


def test_a_repository_on_the_hub(tmp_path: Path) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2", "MODULE_3+4")
    with served_hub() as hub:
        hub.add("datasets/me/cache", {".gitattributes": b""})
        words = [sys.executable, "-c", HUB, str(tmp_path)]
        environ = {**os.environ, **environment(hub, tmp_path / "home", TOKEN)}
        done = subprocess.run(words, env=environ, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        reader = environment(hub, tmp_path / "reader", "hf_another")
        refused = subprocess.run(
            [sys.executable, "-m", "llamax", "cache", "push", "--place=hf://datasets/me/cache/new"]
            + [f"--cache={first}"],
            env={**os.environ, **reader},
            text=True,
            capture_output=True,
        )
    assert [line.partition(",")[0] for line in done.stdout.splitlines()] == [
        "sent 2 compiled programs",
        "took 2 compiled programs",
        "sent 0 compiled programs",
    ]
    assert content(tmp_path / "b") == content(first)
    line = "llamax: hf://datasets/me/cache/new cannot be written: "
    assert refused.returncode == 2
    assert refused.stderr.startswith(line)
    assert refused.stderr.count("\n") == 1


def test_places_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="chains of file systems are not supported"):
        Place("simplecache::s3://bucket")
    with pytest.raises(BackendError, match="nothing://x cannot be opened: Protocol not known"):
        Place("nothing://x")
    odd = tmp_path / "a::b *[x]"
    push(compiled(tmp_path / "a", "MODULE_1+2"), Place(str(odd)))
    assert (odd / FOLDER / "MODULE_1+2" / "entry.json").exists()
    assert pull(Place(str(odd)), tmp_path / "b", None).copied == [f"{FOLDER}/MODULE_1+2"]
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BackendError, match=r"gs:// needs the package gcsfs; pip install gcsfs$"):
        Place("gs://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BackendError, match=r"pip install 'llamax\[cache\]'$"):
        Place(str(tmp_path))
