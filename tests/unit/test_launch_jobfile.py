"""Job files: strict, all problems at once; each launcher's refusals; nothing escapes its quotes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launch_jobs import job, tables

from llamax.cli.launch import main
from llamax.config.hardware import load_machine, machine_names
from llamax.config.load import toml
from llamax.launch import jobfile, kubernetes
from llamax.launch.checks import problems
from llamax.launch.instances import INSTANCES
from llamax.launch.render import PHASES, render
from llamax.runtime.errors import BackendError, ConfigError

TRICKS = "'; touch pwned; '\"$(touch pwned)`touch pwned` \\ #|&<>!* $$ $(PATH) {{x}} é漢\U0001f600"


def read_by_kubernetes(word: str) -> str:
    """A word of a command as a pod gets it: $$ is $, and $(PATH) a value."""
    known = {"$$": "$", "$(PATH)": "/bin"}
    return re.sub(r"\$(?:\$|\([^)]*\))", lambda found: known.get(found[0], found[0]), word)


def refusals(launcher: str = "k8s", phase: str = "train", **changes: Any) -> list[str]:
    return problems(job(**changes), launcher, phase)


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
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read as TOML"):
        jobfile.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nods": 4}, "job: nods is an unknown key; did you mean nodes?"),
        ({"slurm__partitoin": "x"}, "slurm.partitoin is an unknown key; did you mean partition?"),
        ({"nodes": "4"}, 'nodes="4" is a string; write an integer'),
        ({"nodes": 0}, "nodes=0 is out of range; use 1 or more"),
        ({"port": 80}, "port=80 is out of range; use 1024 to 65535"),
        ({"mpirun__per": "socket"}, 'mpirun.per="socket" is unknown; write node or core'),
        ({"prepare__inputs": "books"}, 'prepare.inputs="books" is a string; write a list of str'),
        ({"overrides": 3}, "overrides is not a table; write [overrides] and lines of key = value"),
        ({"environment__A": {"x": 1}}, "environment.A={'x': 1} is no text or number; put it in"),
        ({"environment__A-B": 1}, "environment.A-B is no name of a variable; use letters, digits"),
        ({"name": "a\nb"}, r"name='a\nb' holds a control character; use plain text on one line"),
        ({"overrides__data__path": "a\nb"}, r"overrides.data.path='a\nb' holds a control char"),
        ({"environment__A": "\x7f"}, r"environment.A='\x7f' holds a control character"),
        ({"prepare__inputs": ["a\tb"]}, "prepare.inputs='a\\tb' holds a control character"),
    ],
)
def test_a_file_is_strict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        job(**changes)
    assert "\n" not in str(refused.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        job(nods=4, slurm__signal_s="x", environment__A={})
    assert len(str(refused.value).splitlines()) == 4


def test_every_key_is_explained() -> None:
    text = jobfile.help_text()
    for key in ("name ", "storage.claim ", "slurm.signal_s ", "sagemaker.role ", "environment "):
        assert f"  {key}" in text


# ---- what launchers refuse


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        (
            "torchrun",
            {"ranks_per_node": 64},
            "ranks_per_node=64 but trn1.32xlarge has 32 NeuronCores; use 32 or less, or more nodes",
        ),
        ("torchrun", {"instance": "trn1.32xlage"}, "unknown; did you mean trn1.32xlarge?"),
        ("torchrun", {"instance": "local"}, "ranks_per_node=0: instance=local does not say how"),
        ("torchrun", {"overrides__parallel__tensor": 64}, "1 x trn1.32xlarge = 32 ranks: "),
        (
            "torchrun",
            {"overrides__parallel__tensor": 6},
            "parallel.tensor=6 does not divide model.num_attention_heads=32; use 1, 2, 4, 8, 16 or "
            "32; and 4 more",
        ),
        ("torchrun", {"overrides__optim__lrr": 1}, "--optim.lrr is an unknown option; did you"),
        ("torchrun", {"recipe": "llama2-7c"}, "no recipe is named 'llama2-7c'; did you mean"),
        ("torchrun", {"overrides__run__backend": "cpu"}, "leaves its NeuronCores idle; use"),
        (
            "slurm",
            {"instance": "p5.48xlarge"},
            "run.backend=xla on p5.48xlarge leaves its GPUs idle; use overrides run.backend=cuda",
        ),
        (
            "slurm",
            {"instance": "p4d.24xlarge", "ranks_per_node": 16, "overrides__run__backend": "cuda"},
            "ranks_per_node=16 but p4d.24xlarge has 8 GPUs; use 8 or less, or more nodes",
        ),
        ("slurm", {"instance": "trn1n.2xlarge"}, "instance='trn1n.2xlarge' is unknown; did you"),
        ("torchrun", {"name": "a b"}, "name='a b' names files and objects; use up to 63"),
        ("torchrun", {"environment__RANK": 1}, "environment.RANK is set for each rank by its"),
        ("torchrun", {"nodes": 2, "torchrun__master": ""}, "torchrun.master is empty; with nod"),
        ("mpirun", {"nodes": 2, "mpirun__hostfile": ""}, "mpirun.hostfile is empty; with nodes=2"),
        ("slurm", {"slurm__partition": "a b"}, "slurm.partition='a b' is no name of Slurm's"),
        ("slurm", {"slurm__account": "$(x)"}, "slurm.account='$(x)' is no name of Slurm's"),
        ("slurm", {"slurm__time_limit": "2 days"}, "slurm.time_limit='2 days' is no time; use 2-"),
        ("slurm", {"storage__folder": "/fsx/a b"}, "storage.folder='/fsx/a b' holds what #SBATCH"),
        ("slurm", {"storage__mount": "fsx"}, "storage.mount='fsx' is no absolute path; use the"),
        ("slurm", {"storage__folder": "/efs"}, "storage.folder=/efs is not below storage.mount="),
        (
            "slurm",
            {"overrides__run__folder": "/tmp/run"},
            "run.folder=/tmp/run is not below storage.mount=/fsx: each node would have its own; "
            "use overrides run.folder=/fsx/run",
        ),
        ("slurm", {"overrides__data__path": "../../data"}, "data.path=../../data is not below"),
        ("k8s", {"storage__claim": ""}, "storage.claim is empty; name the PersistentVolumeClaim"),
        ("k8s", {"storage__claim": "My_Claim"}, "storage.claim='My_Claim' is refused by Kuber"),
        ("k8s", {"storage__claim": "a..b"}, "storage.claim='a..b' is refused by Kubernetes; use"),
        ("k8s", {"kubernetes__namespace": "a.b"}, "kubernetes.namespace='a.b' is refused by K"),
        ("k8s", {"kubernetes__service_account": "A"}, "kubernetes.service_account='A' is refused"),
        ("k8s", {"image": ""}, "image is empty; name the image that --phase image builds"),
        ("k8s", {"image": "a b"}, "image='a b' is no image name; use registry/repository:tag"),
        ("k8s", {"name": "Llama_7B"}, "name='Llama_7B' is refused by Kubernetes; use lower-case"),
        ("k8s", {"image": "ecr.aws/Llamax:1"}, "image='ecr.aws/Llamax:1' is no image name; use"),
        ("k8s", {"name": "lläma"}, "name='lläma' is refused by Kubernetes; use lower-case"),
        ("k8s", {"name": "7b"}, "name='7b' is refused by Kubernetes"),
        (
            "k8s",
            {"name": "a" * 44, "nodes": 64},
            "a-precompile-worker-63 has 65 characters, Kubernetes allows 63; use 42 or less",
        ),
        ("k8s", {"name": "a" * 44, "nodes": 8}, "-worker-7 has 64 characters, Kubernetes allows"),
        ("sagemaker", {"name": "a.b"}, "name='a.b' is refused by SageMaker; use letters, digits"),
        ("sagemaker", {"image": ""}, "image='' is no image name; name the image that --phase im"),
        ("sagemaker", {"sagemaker__role": ""}, "sagemaker.role is empty; name the IAM role that"),
        ("sagemaker", {"sagemaker__data": ""}, "sagemaker.data is empty; name the s3:// or file"),
        ("sagemaker", {"sagemaker__output": "/x"}, "sagemaker.output='/x' is no s3:// folder;"),
        ("sagemaker", {"sagemaker__local": True}, "sagemaker.local=true runs on this machine's"),
        (
            "sagemaker",
            {"recipe": "demo", "instance": "local", "ranks_per_node": 4, "overrides": {}},
            "instance=local but sagemaker.local=false; use an instance such as trn1.32xlarge",
        ),
    ],
)
def test_each_mistake_is_one_line(launcher: str, changes: dict[str, Any], message: str) -> None:
    found = refusals(launcher, **changes)
    assert len(found) == 1
    assert message in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    "image",
    [
        "llamax",
        "llamax:1",
        "localhost/llamax",
        "localhost:5000/team/llamax:v1.0_x",
        "Registry.example.com:443/a/b__c/d-e",
        f"public.ecr.aws/neuron/x@sha256:{'0a' * 32}",
    ],
)
def test_names_of_images_that_docker_takes(image: str) -> None:
    assert refusals("k8s", image=image) == []


@pytest.mark.parametrize("key", ["storage__claim", "kubernetes__service_account"])
def test_objects_of_kubernetes_have_subdomains_as_names(key: str) -> None:
    long = ".".join(["a" * 63] * 3)
    assert refusals("k8s", **{key: "fsx.team-1"}) == refusals("k8s", **{key: long}) == []
    assert "is refused by Kubernetes; use" in refusals("k8s", **{key: f"{long}.{long}"})[0]


def test_prepare_wants_inputs_and_a_tokenizer() -> None:
    found = refusals("slurm", "prepare", prepare={})
    assert [line.split(" is ")[0] for line in found] == ["prepare.inputs", "prepare.tokenizer"]


@pytest.mark.parametrize("launcher", PHASES)
def test_a_right_job_is_not_refused(launcher: str) -> None:
    for nodes in (1, 4, 16, 64):
        assert refusals(launcher, nodes=nodes) == []
    assert refusals("k8s", name="a" * 43, nodes=8) == []
    small = {"recipe": "demo", "instance": "local", "ranks_per_node": 4, "overrides": {}}
    assert refusals(launcher, **small, sagemaker__local=True) == []


def test_what_can_be_planned_can_be_launched() -> None:
    assert set(INSTANCES) - {"local"} == set(machine_names()) - {"cpu"}
    for name in set(INSTANCES) - {"local"}:
        this = INSTANCES[name]
        assert (this.cores, this.backend) == (load_machine(name).ranks, load_machine(name).backend)
        assert this.devices > 0 < this.memory_gib


# ---- the command


def write(folder: Path, **changes: Any) -> str:
    """A job file in ``folder``."""

    def lines(table: dict[str, Any], prefix: str = "") -> list[str]:
        flat = [
            f"{k} = {toml(tuple(v) if isinstance(v, list) else v)}"
            for k, v in table.items()
            if not isinstance(v, dict)
        ]
        for key, value in table.items():
            if isinstance(value, dict):
                flat += [f"[{prefix}{key}]", *lines(value, f"{prefix}{key}.")]
        return flat

    path = folder / "job.toml"
    path.write_text("\n".join(lines(tables(**changes))) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "torchrn"], "--on torchrn: unknown here; did you mean torchrun?"),
        (["--on", "lsf"], "--on lsf: unknown here; there are torchrun, mpirun, slurm, k8s, sagem"),
        (["--on", "slurm", "--phase", "shell"], "--phase shell: unknown here; there are prepare"),
        (["--on", "slurm", "--action", "kill"], "--action kill: unknown here; there are start, st"),
        (
            ["--on", "slurm", "--phase", "tensorboard", "--action", "stop"],
            "--action stop: --phase tensorboard runs in the foreground; press Ctrl-C",
        ),
        (["--on", "torchrun", "--node", "4"], "--node=4 is out of range; use 0 to 3"),
        (["--on", "torchrun", "--node", "-1"], "--node=-1 is out of range; use 0 to 3"),
        (["--on", "torchrun"], "--node is missing: 4 nodes each run this command with their own"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(["--job", write(tmp_path, nodes=4), *options])


def test_a_launcher_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="kubectl is not installed here; install it, or print"):
        main(["--job", write(tmp_path), "--on", "k8s"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendError, match="the SageMaker SDK is not installed here; python3 -m"):
        main(["--job", write(tmp_path), "--on", "sagemaker"])


def test_the_program_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    path = write(tmp_path, storage__claim="")
    command = [sys.executable, "-m", "llamax", "launch", "--job", path, "--on", "k8s", "--render"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"llamax: {path}: storage.claim is empty; name the Persistent")
    assert done.stderr.count("\n") == 1


# ---- quotes


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm", "k8s"])
@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_no_value_escapes_its_quotes(tmp_path: Path, launcher: str, phase: str) -> None:
    """The rendered script runs with every command replaced by one that writes its arguments."""
    this = job(
        environment={"TRICK": TRICKS},
        overrides={"data": {"path": f"/fsx/{TRICKS}"}, "run": {"folder": f"run {TRICKS}"}},
        prepare={"inputs": [TRICKS], "tokenizer": TRICKS},
        venv="" if launcher == "k8s" else f"/opt/{TRICKS}",
        mpirun__hostfile="" if launcher != "k8s" else "x",
    )
    text = render(this, launcher, phase)
    if launcher == "k8s":
        spec = yaml.safe_load(text)["spec"]
        spec = spec["mpiReplicaSpecs"]["Launcher"] if phase == "train" else spec
        (container,) = spec["template"]["spec"]["containers"]
        text = read_by_kubernetes(container["command"][2]).replace("/etc/mpi/hostfile", "hosts")
    (tmp_path / "hosts").write_text("localhost\n")
    (tmp_path / "said").write_text("")
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("torchrun", "mpirun", "srun", "python3"):
        body = f'#!/bin/bash\nprintf "%s\\0" "$TRICK" "$@" >{tmp_path}/said\n'
        (fake / name).write_text(body)
        (fake / name).chmod(0o755)
    text = text.replace("cd -- /fsx/llama", f"cd -- {tmp_path}\nPATH={fake}:$PATH")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    trick, *said = (tmp_path / "said").read_text().split("\0")
    assert trick == TRICKS
    if phase == "prepare":
        assert TRICKS in said
        assert f"/fsx/{TRICKS}" in said
    else:
        assert f"--data.path=/fsx/{TRICKS}" in said
        assert f"--run.folder=run {TRICKS}" in said
    assert not (tmp_path / "pwned").exists()


def test_sagemakers_file_keeps_values_as_they_are() -> None:
    this = job(environment={"TRICK": TRICKS + '"""'}, sagemaker__data="s3://" + TRICKS)
    module: dict[str, Any] = {}
    text = render(this, "sagemaker", "train").split("source = Path")[0]
    exec(compile(text.replace("from sagemaker.pytorch import PyTorch", ""), "x", "exec"), module)
    assert module["ARGUMENTS"]["environment"]["TRICK"] == TRICKS + '"""'
    assert module["INPUTS"] == {"training": "s3://" + TRICKS}


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
SCALARS = st.one_of(TEXT, st.integers(), st.booleans())
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXT, inner)), max_leaves=6
)


