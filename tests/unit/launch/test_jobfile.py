"""Job files: read strictly, every key explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.launch_jobs import job, tables

from llamax.launch import jobfile
from llamax.launch.checks import problems
from llamax.launch.render import render
from llamax.runtime.errors import ConfigError

# ---- the file


def test_overrides_are_written_as_toml_writes_tables() -> None:
    found = jobfile.parse(
        tables(overrides={"optim": {"lr": 1e-4}, "run.steps": 5000, "run": {"tensorboard": False}})
    )
    assert found.arguments == [
        "--config",
        "llama2-7b",
        "--optim.lr=0.0001",
        "--run.steps=5000",
        "--run.tensorboard=false",
    ]
    assert found.config.optim.lr == 1e-4
    assert found.config.run.tensorboard is False
    assert job(environment={"A": 1, "B": "two"}).environment == (("A", "1"), ("B", "two"))
    assert jobfile.parse(tables(overrides={"model": {"eos_token_id": [2, 3]}})).arguments[-1] == (
        "--model.eos_token_id=[2, 3]"
    )


def test_a_file_is_read_and_a_broken_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('name = "a"\nrecipe = "demo"\n')
    assert jobfile.load(path).recipe == "demo"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match=r"job.toml: cannot be read as TOML"):
        jobfile.load(path)
    with pytest.raises(ConfigError, match=r"none.toml: no such file; check the path"):
        jobfile.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"override": {}}, "job: override is an unknown key; did you mean overrides?"),
        ({"enviroment": {}}, "job: enviroment is an unknown key; did you mean environment?"),
        (
            {"optim": {"lr": 1}},
            "job: optim is a section of the run, not of the job; write it below [overrides]",
        ),
        ({"nods": 4}, "job: nods is an unknown key; did you mean nodes?"),
        ({"slurm__partitoin": "x"}, "slurm.partitoin is an unknown key; did you mean partition?"),
        ({"nodes": "4"}, 'nodes="4" is a string; write an integer'),
        ({"nodes": 0}, "nodes=0 is out of range; use 1 or more"),
        ({"port": 80}, "port=80 is out of range; use 1024 to 65535"),
        ({"mpirun__per": "socket"}, 'mpirun.per="socket" is unknown; write node or core'),
        ({"prepare__inputs": "books"}, 'prepare.inputs="books" is a string; write a list of str'),
        ({"overrides": 3}, "overrides is not a table; write [overrides] and lines of key = value"),
        ({"environment__A": {"x": 1}}, "environment.A={'x': 1} is not a text or number; put it"),
        ({"environment__A-B": 1}, "environment.A-B is not a name of a variable; use letters"),
        ({"name": "a\nb"}, r"name='a\nb' holds a control character; use plain text on one line"),
        ({"overrides__data__path": "a\nb"}, r"overrides.data.path='a\nb' holds a control char"),
        ({"environment__A": "\x7f"}, r"environment.A='\x7f' holds a control character"),
        ({"environment__A": "\u202e"}, r"environment.A='\u202e' holds a control character"),
        ({"prepare__inputs": ["a\tb"]}, "prepare.inputs='a\\tb' holds a control character"),
    ],
)
def test_a_file_is_strict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        job(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["demo", "run.toml"])
def test_a_configuration_is_no_job_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[run]\nsteps = 3\n")
    kind = "a recipe" if name == "demo" else "the configuration of a run"
    message = f'^{name} is {kind}, not a job file; write a job file with recipe = "{name}", a name'
    with pytest.raises(ConfigError, match=message):
        jobfile.load(name)


def test_every_key_is_explained() -> None:
    text = jobfile.help_text()
    for key in ("name", "storage.claim", "slurm.signal_s", "sagemaker.role", "environment"):
        assert f"  {key}\n" in text


MACHINES = """
[lab]
like = "p4d.24xlarge"
ranks = 4
devices = 4
efa = 0
["p5.4xlarge"]
like = "p5.48xlarge"
ranks = 1
devices = 1
[bare]
like = "h100"
devices = 0
"""


def write_job(folder: Path, instance: str) -> Path:
    """A job file in folder/jobs beside folder/machines.toml, with an instance of that file."""
    (folder / "jobs").mkdir(exist_ok=True)
    (folder / "machines.toml").write_text(MACHINES)
    path = folder / "jobs" / "job.toml"
    overrides = {"run": {"backend": "cuda"}, "parallel": {"tensor": 1}}
    job = tables(nodes=2, instance=instance, overrides=overrides)
    lines = [f"{key} = {json.dumps(job.pop(key))}" for key in ("name", "recipe", "nodes", "image")]
    lines.append(f"instance = {json.dumps(job.pop('instance'))}")
    overridden = job.pop("overrides")
    lines.append("[overrides]")
    lines += [f"{s}.{k} = {json.dumps(v)}" for s, t in overridden.items() for k, v in t.items()]
    for section, table in job.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    return path


def test_the_machine_of_a_job_is_a_file_relative_to_it(tmp_path: Path) -> None:
    job = jobfile.load(write_job(tmp_path, "../machines.toml:lab"))
    assert (job.machine.name, job.ranks, job.machine.bfloat16_tflops) == ("lab", 4, 312.0)
    for launcher in ("torchrun", "mpirun", "slurm", "k8s"):
        assert problems(job, launcher, "train") == []
        text = render(job, launcher, "train")
        assert "2 x lab, 8 ranks" in text
        assert "instance-type" not in text, "no label of AWS"
    (refused,) = problems(job, "sagemaker", "train")
    assert "lab is no instance type of AWS; name the table after the type" in refused
    job = jobfile.load(write_job(tmp_path, "../machines.toml:p5.4xlarge"))
    assert problems(job, "sagemaker", "train") == []
    assert "'instance_type': 'ml.p5.4xlarge'" in render(job, "sagemaker", "train")
    assert "node.kubernetes.io/instance-type: p5.4xlarge" in render(job, "k8s", "train")


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ("../machines.toml", "has 3 tables, each a machine; add :lab, :p5.4xlarge or :bare to"),
        ("../machines.toml:labs", "machines.toml: has no table [labs]; did you mean lab?"),
        ("machines.toml:lab", "machines.toml: no such file; check the path"),
        ("../machines.toml:bare", "bare.devices=0, but a job asks for its GPUs; write the number"),
        ("p4", "instance='p4' is unknown; did you mean p4d.24xlarge or p4de.24xlarge?"),
    ],
)
def test_a_wrong_machine_of_a_job_is_one_line(tmp_path: Path, instance: str, said: str) -> None:
    (refused,) = problems(jobfile.load(write_job(tmp_path, instance)), "slurm", "train")
    assert said in refused
    assert "\n" not in refused
