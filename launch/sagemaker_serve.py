"""The phase serve on SageMaker: a Python file that makes an endpoint with one inference component.

::

    CreateModel ── CreateEndpointConfig ── CreateEndpoint ── CreateInferenceComponent ── a request
    image, s3://   instance type           waits            GPUs of one copy, waits

An endpoint with inference components can hold several models: each takes its share of the GPUs.
With ``sagemaker.endpoint`` a model joins the endpoint of another job, and leaves it alone.
With ``sagemaker.local`` the same container serves on this machine under docker, answers one request
and ends, through the local mode of version 2 or 3 of the SDK.  In the cloud both versions are the
same client of boto3.

Sources: SageMaker API, CreateModel, CreateEndpointConfig, CreateEndpoint and
CreateInferenceComponent; SageMaker Python SDK, "Local Mode"; AWS Deep Learning Containers, "Amazon
SageMaker AI Deployment" of vLLM; Text Generation Inference, ``sagemaker-entrypoint.sh``.
"""

from __future__ import annotations

import json
import pprint
import re
from collections.abc import Iterator
from shlex import quote
from typing import Any

from llamax.launch import sagemaker, sagemaker_checks, serving
from llamax.launch.jobfile import JobFile
from llamax.launch.script import SHEBANG
from llamax.runtime.address import problem
from llamax.runtime.errors import Interrupted

MODEL = "/opt/ml/model"  # where SageMaker puts the folder
VARIANT = "AllTraffic"
NAME = re.compile(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,62}", re.ASCII)
START_S = 3600  # time to load the model; the longest that SageMaker allows
LOCAL_MODULES = {2: "sagemaker.local", 3: "sagemaker.core.local"}
REGISTRY = "763104351884.dkr.ecr.{region}.amazonaws.com"  # of most regions
IMAGES = {
    # SageMaker SDK 3.27, image_uri_config/vllm-server.json, and aws/deep-learning-containers
    "vllm": f"{REGISTRY}/vllm:server-sagemaker-cuda-v2.3",
    # SageMaker SDK 2.257 and 3.27, image_uri_config/huggingface-llm.json
    "tgi": f"{REGISTRY}/huggingface-pytorch-tgi-inference:"
    "2.7.0-tgi3.3.6-gpu-py311-cu124-ubuntu22.04",
}
AMI = "al2-ami-sagemaker-inference-gpu-3-1"  # drivers for the CUDA 13 of vLLM's image

FILE = '''#!/usr/bin/env python3
"""{title}."""

import json
import sys
import time

import boto3
{imports}
{constants}


def main():
    """Make the endpoint, wait until it answers, and send a request."""
    session = boto3.Session()
    MODEL["PrimaryContainer"]["Image"] = IMAGE.format(region=session.region_name)
{serve}

try:
    main()
except KeyboardInterrupt:
    print("interrupted; what SageMaker has begun goes on and costs: clean it", file=sys.stderr)
    sys.exit({interrupted})
except Exception as error:  # boto3, docker and the SDK raise what they like
    sys.exit(f"SageMaker: {{type(error).__name__}}: {{error}}; clean what was made")
'''
CLOUD = """    client, runtime = session.client("sagemaker"), session.client("sagemaker-runtime")
    client.create_model(**MODEL)
{create}    print("waiting for the endpoint {endpoint}")
    client.get_waiter("endpoint_in_service").wait(EndpointName="{endpoint}")
    client.create_inference_component(**COMPONENT)
    print("waiting for its inference component")
    while True:
        found = client.describe_inference_component(InferenceComponentName="{name}")
        if found["InferenceComponentStatus"] not in ("Creating", "Updating"):
            break
        time.sleep(15)
    if found["InferenceComponentStatus"] != "InService":
        raise RuntimeError(f"{found['InferenceComponentStatus']}: {found.get('FailureReason')}")
    answer = runtime.invoke_endpoint(
        EndpointName="{endpoint}",
        InferenceComponentName="{name}",
        ContentType="application/json",
        Body=json.dumps(REQUEST),
    )
    print("answer:", answer["Body"].read().decode())
    print(AGAIN)"""
CREATE = """    client.create_endpoint_config(**CONFIG)
    client.create_endpoint(**ENDPOINT)
"""
LOCAL = """    entities.HEALTH_CHECK_TIMEOUT_LIMIT = 3600  # the default of 120 s is too short
    local = LocalSession()
    client, runtime = local.sagemaker_client, local.sagemaker_runtime_client
    client.create_model(**MODEL)
    client.create_endpoint_config(**CONFIG)
    try:
        client.create_endpoint(**ENDPOINT)
        answer = runtime.invoke_endpoint(
            EndpointName="{name}", ContentType="application/json", Body=json.dumps(REQUEST)
        )
        print("answer:", answer["Body"].read().decode())
    finally:
        client.delete_endpoint("{name}")"""
GONE = """gone() {  # run a command that may find nothing to delete
    local found
    found=$("$@" 2>&1) || [[ $found == *"Could not find"* ]] || { echo "$found" >&2; exit 1; }
}
"""


