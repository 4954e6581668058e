"""The doctor on whole jobs, and its program."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from support.hosts import SDK, host_with, levels, trainium
from support.launch_jobs import job
from support.models import tiny
from support.tiny_run import make_dataset

from llamax.cli.doctor import NOT_READY, main
from llamax.cli.launch import main as launch
from llamax.runtime.errors import BackendError, ConfigError
from llamax.tools.audit import compile_cache
from llamax.tools.doctor import Finding, Host
from llamax.tools.doctor.doctor import examine, observed, programs
from llamax.tools.doctor.run_inputs import _below


def test_programs_are_not_traced_without_torch_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "installed", lambda _: None)
    with pytest.raises(
        BackendError, match="the programs of the run cannot be traced without torch-xla"
    ):
        compile_cache.hashes(job().config, 32, 32, {})


def test_programs_of_a_run() -> None:
    config = job(nodes=4).config
    silent = replace(config, run=replace(config.run, validate_every=0, validate_each_epoch=False))
    assert programs(replace(config, run=replace(config.run, validate_every=9))) == 3
    assert programs(silent) == 2


# ---- the program


def test_without_a_job_a_machine_is_held_against_itself(tmp_path: Path) -> None:
    node = Host(trainium(tmp_path).root, packages=SDK)
    for n in range(8):
        host_with(tmp_path, **{f"sys__class__infiniband__rdmap{n}__device__vendor": "0x1d0f\n"})
    host_with(tmp_path, sys__class__infiniband__mlx5__device__vendor="0x15b3\n")
    host_with(tmp_path, proc__sys__net__ipv4__ip_local_reserved_ports="29500")
    host_with(tmp_path, proc__sys__net__ipv4__ip_local_port_range="1024 65000")
    found = list(examine(node, None, 0))
    assert Finding("ok", "devices", "16 Neuron devices") in found
    assert [each.level for each in found if each.name == "ports"] == ["ok", "warning"]
    assert (observed(node).backend, observed(node).efa) == ("xla", 8)
    assert observed(Host(tmp_path, packages={"torch": "2.11.0"})).backend == "neuron"
    box = host_with(tmp_path / "gpus", dev__nvidia0="", dev__nvidia1="")
    found = list(examine(Host(box.root, packages=SDK), None, 0))
    assert Finding("ok", "devices", "2 GPUs") in found
    assert [each.what for each in found if each.level == "error"] == [
        "torch 2.9.0+cpu is built without CUDA"
    ]
    laptop = Host(tmp_path / "no", packages=SDK)
    found = list(examine(laptop, None, 0))
    assert Finding("ok", "devices", "no Neuron device, none needed") in found
    assert len([each for each in found if each.name == "ports"]) == 1


def test_a_job_is_examined_on_a_laptop() -> None:
    found = levels(examine(Host(packages={"torch": "2.13.0"}), job(nodes=4), 0))
    assert found["plan"] == "ok"
    for name in ("devices", "EFA", "storage", "disk", "dataset", "neuron"):
        assert found[name] == "unknown"
    too_much = job(nodes=4, overrides={"data": {"micro_batch": 32}, "run": {"recompute": "none"}})
    assert levels(examine(Host(packages=SDK), too_much, 0))["plan"] == "error"
    node = {"parallel": {"tensor": 32, "pipeline": 1, "chunks": 1}}
    tight = job(recipe="llama2-70b", nodes=32, overrides=node)  # 15.7 of 16 GiB
    found = list(examine(Host(packages=SDK), tight, 0))
    assert levels(found)["plan"] == "warning"
    (plan,) = (each for each in found if each.name == "plan")
    assert "tight: it fits, but not if a run needs" in plan.why
    unknown = job(recipe="demo", instance="local", ranks_per_node=4, overrides={})
    assert "plan" not in levels(examine(Host(packages=SDK), unknown, 0))


def test_the_datasets_of_a_blend_are_seen_from_the_jobs_folder(tmp_path: Path) -> None:
    seen = {path: _below(tmp_path, path) for path in ("my data", "0.7 web .3 /fsx/b")}
    assert seen["my data"] == f"{tmp_path}/my data"
    assert seen["0.7 web .3 /fsx/b"] == f"0.7 {tmp_path}/web .3 /fsx/b"
    assert _below(tmp_path, "random") == "random"
    assert _below(tmp_path, "0.5 random 0.5 b") == f"0.5 random 0.5 {tmp_path}/b"


def test_random_tokens_need_no_storage() -> None:
    measured = job(overrides={"data": {"path": "random"}})
    found = {each.name: each for each in examine(Host(packages=SDK), measured, 0)}
    assert found["dataset"].level == "ok"
    assert found["dataset"].what == "8,388,608 tokens in random; concat at 4096: 2,048 samples"


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
    assert "llamax launch --phase prepare" in found["dataset"].fix


def test_the_weights_that_a_run_starts_from_are_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def base(folder: Path = tmp_path, **overrides: object) -> Finding:
        asked = {"checkpoint.init_from": "base", "data.sequence_length": 64, **overrides}
        small = job(
            recipe="finetune-demo",
            instance="local",
            ranks_per_node=4,
            overrides=asked,
            storage={"mount": str(folder)},
        )
        assert (small.config.model.vocab_size == 61) == (folder / "base/config.json").is_file()
        (found,) = [one for one in examine(Host(packages=SDK), small, 0) if one.name == "base"]
        return found

    missing = base()
    assert (missing.level, missing.why) == ("error", "training starts from its weights")
    assert "there is no folder" in missing.what
    assert "base is not a folder on this machine" in caplog.text
    assert base(tmp_path / "elsewhere").level == "unknown"
    shape = transformers.LlamaConfig(**tiny().to_hub("float32"))
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    assert base() == Finding("ok", "base", f"a Llama of 19.4K parameters in {tmp_path / 'base'}")
    step = tmp_path / "finetune-demo/run/checkpoints/step-00000001"
    step.mkdir(parents=True)
    (step / "done").touch()
    assert "goes on from its newest checkpoint" in base(**{"run.folder": str(step.parents[1])}).what
    never = {"run.folder": str(step.parents[1]), "checkpoint.resume": "never"}
    assert "a Llama of" in base(**never).what


def test_the_program_prints_all_findings_and_its_exit_code_says_the_worst(
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
    assert "         fix           llamax launch --phase prepare" in said
    path.write_text('name = "a"\nrecipe = "demo"\nstorage.mount = "x"\n')
    with pytest.raises(
        ConfigError, match=r"job.toml: 2 problems\n  1 x trn1\.32xlarge = 32 ranks: "
    ):
        main(["--job", str(path)])
    path.write_text('name = "a"\nrecipe = "demo"\nstorage.mount = "x"\nenvironment.RANK = 1\n')
    with pytest.raises(ConfigError) as refused:
        main(["--job", str(path)])
    for problem in ("job.toml: 2 problems", "environment.RANK is", "storage.mount='x' is not an"):
        assert problem in str(refused.value)


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--on slum: unknown here; did you mean slurm\?"):
        main(["--on", "slum"])
    with pytest.raises(ConfigError, match=r"--on slurm needs a job file; add --job job\.toml"):
        main(["--on", "slurm"])


def test_problems_of_a_launcher_are_those_of_launch(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'name = "a"\nrecipe = "llama2-7b"\nnodes = 2\nstorage.mount = "/fsx"\n[overrides]\n'
        'data.path = "tokens"\n'
    )
    for launcher, problem in (
        ("torchrun", "torchrun.master is empty; with nodes=2 set it"),
        ("mpirun", "mpirun.hostfile is empty; with nodes=2 set it"),
        ("k8s", "storage.claim is empty; set it to the PersistentVolumeClaim"),
        ("sagemaker", "sagemaker.role is empty; set it to the ARN"),
    ):
        told = []
        for command in (main, launch):
            with pytest.raises(ConfigError) as refused:
                command(["--job", str(path), "--on", launcher])
            told.append(str(refused.value))
        assert told[0] == told[1]
        assert problem in told[0]
    assert main(["--job", str(path), "--on", "slurm"]) == 0


def test_doctor_names_the_launchers_that_take_a_job_file() -> None:
    def launcher(**changes: object) -> str:
        found = {each.name: each for each in examine(Host(packages=SDK), job(**changes), 0)}
        return found["launcher"].what

    assert launcher() == "the job file suits torchrun, mpirun, slurm, k8s, sagemaker"
    assert launcher(nodes=2, torchrun__master="", storage__claim="") == (
        "the job file suits mpirun, slurm, sagemaker (--on LAUNCHER says why others do not)"
    )


def test_the_program_of_a_launcher_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)

    def launcher(name: str, path: Path) -> Finding:
        host = Host(packages=SDK, environ={"PATH": str(path)})
        (found,) = (one for one in examine(host, job(), 0, name) if one.name == "launcher")
        return found

    assert launcher("slurm", tmp_path) == Finding("ok", "launcher", f"sbatch is {tmp_path}/sbatch")
    missing = launcher("slurm", tmp_path / "empty")
    assert (missing.level, missing.what) == ("unknown", "sbatch is not installed here")


def test_a_job_of_sagemaker_needs_no_folder_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without [storage] it was refused, though SageMaker takes it."""
    path = tmp_path / "job.toml"
    text = 'name = "a"\nrecipe = "llama2-7b"\ninstance = "trn1.32xlarge"\n'
    text += 'image = "123456789012.dkr.ecr.us-west-2.amazonaws.com/llamax:1"\n[sagemaker]\n'
    text += 'local = false\nrole = "arn:aws:iam::123456789012:role/llamax"\n'
    path.write_text(text + 'data = "s3://bucket/tokens"\noutput = "s3://bucket/run"\n')
    assert main(["--job", str(path)]) == 0
    said = capsys.readouterr().out
    assert "s3://bucket/tokens is not on this machine" in said
    assert "3 checkpoints of 87.9 GiB, sagemaker.volume_gib=100" in said
    assert "WARNING  disk" in said
    for word in ("storage", "neuron ", "devices", "compile cache", "secrets"):
        assert word not in said
    assert main(["--job", str(path), "--on", "sagemaker"]) == 0
    assert capsys.readouterr().out == said


def test_data_and_base_of_sagemaker_on_this_machine_are_looked_at(tmp_path: Path) -> None:
    def found(**changes: object) -> dict[str, Finding]:
        given = {"data": f"file://{tmp_path}/data", "local": True, **changes}
        asked = job(
            recipe="demo",
            instance="local",
            ranks_per_node=4,
            overrides={"data.sequence_length": 32, "model.vocab_size": 61},
            sagemaker={"role": "arn:aws:iam::123456789012:role/llamax", **given},
        )
        return {each.name: each for each in examine(Host(packages=SDK), asked, 0, "sagemaker")}

    assert "there is no such folder" in found()["dataset"].what
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data")
    tokens = found(base="s3://bucket/base")
    assert tokens["dataset"].level == "ok"
    assert tokens["base"].fix == "aws s3 ls --recursive s3://bucket/base"
    assert "devices" in tokens
    no_base = found(base=f"file://{tmp_path}/base")["base"]
    assert (no_base.level, "there is no folder" in no_base.what) == ("error", True)
