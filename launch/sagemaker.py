"""A Python file that creates a SageMaker job and starts it, for version 2 or 3 of the SDK.

::

    train      SDK 2    sagemaker.pytorch.PyTorch(**ARGUMENTS).fit(INPUTS)
               SDK 3    sagemaker.train.ModelTrainer(**ARGUMENTS).train(INPUTS)    no estimators
    prepare    both     ScriptProcessor(**ARGUMENTS).run(SCRIPT, INPUTS, OUTPUTS), a processing job

With ``sagemaker.local`` the same container trains on this machine under docker, to test the job
before it runs on the cluster.  SageMaker starts torchrun on every host and passes settings
as hyperparameters: ``--optim.lr 1e-4``.

A processing job copies ``sagemaker.inputs`` to a disk, runs a script there on one CPU instance and
copies the tokens to ``sagemaker.data``.

Sources: SageMaker Python SDK 2, ``sagemaker.pytorch.PyTorch``, ``sagemaker.processing`` and "Local
Mode"; SDK 3, ``sagemaker.train.ModelTrainer``, its torchrun driver and
``sagemaker.core.processing``; AWS, "Run distributed training on Trainium: torchrun";
sagemaker-training-toolkit (hyperparameters).
"""

from __future__ import annotations

import json
import pprint
from dataclasses import replace
from shlex import quote
from typing import Any

from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile, Storage
from llamax.launch.prepare import command_line
from llamax.launch.script import SHEBANG, array, head, title
from llamax.runtime.errors import Interrupted
from llamax.runtime.versions import installed

TRAIN = '''"""The training program of one rank, started by SageMaker."""

import runpy
import sys

del sys.path[0]  # the folder of this file: no module is imported from it
{secrets}runpy.run_module("llamax.train", run_name="__main__")  # as python -m llamax.train
'''
SECRETS = """
import json
from os import environ

import boto3

found = boto3.client("secretsmanager").get_secret_value(SecretId={secret!r})
values = json.loads(found["SecretString"])
environ.update({{name: values[name] for name in {names!r}}})

"""
CHECKPOINTS = "/opt/ml/checkpoints"  # SageMaker copies it to sagemaker.output during the job
DATA, BASE = "/opt/ml/input/data/training", "/opt/ml/input/data/base"
METRICS = {  # what SageMaker draws, by a regular expression for the lines of the log
    "train:loss": r"step +[0-9]+/[0-9]+ +loss +([0-9.]+)",
    "validation:loss": r" validation +([0-9.]+)",
}
TEXT = "/opt/ml/processing/text"  # a copy of sagemaker.inputs
TOKENS = "/opt/ml/processing/tokens"  # SageMaker copies it to sagemaker.data when the job ends
# What the SDKs append to the name of a job: 2026-11-29-12-04-17-792 or 20261129120453.
TIME = "([0-9]{4}(-[0-9]{2}){5}-[0-9]{3}|[0-9]{14})"
LONGEST_NAME = 31  # with -prepare and the time a name of 63 characters
CLI_2 = """if [[ $(aws --version 2>&1) == aws-cli/1.* ]]; then
    echo "aws logs tail needs version 2 of the AWS CLI" >&2
    exit 2
fi
"""

