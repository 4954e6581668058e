"""The phase cluster: files of eksctl and ParallelCluster, and scripts with stand-ins of the tools.

The files also pass the schemas of eksctl and of AWS ParallelCluster 3.16, compared by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launch_jobs import job

from llamax.cli.launch import main
from llamax.launch import cluster
from llamax.launch.checks import problems
from llamax.launch.render import action, render
from llamax.runtime.errors import ConfigError

TOOL = """#!/bin/bash
echo "$(basename "$0") $*" >>{folder}/asked
input=$([[ -p /dev/stdin ]] && cat || true)
[[ -z $input ]] || echo "$input" >>{folder}/input
case "$*" in
*describe-instance-types*) echo 128 ;;
*sagemaker*list-service-quotas* | *list-service-quotas*) echo "${{QUOTA:-256.0}}" ;;
*describe-instance-type-offerings*) printf '%s\\t%s\\n' us-west-2b us-west-2d ;;
*clusterSecurityGroupId*) echo sg-1 ;;
*vpcId* | *VpcId*) echo vpc-1 ;;
*describe-subnets*) echo subnet-9 ;;
*get-parameter*) echo ami-1 ;;
*describe-images*) echo "${{IMAGE-\"ami-2\"}}" ;;
*describe-security-groups*) echo "${{GROUP-None}}" ;;
*create-security-group*) echo sg-2 ;;
*run-instances*) echo i-1 ;;
*"describe-instances --output text"*) echo "${{FOUND-i-1}}" ;;
*PublicDnsName*) echo host.example ;;
esac
"""


def run(text: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    for name in ("aws", "eksctl", "kubectl", "pcluster"):
        (folder / name).write_text(TOOL.format(folder=folder))
        (folder / name).chmod(0o755)
    (folder / "asked").write_text("")
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", text],
        env={**os.environ, "PATH": path, **environ},
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_eks_has_the_nodes_the_storage_and_the_operator(tmp_path: Path) -> None:
    this = job(nodes=2)
    done = run(render(this, "k8s", "cluster"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 x trn1.32xlarge cost $43.00 an hour at the list price of June 2025" in done.stdout
    commands = asked(tmp_path)
    made = next(n for n, line in enumerate(commands) if line.startswith("eksctl create cluster"))
    assert all(line.startswith("aws ") for line in commands[:made])  # looks before it makes
    assert any("mpi-operator/v0.6.0/" in line for line in commands[made:])
    text = (tmp_path / "input").read_text()
    config, _, claims = text.partition("apiVersion: storage.k8s.io/v1")
    nodes = yaml.safe_load(config)["managedNodeGroups"][1]
    assert nodes["efaEnabled"] is True
    assert (nodes["instanceType"], nodes["desiredCapacity"]) == ("trn1.32xlarge", 2)
    assert nodes["availabilityZones"] == ["us-west-2d"]
    storage, claim = yaml.safe_load_all(f"apiVersion: storage.k8s.io/v1{claims}")
    assert storage["parameters"]["subnetId"] == "subnet-9"
    assert storage["parameters"]["securityGroupIds"] == "sg-1"
    assert claim["metadata"] == {"name": this.storage.claim, "namespace": "training"}


@pytest.mark.parametrize("version", ["1.25", "1.31", "1.35"])
def test_the_storage_holds_to_the_strict_schemas(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for manifest in cluster.storage(job()):
        validate(manifest, version, strict=True)


def test_slurm_has_a_queue_with_the_partition_of_the_job(tmp_path: Path) -> None:
    this = job(nodes=4)
    done = run(render(this, "slurm", "cluster"), tmp_path, QUOTA="512.0")
    assert done.returncode == 0, done.stderr
    assert asked(tmp_path)[-1].startswith("pcluster create-cluster --cluster-name llama2-7b")
    (queue,) = cluster.parallel_cluster_file(this)["Scheduling"]["SlurmQueues"]
    assert queue["Name"] == this.slurm.partition
    assert queue["Networking"]["SubnetIds"] == ["subnet-0fedcba9876543210"]
    (node,) = queue["ComputeResources"]
    assert (node["MaxCount"], node["Efa"]) == (4, {"Enabled": True})
    one_interface = job(instance="trn1.2xlarge", ranks_per_node=2, cluster__nodes_subnet="")
    assert not any("nodes_subnet" in line for line in problems(one_interface, "slurm", "cluster"))
    (queue,) = cluster.parallel_cluster_file(one_interface)["Scheduling"]["SlurmQueues"]
    assert queue["Networking"]["SubnetIds"] == [this.cluster.subnet]
    assert "Efa" not in queue["ComputeResources"][0]


def test_an_instance_opens_ssh_to_its_owner_alone(tmp_path: Path) -> None:
    done = run(render(job(), "torchrun", "cluster"), tmp_path, FOUND="")
    assert done.returncode == 0, done.stderr
    commands = "\n".join(asked(tmp_path))
    assert "--port 22 --cidr 203.0.113.7/32" in commands
    assert "--key-name my key" in commands
    assert done.stdout.splitlines()[-1].endswith("ubuntu@host.example")
    clean = action(job(), "torchrun", "cluster", "clean")
    done = run(clean, tmp_path, GROUP="sg-2")
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in asked(tmp_path)] == [
        "describe-instances",
        "terminate-instances",
        "wait",
        "describe-security-groups",
        "delete-security-group",
    ]
    done = run(clean, tmp_path, FOUND="", GROUP="")
    assert (done.returncode, done.stdout) == (0, "EC2 has no instance llama2-7b in us-west-2\n")
    assert len(asked(tmp_path)) == 2


@pytest.mark.parametrize(
    ("changes", "named", "described", "image"),
    [
        ({}, "Neuron PyTorch 2.9 (Ubuntu 24.04)*", "*Neuron SDK 2.28.*", "ami-2"),
        ({"neuron_sdk": "2.29.1"}, "Neuron PyTorch 2.9 (", "*Neuron SDK 2.29.*", "ami-2"),
        ({"instance": "trn2.48xlarge"}, "Neuron torch-neuronx*", "*Neuron SDK 2.33.*", "ami-2"),
        ({"instance": "p5.48xlarge"}, "", "", "ami-1"),
    ],
)
def test_an_instance_has_the_image_of_the_sdk(
    tmp_path: Path, changes: dict[str, str], named: str, described: str, image: str
) -> None:
    """The newest image for Neuron has no torch-xla: AWS ended it with SDK 2.31."""
    this = job(**changes)
    done = run(render(this, "torchrun", "cluster"), tmp_path, FOUND="", QUOTA="999")
    assert done.returncode == 0, done.stderr
    commands = asked(tmp_path)
    assert any(f"run-instances --image-id {image} " in line for line in commands)
    found = [line for line in commands if "describe-images" in line]
    assert len(found) == bool(named)
    assert all(named in line and described in line for line in found)
    if named:
        none = run(
            render(this, "torchrun", "cluster"), tmp_path, FOUND="", IMAGE="null", QUOTA="999"
        )
        assert none.returncode == 2
        assert "AWS has no AMI with Neuron SDK" in none.stderr
        assert not any("run-instances" in line for line in asked(tmp_path))


def test_a_second_start_makes_no_second_instance(tmp_path: Path) -> None:
    done = run(render(job(), "torchrun", "cluster"), tmp_path)
    message = (
        "i-1 of this job exists already; --action status shows it, --action clean deletes it\n"
    )
    assert (done.returncode, done.stderr) == (2, message)
    assert not any("create" in line or "run-instances" in line for line in asked(tmp_path))


def test_the_group_of_an_instance_that_found_no_capacity_is_used_and_deleted(
    tmp_path: Path,
) -> None:
    done = run(render(job(), "torchrun", "cluster"), tmp_path, FOUND="", GROUP="sg-7")
    assert done.returncode == 0, done.stderr
    commands = "\n".join(asked(tmp_path))
    assert "--security-group-ids sg-7" in commands
    assert "create-security-group" not in commands
    done = run(action(job(), "torchrun", "cluster", "clean"), tmp_path, FOUND="", GROUP="sg-7")
    assert done.returncode == 0, done.stderr
    assert asked(tmp_path)[-1] == "aws ec2 delete-security-group --group-id sg-7"


@pytest.mark.parametrize("launcher", ["k8s", "slurm", "torchrun"])
def test_nothing_is_made_without_quota_or_in_another_zone(tmp_path: Path, launcher: str) -> None:
    for changes, environ, message in (
        ({}, {"QUOTA": "64.0"}, "is 64.0 vCPUs, but 1 x trn1.32xlarge need 128; ask for them in"),
        ({}, {"QUOTA": "null"}, "quota 'Running On-Demand Trn instances' in us-west-2 is null"),
        (
            {"cluster__zone": "us-west-2a"},
            {},
            "trn1.32xlarge is not offered in us-west-2a, but in: us-west-2b us-west-2d",
        ),
    ):
        done = run(render(job(**changes), launcher, "cluster"), tmp_path, **environ)
        assert done.returncode == 2
        assert message in done.stderr
        assert not any(re.search("create|run-instances|apply", line) for line in asked(tmp_path))


def test_the_quotas_of_sagemaker(tmp_path: Path) -> None:
    this = job(nodes=2, serve__instance="g5.12xlarge")
    done = run(render(this, "sagemaker", "cluster"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "ml.trn1.32xlarge for training job usage: 256.0, needed: 2",
        "ml.c5.9xlarge for processing job usage: 256.0, needed: 1",
        "ml.g5.12xlarge for endpoint usage: 256.0, needed: 1",
    ]
    done = run(render(this, "sagemaker", "cluster"), tmp_path, QUOTA="0.0")
    assert done.returncode == 2
    assert done.stderr == "ask for what is missing in Service Quotas, in us-west-2\n"


@pytest.mark.parametrize("launcher", ["k8s", "slurm"])
def test_clean_deletes_the_cluster(tmp_path: Path, launcher: str) -> None:
    done = run(action(job(), launcher, "cluster", "clean"), tmp_path)
    assert done.returncode == 0, done.stderr
    lines = asked(tmp_path)
    assert re.search(r"delete.cluster", lines[-1])
    assert (launcher == "k8s") == lines[0].startswith("kubectl delete pvc")
    assert run(action(job(), launcher, "cluster", "status"), tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        (
            "k8s",
            {"cluster__region": "oregon"},
            "cluster.region='oregon' is no region; use one such",
        ),
        ("k8s", {"cluster__zone": "us-east-1a"}, "cluster.zone='us-east-1a' is no zone of us-west"),
        ("k8s", {"cluster__second_zone": "us-west-2d"}, "cluster.second_zone='us-west-2d' is no o"),
        (
            "k8s",
            {"cluster__region": "", "cluster__zone": ""},
            "cluster.zone='' is no zone of a region; use one such as us-west-2d",
        ),
        (
            "k8s",
            {"cluster__second_zone": "us-east-1a"},
            "cluster.second_zone='us-east-1a' is no other zone of us-west-2",
        ),
        ("slurm", {"cluster__storage_gib": 3600}, "cluster.storage_gib=3600 is no size of FSx for"),
        ("slurm", {"cluster__subnet": "subnet-1"}, "cluster.subnet='subnet-1' is no subnet; use"),
        ("torchrun", {"cluster__ssh_from": "999.1.1.1/32"}, "cluster.ssh_from='999.1.1.1/32' is"),
        ("torchrun", {"cluster__ssh_from": "1.2.3.4/33"}, "cluster.ssh_from='1.2.3.4/33' is no"),
        ("torchrun", {"cluster__ssh_from": "1.2.3.4"}, "cluster.ssh_from='1.2.3.4' is no range"),
        (
            "k8s",
            {"cluster__disk_gib": 16385},
            "cluster.disk_gib=16385 is above the limit of EBS; use 16384 or less",
        ),
        ("slurm", {"cluster__subnet": "default"}, "cluster.subnet='default' is no subnet; use one"),
        (
            "slurm",
            {"cluster__nodes_subnet": ""},
            "cluster.nodes_subnet='' is no other subnet; use a private one in the zone: machines",
        ),
        ("slurm", {"cluster__key": "$(x)"}, "cluster.key='$(x)' is no name of an EC2 key pair"),
        (
            "torchrun",
            {"cluster__ssh_from": "0.0.0.0/0"},
            "cluster.ssh_from='0.0.0.0/0' is no range",
        ),
        ("torchrun", {"nodes": 2}, "nodes=2 but --on torchrun makes one instance; use --on slurm"),
        ("slurm", {"name": "a.b"}, "name='a.b' cannot name a cluster; use letters, digits and -,"),
        (
            "sagemaker",
            {"instance": "local", "ranks_per_node": 2, "recipe": "demo", "overrides": {}},
            "instance='local' is no instance type of AWS with accelerators; use one",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(
    launcher: str, changes: dict[str, Any], message: str
) -> None:
    found = problems(job(**changes), launcher, "cluster")
    assert any(line.startswith(message) for line in found), found


def test_a_cluster_is_made_looked_at_and_deleted(tmp_path: Path) -> None:
    command = ["--job", str(tmp_path / "none.toml"), "--on", "k8s", "--phase", "cluster"]
    with pytest.raises(ConfigError, match="--phase cluster has start, status or clean"):
        main([*command, "--action", "logs"])
