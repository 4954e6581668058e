"""What doctor finds on machines that a test lays out, and what it says on this one."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from support.launch_jobs import job

from llamax.cli.doctor import NOT_READY, main
from llamax.config.load import load_config
from llamax.launch.instances import INSTANCES
from llamax.model import lora
from llamax.runtime.errors import BackendError, ConfigError
from llamax.tools.audit import compile_cache
from llamax.tools.doctor import Finding, Host, machine, storage, versions
from llamax.tools.doctor.doctor import _seen_from, count, examine, here

TRN1, LOCAL = INSTANCES["trn1.32xlarge"], INSTANCES["local"]
SDK = {
    "torch": "2.9.0+cpu",
    "torch-xla": "2.9.0",
    "torch-neuronx": "2.9.0.2.12.1",
    "neuronx-cc": "2.23.6484.0",
    "neuronx-distributed": "0.17.26814",
}


def lay(root: Path, **files: str) -> Host:
    """A machine with these files; ``__`` in a name is ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root)


def trainium(root: Path, devices: int = 16, driver: str = "2.26.5.0") -> Host:
    names = {f"dev__neuron{n}": "" for n in range(devices)}
    return lay(root, **names, sys__module__neuron__version=driver + "\n")


def levels(found: Iterable[Finding]) -> dict[str, str]:
    found = list(found)
    for each in found:
        assert each.what
        assert bool(each.why) == (each.level in ("warning", "error")), each
        assert bool(each.mend) == (each.level != "ok"), each
    return {each.name: each.level for each in found}


def test_versions_of_an_sdk_fit(tmp_path: Path) -> None:
    host = trainium(tmp_path)
    found = levels(versions.check(Host(host.root, packages=SDK), "xla"))
    assert set(found.values()) == {"ok"}
    assert len(found) == 6
    newer = {**SDK, "neuronx-cc": "2.24.5133.0", "neuronx-distributed": "0.18.27753"}
    found = levels(versions.check(Host(host.root, packages=newer), "xla"))
    assert [name for name, level in found.items() if level != "ok"] == ["driver"]


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"torch": "2.8.1"}, "torch", "error"),
        ({"torch": "2.13.0"}, "torch-xla", "error"),
        ({"torch-xla": "2.8.0"}, "torch-xla", "error"),
        ({"torch-xla": None}, "torch-xla", "error"),
        ({"torch-neuronx": "2.8.0.1"}, "torch-neuronx", "error"),
        ({"torch-neuronx": None}, "neuron", "unseen"),
        ({"neuronx-cc": "2.21.1"}, "neuronx-cc", "warning"),
        ({"neuronx-distributed": "0.18.1"}, "nxd", "error"),
        ({"neuronx-distributed": None}, "nxd", "ok"),
    ],
)
def test_versions_that_do_not_fit(
    tmp_path: Path, changes: dict[str, str | None], name: str, level: str
) -> None:
    packages = {key: value for key, value in {**SDK, **changes}.items() if value}
    host = Host(trainium(tmp_path).root, packages=packages)
    assert levels(versions.check(host, "xla"))[name] == level


def test_versions_on_other_machines(tmp_path: Path) -> None:
    assert levels(versions.check(Host(tmp_path, packages={}), "cpu")) == {"torch": "error"}
    laptop = Host(tmp_path, packages={"torch": "2.13.0"})
    assert levels(versions.check(laptop, "cpu")) == {"torch": "ok"}
    assert levels(versions.check(laptop, "xla"))["torch-xla"] == "unseen"
    bare = Host(tmp_path, packages=SDK)
    assert levels(versions.check(bare, "xla"))["driver"] == "unseen"