# All kinds of file end with one line on what boto3 or the SDK refuses.
GUARD = """import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    found = version("sagemaker")
except PackageNotFoundError:
    found = "none"
if not found.startswith("{sdk}."):
    sys.exit(f"this file is for the SageMaker SDK {sdk}; found: {{found}}")

{imports}
SCRIPT = {script}
ARGUMENTS = {arguments}
INPUTS = {inputs!r}{outputs}

source = Path("{source}")
source.mkdir(exist_ok=True)
(source / "{file}").write_text(SCRIPT)
try:
{start}
except KeyboardInterrupt:
    print("interrupted; a job that SageMaker has accepted goes on", file=sys.stderr)
    sys.exit({interrupted})
except Exception as error:  # boto3, docker and the SDK raise what they like
    sys.exit(f"SageMaker: {{type(error).__name__}}: {{error}}")
"""
START = {
    ("train", 2): (
        "from sagemaker.pytorch import PyTorch\n",
        "    PyTorch(**ARGUMENTS).fit(INPUTS)",
    ),
    ("train", 3): (
        "from sagemaker.core.shapes import MetricDefinition\n"
        "from sagemaker.train import ModelTrainer\n"
        "from sagemaker.train.configs import (\n"
        "    CheckpointConfig,\n    Compute,\n    InputData,\n    SourceCode,\n"
        "    StoppingCondition,\n)\n"
        "from sagemaker.train.distributed import Torchrun\n"
        "from sagemaker.train.model_trainer import Mode\n",
        """    kinds = {
        "training_mode": Mode,
        "source_code": lambda fields: SourceCode(**fields),
        "distributed": lambda fields: Torchrun(**fields),
        "compute": lambda fields: Compute(**fields),
        "stopping_condition": lambda fields: StoppingCondition(**fields),
        "checkpoint_config": lambda fields: CheckpointConfig(**fields),
    }
    metrics = [MetricDefinition(**fields) for fields in ARGUMENTS.pop("metric_definitions", [])]
    trainer = ModelTrainer(
        **{key: kinds.get(key, lambda value: value)(value) for key, value in ARGUMENTS.items()}
    ).with_metric_definitions(metrics or None)
    trainer.train([InputData(channel_name=name, data_source=at) for name, at in INPUTS.items()])""",
    ),
    ("prepare", 2): (
        "from sagemaker.processing import ProcessingInput, ProcessingOutput, ScriptProcessor\n",
        """    ScriptProcessor(**ARGUMENTS).run(
        str(source / "prepare.sh"),
        [ProcessingInput(source=at, destination=path) for path, at in INPUTS.items()],
        [ProcessingOutput(source=path, destination=at) for path, at in OUTPUTS.items()],
    )""",
    ),
    ("prepare", 3): (
        "from sagemaker.core.processing import ScriptProcessor\n"
        "from sagemaker.core.shapes import (\n"
        "    ProcessingInput,\n    ProcessingOutput,\n"
        "    ProcessingS3Input,\n    ProcessingS3Output,\n)\n",
        """    inputs = [
        ProcessingInput(
            input_name="text",
            s3_input=ProcessingS3Input(
                s3_uri=at, local_path=path, s3_data_type="S3Prefix", s3_input_mode="File"
            ),
        )
        for path, at in INPUTS.items()
    ]
    outputs = [
        ProcessingOutput(
            output_name="tokens",
            s3_output=ProcessingS3Output(s3_uri=at, local_path=path, s3_upload_mode="EndOfJob"),
        )
        for path, at in OUTPUTS.items()
    ]
    processor = ScriptProcessor(**ARGUMENTS)
    try:
        processor.run(str(source / "prepare.sh"), inputs, outputs)
    except AttributeError:  # what SDK 3.27 makes of a job that failed
        if not (job := processor.latest_job):
            raise
        job.refresh()
        state = f"{job.processing_job_status}. {job.failure_reason}".rstrip()
        sys.exit(f"SageMaker: {job.processing_job_name}: {state}")""",
    ),
}


def sdk(job: JobFile) -> int:
    """The major version of the SDK that the file is for."""
    if job.sagemaker.sdk:
        return job.sagemaker.sdk
    found = installed("sagemaker")
    return 2 if found and found.split(".")[0] == "2" else 3


def hyperparameters(job: JobFile) -> dict[str, str]:
    """The options of the training program."""
    settings = dict(job.overrides) | {"data.path": DATA, "run.folder": CHECKPOINTS}
    if job.sagemaker.base:
        settings["checkpoint.init_from"] = BASE
    return {"config": job.recipe, **settings}


def as_json_twice(value: str) -> str:
    """A text that SDK 3 hands over as ``value``: it reads hyperparameters as JSON, twice.

    So ``1.10`` would become ``1.1``; texts that stay as they are remain readable.
    """
    try:
        kept = json.dumps(json.loads(value)) == value and not value.startswith('"')
    except ValueError:
        kept = True
    return value if kept else json.dumps(json.dumps(value))


def environ(job: JobFile) -> dict[str, str]:
    """The environment variables of the container."""
    found = {variable.name: variable.value for variable in variables(job, container=True)}
    # SageMaker's own programs import what lies beside them; train.py removes its own folder.
    del found["PYTHONSAFEPATH"]
    if "NEURON_COMPILE_CACHE_URL" in found:  # hosts share no folder; the cache may be on s3://
        found["NEURON_COMPILE_CACHE_URL"] = f"{job.sagemaker.output.rstrip('/')}/neuron-cache"
    return found


