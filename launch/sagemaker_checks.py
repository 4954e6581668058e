"""What SageMaker would refuse of a job file.

Sources: SageMaker API, CreateTrainingJob, CreateProcessingJob and CreateModel: the patterns and
limits in botocore's description of the service (1.44), of which boto3 itself checks none; AWS, "Use
Your Own Training Algorithms", for images in Amazon ECR; Secrets Manager API, CreateSecret.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator

from llamax.config.data_path import RANDOM
from llamax.launch import prepare, sagemaker
from llamax.launch.forms import IMAGE, image_problem, inside
from llamax.launch.jobfile import JobFile
from llamax.runtime.address import problem
from llamax.runtime.hub_name import hub_name
from llamax.runtime.versions import installed

NAME = re.compile(r"[A-Za-z0-9](-*[A-Za-z0-9])*")
ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
ECR = re.compile(r"\d{12}\.dkr\.ecr(-fips)?\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/.+", re.ASCII)
INSTANCE_TYPE = re.compile(r"[cmrtgp]\d[a-z0-9-]*\.(medium|\d*x?large)")  # families of processing
SECRET = re.compile(r"[\w/+=.@:-]{1,512}", re.ASCII)
ENTRIES, VARIABLE, SETTING, ADDRESS = 100, 512, 2500, 1024  # most of a job, most characters
VOLUME_GIB, KEEP_ALIVE_S = 16384, 21600
RUN_S = {"train": 28 * 86400, "prepare": 9 * 86400}


def problems(job: JobFile, phase: str, runs: bool) -> Iterator[str]:
    """What SageMaker would refuse, one line each; ``runs``: whether the configuration is right."""
    settings = job.sagemaker
    yield from image_problem("base_image", job.base_image)
    if job.secrets and not settings.secret:
        yield (
            "sagemaker.secret is empty, but there are secrets; set it to the name or ARN of a JSON "
            "object in AWS Secrets Manager that has their names"
        )
    elif settings.secret and not SECRET.fullmatch(settings.secret):
        yield (
            f"sagemaker.secret={settings.secret!r} is no name in AWS Secrets Manager; use its name "
            "or its ARN, of letters, digits and /_+=.@-"
        )
    yield from name(job)
    yield from image(job, "image", job.image)
    yield from role(job)
    yield from _folder("data", settings.data, "of the dataset", local=phase != "prepare")
    if phase == "prepare":
        yield from _prepare(job)
    elif settings.local:
        if job.nodes > 1 or not (job.local or job.machine.backend == "cuda"):
            yield (
                f"sagemaker.local=true runs on the CPU or the GPUs of this machine, not on "
                f"{job.nodes} x {job.instance}; try with instance=local and a small recipe, or use "
                "sagemaker.local=false"
            )
    elif job.local:
        yield "instance=local but sagemaker.local=false; use an instance such as trn1.32xlarge"
    else:
        yield from _folder("output", settings.output, "for checkpoints", local=False)
    if phase == "train" and runs:
        if job.config.data.path == RANDOM:
            yield (
                f"data.path={RANDOM}, but jobs on SageMaker train on sagemaker.data; prepare some "
                "text there, or measure with another launcher"
            )
        yield from _base(job)
        yield from _limits(job, "train")


def instance_type(job: JobFile) -> Iterator[str]:
    """The problem of a machine that AWS does not have."""
    if not job.local and not job.machine.instance_type:
        yield (
            f"instance={job.instance!r}: {job.machine.name} is no instance type of AWS; name the "
            'table after the type, such as ["p5.4xlarge"]'
        )


def sdk_problem(job: JobFile) -> str:
    """Why the SageMaker SDK of this machine cannot start a job; empty if it can."""
    wanted, found = sagemaker.sdk(job), installed("sagemaker")
    package = "llamax[sagemaker]" if wanted == 2 else f"sagemaker>={wanted},<{wanted + 1}"
    if found is None:
        return f"the SageMaker SDK is not installed here; pip install '{package}'"
    if found.split(".")[0] != str(wanted):
        return (
            f"the SageMaker SDK found is {found}, but the job is for version {wanted}; set "
            f"sagemaker.sdk, or pip install '{package}'"
        )
    return ""


def name(job: JobFile) -> Iterator[str]:
    """The problem of a job's name, to which the SDK appends the time."""
    if not NAME.fullmatch(job.name) or len(job.name) > sagemaker.LONGEST_NAME:
        yield (
            f"name={job.name!r} is refused by SageMaker; use letters, digits and -, up to "
            f"{sagemaker.LONGEST_NAME} of them"
        )