def test_a_machine_with_gpus(tmp_path: Path) -> None:
    p5 = INSTANCES["p5.48xlarge"]
    assert levels(machine.devices(Host(tmp_path), p5)) == {"devices": "unseen"}
    for n in range(8):
        lay(tmp_path, **{f"dev__nvidia{n}": ""})
    lay(tmp_path, dev__nvidiactl="")
    assert levels(machine.devices(Host(tmp_path), p5)) == {"devices": "ok"}
    for line in ("Kernel Module  570.133.20  Wed", "Open Kernel Module for x86_64  570.133.20  R"):
        host = Host(tmp_path, packages={"torch": "2.9.0+cpu"})
        assert levels(versions.check(host, "cuda"))["torch"] == "error"
        lay(tmp_path, proc__driver__nvidia__version=f"NVRM version: NVIDIA UNIX {line}\n")
        host = Host(tmp_path, packages={"torch": "2.9.0+cu130"})
        torch, driver = versions.check(host, "cuda")
        assert (torch.level, driver.what) == ("ok", "NVIDIA driver 570.133.20")
    (tmp_path / "dev" / "nvidia3").unlink()
    assert levels(machine.devices(host, p5)) == {"devices": "error"}


def test_devices_and_memory(tmp_path: Path) -> None:
    host = trainium(tmp_path)
    assert levels(machine.devices(host, TRN1)) == {"devices": "ok"}
    assert levels(machine.devices(Host(tmp_path / "no"), TRN1)) == {"devices": "unseen"}
    assert levels(machine.devices(Host(tmp_path / "no"), LOCAL)) == {"devices": "ok"}
    (tmp_path / "dev" / "neuron3").unlink()
    assert levels(machine.devices(host, TRN1)) == {"devices": "error"}
    assert levels(machine.memory(host, TRN1)) == {"memory": "unseen"}
    lay(tmp_path, proc__meminfo=f"MemTotal: {510 * 2**20} kB\n")
    assert levels(machine.memory(host, TRN1)) == {"memory": "ok"}
    lay(tmp_path, **{"sys__fs__cgroup__memory.max": str(64 * 2**30)})
    assert levels(machine.memory(host, TRN1)) == {"memory": "warning"}


def test_limits() -> None:
    assert levels(machine.open_files(1024)) == {"open files": "warning"}
    assert levels(machine.open_files(65535)) == {"open files": "ok"}
    assert levels(machine.open_files(resource.RLIM_INFINITY)) == {"open files": "ok"}
    assert levels(machine.arenas(Host(), 128)) == {"malloc": "warning"}
    assert levels(machine.arenas(Host(environ={"MALLOC_ARENA_MAX": "64"}), 128)) == {"malloc": "ok"}
    assert levels(machine.arenas(Host(), 4)) == {"malloc": "ok"}
    assert levels(machine.clock(5)) == {"clock": "warning"}
    assert levels(machine.clock(0)) == {"clock": "ok"}
    assert levels(machine.clock(None)) == {"clock": "unseen"}


@pytest.mark.parametrize(
    ("kept", "span", "level"),
    [
        ("", "32768\t60999", "ok"),
        ("", "1024\t65000", "warning"),
        ("29000-29600,62182", "1024\t65000", "ok"),
        ("29501", "1024\t65000", "warning"),
    ],
)
def test_ports_that_the_kernel_hands_out(tmp_path: Path, kept: str, span: str, level: str) -> None:
    host = lay(
        tmp_path,
        proc__sys__net__ipv4__ip_local_reserved_ports=kept,
        proc__sys__net__ipv4__ip_local_port_range=span,
    )
    (found,) = machine.reserved(host, 29500)
    assert found.level == level
    if kept == "29501":
        assert found.mend.endswith("=29501,29500")
    assert levels(machine.reserved(Host(tmp_path / "no"), 29500)) == {"ports": "unseen"}


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        assert levels(machine.free(port)) == {"port in use": "warning"}
    assert levels(machine.free(port)) == {"port in use": "ok"}


