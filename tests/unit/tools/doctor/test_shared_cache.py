"""The doctor on a compile cache that jobs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hosts import levels
from support.launch_jobs import job, tables

from llamax.launch import script
from llamax.launch.jobfile import parse
from llamax.launch.render import render
from llamax.runtime.errors import BackendError
from llamax.tools.audit import compile_cache, shared_cache
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.compile_cache import Note
from llamax.tools.doctor import Finding
from llamax.tools.doctor import shared_cache as doctor

HASHES = {"microstep": "a1" * 32, "update": "b2" * 32}
NOTE = Note("2.23.1", "")


def found(url: Path | str) -> Finding:
    (finding,) = doctor.shared_cache(str(url), lambda: HASHES, NOTE)
    levels([finding])
    return finding


def test_the_doctor_names_what_a_shared_cache_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "installed", {"neuronx-cc": "2.23.1"}.get)
    url, local = tmp_path / "place", tmp_path / "local"
    place = Place(str(url))
    lacking = found(url)
    assert lacking.level == "warning"
    assert lacking.what == (
        f"0 compiled programs in {url}, without microstep and update of this run"
    )
    assert lacking.why.endswith("; no compilation into this cache is recorded")
    assert "published runs of models of 7B and 8B took 25 to 40 minutes" in lacking.why
    module = local / "neuronxcc-2.23.1" / "MODULE_1+2"
    module.mkdir(parents=True)
    (module / "model.neff").write_bytes(b"neff")
    compile_cache.write_notes(local, {"microstep": HASHES["microstep"]}, {})
    shared_cache.push(local, place)
    time = shared_cache.CompileTime(1860.0, 2)
    shared_cache.write_time(place, "neuronxcc-2.23.1", time)
    lacking = found(url)
    assert lacking.what == f"1 compiled program in {url}, without update of this run"
    assert lacking.why.endswith("the last compilation into this cache took 31m00s for 2 programs")
    compile_cache.write_notes(local, HASHES, {})
    shared_cache.push(local, place)
    whole = found(url)
    assert (whole.level, whole.name) == ("ok", "shared cache")
    assert whole.what == f"1 compiled program in {url}, with microstep, update of this run"


def test_the_doctor_without_the_place_or_the_hashes(tmp_path: Path) -> None:
    assert found("nothing://x").level == "warning"

    def nowhere() -> dict[str, str]:
        raise BackendError("torch-xla is absent")

    (finding,) = doctor.shared_cache(str(tmp_path), nowhere, NOTE)
    assert (finding.level, finding.what) == ("unknown", f"{tmp_path}: torch-xla is absent")


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm", "k8s"])
def test_jobs_pull_before_training_and_fill_in_precompile(launcher: str) -> None:
    for nodes in (1, 4):
        this = job(nodes=nodes, compile_cache="s3://bucket/it's here")
        train, precompile = (render(this, launcher, each) for each in ("train", "precompile"))
        assert train.count("llamax cache pull") == 1
        assert "llamax cache pull '--place=s3://bucket/it'\"'\"'s here' || " in train
        assert "cache fill" not in train
        assert "cache pull" not in precompile
        runs = precompile.count("neuron_parallel_compile torchrun ")
        assert precompile.count("llamax cache fill ") == runs
        assert " -- neuron_parallel_compile torchrun " in precompile
        plain = render(job(nodes=nodes), launcher, "train")
        assert "llamax cache" not in plain
    on_gpus = parse(tables(compile_cache="s3://bucket", instance="p5.48xlarge"))
    assert script.compiler(on_gpus, "precompile") == script.pull_cache(on_gpus, "train") == ""
