"""Values of a job that AWS, Kubernetes or sbatch would refuse, and unusual ones that they take."""

from __future__ import annotations

from typing import Any

import pytest
from support.launch_jobs import job

from llamax.launch.checks import problems


def refusals(launcher: str = "k8s", phase: str = "train", **changes: Any) -> list[str]:
    return problems(job(**changes), launcher, phase)


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
