"""What is checked of a job before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
from support.launch_jobs import job

from llamax.launch import slurm
from llamax.launch.checks import problems
from llamax.launch.render import PHASES
from llamax.runtime.errors import ConfigError


def refusals(launcher: str = "k8s", phase: str = "train", **changes: Any) -> list[str]:
    return problems(job(**changes), launcher, phase)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as refused:
        job(nods=4, slurm__signal_s="x", environment__A={})
    assert len(str(refused.value).splitlines()) == 4


# ---- what launchers refuse


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        (
            "torchrun",
            {"ranks_per_node": 64},
            "ranks_per_node=64 but trn1.32xlarge has 32 NeuronCores; use 32 or less, or more nodes",
        ),
        (
            "torchrun",
            {"ranks_per_node": 16},
            "ranks_per_node=16: Neuron has no collectives between 16 of the 32 NeuronCores of "
            "trn1.32xlarge; use 1, 2, 8 or 32",
        ),
        (
            "slurm",
            {"instance": "trn2", "ranks_per_node": 8},
            "ranks_per_node=8: Neuron has no collectives between 8 of the 64 NeuronCores of "
            "trn2.48xlarge; use 1, 4, 16 or 64",
        ),
        ("torchrun", {"instance": "trn1.32xlage"}, "unknown; did you mean trn1.32xlarge?"),
        ("torchrun", {"instance": "local"}, "ranks_per_node=0: instance=local has no default"),
        ("torchrun", {"overrides__parallel__tensor": 64}, "1 x trn1.32xlarge = 32 ranks: "),
        (
            "torchrun",
            {"overrides__parallel__tensor": 6},
            "parallel.tensor=6 does not divide model.num_attention_heads=32; use 1, 2, 4, 8, 16 or "
            "32; and 5 more",
        ),
        (
            "k8s",
            {
                "nodes": 4,
                "recipe": "llama2-70b",
                "overrides__parallel__tensor": 64,
                "overrides__parallel__pipeline": 1,
                "overrides__parallel__chunks": 1,
            },
            "4 x trn1.32xlarge = 128 ranks: overrides: parallel.tensor=64 does not divide a node "
            "of 32 ranks, and tensor ranks share one; use parallel.tensor=1, 2, 4, 8, 16 or 32",
        ),
        (
            "slurm",
            {"nodes": 4, "ranks_per_node": 8, "overrides__parallel__context": 2},
            "parallel.tensor=8 x parallel.context=2 does not divide a node of 8 ranks, and tensor "
            "and context ranks share one; use parallel.context=1",
        ),
        ("torchrun", {"overrides__optim__lrr": 1}, "--optim.lrr is an unknown option; did you"),
        ("torchrun", {"recipe": "llama2-7c"}, "no recipe is named 'llama2-7c'; did you mean"),
        ("torchrun", {"overrides__run__backend": "cpu"}, "leaves its NeuronCores idle; use"),
        (
            "slurm",
            {"instance": "p5.48xlarge"},
            "run.backend=xla on p5.48xlarge leaves its GPUs idle; use overrides run.backend=cuda",
        ),
        (
            "slurm",
            {"instance": "p4d.24xlarge", "ranks_per_node": 16, "overrides__run__backend": "cuda"},
            "ranks_per_node=16 but p4d.24xlarge has 8 GPUs; use 8 or less, or more nodes",
        ),
        ("slurm", {"instance": "trn1n.2xlarge"}, "instance='trn1n.2xlarge' is unknown; did you"),
        ("torchrun", {"name": "a b"}, "name='a b' cannot name files and objects; use up to 63"),
        ("torchrun", {"environment__RANK": 1}, "environment.RANK is set for each rank by its"),
        ("torchrun", {"nodes": 2, "torchrun__master": ""}, "torchrun.master is empty; with nod"),
        ("mpirun", {"nodes": 2, "mpirun__hostfile": ""}, "mpirun.hostfile is empty; with nodes=2"),
        ("slurm", {"slurm__partition": "a b"}, "slurm.partition='a b' is not a name in Slurm"),
        ("slurm", {"slurm__account": "$(x)"}, "slurm.account='$(x)' is not a name in Slurm"),
        (
            "slurm",
            {"slurm__time_limit": "2 days"},
            "slurm.time_limit='2 days' is not a time; use 2-",
        ),
        (
            "slurm",
            {"slurm__time_limit": "00:10:00"},
            "slurm.signal_s=600 is not below slurm.time_limit, 600 s",
        ),
        (
            "slurm",
            {"storage__folder": "/fsx/a b"},
            "storage.folder='/fsx/a b' has characters that #SBATCH",
        ),
        (
            "slurm",
            {"slurm__cpus": 8},
            "slurm.cpus=8 but a job has whole nodes of trn1.32xlarge; use slurm.cpus=0, or",
        ),
        ("slurm", {"storage__mount": "fsx"}, "storage.mount='fsx' is not an absolute path; use"),
        ("slurm", {"storage__folder": "/efs"}, "storage.folder=/efs is not below storage.mount="),
        (
            "slurm",
            {"overrides__run__folder": "/tmp/run"},
            "run.folder=/tmp/run is not below storage.mount=/fsx: each node would have a different "
            "one; use overrides run.folder=/fsx/run",
        ),
        ("slurm", {"overrides__data__path": "../../data"}, "data.path=../../data is not below"),
        ("slurm", {"overrides__data__path": "0.7 /x/web 0.3 a"}, "data.path=/x/web is not below"),
        ("k8s", {"storage__claim": ""}, "storage.claim is empty; set it to the Persis"),
        ("k8s", {"storage__claim": "My_Claim"}, "storage.claim='My_Claim' is refused by Kuber"),
        ("k8s", {"storage__claim": "a..b"}, "storage.claim='a..b' is refused by Kubernetes; use"),
        ("k8s", {"kubernetes__namespace": "a.b"}, "kubernetes.namespace='a.b' is refused by K"),
        ("k8s", {"kubernetes__service_account": "A"}, "kubernetes.service_account='A' is refused"),
        ("k8s", {"image": ""}, "image is empty; set it to the image that --phase image builds"),
        ("k8s", {"image": "a b"}, "image='a b' is not an image name; use registry/repository:tag"),
        ("k8s", {"name": "Llama_7B"}, "name='Llama_7B' is refused by Kubernetes; use lower-case"),
        (
            "k8s",
            {"image": "ecr.aws/Llamax:1"},
            "image='ecr.aws/Llamax:1' is not an image name; use",
        ),
        ("k8s", {"name": "lläma"}, "name='lläma' is refused by Kubernetes; use lower-case"),
        ("k8s", {"name": "7b"}, "name='7b' is refused by Kubernetes"),
        (
            "k8s",
            {"name": "a" * 44, "nodes": 64},
            "a-precompile-worker-63 has 65 characters, Kubernetes allows 63; use 42 or less",
        ),
        ("k8s", {"name": "a" * 44, "nodes": 8}, "-worker-7 has 64 characters, Kubernetes allows"),
        ("sagemaker", {"name": "a.b"}, "name='a.b' is refused by SageMaker; use letters, digits"),
        ("sagemaker", {"name": "a" * 32}, "use letters, digits and -, up to 31 of them"),
        ("sagemaker", {"image": ""}, "image='' is not an image name; set it to the image that"),
        ("sagemaker", {"sagemaker__role": ""}, "sagemaker.role is empty; set it to the ARN of t"),
        ("sagemaker", {"sagemaker__data": ""}, "sagemaker.data is empty; set it to the s3:// or"),
        ("sagemaker", {"sagemaker__output": "/x"}, "sagemaker.output='/x' is not an s3:// folder "),
        ("sagemaker", {"sagemaker__local": True}, "sagemaker.local=true runs on the CPU or the GP"),
        (
            "sagemaker",
            {"sagemaker__base": "/m"},
            "sagemaker.base='/m' is not an s3:// or file:///",
        ),
        (
            "sagemaker",
            {"overrides__checkpoint__init_from": "models/base"},
            "checkpoint.init_from=models/base is a folder that containers of Sa",
        ),
        (
            "sagemaker",
            {"recipe": "demo", "instance": "local", "ranks_per_node": 4, "overrides": {}},
            "instance=local but sagemaker.local=false; use an instance such as trn1.32xlarge",
        ),
    ],
)
def test_each_mistake_is_one_line(launcher: str, changes: dict[str, Any], message: str) -> None:
    found = refusals(launcher, **changes)
    assert len(found) == 1
    assert message in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sagemaker__inputs": ""}, "sagemaker.inputs is empty; set it to the s3:// or file:///"),
        ({"sagemaker__inputs": "/x"}, "sagemaker.inputs='/x' is not an s3:// or file:/// folder w"),
        ({"sagemaker__data": "file:///x"}, "sagemaker.data='file:///x' is not an s3:// folder "),
        ({"sagemaker__prepare_instance": "ml.c5.xlarge"}, "use one such as c5.9xlarge, without ml"),
        ({"sagemaker__prepare_instance": "c5"}, "sagemaker.prepare_instance='c5' is no instance t"),
        ({"sagemaker__local": True}, "sagemaker.local=true has no phase prepare; use --on torchr"),
        ({"prepare__inputs": ["/fsx/a"]}, "prepare.inputs='/fsx/a' is not in sagemaker.inputs;"),
        ({"prepare__tokenizer": "a/../../b"}, "prepare.tokenizer='a/../../b' is not in sagemaker"),
        ({"prepare__inputs": []}, "prepare.inputs is empty; set it to the text files, rows or"),
    ],
)
def test_each_mistake_of_a_processing_job_is_one_line(
    changes: dict[str, Any], message: str
) -> None:
    found = problems(job(**changes), "sagemaker", "prepare")
    assert len(found) == 1
    assert message in found[0]


def test_processing_jobs_that_are_right() -> None:
    for changes in (
        {"sagemaker__inputs": "file:///data"},
        {"sagemaker__prepare_instance": "m7i.48xlarge"},
        {"prepare__inputs": ["."], "prepare__tokenizer": "..tok/x.model"},
        {"overrides__data__path": "0.5 a 0.5 b"},
    ):
        assert problems(job(**changes), "sagemaker", "prepare") == []


@pytest.mark.parametrize(
    "image",
    [
        "llamax",
        "llamax:1",
        "localhost/llamax",
        "localhost:5000/team/llamax:v1.0_x",
        "Registry.example.com:443/a/b__c/d-e",
        f"public.ecr.aws/neuron/x@sha256:{'0a' * 32}",
    ],
)
def test_names_of_images_that_docker_takes(image: str) -> None:
    assert refusals("k8s", image=image) == []


@pytest.mark.parametrize("key", ["storage__claim", "kubernetes__service_account"])
def test_objects_of_kubernetes_have_subdomains_as_names(key: str) -> None:
    long = ".".join(["a" * 63] * 3)
    assert refusals("k8s", **{key: "fsx.team-1"}) == refusals("k8s", **{key: long}) == []
    assert "is refused by Kubernetes; use" in refusals("k8s", **{key: f"{long}.{long}"})[0]


def test_prepare_wants_inputs_and_a_tokenizer() -> None:
    found = refusals("slurm", "prepare", prepare={})
    assert [line.split(" is ")[0] for line in found] == ["prepare.inputs", "prepare.tokenizer"]


@pytest.mark.parametrize("launcher", PHASES)
def test_a_right_job_is_not_refused(launcher: str) -> None:
    for nodes in (1, 4, 16, 64):
        assert refusals(launcher, nodes=nodes) == []
    assert refusals("k8s", name="a" * 43, nodes=8) == []
    small = {"recipe": "demo", "instance": "local", "ranks_per_node": 4, "overrides": {}}
    assert refusals(launcher, **small, sagemaker__local=True) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sagemaker__base": "s3://bucket/base", "overrides__checkpoint__init_from": "models/base"},
        {"overrides__checkpoint__init_from": "/opt/models/base"},
        {"sagemaker__local": True, "instance": "g5.4xlarge", "recipe": "korean-chat-qlora"}
        | {"overrides": {}, "sagemaker__base": "file:///models/base"},
    ],
)
def test_where_a_job_of_sagemaker_may_find_its_base(changes: dict[str, Any]) -> None:
    assert refusals("sagemaker", **changes) == []


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("", 0),
        ("0", 0),
        ("90", 5400),
        ("1:30", 90),
        ("01:00:05", 3605),
        ("2-3", 183600),
        ("1-0:1", 86460),
        ("2-00:00:01", 172801),
    ],
)
def test_a_limit_of_slurm_in_seconds(limit: str, expected: int) -> None:
    assert slurm.seconds(limit) == expected
