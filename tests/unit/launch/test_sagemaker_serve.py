"""The phase serve on SageMaker: real clients make the requests, and nothing leaves this machine."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from support.launch_jobs import TRICKS, job

from llamax.cli.serve import parser
from llamax.launch import sagemaker_serve
from llamax.launch.checks import problems
from llamax.launch.image import ENDPOINT, dockerfile
from llamax.launch.render import action, render

CLOUD = {"instance": "g5.12xlarge", "length": 4096}
ANSWER = {"choices": [{"text": " Paris"}]}


def values(text: str) -> dict[str, Any]:
    """The constants of the file."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


@pytest.mark.parametrize(("engine", "devices"), [("vllm", 4), ("tgi", 2), ("llamax", 1)])
def test_one_component_has_its_share_of_the_endpoint(engine: str, devices: int) -> None:
    settings = {**CLOUD, "engine": engine, "devices": 0 if engine == "llamax" else devices}
    this = job(serve=settings, environment={"TRICK": TRICKS})
    assert problems(this, "sagemaker", "serve") == []
    found = values(render(this, "sagemaker", "serve"))
    container = found["MODEL"]["PrimaryContainer"]
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == "s3://bucket/hub/"
    assert container["Environment"]["TRICK"] == TRICKS
    (variant,) = found["CONFIG"]["ProductionVariants"]
    assert "ModelName" not in variant  # the component has it
    assert variant["InstanceType"] == "ml.g5.12xlarge"
    specification = found["COMPONENT"]["Specification"]
    needs = specification["ComputeResourceRequirements"]
    assert needs["NumberOfAcceleratorDevicesRequired"] == devices
    assert specification["ModelName"] == found["MODEL"]["ModelName"]
    sent = container["Environment"]
    if engine == "llamax":
        options = parser().parse_args([*ENDPOINT.split(), *sent["LLAMAX_SERVE"].split()])
        assert (options.host, options.port, options.length) == ("0.0.0.0", 8080, 4096)
        assert "python3 -m llamax serve /opt/ml/model" in dockerfile(this)
        assert found["IMAGE"] == this.image
    else:
        parallel = {"vllm": "SM_VLLM_TENSOR_PARALLEL_SIZE", "tgi": "SM_NUM_GPUS"}[engine]
        longest = {"vllm": "SM_VLLM_MAX_MODEL_LEN", "tgi": "MAX_TOTAL_TOKENS"}[engine]
        assert (sent[parallel], sent[longest]) == (str(devices), "4096")
        assert ".dkr.ecr.{region}.amazonaws.com/" in found["IMAGE"]


class Aws:
    """SageMaker behind botocore, which checks, signs and serializes each request."""

    def __init__(self, failing: str = "") -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.failing = failing

    def send(self, client: object, request: Any) -> Any:
        from botocore.awsrequest import AWSResponse

        target = request.headers.get("X-Amz-Target", b"")
        target = target.decode() if isinstance(target, bytes) else target
        name = target.rpartition(".")[2] or "InvokeEndpoint"
        body = request.body.decode() if isinstance(request.body, bytes) else request.body
        self.asked.append((name, json.loads(body)))
        text = json.dumps(self.answer(name))

        class Raw:
            def stream(self, *sizes: int) -> Any:
                yield text.encode()

            def read(self, *sizes: int) -> bytes:
                return text.encode()

        return AWSResponse(request.url, 200, {"Content-Type": "application/json"}, Raw())

    def answer(self, name: str) -> dict[str, Any]:
        arn = "arn:aws:sagemaker:us-west-2:123456789012:x/y"
        asked = [each for each, _ in self.asked].count(name)
        if name == "InvokeEndpoint":
            return ANSWER
        if name == "DescribeInferenceComponent":
            done = "Failed" if self.failing else "InService"
            state = "Creating" if asked == 1 else done
            return {"InferenceComponentStatus": state, "FailureReason": self.failing}
        return {f"{kind}Arn": arn for kind in ("Model", "EndpointConfig", "Endpoint")} | {
            "InferenceComponentArn": arn,
            "EndpointName": "x",
            "EndpointStatus": "InService",
        }