def test_efa(tmp_path: Path) -> None:
    unlimited = resource.RLIM_INFINITY
    assert levels(machine.network(Host(tmp_path), LOCAL, 0)) == {"EFA": "ok"}
    assert levels(machine.network(Host(tmp_path), TRN1, unlimited)) == {"EFA": "unseen"}
    for n in range(8):
        path = tmp_path / f"sys/class/infiniband/rdmap{n}/ports/1/hw_counters/tx_bytes"
        path.parent.mkdir(parents=True)
        path.write_text("0\n")
    host = Host(tmp_path, environ={"FI_PROVIDER": "efa"})
    found = levels(machine.network(host, TRN1, unlimited))
    assert found == {"EFA": "ok", "EFA traffic": "unseen"}
    path.write_text("12345\n")
    assert levels(machine.network(host, TRN1, unlimited))["EFA traffic"] == "ok"
    tcp = Host(tmp_path, environ={"FI_PROVIDER": "tcp"})
    found = levels(machine.network(tcp, TRN1, 65536))
    assert (found["libfabric"], found["memlock"]) == ("error", "error")
    assert levels(machine.network(host, INSTANCES["trn1n.32xlarge"], unlimited))["EFA"] == "error"


# ---- storage


def mounts(root: Path, kind: str, place: Path) -> Host:
    return lay(root, proc__mounts=f"/dev/root / ext4 rw 0 0\nfs {place} {kind} rw 0 0\n")


def test_storage_is_shared_or_not(tmp_path: Path) -> None:
    folder = tmp_path / "fsx"
    folder.mkdir()
    assert levels(storage.check(Host(), tmp_path / "none", 4, 0)) == {"storage": "unseen"}
    lustre = mounts(tmp_path, "lustre", folder)
    assert storage.file_system(lustre, folder) == "lustre"
    assert storage.file_system(lustre, tmp_path) == "ext4"
    assert levels(storage.check(lustre, folder, 1, 0)) == {"storage": "ok"}
    assert levels(storage.check(lustre, folder, 2, 0)) == {"storage": "ok", "shared": "unseen"}
    private = mounts(tmp_path, "xfs", folder)
    assert levels(storage.check(private, folder, 2, 0))["storage"] == "error"
    if os.geteuid() != 0:
        folder.chmod(0o500)
        assert levels(storage.check(private, folder, 1, 0)) == {"storage": "error"}


@pytest.mark.parametrize(("ahead", "level"), [(0.0, "ok"), (30.0, "warning"), (-30.0, "warning")])
def test_nodes_meet_in_the_folder(tmp_path: Path, ahead: float, level: str) -> None:
    place = tmp_path / storage.BEACONS
    place.mkdir()
    told = {"node": "other", "time": time.time() + ahead}
    (place / "other.json").write_text(json.dumps(told))
    found = levels(storage._beacons(tmp_path, 2, 1.0, "me"))
    assert found == {"shared": "ok", "clock skew": level}
    (place / "other.json").write_text(json.dumps({"node": "other", "time": 0}))
    assert levels(storage._beacons(tmp_path, 2, 0.0, "me")) == {"shared": "unseen"}


def test_disk_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_config("demo", ["--checkpoint.every=40", "--checkpoint.keep=0"])
    assert levels(storage.disk(tmp_path, small, None)) == {"disk": "ok"}
    found = list(storage.disk(tmp_path, small, 10.0))
    assert levels(found) == {"disk": "ok", "write rate": "ok"}
    assert found[0].what.startswith("4 checkpoints of 36.6 MiB")  # 160 steps
    huge = load_config("llama3.1-70b", ["--run.dtype=float32"])
    assert levels(storage.disk(tmp_path, huge, 10.0))["disk"] == "error"
    assert levels(storage.disk(tmp_path / "none", huge, 10.0)) == {"disk": "unseen"}
    monkeypatch.setattr(storage, "_write_rate", lambda folder: 1e3)
    assert levels(storage.disk(tmp_path, small, 0.1))["write rate"] == "warning"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "fullest"),
    [
        ("every=0", 1),  # at the end alone
        ("every=160 keep_best=true", 1),
        ("every=100", 2),
        ("every=10", 3),
        ("every=10 keep=0", 16),
        ("every=10 keep=15", 16),
        ("every=10 keep=20", 16),
        ("every=10 keep_best=true", 4),
        ("every=10 keep_every=40", 6),
        ("every=10 keep_every=40 keep=13", 14),
        ("every=0 each_epoch=true", 3),
        ("every=0 each_epoch=true keep_best=true", 4),
    ],
)
def test_checkpoints_that_are_there_at_once(keys: str, fullest: int) -> None:
    settings = [f"--checkpoint.{key}" for key in keys.split()]
    config = load_config("demo", settings)
    assert config.run.steps == 160
    validating = replace(config, run=replace(config.run, validate_every=10))
    assert storage.at_once(validating) == fullest