def role(job: JobFile) -> Iterator[str]:
    """The problem of the role, whose ARN SageMaker wants; a name is not enough for all requests."""
    found = job.sagemaker.role
    if not found:
        yield "sagemaker.role is empty; set it to the ARN of the IAM role that SageMaker assumes"
    elif not ROLE.fullmatch(found):
        shown = f"sagemaker.role={found!r} is no ARN of an IAM role; use one such as "
        shown += "arn:aws:iam::123456789012:role/NAME"
        if re.fullmatch(r"[\w+=,.@-]{1,64}", found, re.ASCII):
            shown += f" (aws iam get-role --role-name {found} --query Role.Arn)"
        yield shown


def image(job: JobFile, key: str, found: str) -> Iterator[str]:
    """The problem of an image; outside local mode it is pulled from Amazon ECR."""
    if not IMAGE.fullmatch(found):
        yield (
            f"{key}={found!r} is not an image name; set it to the image that --phase image builds"
        )
    elif not job.sagemaker.local and not ECR.fullmatch(found):
        yield (
            f"{key}={found!r} is not in Amazon ECR, where SageMaker pulls images; push it to one "
            "such as 123456789012.dkr.ecr.us-west-2.amazonaws.com/llamax:1"
        )


def _folder(key: str, found: str, what: str, local: bool = True) -> Iterator[str]:
    """The problem of a folder on S3, or with ``local`` on this machine."""
    kinds = ("s3", "file") if local else ("s3",)
    if not found:
        yield f"sagemaker.{key} is empty; set it to the {_wanted(local)} folder {what}"
    elif len(found) > ADDRESS:
        yield f"sagemaker.{key} has {len(found)} characters; SageMaker takes {ADDRESS} or fewer"
    elif not found.startswith(("s3://", "file://")[: len(kinds)]):
        yield (
            f"sagemaker.{key}={found!r} is not an {_wanted(local)} folder {what}; use one such as "
            "s3://bucket/path"
        )
    elif why := problem(found, kinds):
        yield f"sagemaker.{key}={found!r} {why}"


def _wanted(local: bool) -> str:
    return "s3:// or file:///" if local else "s3://"


def _base(job: JobFile) -> Iterator[str]:
    """Whether the model to start from is where the containers can read it."""
    base, given = job.sagemaker.base, job.config.checkpoint.init_from
    if base:
        yield from _folder("base", base, "of a model")
    elif given and not os.path.isabs(given) and hub_name(given) is None:
        yield (
            f"checkpoint.init_from={given} is a folder that containers of SageMaker do not have; "
            "copy it to S3 and set sagemaker.base, or give its name on the Hub"
        )


def _prepare(job: JobFile) -> Iterator[str]:
    """Problems of a processing job; all of its files are in one folder on S3 or here."""
    settings = job.sagemaker
    if settings.local:
        yield (
            "sagemaker.local=true has no phase prepare; use --on torchrun on this machine, or "
            "sagemaker.local=false"
        )
        return
    yield from _folder("inputs", settings.inputs, "with the files that [prepare] names")
    if not INSTANCE_TYPE.fullmatch(settings.prepare_instance):
        yield (
            f"sagemaker.prepare_instance={settings.prepare_instance!r} is no instance type of "
            "processing jobs; use one such as c5.9xlarge, without ml."
        )
    for key, path in prepare.paths(job.prepare):
        if not inside(os.path.join(sagemaker.TEXT, path), sagemaker.TEXT):
            yield (
                f"prepare.{key}={path!r} is not in sagemaker.inputs; use a path that is relative "
                "to it"
            )
    yield from _limits(job, "prepare")


def _limits(job: JobFile, phase: str) -> Iterator[str]:
    """Numbers, texts and tables that are larger than SageMaker takes them."""
    settings = job.sagemaker
    numbers = [("max_run_s", RUN_S[phase]), ("volume_gib", VOLUME_GIB)]
    numbers += [("keep_alive_s", KEEP_ALIVE_S)] if phase == "train" else []
    for key, limit in numbers:
        if (found := getattr(settings, key)) > limit:
            yield f"sagemaker.{key}={found} is above SageMaker's limit; use {limit} or less"
    if phase == "prepare":
        return  # its variables and settings are in a script
    tables = (
        ("environment", job.environment, sagemaker.environ(job), VARIABLE),
        ("overrides", job.overrides, sagemaker.hyperparameters(job), SETTING),
    )
    for table, pairs, entries, longest in tables:
        for key, value in pairs:
            if len(value) > longest:
                yield (
                    f"{table}.{key} has {len(value)} characters; SageMaker takes {longest} or fewer"
                )
        if len(entries) > ENTRIES:
            yield f"{table} makes {len(entries)} of a job; SageMaker takes {ENTRIES} or fewer"
