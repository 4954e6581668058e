"""Job files that the tests of ``llamax launch`` share."""

from __future__ import annotations

import copy
import re
from typing import Any

from llamax.launch.jobfile import JobFile, parse

TRICKS = "'; touch pwned; '\"$(touch pwned)`touch pwned` \\ #|&<>!* $$ $(PATH) {{x}} é漢\U0001f600"

JOB: dict[str, Any] = {
    "name": "llama2-7b",
    "recipe": "llama2-7b",
    "image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/llamax:1",
    "overrides": {"data": {"path": "tokens/llama2"}, "optim": {"lr": 2e-4}},
    "environment": {"NEURON_RT_EXEC_TIMEOUT": 900},
    "storage": {"mount": "/fsx", "folder": "/fsx/llama", "claim": "fsx"},
    "prepare": {"inputs": ["books", "notes.jsonl"], "tokenizer": "tokenizer.model"},
    "serve": {"model": "hub", "length": 2048, "slots": 4},
    "cluster": {
        "region": "us-west-2",
        "zone": "us-west-2d",
        "second_zone": "us-west-2b",
        "subnet": "subnet-0123456789abcdef0",
        "nodes_subnet": "subnet-0fedcba9876543210",
        "key": "my key",
        "ssh_from": "203.0.113.7/32",
    },
    "torchrun": {"master": "trn1-0"},
    "mpirun": {"hostfile": "/fsx/llama/hosts"},
    "slurm": {"partition": "trn1", "time_limit": "2-00:00:00"},
    "kubernetes": {"namespace": "training"},
    "sagemaker": {
        "local": False,
        "role": "arn:aws:iam::123456789012:role/SageMaker",
        "data": "s3://bucket/tokens",
        "inputs": "s3://bucket/text",
        "output": "s3://bucket/run",
        "model": "s3://bucket/hub",
    },
}


def tables(**changes: Any) -> dict[str, Any]:
    """The tables of the job file with ``section__key=value`` or ``key=value`` changed."""
    found = copy.deepcopy(JOB)
    for name, value in changes.items():
        *sections, key = name.split("__")
        table = found
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return found


def job(**changes: Any) -> JobFile:
    return parse(tables(**changes))


def read_by_kubernetes(word: str) -> str:
    """A word of a command as a pod gets it: $$ is $, and $(PATH) a value."""
    known = {"$$": "$", "$(PATH)": "/bin"}
    return re.sub(r"\$(?:\$|\([^)]*\))", lambda found: known.get(found[0], found[0]), word)
