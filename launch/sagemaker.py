"""A Python file that creates a SageMaker training job and starts it, for version 2 or 3 of the SDK.

::

    SDK 2    sagemaker.pytorch.PyTorch(**ARGUMENTS).fit(INPUTS)
    SDK 3    sagemaker.train.ModelTrainer(**ARGUMENTS).train(INPUTS)      SDK 3 has no estimators

With ``sagemaker.local`` the same container runs on this machine under docker, on the CPU, to test
the job before it runs on the cluster.  SageMaker starts torchrun on every host and passes settings
as hyperparameters: ``--optim.lr 1e-4``.

Sources: SageMaker Python SDK 2, ``sagemaker.pytorch.PyTorch`` and "Local Mode"; SDK 3,
``sagemaker.train.ModelTrainer`` and its torchrun driver; AWS, "Run
distributed training on Trainium: torchrun"; sagemaker-training-toolkit (hyperparameters).
"""

from __future__ import annotations

import pprint
from shlex import quote
from typing import Any

from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile
from llamax.launch.script import SHEBANG
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
DATA = "/opt/ml/input/data/training"


# Both kinds of file end with one line on what boto3 or the SDK refuses.
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
TRAIN = {train!r}
ARGUMENTS = {arguments}
INPUTS = {inputs!r}

source = Path("{source}")
source.mkdir(exist_ok=True)
(source / "train.py").write_text(TRAIN)
try:
{start}
except Exception as error:  # boto3, docker and the SDK raise what they like
    sys.exit(f"SageMaker: {{type(error).__name__}}: {{error}}")
"""
START = {
    2: (
        "from sagemaker.pytorch import PyTorch\n",
        "    PyTorch(**ARGUMENTS).fit(INPUTS)",
    ),
    3: (
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
    trainer = ModelTrainer(
        **{key: kinds.get(key, lambda value: value)(value) for key, value in ARGUMENTS.items()}
    )
    trainer.train([InputData(channel_name=name, data_source=at) for name, at in INPUTS.items()])""",
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
    return {"config": job.recipe, **settings}


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
        "base_job_name": job.name,
        "image_uri": job.image,
        "role": job.sagemaker.role,
        "instance_type": "local" if local else f"ml.{job.machine.name}",
        "instance_count": 1 if local else job.nodes,
        "distribution": {"torch_distributed": {"enabled": True}},
        "hyperparameters": hyperparameters(job),
        "environment": environ(job),
    }
    if not local:
        arguments["max_run"] = job.sagemaker.max_run_s
        arguments["checkpoint_s3_uri"] = job.sagemaker.output
        arguments["checkpoint_local_path"] = CHECKPOINTS
    return arguments


def model_trainer(job: JobFile) -> dict[str, Any]:
    """The arguments of ``sagemaker.train.ModelTrainer`` of SDK 3; a dictionary for each object."""
    local = job.sagemaker.local
    arguments: dict[str, Any] = {
        "training_mode": "LOCAL_CONTAINER" if local else "SAGEMAKER_TRAINING_JOB",
        "base_job_name": job.name,
        "training_image": job.image,
        "role": job.sagemaker.role,
        "source_code": {"source_dir": f"sagemaker-{job.name}", "entry_script": "train.py"},
        "distributed": {"process_count_per_node": job.ranks},
        "compute": {
            "instance_type": "local_cpu" if local else f"ml.{job.machine.name}",
            "instance_count": 1 if local else job.nodes,
        },
        "hyperparameters": hyperparameters(job),
        "environment": environ(job),
    }
    if not local:
        arguments["stopping_condition"] = {"max_runtime_in_seconds": job.sagemaker.max_run_s}
        arguments["checkpoint_config"] = {
            "s3_uri": job.sagemaker.output,
            "local_path": CHECKPOINTS,
        }
    return arguments


def render(job: JobFile) -> str:
    """The Python file; it needs the SageMaker SDK and AWS credentials, or docker in local mode."""
    version = sdk(job)
    data = job.sagemaker.data
    if version == 3:
        data = data.removeprefix("file://")
    arguments = model_trainer(job) if version == 3 else estimator(job)
    imports, start = START[version]
    where = "in a container on this machine" if job.sagemaker.local else "on SageMaker"
    machine = job.machine.name
    head = f'''#!/usr/bin/env python3
"""{job.name}: train on {job.nodes} x {machine}, {where}, by the SageMaker SDK {version}."""

'''
    return head + GUARD.format(
        sdk=version,
        imports=imports,
        train=TRAIN.format(secrets=_secrets(job)),
        arguments=pprint.pformat(arguments, width=96, sort_dicts=False),
        inputs={"training": data},
        source=f"sagemaker-{job.name}",
        start=start,
    )


def _secrets(job: JobFile) -> str:
    """The part of train.py that reads the secrets with the role of the job."""
    names = [name for name, _ in job.secrets]
    return SECRETS.format(secret=job.sagemaker.secret, names=names) if names else ""


def action(job: JobFile, what: str) -> str:
    """The script of an action on the newest job of this name."""
    jobs = "aws sagemaker list-training-jobs --sort-by CreationTime --sort-order Descending"
    newest = f"""job=$({jobs} \\
    --name-contains {quote(job.name)} --max-results 1 \\
    --query 'TrainingJobSummaries[0].TrainingJobName' --output text)
if [[ $job == None ]]; then
    echo "SageMaker has no job of this name"
    exit 0
fi
"""
    describe = 'aws sagemaker describe-training-job --training-job-name "$job"'
    tail = "aws logs tail /aws/sagemaker/TrainingJobs --follow"
    return (
        f"{SHEBANG}\nset -euo pipefail\n"
        + {
            "stop": f'{newest}aws sagemaker stop-training-job --training-job-name "$job"\n',
            "status": f"{newest}{describe} --output table \\\n"
            "    --query '[TrainingJobStatus,SecondaryStatus,TrainingTimeInSeconds]'\n",
            "logs": f'{newest}{tail} --log-stream-name-prefix "$job"\n',
            "utilization": f"""{newest}aws cloudwatch get-metric-data --output table \\
    --start-time "$(date --utc --date='1 hour ago' +%FT%TZ)" --end-time "$(date --utc +%FT%TZ)" \\
    --metric-data-queries "[{{\\"Id\\":\\"cpu\\",\\"Expression\\":\\"SEARCH('{{/aws/sagemaker/\
TrainingJobs,Host}} $job', 'Average', 300)\\"}}]"
""",
            "clean": f"rm -rf -- {quote(f'sagemaker-{job.name}')}\n",
        }[what]
    )