def render(job: JobFile) -> str:
    """The Python file; it needs AWS credentials, and in local mode the SDK and docker."""
    version, local = sagemaker.sdk(job), job.sagemaker.local
    name, constants = job.name, {"MODEL": _model(job)}
    if not job.sagemaker.endpoint:
        constants |= {"CONFIG": _config(job)}
        constants |= {"ENDPOINT": {"EndpointName": name, "EndpointConfigName": name}}
    constants |= {} if local else {"COMPONENT": _component(job)}
    serve = (LOCAL if local else CLOUD).replace("{name}", name).replace("{endpoint}", endpoint(job))
    shown = [f"IMAGE = {image(job)!r}"]
    for key, value in (constants | {"REQUEST": serving.body(job)}).items():
        shown.append(f"{key} = {pprint.pformat(value, width=88, sort_dicts=False)}")
    if not local:
        shown.append(f"AGAIN = {_again(job)!r}")
    where = f"SageMaker's local mode, SDK {version}" if local else "SageMaker"
    return FILE.format(
        title=f"{name}: {serving.title(job, where)}",
        imports=f"from {LOCAL_MODULES[version]} import LocalSession, entities\n" if local else "",
        constants="\n".join(shown),
        serve=serve.replace("{create}", "" if job.sagemaker.endpoint else CREATE),
        interrupted=Interrupted.exit_code,
    )


def endpoint(job: JobFile) -> str:
    """The name of the endpoint that has the component."""
    return job.sagemaker.endpoint or job.name


def _again(job: JobFile) -> str:
    """The command that sends the request of the file once more."""
    return (
        f"the same again:\naws sagemaker-runtime invoke-endpoint --endpoint-name {endpoint(job)} "
        f"--inference-component-name {job.name} --content-type application/json "
        f"--cli-binary-format raw-in-base64-out --body {quote(json.dumps(serving.body(job)))} "
        "/dev/stdout"
    )


def image(job: JobFile) -> str:
    """The image; ``{region}`` in it is that of the session."""
    return job.serve.image or IMAGES.get(job.serve.engine, job.image)


def _environment(job: JobFile) -> Iterator[tuple[str, str]]:
    """What the entry points of the images read instead of options."""
    settings, devices = job.serve, str(serving.devices(job))
    if settings.engine == "vllm":
        yield "SM_VLLM_SERVED_MODEL_NAME", job.name
        yield "SM_VLLM_TENSOR_PARALLEL_SIZE", devices
        yield "VLLM_NO_USAGE_STATS", "1"
        if settings.length:
            yield "SM_VLLM_MAX_MODEL_LEN", str(settings.length)
        if settings.slots:
            yield "SM_VLLM_MAX_NUM_SEQS", str(settings.slots)
    elif settings.engine == "tgi":
        yield "HF_MODEL_ID", MODEL
        yield "SM_NUM_GPUS", devices
        yield "USAGE_STATS", "off"
        if settings.length:
            yield "MAX_TOTAL_TOKENS", str(settings.length)
    else:
        words = ["--name", job.name, "--backend", job.server_machine.backend]
        words += ["--length", str(settings.length)] if settings.length else []
        words += ["--slots", str(settings.slots)] if settings.slots else []
        yield "LLAMAX_SERVE", " ".join(words)
    yield from job.environment


def _model(job: JobFile) -> dict[str, Any]:
    container: dict[str, Any] = {"Environment": dict(_environment(job))}
    if job.sagemaker.local:
        container["ModelDataUrl"] = job.sagemaker.model
    else:
        container["ModelDataSource"] = {
            "S3DataSource": {
                "S3Uri": job.sagemaker.model.rstrip("/") + "/",
                "S3DataType": "S3Prefix",
                "CompressionType": "None",
            }
        }
    return {
        "ModelName": job.name,
        "PrimaryContainer": container,
        "ExecutionRoleArn": job.sagemaker.role,
    }


