"""What is checked of a job before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launch_jobs import job

from llamax.launch import kubernetes, slurm
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


ROLE = "arn:aws:iam::123456789012:role"


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        (
            "sagemaker",
            {"sagemaker__role": "me"},
            "sagemaker.role='me' is no ARN of an IAM role; use one such as arn:aws:iam::"
            "123456789012:role/NAME (aws iam get-role --role-name me --query Role.Arn)",
        ),
        (
            "sagemaker",
            {"sagemaker__role": f"{ROLE}/a b"},
            f"sagemaker.role='{ROLE}/a b' is no ARN of an IAM role; use one such as {ROLE}/NAME",
        ),
        ("sagemaker", {"sagemaker__role": "arn:aws:iam::123456789012:user/x"}, "is no ARN of an"),
        (
            "sagemaker",
            {"sagemaker__data": "ftp://x"},
            "sagemaker.data='ftp://x' is not an s3:// or file:/// folder of the dataset; use one "
            "such as s3://bucket/path",
        ),
        (
            "sagemaker",
            {"sagemaker__output": "s3://"},
            "sagemaker.output='s3://' names no bucket; use s3://bucket/path",
        ),
        (
            "sagemaker",
            {"sagemaker__base": "s3://My_Bucket/x"},
            "sagemaker.base='s3://My_Bucket/x' has the bucket 'My_Bucket'; the name of a bucket "
            "has 3 to 63 lower-case letters, digits, - and .",
        ),
        (
            "sagemaker",
            {"sagemaker__data": "file://x"},
            "sagemaker.data='file://x' names no folder of this machine; use file:///folder",
        ),
        (
            "sagemaker",
            {"sagemaker__data": f"s3://bucket/{'x' * 1020}"},
            "sagemaker.data has 1032 characters; SageMaker takes 1024 or fewer",
        ),
        (
            "sagemaker",
            {"image": "llamax:1"},
            "image='llamax:1' is not in Amazon ECR, where SageMaker pulls images; push it to one "
            "such as 123456789012.dkr.ecr.us-west-2.amazonaws.com/llamax:1",
        ),
        (
            "sagemaker",
            {"sagemaker__max_run_s": 28 * 86400 + 1},
            "sagemaker.max_run_s=2419201 is above SageMaker's limit; use 2419200 or less",
        ),
        ("sagemaker", {"sagemaker__volume_gib": 16385}, "sagemaker.volume_gib=16385 is above Sage"),
        ("sagemaker", {"sagemaker__keep_alive_s": 21601}, "sagemaker.keep_alive_s=21601 is above"),
        (
            "sagemaker",
            {"environment__A": "x" * 513},
            "environment.A has 513 characters; SageMaker takes 512 or fewer",
        ),
        (
            "sagemaker",
            {"overrides__data__path": "x" * 2501},
            "overrides.data.path has 2501 characters; SageMaker takes 2500 or fewer",
        ),
        (
            "sagemaker",
            {"environment": {f"A{number}": 1 for number in range(120)}},
            " of a job; SageMaker takes 100 or fewer",
        ),
        ("sagemaker", {"sagemaker__secret": "a b"}, "sagemaker.secret='a b' is no name in AWS Sec"),
        (
            "slurm",
            {"compile_cache": "ftp://x/y"},
            "compile_cache='ftp://x/y' is no address that is known here; use s3://bucket/path, "
            "gs://bucket/path, hf://datasets/org/name or file:///folder",
        ),
        ("k8s", {"compile_cache": "s3:/x"}, "compile_cache='s3:/x' is no address that is known"),
        ("torchrun", {"compile_cache": "S3://b/x"}, "compile_cache='S3://b/x' is no address"),
        (
            "mpirun",
            {"compile_cache": "hf://datasets/a"},
            "compile_cache='hf://datasets/a' names no repository of the Hub; use hf://datasets/",
        ),
        (
            "torchrun",
            {"torchrun__master": "trn1-0:29500"},
            "torchrun.master='trn1-0:29500' is no name or IPv4 address of a machine; use one such "
            "as trn1-0 or 10.0.0.1, without a port: it is port",
        ),
        ("torchrun", {"torchrun__master": "::1"}, "torchrun.master='::1' is no name or IPv4"),
        ("torchrun", {"torchrun__master": "a b"}, "torchrun.master='a b' is no name or IPv4"),
        (
            "slurm",
            {"slurm__signal_s": 65536},
            "slurm.signal_s=65536 is above the limit of sbatch; use 65535 or less",
        ),
        (
            "k8s",
            {"storage__mount": "/"},
            "storage.mount='/' is refused by Kubernetes; use one such as /fsx, without a colon and "
            "below /",
        ),
        (
            "k8s",
            {"storage": {"mount": "/fsx:rw", "claim": "fsx"}},
            "storage.mount='/fsx:rw' is refused by Kubernetes; use one such as /fsx",
        ),
        (
            "slurm",
            {"overrides__run__folder": "s3://bucket/run"},
            "run.folder=s3://bucket/run is an address of s3, not a path; copy it or mount it here, "
            "and use a folder for this run",
        ),
    ],
)
def test_a_value_that_a_service_would_refuse_is_one_line(
    launcher: str, changes: dict[str, Any], message: str
) -> None:
    found = refusals(launcher, **changes)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        ("sagemaker", {"sagemaker__role": f"{ROLE}/service-role/AmazonSageMaker-2020"}),
        ("sagemaker", {"sagemaker__role": "arn:aws-cn:iam::123456789012:role/x"}),
        ("sagemaker", {"sagemaker__data": "s3://my.bucket-1/a b/c"}),
        ("sagemaker", {"sagemaker__data": "file:///data/a b"}),
        ("sagemaker", {"sagemaker__secret": "arn:aws:secretsmanager:us-west-2:1:secret:x-AbC"}),
        ("sagemaker", {"image": "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn/llamax:1"}),
        ("sagemaker", {"sagemaker__max_run_s": 28 * 86400, "sagemaker__keep_alive_s": 21600}),
        ("slurm", {"compile_cache": "s3://bucket"}),
        ("slurm", {"compile_cache": "s3a://bucket/neuron-cache"}),
        ("slurm", {"compile_cache": "gcs://bucket_1/x"}),
        ("slurm", {"compile_cache": "hf://datasets/org/name@main/x"}),
        ("slurm", {"compile_cache": "hf://org/name"}),
        ("slurm", {"compile_cache": "../cache"}),
        ("slurm", {"compile_cache": "file:///fsx/cache"}),
        ("torchrun", {"torchrun__master": "ip-10-0-0-1.us-west-2.compute.internal"}),
        ("torchrun", {"torchrun__master": "node_1"}),
        ("slurm", {"slurm__signal_s": 65535}),
    ],
)
def test_unusual_values_that_services_take(launcher: str, changes: dict[str, Any]) -> None:
    assert refusals(launcher, **changes) == []


@pytest.mark.parametrize("launcher", ["slurm", "k8s"])
def test_files_elsewhere_are_no_inputs(launcher: str) -> None:
    (found,) = refusals(launcher, "prepare", prepare__inputs=["s3://bucket/text"])
    assert found == (
        "prepare.inputs='s3://bucket/text' is an address, not a path; copy it to the storage, such "
        "as by aws s3 sync"
    )
    assert refusals(launcher, "prepare", prepare__inputs=["hf://datasets/org/name"]) == []
    found, *_ = refusals("k8s", "serve", serve__model="s3://bucket/hub")
    assert found.startswith("serve.model='s3://bucket/hub' is an address, not a path; copy it to a")


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


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)


SCALARS = st.one_of(TEXT, st.integers(), st.booleans())


DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXT, inner)), max_leaves=6
)


@settings(max_examples=60)
@given(st.dictionaries(TEXT, DOCUMENTS, min_size=1, max_size=4))
def test_a_manifest_reads_back_as_it_was_written(document: dict[str, Any]) -> None:
    assert yaml.safe_load(kubernetes.dump(document)) == document


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "a\nb\n\n",
        "a\n\n b\n",
        " a\nb\n",
        "a\nb",
        "\na\n",
        "a\n\n",
        "no",
        "1e3",
        "é\nb\n",
        "-",
    ],
)
def test_a_manifest_keeps_any_text(text: str) -> None:
    manifest = {"b": [{"a": text}, text], "a": text}
    assert yaml.safe_load(kubernetes.dump(manifest)) == manifest
    assert list(yaml.safe_load(kubernetes.dump(manifest))) == ["b", "a"]


@pytest.mark.parametrize("text", ["1e3", "0o7", "12", "1_0", "y", "No", "on", "null", "~", ""])
def test_text_that_a_yaml_version_reads_as_another_type_is_quoted(text: str) -> None:
    assert kubernetes.dump({"a": text}) == f'a: "{text}"\n'


def test_a_manifest_is_block_style_without_anchors_and_scripts_are_literal_blocks() -> None:
    shared = {"gpu": "8"}
    manifest = {"limits": shared, "requests": shared, "command": ["bash", "cd x\n\nls\n"], "e": {}}
    assert kubernetes.dump(manifest) == (
        'limits:\n  gpu: "8"\nrequests:\n  gpu: "8"\n'
        "command:\n  - bash\n  - |\n    cd x\n\n    ls\ne: {}\n"
    )


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
