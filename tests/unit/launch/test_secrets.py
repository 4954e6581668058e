"""Secrets: their values stand in no script, manifest, image or command line."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from support.launch_jobs import TRICKS, job
from support.mpijob_schema import MPIJOB

from llamax.launch.checks import problems
from llamax.launch.environment import literal_values, plain_text_secrets
from llamax.launch.jobfile import JobFile
from llamax.launch.render import PHASES, render
from llamax.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SECRETS = {"WANDB_API_KEY": "/keys/wandb", "HF_TOKEN": "/keys/hf"}
REFERENCES: dict[str, Any] = {
    "secrets": SECRETS,
    "kubernetes__secret": "llamax-keys",
    "sagemaker__secret": "llamax/keys",
}


def with_secrets(**changes: Any) -> JobFile:
    return job(**{**REFERENCES, **changes})


# ---- scripts read files


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm"])
@pytest.mark.parametrize("phase", ["prepare", "train"])
@pytest.mark.parametrize("value", ["a key", TRICKS, "$(touch pwned)\nline two"])
def test_a_script_reads_the_file_of_a_secret(
    tmp_path: Path, launcher: str, phase: str, value: str
) -> None:
    path = tmp_path / "it's $(touch pwned)"
    path.write_text(f"{value}\n")
    this = job(
        secrets={"WANDB_API_KEY": str(path)},
        overrides={"data": {"path": "data"}, "run": {"folder": "run"}},
        mpirun__hostfile="",
    )
    text = render(this, launcher, phase)
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("torchrun", "mpirun", "srun", "python3"):
        (fake / name).write_text(f'#!/bin/bash\nprintf %s "$WANDB_API_KEY" >{tmp_path}/given\n')
        (fake / name).chmod(0o755)
    text = text.replace("cd -- /fsx/llama", f"cd -- {tmp_path}\nPATH={fake}:$PATH")
    run = ["bash", "-c", text]
    done = subprocess.run(run, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "given").read_text() == value
    assert value not in text + done.stdout + done.stderr
    if launcher == "mpirun" and phase == "train":
        assert "-x WANDB_API_KEY\n" in text
    path.unlink()
    done = subprocess.run(run, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2
    assert f"secrets.WANDB_API_KEY={path} cannot be read on this node" in done.stderr
    assert not (tmp_path / "pwned").exists()


# ---- Kubernetes refers to a Secret


@pytest.mark.parametrize("version", ["1.25", "1.31", "1.35"])
def test_manifests_refer_to_a_secret(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    check = pytest.importorskip("jsonschema").validate
    for phase in PHASES["k8s"][2:]:
        text = render(with_secrets(nodes=4), "k8s", phase)
        assert "/keys/" not in text
        manifest, *beside = yaml.safe_load_all(text)
        pods = [manifest, *beside]
        if manifest["kind"] == "MPIJob":
            check(manifest, MPIJOB)
            head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
            replicas = manifest["spec"]["mpiReplicaSpecs"]
            pods = [{**head, **replicas[name]["template"]} for name in ("Launcher", "Worker")]
            assert "-x WANDB_API_KEY\n" in text
        for pod in pods:
            validate(pod, version, strict=True)
        if phase not in ("shell", "prepare", "precompile", "train"):
            continue
        spec = pods[0]["spec"]
        spec = spec["template"]["spec"] if phase == "prepare" else spec
        given = {
            each["name"]: each["valueFrom"]
            for each in spec["containers"][0]["env"]
            if "valueFrom" in each
        }
        wanted = {"secretKeyRef": {"name": "llamax-keys", "key": "HF_TOKEN"}}
        assert given["HF_TOKEN"] == wanted
        assert set(given) == set(SECRETS)


# ---- SageMaker reads them with the role of the job


@pytest.mark.parametrize("sdk", [2, 3])
def test_sagemakers_program_reads_secrets_when_it_starts(
    sdk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = render(with_secrets(sagemaker__sdk=sdk, sagemaker__secret=TRICKS), "sagemaker", "train")
    assert "/keys/" not in text
    module: dict[str, Any] = {}
    constants = text[text.index("SCRIPT = ") : text.index("source = Path")]
    exec(compile(constants, "x", "exec"), module)
    assert not set(SECRETS) & set(module["ARGUMENTS"]["environment"])
    asked: list[str] = []

    def get_secret_value(SecretId: str) -> dict[str, str]:
        asked.append(SecretId)
        return {"SecretString": json.dumps({"WANDB_API_KEY": "a", "HF_TOKEN": "b", "X": "c"})}

    boto3: Any = ModuleType("boto3")
    boto3.client = lambda service: SimpleNamespace(get_secret_value=get_secret_value)
    started: list[str] = []
    monkeypatch.setitem(sys.modules, "boto3", boto3)
    monkeypatch.setattr("runpy.run_module", lambda name, run_name: started.append(name))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    exec(compile(module["SCRIPT"], "train.py", "exec"), {})
    assert asked == [TRICKS]
    assert started == ["llamax.train"]
    assert (os.environ["WANDB_API_KEY"], os.environ["HF_TOKEN"]) == ("a", "b")
    assert str(tmp_path) not in sys.path


def test_a_job_without_secrets_needs_no_service() -> None:
    assert "boto3.client" not in render(job(), "sagemaker", "train")
    assert "secretKeyRef" not in render(job(), "k8s", "train")


# ---- what is refused


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        (
            "k8s",
            {"kubernetes__secret": ""},
            "create secret generic NAME --from-file=WANDB_API_KEY=",
        ),
        ("k8s", {"kubernetes__secret": "A_b"}, "kubernetes.secret='A_b' is refused by Kubernetes"),
        ("sagemaker", {"sagemaker__secret": ""}, "sagemaker.secret is empty"),
        ("slurm", {"secrets__RANK": "/x"}, "secrets.RANK is set for each rank by its launcher"),
        ("slurm", {"environment__HF_TOKEN": "x"}, "HF_TOKEN is in the table environment too"),
        ("slurm", {"secrets__A": "keys/a"}, "secrets.A='keys/a' is not an absolute path"),
        ("k8s", {"base_image": "Not An Image"}, "base_image='Not An Image' is not an image name"),
        ("sagemaker", {"base_image": "x\u200by"}, "is not an image name"),
        ("k8s", {"base_image": "a b\tRUN x"}, "holds a control character"),
        ("slurm", {"secrets__A": "/a\nb"}, "secrets.A='/a\\nb' holds a control character"),
        ("slurm", {"secrets": {"a-b": "/x"}}, "secrets.a-b is not a name of a variable"),
    ],
)
def test_wrong_references_are_refused(launcher: str, changes: dict[str, Any], message: str) -> None:
    try:
        changes = {**changes, "secrets": changes.get("secrets", dict(SECRETS))}
        found = "\n".join(problems(with_secrets(**changes), launcher, "train"))
    except ConfigError as error:
        found = str(error)
    assert message in found


@pytest.mark.parametrize("base", ["ubuntu:24.04", "r.example:5000/a/b@sha256:" + "0" * 64, ""])
def test_base_images_that_are_names_pass(base: str) -> None:
    assert not problems(job(base_image=base), "k8s", "image")


def test_plain_values_that_sound_like_secrets_are_named() -> None:
    named = {"WANDB_API_KEY": "x", "hf_token": "y", "AWS_SECRET_ACCESS_KEY": "z", "PASSWORD": ""}
    plain = {"NEURON_FUSE_SOFTMAX": "1", "TOKENIZERS_PARALLELISM": "0", "KEYBOARD": "", "A": ""}
    assert plain_text_secrets(job(environment={**named, **plain})) == [*named]


def test_a_variable_in_a_value_is_named() -> None:
    """It reaches the job as it is written: the value is one quoted word of the script."""
    told = {"PATH": "/opt/bin:$PATH", "A": "x${LD_LIBRARY_PATH}"}
    kept = {"B": "$", "C": "[rank ${rank}]", "D": "$1", "E": "a$b"}
    assert [*literal_values(job(environment={**told, **kept}))] == [
        f"environment.{name} holds {found} as text: no variable is expanded there; write the whole "
        "value"
        for name, found in (("PATH", "$PATH"), ("A", "${LD_LIBRARY_PATH}"))
    ]


# ---- images


def test_the_image_has_no_host_keys() -> None:
    text = render(job(), "k8s", "image")
    assert "ssh-keygen" not in text
    assert "rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*" in text
    manifest = yaml.safe_load(render(job(), "k8s", "train"))
    worker = manifest["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert worker["command"][-1] == "ssh-keygen -A && exec /usr/sbin/sshd -De"


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file out: the last rule decides that fits it or a parent."""
    found = False
    parents = [path, *map(str, Path(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        whole = "/" not in rule.removeprefix("**/") and rule.startswith("**/")
        pattern = rule.removeprefix("**/")
        for part in parents:
            name = Path(part).name if whole else part
            if fnmatch.fnmatchcase(name, pattern) and (whole or part.count("/") == rule.count("/")):
                found = not line.startswith("!")
    return found


@pytest.mark.parametrize(
    "path",
    [".git/config", ".env", "llamax/.env", ".ssh/id_ed25519", "id_rsa", "launch/id_rsa", "key.pem"]
    + ["launch/tls.key", "data/train.tokens", "runs/a/run.toml", "corpus.txt", ".venv/bin/python"]
    + ["kubeconfig", "job.toml", "tests/conftest.py", ".aws/credentials", "llamax/x/__pycache__/a"]
    + [".netrc", "wandb/x", "ssh_host_rsa_key", "llamax.egg-info/PKG-INFO"],
)
def test_keys_and_data_stay_out_of_the_image(path: str) -> None:
    assert ignored(path)


def test_the_image_has_all_that_it_installs() -> None:
    names = subprocess.run(
        ["git", "ls-files", "llamax", "launch", "kernels"], cwd=ROOT, text=True, capture_output=True
    ).stdout.split()
    for path in [*names, "pyproject.toml", "README.md", "LICENSE", "requirements-image.txt"]:
        assert not ignored(path), path
    text = render(job(), "k8s", "image")
    for path in re.findall(r"launch/\w+\.py", text):
        assert (ROOT / path).exists()
