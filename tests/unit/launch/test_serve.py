"""The phase serve: what docker is asked to run, manifests, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.docker_daemon import DOCKER, Daemon, docker_daemon
from support.launch_jobs import TRICKS, job, read_by_kubernetes

from llamax.cli.serve import parser
from llamax.launch import serving
from llamax.launch.checks import problems
from llamax.launch.render import action, render

GPU = {"model": "hub", "instance": "g5.12xlarge"}


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    if not DOCKER:
        pytest.skip("the docker command is not installed")
    with docker_daemon() as found:
        yield found


def run(text: str, daemon: Daemon) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "DOCKER_HOST": f"unix://{daemon.socket}"}
    return subprocess.run(
        ["bash", "-c", text],
        cwd=daemon.socket.parent,
        env=environ,
        text=True,
        capture_output=True,
        timeout=300,
    )


def exported(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


# ---- docker


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        (GPU, -1),
        ({**GPU, "devices": 2}, 2),
        ({**GPU, "engine": "tgi", "length": 4096}, -1),
        ({"model": "hub", "length": 2048, "slots": 4, "devices": 8}, 0),
        ({"model": "hub", "engine": "llamax", "instance": "local", "port": 9000}, 0),
    ],
)
def test_docker_runs_the_server_with_every_value_as_it_is(
    tmp_path: Path, daemon: Daemon, settings: dict[str, Any], gpus: int
) -> None:
    model = exported(tmp_path / TRICKS.replace("/", "").strip() / 'a "b", c')
    this = job(
        environment={"TRICK": TRICKS},
        serve={**settings, "model": str(model)},
        storage__mount=str(tmp_path),
        storage__folder=str(tmp_path),
    )
    assert problems(this, "docker", "serve") == []
    server = serving.server(this)
    daemon.log = f"loading\nx {server.ready} y\nmore\n"
    done = run(render(this, "docker", "serve"), daemon)
    assert done.returncode == 0, done.stderr
    asked, host = daemon.created, daemon.created["HostConfig"]
    assert asked["name"] == "llama2-7b-serve"
    assert asked["Image"] == server.image
    assert [*(asked.get("Entrypoint") or []), *asked["Cmd"]] == list(server.words)
    assert f"TRICK={TRICKS}" in asked["Env"]
    (mount,) = host["Mounts"]
    assert (mount["Source"], mount["Target"], mount["ReadOnly"]) == (str(model), "/model", True)
    port = str(this.serve.port)
    assert host["PortBindings"] == {f"{port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": port}]}
    requests = [each["Count"] for each in host["DeviceRequests"] or []]
    assert requests == ([gpus] if gpus else [])
    chips = [each["PathOnHost"] for each in host["Devices"] or []]
    neuron = this.server_machine.neuron
    assert chips == ([f"/dev/neuron{chip}" for chip in range(4)] if neuron else [])
    assert not list(tmp_path.glob("**/pwned"))
    *_, line = done.stdout.splitlines()
    words = shlex.split(line)
    assert words[:2] == ["curl", f"http://127.0.0.1:{port}/v1/completions"]
    assert json.loads(words[-1])["model"] == "llama2-7b"


def test_a_server_that_ends_before_it_is_ready_shows_its_log(
    tmp_path: Path, daemon: Daemon
) -> None:
    exported(tmp_path / "hub")
    this = job(serve=GPU, storage__mount=str(tmp_path), storage__folder=str(tmp_path))
    daemon.log = "no GPU here\n"
    done = run(render(this, "docker", "serve"), daemon)
    assert done.returncode == 1
    assert done.stderr == (
        "no GPU here\nllama2-7b-serve ended with code 3 before it was ready; its log is above\n"
    )


def test_one_server_at_a_time_and_its_actions(tmp_path: Path, daemon: Daemon) -> None:
    this = job(serve=GPU, storage__mount=str(tmp_path), storage__folder=str(tmp_path))
    done = run(render(this, "docker", "serve"), daemon)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path}/hub is no exported folder: it has no config.json" in done.stderr
    assert daemon.asked == []
    exported(tmp_path / "hub")
    for what in ("status", "logs", "stop", "clean"):
        done = run(action(this, "docker", "serve", what), daemon)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "there is no container llama2-7b-serve\n"
    daemon.log = f"{serving.READY['vllm']}\n"
    assert run(render(this, "docker", "serve"), daemon).returncode == 0
    done = run(render(this, "docker", "serve"), daemon)
    assert (done.returncode, done.stderr) == (2, "llama2-7b-serve runs already; stop it first\n")
    assert "llama2-7b-serve" in run(action(this, "docker", "serve", "status"), daemon).stdout
    assert run(action(this, "docker", "serve", "logs"), daemon).stdout == daemon.log
    stopped = run(action(this, "docker", "serve", "stop"), daemon)
    assert stopped.stdout == "llama2-7b-serve has stopped\n"
    assert daemon.state == "exited"
    assert run(render(this, "docker", "serve"), daemon).returncode == 0  # in place of the old one
    assert run(action(this, "docker", "serve", "clean"), daemon).returncode == 0
    assert daemon.state == ""


def test_without_a_daemon_the_message_is_that_of_docker(daemon: Daemon) -> None:
    daemon.socket = daemon.socket.with_name("none.sock")
    done = run(action(job(serve=GPU), "docker", "serve", "stop"), daemon)
    assert done.returncode != 0
    assert "docker daemon running" in done.stderr
    assert done.stdout == ""


def test_a_key_is_read_from_its_file_and_in_no_command(tmp_path: Path, daemon: Daemon) -> None:
    exported(tmp_path / "hub")
    (tmp_path / "key").write_text("s3cret\n")
    this = job(
        serve=GPU,
        secrets={"VLLM_API_KEY": str(tmp_path / "key"), "WANDB_API_KEY": "/none"},
        storage__mount=str(tmp_path),
        storage__folder=str(tmp_path),
    )
    text = render(this, "docker", "serve")
    daemon.log = f"{serving.READY['vllm']}\n"
    done = run(text, daemon)
    assert done.returncode == 0, done.stderr
    assert "VLLM_API_KEY=s3cret" in daemon.created["Env"]
    assert "WANDB_API_KEY" not in text
    assert "s3cret" not in text + done.stdout
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    curl.chmod(0o755)
    line = done.stdout.splitlines()[-1]
    sent = run(f"PATH={tmp_path}:$PATH; {line}", daemon).stdout.splitlines()
    assert "Authorization: Bearer s3cret" in sent


def test_the_command_of_llamax_is_one_that_it_reads() -> None:
    settings = {"model": "hub", "engine": "llamax", "instance": "local", "length": 64, "slots": 2}
    server = serving.server(job(serve=settings))
    assert server.command == ("python3", "-m", "llamax", "serve")
    options = parser().parse_args(list(server.arguments))
    assert (str(options.model), options.host, options.port) == ("/model", "0.0.0.0", 8000)
    assert (options.name, options.length, options.slots) == ("llama2-7b", 64, 2)
    assert options.backend == "cpu"


# ---- Kubernetes


def test_a_pod_has_the_model_the_devices_and_the_key(tmp_path: Path) -> None:
    this = job(
        environment={"TRICK": TRICKS},
        secrets={"API_KEY": "/keys/a", "WANDB_API_KEY": "/keys/b"},
        serve={"engine": "tgi", "model": f"hubs/{TRICKS}", "instance": "g5.48xlarge", "devices": 4},
        kubernetes__secret="keys",
    )
    assert problems(this, "k8s", "serve") == []
    deployment, service = yaml.safe_load_all(render(this, "k8s", "serve"))
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    model, _ = container["volumeMounts"]
    path = os.path.normpath(f"llama/hubs/{TRICKS}")
    assert model == {"name": "storage", "mountPath": "/model", "readOnly": True, "subPath": path}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert read_by_kubernetes(values["TRICK"] or "") == TRICKS
    assert list(values) == ["TRICK", "API_KEY"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert container["ports"][0]["name"] == service["spec"]["ports"][0]["targetPort"]


@pytest.mark.parametrize(
    ("instance", "devices", "chips"),
    [
        ("trn1.2xlarge", 0, "1"),
        ("trn1.32xlarge", 8, "4"),
        ("trn1.32xlarge", 1, "1"),
        ("trn2.48xlarge", 0, "16"),
        ("trn2.48xlarge", 4, "1"),
    ],
)
def test_neuroncores_are_asked_for_as_chips(instance: str, devices: int, chips: str) -> None:
    settings = {"model": "hub", "length": 2048, "slots": 4}
    this = job(serve={**settings, "instance": instance, "devices": devices})
    deployment, _ = yaml.safe_load_all(render(this, "k8s", "serve"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"aws.amazon.com/neuron": chips}
    words = container["args"]
    parallel = words[words.index("--tensor-parallel-size") + 1]
    assert int(parallel) == (devices or this.server_machine.ranks)


# ---- what is refused


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        ("docker", {"serve": {}}, "serve.model is empty; set it to the folder that llamax consol"),
        ("docker", {"serve": {**GPU, "instance": "g5.13xlarge"}}, "serve.instance='g5.13xlarge' i"),
        (
            "docker",
            {"serve": {**GPU, "devices": 5}},
            "serve.devices=5 but g5.12xlarge has 4 GPUs; use 4 or less",
        ),
        (
            "docker",
            {"serve": {**GPU, "instance": "local"}},
            "serve.engine=vllm has no image for local; use serve.engine=llamax",
        ),
        (
            "k8s",
            {"serve": {"model": "hub", "engine": "tgi"}},
            "serve.engine=tgi has no image for trn1.32xlarge; use serve.engine=vllm",
        ),
        ("k8s", {"serve": {"model": "hub"}}, "serve.length and serve.slots are needed on Trainium"),
        (
            "docker",
            {"serve": {"model": "hub", "engine": "llamax"}},
            "serve.engine=llamax does not serve on trn1.32xlarge; use serve.engine=vllm, or",
        ),
        (
            "docker",
            {"serve": {**GPU, "engine": "llamax", "devices": 2}},
            "serve.devices=2 but llamax serves on one device; remove it",
        ),
        (
            "docker",
            {"serve": {**GPU, "engine": "llamax"}, "image": ""},
            "image is empty; set it to the image that --phase image builds",
        ),
        (
            "docker",
            {"serve": {**GPU, "engine": "tgi", "slots": 4}},
            "serve.slots=4 has no equal in",
        ),
        ("docker", {"serve": {**GPU, "image": "a b"}}, "serve.image='a b' is not an image name;"),
        (
            "docker",
            {"serve": GPU, "storage": {}},
            "serve.model='hub' is relative, but storage.mount is empty; use an absolute path",
        ),
        ("docker", {"serve": GPU, "name": "a b"}, "name='a b' cannot name files and objects;"),
        (
            "k8s",
            {"serve": {**GPU, "model": "/home/hub"}},
            "serve.model='/home/hub' is not below storage.mount=/fsx; export the model there",
        ),
        ("k8s", {"serve": GPU, "storage__claim": ""}, "storage.claim is empty; set it to the"),
        ("k8s", {"serve": GPU, "environment": {"RANK": 1}}, "environment.RANK is set for each ran"),
    ],
)
def test_what_cannot_be_served_is_refused(
    launcher: str, changes: dict[str, Any], message: str
) -> None:
    found = problems(job(**changes), launcher, "serve")
    assert any(line.startswith(message) for line in found), found


@pytest.mark.parametrize(
    ("devices", "config", "message"),
    [
        (0, '{"num_attention_heads": 6}', "4 GPUs cannot share the 6 attention heads of {hub} equ"),
        (3, '{"num_attention_heads": 32}', "3 GPUs cannot share the 32 attention heads of {hub} "),
        (2, '{"num_attention_heads": 6}', ""),
        (3, '{"num_attention_heads": ', ""),
    ],
)
def test_devices_share_the_attention_heads_equally(
    tmp_path: Path, devices: int, config: str, message: str
) -> None:
    hub = exported(tmp_path / "hub")
    (hub / "config.json").write_text(config)
    this = job(serve={**GPU, "model": str(hub), "devices": devices})
    lines = problems(this, "docker", "serve")
    if not message:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(message.format(hub=hub))
    assert line.endswith(f"use serve.devices={2 if devices else 3}")


def test_a_server_needs_nothing_of_the_run() -> None:
    this = job(recipe="", overrides={"data": {"path": ""}}, image="", serve=GPU)
    for launcher in ("docker", "k8s"):
        assert problems(this, launcher, "serve") == []
        assert render(this, launcher, "serve")