@pytest.mark.parametrize(("keep", "fullest"), [(1, 2), (2, 3), (3, 3), (0, 3)])
def test_checkpoints_of_epochs_that_are_there_at_once(keep: int, fullest: int) -> None:
    tuned = load_config("gsm8k-lora", [f"--checkpoint.keep={keep}"])
    assert storage.at_once(tuned) == fullest
    often = replace(tuned.checkpoint, every=100, each_epoch=False)
    assert storage.at_once(replace(tuned, checkpoint=often)) == (keep + 1 if keep else 1)


def test_bytes_of_a_checkpoint() -> None:
    demo = load_config("demo", [])
    weights = demo.model.num_parameters()
    assert storage.size(demo) == weights * 12  # its weights are their own masters
    assert storage.size(replace(demo, run=replace(demo.run, backend="xla"))) == weights * 16
    half = replace(demo, run=replace(demo.run, dtype="bfloat16"))
    assert storage.size(half) == weights * 14
    hub = replace(half, checkpoint=replace(half.checkpoint, also_hf=True))
    assert storage.size(hub) == weights * 16
    tuned = load_config("gsm8k-lora", [])
    assert storage.size(tuned) == 14 * lora.num_parameters(tuned.model, tuned.finetune)


def test_compile_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    traced = {"microstep": "a1", "update": "b2"}

    def cache(url: Path | str = folder, count: int = 1) -> tuple[str, str, str]:
        (found,) = storage.cache(str(url), count, lambda: traced)
        return found.level, found.what, found.mend

    def nowhere() -> dict[str, str]:
        raise BackendError("torch-xla is absent")

    assert cache("s3://bucket/cache")[0] == cache(folder / "deep")[0] == "unseen"
    assert cache()[0] == "warning"
    folder.mkdir()
    assert cache(count=2)[1] == f"no compiled programs in {folder}, where the run has 2"
    module = folder / "neuronxcc-2.23" / "MODULE_1+2"
    module.mkdir(parents=True)
    level, _, mend = cache()
    assert (level, mend) == (
        "warning",
        f"cat {module}/*.log; then rm -r {module} and precompile again",
    )
    (module / "model.neff").touch()
    level, what, _ = cache(count=2)
    told = f"1 compiled program in {folder}"
    assert (level, what) == ("warning", f"{told}, where the run has 2")
    assert cache()[:2] == ("unseen", f"{told}, without a note of which run they are")
    compile_cache.note(folder, {"microstep": "a1"})
    level, what, mend = cache()
    assert level == "warning"
    assert what == f"{told}, but not the run's update: it has changed since precompile"
    assert mend == storage.PRECOMPILE
    compile_cache.note(folder, traced)
    assert cache()[:2] == ("ok", f"{told}, among them the run's own microstep, update")
    (found,) = storage.cache(str(folder), 1, nowhere)
    assert (found.level, found.what) == ("unseen", f"{told}; torch-xla is absent")


def test_programs_are_not_traced_without_torch_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "installed", lambda _: None)
    with pytest.raises(BackendError, match="the run's own cannot be traced without torch-xla"):
        compile_cache.hashes(job().config, 32, 32, {})


def test_programs_of_a_run() -> None:
    config = job(nodes=4).config
    silent = replace(config, run=replace(config.run, validate_every=0, validate_each_epoch=False))
    assert count(replace(config, run=replace(config.run, validate_every=9))) == 3
    assert count(silent) == 2