@settings(max_examples=60)
@given(st.dictionaries(TEXT, DOCUMENTS, min_size=1, max_size=4))
def test_a_manifest_reads_back_as_it_was_written(document: dict[str, Any]) -> None:
    assert yaml.safe_load(kubernetes.dump(document)) == document


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "a\nb\n\n",
        "a\n\n b\n",
        " a\nb\n",
        "a\nb",
        "\na\n",
        "a\n\n",
        "no",
        "1e3",
        "é\nb\n",
        "-",
    ],
)
def test_a_manifest_keeps_any_text(text: str) -> None:
    manifest = {"b": [{"a": text}, text], "a": text}
    assert yaml.safe_load(kubernetes.dump(manifest)) == manifest
    assert list(yaml.safe_load(kubernetes.dump(manifest))) == ["b", "a"]


@pytest.mark.parametrize("text", ["1e3", "0o7", "12", "1_0", "y", "No", "on", "null", "~", ""])
def test_text_that_a_yaml_version_reads_as_another_type_is_quoted(text: str) -> None:
    assert kubernetes.dump({"a": text}) == f'a: "{text}"\n'


def test_a_manifest_is_block_style_without_anchors_and_scripts_are_literal_blocks() -> None:
    shared = {"gpu": "8"}
    manifest = {"limits": shared, "requests": shared, "command": ["bash", "cd x\n\nls\n"], "e": {}}
    assert kubernetes.dump(manifest) == (
        'limits:\n  gpu: "8"\nrequests:\n  gpu: "8"\n'
        "command:\n  - bash\n  - |\n    cd x\n\n    ls\ne: {}\n"
    )