def estimator(job: JobFile) -> dict[str, Any]:
    """The arguments of ``sagemaker.pytorch.PyTorch`` of SDK 2."""
    local = job.sagemaker.local
    arguments: dict[str, Any] = {
        "entry_point": "train.py",
        "source_dir": f"sagemaker-{job.name}",
        "base_job_name": base_name(job, "train"),
        "image_uri": job.image,
        "role": job.sagemaker.role,
        "instance_type": _local_type(job, "local") if local else f"ml.{job.machine.name}",
        "instance_count": 1 if local else job.nodes,
        "distribution": {"torch_distributed": {"enabled": True}},
        "hyperparameters": hyperparameters(job),
        "environment": environ(job),
    }
    if not local:
        arguments["max_run"] = job.sagemaker.max_run_s
        arguments["volume_size"] = job.sagemaker.volume_gib
        if job.sagemaker.keep_alive_s:
            arguments["keep_alive_period_in_seconds"] = job.sagemaker.keep_alive_s
        arguments["metric_definitions"] = [
            {"Name": name, "Regex": regex} for name, regex in METRICS.items()
        ]
        arguments["checkpoint_s3_uri"] = job.sagemaker.output
        arguments["checkpoint_local_path"] = CHECKPOINTS
    return arguments


def model_trainer(job: JobFile) -> dict[str, Any]:
    """The arguments of ``sagemaker.train.ModelTrainer`` of SDK 3; a dictionary for each object."""
    local = job.sagemaker.local
    arguments: dict[str, Any] = {
        "training_mode": "LOCAL_CONTAINER" if local else "SAGEMAKER_TRAINING_JOB",
        "base_job_name": base_name(job, "train"),
        "training_image": job.image,
        "role": job.sagemaker.role,
        "source_code": {"source_dir": f"sagemaker-{job.name}", "entry_script": "train.py"},
        "distributed": {"process_count_per_node": job.ranks},
        "compute": {
            "instance_type": _local_type(job, "local_cpu") if local else f"ml.{job.machine.name}",
            "instance_count": 1 if local else job.nodes,
        },
        "hyperparameters": {
            key: as_json_twice(value) for key, value in hyperparameters(job).items()
        },
        "environment": environ(job),
    }
    if not local:
        arguments["compute"]["volume_size_in_gb"] = job.sagemaker.volume_gib
        if job.sagemaker.keep_alive_s:
            arguments["compute"]["keep_alive_period_in_seconds"] = job.sagemaker.keep_alive_s
        arguments["metric_definitions"] = [
            {"name": name, "regex": regex} for name, regex in METRICS.items()
        ]
        arguments["stopping_condition"] = {"max_runtime_in_seconds": job.sagemaker.max_run_s}
        arguments["checkpoint_config"] = {
            "s3_uri": job.sagemaker.output,
            "local_path": CHECKPOINTS,
        }
    return arguments


def _local_type(job: JobFile, cpu: str) -> str:
    """The instance type of local mode."""
    return "local_gpu" if job.machine.backend == "cuda" else cpu


def processor(job: JobFile) -> dict[str, Any]:
    """The arguments of ``ScriptProcessor``, the same in both SDKs."""
    return {
        "base_job_name": base_name(job, "prepare"),
        "image_uri": job.image,
        "role": job.sagemaker.role,
        "command": ["bash"],
        "instance_type": f"ml.{job.sagemaker.prepare_instance}",
        "instance_count": 1,
        "volume_size_in_gb": job.sagemaker.volume_gib,
        "max_runtime_in_seconds": job.sagemaker.max_run_s,
    }