def start(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "serve.py"
    file.write_text(text)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("engine", ["vllm", "tgi", "llamax"])
def test_boto3_makes_the_requests(
    engine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("boto3", reason="the SageMaker SDK is not installed")
    aws = Aws()
    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", lambda s, r: aws.send(s, r))
    start(
        render(job(serve={**CLOUD, "engine": engine}), "sagemaker", "serve"), tmp_path, monkeypatch
    )
    asked = [name for name, _ in aws.asked]
    assert asked == [
        "CreateModel",
        "CreateEndpointConfig",
        "CreateEndpoint",
        "DescribeEndpoint",
        "CreateInferenceComponent",
        "DescribeInferenceComponent",
        "DescribeInferenceComponent",
        "InvokeEndpoint",
    ]
    image = aws.asked[0][1]["PrimaryContainer"]["Image"]
    assert ".us-west-2." in image
    assert "Paris" in capsys.readouterr().out


def test_a_second_model_joins_the_endpoint_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = job(serve={**CLOUD, "devices": 1}, name="second", sagemaker__endpoint="first")
    assert problems(this, "sagemaker", "serve") == []
    text = render(this, "sagemaker", "serve")
    found = values(text)
    assert found["COMPONENT"]["EndpointName"] == "first"
    assert found["COMPONENT"]["InferenceComponentName"] == "second"
    assert not {"CONFIG", "ENDPOINT"} & {*found}
    assert "--endpoint-name first --inference-component-name second" in found["AGAIN"]
    for what in ("stop", "clean"):
        deleting = action(this, "sagemaker", "serve", what)
        assert "first" not in deleting
        assert "ended inference-component second InferenceComponentStatus\n" in deleting
    assert "delete-model --model-name second" in action(this, "sagemaker", "serve", "clean")
    assert "describe-endpoint --endpoint-name first" in action(this, "sagemaker", "serve", "status")
    pytest.importorskip("boto3", reason="the SageMaker SDK is not installed")
    aws = Aws()
    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", lambda s, r: aws.send(s, r))
    start(text, tmp_path, monkeypatch)
    asked = [name for name, _ in aws.asked]
    assert asked[:3] == ["CreateModel", "DescribeEndpoint", "CreateInferenceComponent"]


def test_a_component_that_fails_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3", reason="the SageMaker SDK is not installed")
    aws = Aws("no capacity")
    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", lambda s, r: aws.send(s, r))
    with pytest.raises(SystemExit) as caught:
        start(render(job(serve=CLOUD), "sagemaker", "serve"), tmp_path, monkeypatch)
    assert caught.value.code == (
        "SageMaker: RuntimeError: Failed: no capacity; clean what was made"
    )


QUIET = """SchemaVersion: "1.0"
SageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}
"""
COMPOSE = """#!{python}
import http.server, pathlib, sys, threading
if "version" in sys.argv:
    print("Docker Compose version v2.30.0")
elif "inspect" in sys.argv:
    print('[{{"Endpoints": {{"docker": {{"Host": "unix:///run/docker.sock"}}}}}}]')
elif "up" in sys.argv:
    file = pathlib.Path(sys.argv[sys.argv.index("-f") + 1])
    pathlib.Path("{folder}/compose.yaml").write_text(file.read_text())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/invocations":
                pathlib.Path("{folder}/asked").write_bytes(asked)
            self.send_response(200 if self.path in ("/ping", "/invocations") else 404)
            self.end_headers()
            self.wfile.write(b'{answer}')

        def log_message(self, *args):
            pass

    http.server.HTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the SDK
def test_local_mode_serves_one_request_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK starts docker compose; here that is a server of two paths."""
    pytest.importorskip("sagemaker", reason="the SageMaker SDK is not installed")
    import yaml

    model = tmp_path / "a hub"
    model.mkdir()
    (model / "config.json").write_text("{}")
    docker = tmp_path / "docker"
    text = COMPOSE.format(python=sys.executable, folder=tmp_path, answer=json.dumps(ANSWER))
    docker.write_text(text)
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.yaml").write_text(QUIET)
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(tmp_path / "config.yaml"))
    sdk = int(version("sagemaker").split(".")[0])
    this = job(
        serve={"engine": "llamax", "instance": "local"},
        sagemaker__model=f"file://{model}",
        sagemaker__local=True,
        sagemaker__sdk=sdk,
        image="llamax:1",
        environment={"TRICK": TRICKS},
    )
    assert problems(this, "sagemaker", "serve") == []
    start(render(this, "sagemaker", "serve"), tmp_path, monkeypatch)
    (service,) = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"].values()
    assert service["image"] == "llamax:1"
    assert service["command"] == "serve"
    assert f"TRICK={TRICKS}" in service["environment"]
    assert any(each.startswith(f"{model}:/opt/ml/model") for each in service["volumes"])
    assert json.loads((tmp_path / "asked").read_text())["prompt"]


AWS = """#!/bin/bash
echo "$*" >>"{folder}/asked"
case "$1 $2" in
"--version ") echo "aws-cli/2.1" ;;
*describe* | *delete* | *list*)
    if [[ ! -e {folder}/there ]]; then
        echo "An error occurred (ValidationException): Could not find it" >&2
        exit 254
    fi
    if [[ -e {folder}/deleting ]]; then
        [[ $2 != delete-endpoint && $2 != delete-inference-component ]] || {{
            echo "An error occurred (ValidationException): it is in the state Deleting" >&2
            exit 254
        }}
        [[ "$*" != *--query* ]] || {{ cat {folder}/deleting; exit 0; }}
    fi
    [[ $2 != delete-endpoint ]] || rm {folder}/there
    [[ $2 != describe-inference-component ]] || exit 254 ;;
esac
"""


def test_actions_delete_what_costs_and_end_well_without_it(tmp_path: Path) -> None:
    aws = tmp_path / "aws"
    aws.write_text(AWS.format(folder=tmp_path))
    aws.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(what: str) -> tuple[int, str, list[str]]:
        (tmp_path / "asked").write_text("")
        text = action(job(serve=CLOUD), "sagemaker", "serve", what)
        done = subprocess.run(
            ["bash", "-c", text], env=environ, text=True, capture_output=True, timeout=60
        )
        assert done.stderr == ""
        asked = (tmp_path / "asked").read_text().splitlines()
        return done.returncode, done.stdout, [" ".join(line.split()[:2]) for line in asked]

    for what in ("status", "logs", "utilization"):
        assert run(what)[:2] == (0, "SageMaker has no endpoint llama2-7b\n")
    assert run("clean")[:2] == (0, "")
    (tmp_path / "there").touch()
    assert run("status")[0] == 0
    assert run("logs")[2][-1] == "logs tail"
    code, said, asked = run("stop")
    assert code == 0
    assert said.startswith("llama2-7b is deleted; its model")
    assert asked == [
        "sagemaker delete-inference-component",
        "sagemaker describe-inference-component",
        "sagemaker delete-endpoint",
        "sagemaker wait",
    ]
    (tmp_path / "there").touch()
    deleted = [each.split("-", 1)[1] for each in run("clean")[2] if " delete-" in each]
    assert deleted == ["inference-component", "endpoint", "endpoint-config", "model"]
    (tmp_path / "there").touch()
    (tmp_path / "deleting").write_text("Deleting\n")  # by an earlier command
    assert run("clean")[0] == 0
    (tmp_path / "deleting").write_text("InService\n")
    done = subprocess.run(
        ["bash", "-c", action(job(serve=CLOUD), "sagemaker", "serve", "clean")],
        env=environ, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "it is in the state Deleting" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"serve": CLOUD, "sagemaker__model": "hub"},
            "sagemaker.model='hub' is no s3:// folder, which sagemaker.local=false needs;",
        ),
        (
            {"serve": CLOUD, "sagemaker__local": True},
            "sagemaker.model='s3://bucket/hub' is no file:/// folder, which sagemaker.local=true",
        ),
        (
            {"serve": {**CLOUD, "instance": "trn1.32xlarge", "slots": 4}},
            "serve.instance=trn1.32xlarge: no image of vLLM for Trainium starts as SageMaker",
        ),
        (
            {"serve": {**CLOUD, "instance": "local", "engine": "llamax"}},
            "serve.instance=local is no instance type of AWS; use one, or local mode",
        ),
        (
            {"serve": CLOUD, "sagemaker__endpoint": "llama2-7b"},
            "sagemaker.endpoint=llama2-7b is the job's own name; leave it out",
        ),
        (
            {"serve": CLOUD, "sagemaker__endpoint": "a b"},
            "sagemaker.endpoint='a b' is no name of an endpoint; use",
        ),
        (
            {"serve": CLOUD, "sagemaker__endpoint": "other", "sagemaker__local": True},
            "sagemaker.endpoint is for the cloud, where endpoints last",
        ),
        ({"serve": CLOUD, "sagemaker__role": ""}, "sagemaker.role is empty; set it to the ARN of"),
        ({"serve": CLOUD, "sagemaker__role": "me"}, "sagemaker.role='me' is no ARN of an IAM role"),
        (
            {"serve": CLOUD, "sagemaker__model": "s3://Hub/x"},
            "sagemaker.model='s3://Hub/x' has the",
        ),
        (
            {"serve": {**CLOUD, "image": "llamax:1"}},
            "serve.image='llamax:1' is not in Amazon ECR, where SageMaker pulls images; push it",
        ),
        ({"serve": CLOUD, "name": "a_b"}, "name='a_b' is refused by SageMaker; use letters, digit"),
    ],
)
def test_what_sagemaker_would_refuse(changes: dict[str, Any], message: str) -> None:
    found = problems(job(**changes), "sagemaker", "serve")
    assert any(line.startswith(message) for line in found), found


def test_the_images_are_those_of_the_sdk() -> None:
    """Each SDK has a table of images, with the account of the registry in every region."""
    pytest.importorskip("sagemaker", reason="the SageMaker SDK is not installed")
    if version("sagemaker").split(".")[0] == "2":
        from sagemaker import image_uris
    else:
        from sagemaker.core import image_uris
    found = image_uris.retrieve(
        "huggingface-llm", "us-west-2", version="3.3.6", image_scope="inference", instance_type=GPU
    )
    assert found == sagemaker_serve.IMAGES["tgi"].format(region="us-west-2")


GPU = "ml.g5.12xlarge"