def _config(job: JobFile) -> dict[str, Any]:
    machine = job.server_machine
    if job.sagemaker.local:
        kind = "local_gpu" if machine.backend == "cuda" else "local"
        variant: dict[str, Any] = {"ModelName": job.name, "InstanceType": kind}
    else:
        variant = {
            "InstanceType": f"ml.{machine.name}",
            "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        }
        if job.serve.engine == "vllm":
            variant["InferenceAmiVersion"] = AMI
    config = {
        "EndpointConfigName": job.name,
        "ProductionVariants": [{"VariantName": VARIANT, "InitialInstanceCount": 1} | variant],
    }
    return config if job.sagemaker.local else config | {"ExecutionRoleArn": job.sagemaker.role}


def _component(job: JobFile) -> dict[str, Any]:
    return {
        "InferenceComponentName": job.name,
        "EndpointName": endpoint(job),
        "VariantName": VARIANT,
        "Specification": {
            "ModelName": job.name,
            "StartupParameters": {
                "ModelDataDownloadTimeoutInSeconds": START_S,
                "ContainerStartupHealthCheckTimeoutInSeconds": START_S,
            },
            "ComputeResourceRequirements": {
                "NumberOfAcceleratorDevicesRequired": serving.devices(job),
                "MinMemoryRequiredInMb": 1024,  # to place copies by; more may be used
            },
        },
        "RuntimeConfig": {"CopyCount": 1},
    }


def problems(job: JobFile) -> Iterator[str]:
    """What SageMaker would refuse, one line each."""
    machine, local, model = job.server_machine, job.sagemaker.local, job.sagemaker.model
    yield from sagemaker_checks.role(job)
    if job.serve.image:
        yield from sagemaker_checks.image(job, "serve.image", job.serve.image)
    elif job.serve.engine == "llamax" and job.image:
        yield from sagemaker_checks.image(job, "image", job.image)
    wanted, example = ("file:///", "file:///fsx/hub") if local else ("s3://", "s3://bucket/hub")
    if not model.startswith(wanted):
        yield (
            f"sagemaker.model={model!r} is no {wanted} folder, which "
            f"sagemaker.local={'true' if local else 'false'} needs; use one such as {example}"
        )
    elif why := problem(model, ("s3", "file")):
        yield f"sagemaker.model={model!r} {why}"
    if machine.neuron:
        yield (
            f"serve.instance={machine.name}: no image of vLLM for Trainium starts as SageMaker "
            "starts images; use a GPU such as g5.12xlarge, or --on docker or k8s"
        )
    elif not local and not machine.instance_type:
        yield f"serve.instance={machine.name} is no instance type of AWS; use one, or local mode"
    if job.sagemaker.endpoint and local:
        yield "sagemaker.endpoint is for the cloud, where endpoints last; leave it out here"
    elif job.sagemaker.endpoint == job.name:
        yield f"sagemaker.endpoint={job.name} is the job's own name; leave it out, or name another"
    elif job.sagemaker.endpoint and not NAME.fullmatch(job.sagemaker.endpoint):
        yield (
            f"sagemaker.endpoint={job.sagemaker.endpoint!r} is no name of an endpoint; use "
            "letters, digits and -, up to 63 of them"
        )


def action(job: JobFile, what: str) -> str:
    """The script of an action on the endpoint."""
    name, where = job.name, endpoint(job)
    exists = f"""if ! found=$(aws sagemaker describe-endpoint --endpoint-name {where} 2>&1); then
    [[ $found == *"Could not find"* ]] || {{ echo "$found" >&2; exit 1; }}
    echo "SageMaker has no endpoint {where}"
    exit 0
fi
"""
    shared = bool(job.sagemaker.endpoint)
    configuration = f"gone aws sagemaker delete-endpoint-config --endpoint-config-name {name}\n"
    configuration, more = ("", " stays") if shared else (configuration, " and configuration stay")
    group, metrics = "/aws/sagemaker/InferenceComponents", "GPUUtilizationNormalized"
    return (
        f"{SHEBANG}\nset -euo pipefail\n"
        + {
            "stop": f"""# the instances of an endpoint cost until it is deleted
{_deleted(job)}
echo "{name} is deleted; its model{more} until --action clean"
""",
            "status": f"""{exists}aws sagemaker describe-endpoint --output table \\
    --endpoint-name {where} \\
    --query '{{state: EndpointStatus, problem: FailureReason, since: CreationTime}}'
aws sagemaker list-inference-components --endpoint-name-equals {where} --output table \\
    --query 'InferenceComponents[].{{name: InferenceComponentName, state: \
InferenceComponentStatus}}'
""",
            "logs": f"{sagemaker.CLI_2}{exists}exec aws logs tail {group}/{name} --follow\n",
            "utilization": f"""{exists}aws cloudwatch get-metric-statistics --output table \\
    --namespace {group} --metric-name {metrics} --statistics Average --period 300 \\
    --dimensions Name=InferenceComponentName,Value={name} \\
    --start-time "$(date --utc --date='1 hour ago' +%FT%TZ)" --end-time "$(date --utc +%FT%TZ)"
""",
            "clean": f"""{_deleted(job)}
{GONE}{configuration}gone aws sagemaker delete-model --model-name {name}
""",
        }[what]
    )


def _deleted(job: JobFile) -> str:
    """Delete the component, and an endpoint of its own, and wait until both are gone."""
    component = f"--inference-component-name {job.name}"
    text = f"""\
ended() {{  # thing, its name, field of its state: delete it, unless that has begun already
    local found state=(--query "$3" --output text)
    found=$(aws sagemaker "delete-$1" "--$1-name" "$2" 2>&1) ||
        [[ $found == *"Could not find"* ]] ||
        [[ $(aws sagemaker "describe-$1" "--$1-name" "$2" "${{state[@]}}") == Deleting ]] ||
        {{ echo "$found" >&2; exit 1; }}
}}
ended inference-component {job.name} InferenceComponentStatus
while aws sagemaker describe-inference-component {component} >/dev/null 2>&1; do
    sleep 5
done"""
    if job.sagemaker.endpoint:
        return text
    return f"""{text}
ended endpoint {job.name} EndpointStatus
aws sagemaker wait endpoint-deleted --endpoint-name {job.name}"""