# ---- the program


def test_without_a_job_a_machine_is_held_against_itself(tmp_path: Path) -> None:
    node = Host(trainium(tmp_path).root, packages=SDK)
    for n in range(8):
        lay(tmp_path, **{f"sys__class__infiniband__rdmap{n}__device__vendor": "0x1d0f\n"})
    lay(tmp_path, sys__class__infiniband__mlx5__device__vendor="0x15b3\n")
    lay(tmp_path, proc__sys__net__ipv4__ip_local_reserved_ports="29500")
    lay(tmp_path, proc__sys__net__ipv4__ip_local_port_range="1024 65000")
    found = list(examine(node, None, 0))
    assert Finding("ok", "devices", "16 Neuron devices") in found
    assert [each.level for each in found if each.name == "ports"] == ["ok", "warning"]
    assert (here(node).backend, here(node).efa) == ("xla", 8)
    assert here(Host(tmp_path, packages={"torch": "2.11.0"})).backend == "neuron"
    box = lay(tmp_path / "gpus", dev__nvidia0="", dev__nvidia1="")
    found = list(examine(Host(box.root, packages=SDK), None, 0))
    assert Finding("ok", "devices", "2 GPUs") in found
    assert [each.what for each in found if each.level == "error"] == [
        "torch 2.9.0+cpu is built without CUDA"
    ]
    laptop = Host(tmp_path / "no", packages=SDK)
    found = list(examine(laptop, None, 0))
    assert Finding("ok", "devices", "no Neuron device, none asked") in found
    assert len([each for each in found if each.name == "ports"]) == 1


def test_a_job_is_examined_on_a_laptop() -> None:
    found = levels(examine(Host(packages={"torch": "2.13.0"}), job(nodes=4), 0))
    assert found["plan"] == "ok"
    for name in ("devices", "EFA", "storage", "disk", "dataset", "neuron"):
        assert found[name] == "unseen"
    too_much = job(nodes=4, overrides={"data": {"micro_batch": 32}, "run": {"recompute": "none"}})
    assert levels(examine(Host(packages=SDK), too_much, 0))["plan"] == "error"
    unknown = job(recipe="demo", instance="local", ranks_per_node=4, overrides={})
    assert "plan" not in levels(examine(Host(packages=SDK), unknown, 0))


def test_the_datasets_of_a_blend_are_seen_from_the_jobs_folder(tmp_path: Path) -> None:
    seen = {path: _seen_from(tmp_path, path) for path in ("my data", "0.7 web .3 /fsx/b")}
    assert seen["my data"] == f"{tmp_path}/my data"
    assert seen["0.7 web .3 /fsx/b"] == f"0.7 {tmp_path}/web .3 /fsx/b"


def test_a_missing_dataset_is_an_error(tmp_path: Path) -> None:
    small = job(
        recipe="demo",
        instance="local",
        ranks_per_node=4,
        overrides={},
        storage={"mount": str(tmp_path)},
    )
    found = {each.name: each for each in examine(Host(packages=SDK), small, 0)}
    assert found["dataset"].level == "error"
    assert "llamax launch --phase prepare" in found["dataset"].mend


def test_the_program_says_it_all_and_how_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamax", "doctor"], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "ok       torch" in done.stdout
    assert done.stdout.endswith("0 errors\n")
    path = tmp_path / "job.toml"
    path.write_text(
        f'name = "a"\nrecipe = "demo"\ninstance = "local"\nranks_per_node = 4\n'
        f'storage.mount = "{tmp_path}"\n'
    )
    assert main(["--job", str(path)]) == NOT_READY
    said = capsys.readouterr().out
    assert "ERROR    dataset" in said
    assert "         mend          llamax launch --phase prepare" in said
    path.write_text('name = "a"\nrecipe = "demo"\nstorage.mount = "x"\n')
    with pytest.raises(ConfigError, match=r"job.toml: 1 x trn1\.32xlarge = 32 ranks: "):
        main(["--job", str(path)])
