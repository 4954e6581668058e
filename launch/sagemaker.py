"""A Python file that creates a SageMaker estimator and starts it.

With ``sagemaker.local`` the same container runs on this machine under docker, on the CPU, to test
the job before it runs on the cluster.  SageMaker starts torchrun on every host and passes settings
as hyperparameters: ``--optim.lr 1e-4``.

Sources: SageMaker Python SDK 2, ``sagemaker.pytorch.PyTorch`` and "Local Mode"; AWS, "Run
distributed training on Trainium: torchrun"; sagemaker-training-toolkit (hyperparameters).
"""

from __future__ import annotations

import pprint
from shlex import quote
from typing import Any

from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile
from llamax.launch.script import SHEBANG

TRAIN = '''"""The training program of one rank, started by SageMaker."""

import sys

from llamax.runtime.process import run_main
from llamax.train import main

sys.exit(run_main(main))
'''
CHECKPOINTS = "/opt/ml/checkpoints"  # SageMaker copies it to sagemaker.output during the job
DATA = "/opt/ml/input/data/training"


def estimator(job: JobFile) -> dict[str, Any]:
    """The arguments of ``sagemaker.pytorch.PyTorch``."""
    local, settings = job.sagemaker.local, dict(job.overrides)
    settings |= {"data.path": DATA, "run.folder": CHECKPOINTS}
    environ = {variable.name: variable.value for variable in variables(job, container=True)}
    if "NEURON_COMPILE_CACHE_URL" in environ:  # hosts share no folder; the cache may be on s3://
        environ["NEURON_COMPILE_CACHE_URL"] = f"{job.sagemaker.output.rstrip('/')}/neuron-cache"
    arguments: dict[str, Any] = {
        "entry_point": "train.py",
        "source_dir": f"sagemaker-{job.name}",
        "base_job_name": job.name,
        "image_uri": job.image,
        "role": job.sagemaker.role,
        "instance_type": "local" if local else f"ml.{job.instance}",
        "instance_count": 1 if local else job.nodes,
        "distribution": {"torch_distributed": {"enabled": True}},
        "hyperparameters": {"config": job.recipe, **settings},
        "environment": environ,
    }
    if not local:
        arguments["max_run"] = job.sagemaker.max_run_s
        arguments["checkpoint_s3_uri"] = job.sagemaker.output
        arguments["checkpoint_local_path"] = CHECKPOINTS
    return arguments


def render(job: JobFile) -> str:
    """The Python file; it needs the SageMaker SDK and AWS credentials, or docker in local mode."""
    arguments = pprint.pformat(estimator(job), width=96, sort_dicts=False)
    inputs = {"training": job.sagemaker.data}
    where = "in a container on this machine" if job.sagemaker.local else "on SageMaker"
    return f'''#!/usr/bin/env python3
"""{job.name}: train on {job.nodes} x {job.instance}, {where}."""

from pathlib import Path

from sagemaker.pytorch import PyTorch

TRAIN = {TRAIN!r}
ARGUMENTS = {arguments}
INPUTS = {inputs!r}

source = Path(ARGUMENTS["source_dir"])
source.mkdir(exist_ok=True)
(source / ARGUMENTS["entry_point"]).write_text(TRAIN)
PyTorch(**ARGUMENTS).fit(INPUTS)
'''


def action(job: JobFile, what: str) -> str:
    """The script of an action on the newest job of this name."""
    jobs = "aws sagemaker list-training-jobs --sort-by CreationTime --sort-order Descending"
    newest = f"""job=$({jobs} \\
    --name-contains {quote(job.name)} --max-results 1 \\
    --query 'TrainingJobSummaries[0].TrainingJobName' --output text)
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