def render(job: JobFile, phase: str) -> str:
    """The Python file; it needs the SageMaker SDK and AWS credentials, or docker in local mode."""
    version = sdk(job)
    imports, start = START[phase, version]
    outputs = ""
    if phase == "prepare":
        file, script, arguments = "prepare.sh", _prepare_script(job), processor(job)
        inputs = {TEXT: job.sagemaker.inputs.removeprefix("file://")}
        outputs = f"\nOUTPUTS = { ({TOKENS: job.sagemaker.data})!r}"
        what = f"{title(job, phase, 'SageMaker')} on {job.sagemaker.prepare_instance}"
    else:
        file, script = "train.py", TRAIN.format(secrets=_secrets(job))
        arguments = model_trainer(job) if version == 3 else estimator(job)
        inputs = {"training": job.sagemaker.data}
        if job.sagemaker.base:
            inputs["base"] = job.sagemaker.base
        if version == 3:
            inputs = {name: at.removeprefix("file://") for name, at in inputs.items()}
        where = "in a container on this machine" if job.sagemaker.local else "on SageMaker"
        what = f"train on {job.nodes} x {job.machine.name}, {where}"
    head = f'''#!/usr/bin/env python3
"""{job.name}: {what}, by the SageMaker SDK {version}."""

'''
    return head + GUARD.format(
        sdk=version,
        imports=imports,
        script=pprint.pformat(script, width=96),
        arguments=pprint.pformat(arguments, width=96, sort_dicts=False),
        inputs=inputs,
        outputs=outputs,
        source=f"sagemaker-{job.name}",
        file=file,
        start=start,
        interrupted=Interrupted.exit_code,
    )


def _prepare_script(job: JobFile) -> str:
    """The bash script of the container: ``llamax prepare`` in the copy of ``sagemaker.inputs``."""
    inside = replace(job, storage=Storage(mount=TEXT), venv="")
    text = head(inside, title(job, "prepare", "SageMaker"), container=True)
    words = ["python3", "-m", "llamax", "prepare", *command_line(job.prepare, TOKENS)]
    return text + array("program", words) + 'exec "${program[@]}"\n'


def _secrets(job: JobFile) -> str:
    """The part of train.py that reads the secrets with the role of the job."""
    names = [name for name, _ in job.secrets]
    return SECRETS.format(secret=job.sagemaker.secret, names=names) if names else ""


def base_name(job: JobFile, phase: str) -> str:
    """The name of the jobs of a phase, without the time that the SDK appends."""
    return job.name if phase == "train" else f"{job.name}-{phase}"


def action(job: JobFile, phase: str, what: str) -> str:
    """The script of an action on the newest job of a phase."""
    kind, Kind = ("training", "Training") if phase == "train" else ("processing", "Processing")
    name = base_name(job, phase)
    jobs = f"aws sagemaker list-{kind}-jobs --sort-by CreationTime --sort-order Descending"
    newest = f"""# names are {name}-TIME; jobs of other names may contain this one
names=$({jobs} \\
    --name-contains {name} --query '{Kind}JobSummaries[].{Kind}JobName' --output text)
job=$(tr '\\t' '\\n' <<<"$names" | grep -E --max-count 1 '^{name}-{TIME}$' || true)
if [[ -z $job ]]; then
    echo "SageMaker has no job {name}"
    exit 0
fi
"""
    this = f'--{kind}-job-name "$job"'
    state = f"state: {Kind}JobStatus, started: {Kind}StartTime, ended: {Kind}EndTime"
    state += ", step: SecondaryStatus" if phase == "train" else ""
    group = f"/aws/sagemaker/{Kind}Jobs"
    return (
        f"{SHEBANG}\nset -euo pipefail\n"
        + {
            "stop": f'{newest}aws sagemaker stop-{kind}-job {this}\necho "$job is being stopped"\n',
            "status": f"{newest}aws sagemaker describe-{kind}-job {this} --output table \\\n"
            f"    --query '{{{state}, problem: FailureReason}}'\n",
            "logs": f"{CLI_2}{newest}exec aws logs tail {group} --follow \\\n"
            '    --log-stream-name-prefix "$job"\n',
            "utilization": f"""{newest}aws cloudwatch get-metric-data --output table \\
    --start-time "$(date --utc --date='1 hour ago' +%FT%TZ)" --end-time "$(date --utc +%FT%TZ)" \\
    --metric-data-queries "[{{\\"Id\\":\\"cpu\\",\\"Expression\\":\\"SEARCH('{{{group},Host}} \
$job', 'Average', 300)\\"}}]"
""",
            "clean": f"rm -rf -- {quote(f'sagemaker-{job.name}')}\n",
        }[what]
    )
