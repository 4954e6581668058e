"""What is rendered for SageMaker is Python, for both of its SDKs, with these arguments."""

from __future__ import annotations

import ast
import importlib
import json
import re
from typing import Any

import pytest
from support.launch_jobs import job

from llamax.launch import sagemaker
from llamax.launch.checks import problems
from llamax.training.console import line
from llamax.training.metrics import Record


def sagemaker_values(text: str) -> dict[str, Any]:
    """The constants of SageMaker's file."""
    module = ast.parse(text)
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.isupper()
    }


def check_program(text: str) -> None:
    """The training program imports what there is."""
    program = ast.parse(text)
    for node in program.body:
        if isinstance(node, ast.ImportFrom):
            library = importlib.import_module(str(node.module))
            assert all(hasattr(library, alias.name) for alias in node.names)
    assert "runpy.run_module('llamax.train', run_name='__main__')" in ast.unparse(program)


def test_sagemakers_file_is_python_with_these_arguments() -> None:
    values = sagemaker_values(sagemaker.render(job(nodes=4, sagemaker__sdk=2), "train"))
    arguments = values["ARGUMENTS"]
    assert arguments["instance_type"] == "ml.trn1.32xlarge"
    assert arguments["instance_count"] == 4
    assert arguments["distribution"] == {"torch_distributed": {"enabled": True}}
    assert arguments["hyperparameters"]["optim.lr"] == "0.0002"
    assert all(isinstance(value, str) for value in arguments["hyperparameters"].values())
    assert arguments["environment"]["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/run/neuron-cache"
    check_program(values["SCRIPT"])
    assert values["INPUTS"] == {"training": "s3://bucket/tokens"}


def test_sdk_3_has_a_model_trainer() -> None:
    values = sagemaker_values(sagemaker.render(job(nodes=4, sagemaker__sdk=3), "train"))
    arguments = values["ARGUMENTS"]
    assert arguments["compute"] == {
        "instance_type": "ml.trn1.32xlarge",
        "instance_count": 4,
        "volume_size_in_gb": 100,
    }
    assert arguments["distributed"] == {"process_count_per_node": 32}
    assert arguments["hyperparameters"]["optim.lr"] == "0.0002"
    assert arguments["environment"]["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/run/neuron-cache"
    assert arguments["checkpoint_config"]["s3_uri"] == "s3://bucket/run"
    assert arguments["source_code"]["entry_script"] == "train.py"
    check_program(values["SCRIPT"])
    assert values["INPUTS"] == {"training": "s3://bucket/tokens"}
    small = {"recipe": "demo", "instance": "local", "ranks_per_node": 4, "overrides": {}}
    here = job(**small, sagemaker__local=True, sagemaker__sdk=3, sagemaker__data="file:///data")
    assert problems(here, "sagemaker", "train") == []
    values = sagemaker_values(sagemaker.render(here, "train"))
    assert values["INPUTS"] == {"training": "/data"}
    assert values["ARGUMENTS"]["training_mode"] == "LOCAL_CONTAINER"
    assert values["ARGUMENTS"]["compute"] == {"instance_type": "local_cpu", "instance_count": 1}
    assert "checkpoint_config" not in values["ARGUMENTS"]


@pytest.mark.parametrize("sdk", [2, 3])
def test_a_base_and_a_warm_pool_on_sagemaker(sdk: int) -> None:
    changes: dict[str, Any] = {"recipe": "news-llama3-8b-qlora", "overrides": {}, "nodes": 2}
    changes |= {"instance": "g5.12xlarge", "sagemaker__sdk": sdk, "sagemaker__keep_alive_s": 3600}
    cloud = job(**changes, sagemaker__base="s3://bucket/base", sagemaker__volume_gib=256)
    assert problems(cloud, "sagemaker", "train") == []
    values = sagemaker_values(sagemaker.render(cloud, "train"))
    assert values["INPUTS"] == {"training": "s3://bucket/tokens", "base": "s3://bucket/base"}
    arguments = values["ARGUMENTS"]
    assert arguments["hyperparameters"]["checkpoint.init_from"] == sagemaker.BASE
    where = arguments if sdk == 2 else arguments["compute"]
    assert where["volume_size" if sdk == 2 else "volume_size_in_gb"] == 256
    assert where["keep_alive_period_in_seconds"] == 3600
    changes |= {"nodes": 1, "sagemaker__local": True, "sagemaker__data": "file:///data"}
    here = job(**changes, sagemaker__base="file:///base")
    assert problems(here, "sagemaker", "train") == []
    values = sagemaker_values(sagemaker.render(here, "train"))
    where = values["ARGUMENTS"] if sdk == 2 else values["ARGUMENTS"]["compute"]
    assert where["instance_type"] == "local_gpu"
    prefix = "file://" if sdk == 2 else ""
    assert values["INPUTS"] == {"training": f"{prefix}/data", "base": f"{prefix}/base"}


def test_sagemaker_finds_the_losses_in_the_lines_of_the_log() -> None:
    record = Record(7, 0, 1.0, 1.0, 6.25, 0.5, 1e-4, 10.0, 0, validation_loss=1.5)
    found = {
        name: [float(text) for text in re.findall(regex, f"[rank 0] {line(record, 1000)}")]
        for name, regex in sagemaker.METRICS.items()
    }
    assert found == {"train:loss": [6.25], "validation:loss": [1.5]}


@pytest.mark.parametrize("sdk", [2, 3])
def test_a_processing_job_prepares(sdk: int) -> None:
    values = sagemaker_values(sagemaker.render(job(nodes=4, sagemaker__sdk=sdk), "prepare"))
    arguments = values["ARGUMENTS"]
    assert (arguments["instance_type"], arguments["instance_count"]) == ("ml.c5.9xlarge", 1)
    assert arguments["base_job_name"] == "llama2-7b-prepare"
    assert values["INPUTS"] == {sagemaker.TEXT: "s3://bucket/text"}
    assert values["OUTPUTS"] == {sagemaker.TOKENS: "s3://bucket/tokens"}
    script = values["SCRIPT"]
    assert f"\ncd -- {sagemaker.TEXT} 2>" in script
    assert f"    --out={sagemaker.TOKENS}\n" in script
    assert script.endswith('    --\n    books\n    notes.jsonl\n)\nexec "${program[@]}"\n')
    here = job(sagemaker__sdk=sdk, sagemaker__inputs="file:///data/text")
    assert sagemaker_values(sagemaker.render(here, "prepare"))["INPUTS"] == {
        sagemaker.TEXT: "/data/text"
    }


@pytest.mark.parametrize(
    "value", ["1.10", "1e3", "007", "true", '"quoted"', "null", "[1,2]", "2e-05", "a b", "", "é"]
)
def test_sdk_3_hands_values_over_as_they_are(value: str) -> None:
    """The driver of SDK 3.27 in the container: environment.py reads JSON, torchrun_driver too."""

    def deserialize(text: object) -> object:
        try:
            return json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError:
            return text

    given = sagemaker.model_trainer(job(overrides__run__wandb_project=value))
    found = deserialize(deserialize(given["hyperparameters"]["run.wandb_project"]))
    assert (found if isinstance(found, str) else json.dumps(found)) == value


@pytest.mark.parametrize(
    ("version", "sdk"), [("2.257.7", 2), ("3.27.0", 3), ("4.0.0", 3), (None, 3)]
)
def test_the_file_is_for_the_installed_sdk(
    monkeypatch: pytest.MonkeyPatch, version: str | None, sdk: int
) -> None:
    monkeypatch.setattr(sagemaker, "installed", lambda package: version)
    assert sagemaker.sdk(job()) == sdk
    assert f"by the SageMaker SDK {sdk}." in sagemaker.render(job(), "train")
    assert sagemaker.sdk(job(sagemaker__sdk=2)) == 2


def test_sagemaker_runs_here_first() -> None:
    small = job(
        recipe="demo", instance="local", ranks_per_node=4, sagemaker__local=True, overrides={}
    )
    assert problems(small, "sagemaker", "train") == []
    arguments = sagemaker.estimator(small)
    assert (arguments["instance_type"], arguments["instance_count"]) == ("local", 1)
    assert "checkpoint_s3_uri" not in arguments
