"""The table of machines: files of a user, and this machine measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llamax.cli.plan import main
from llamax.config.hardware import (
    GIB,
    KNOWN,
    LOCAL,
    Machine,
    default_machine,
    find_machine,
    gpu_peak_flops,
    known_machines,
    load_machine,
    machine_names,
    measure_machine,
    memory_share,
)
from llamax.runtime.errors import ConfigError

TRN1 = load_machine("trn1.32xlarge")


MINE = """
[lab]
backend = "cuda"
ranks = 4
memory_gib = 24
bfloat16_tflops = 100
float32_tflops = 20
memory_gbps = 900
link_gbps = 12
dollars_per_hour = 0
"""


def test_a_machine_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(MINE)
    machine = load_machine(str(path))
    assert (machine.name, machine.ranks, machine.matmul_efficiency) == ("lab", 4, 1.0)
    assert main(["--config", "llama3.2-1b", "--instance", str(path), "--search"]) == 0
    assert "4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("ranks = 4", "ranks = 4.5", "lab.ranks=4.5 is a float; write an integer"),
        ("ranks = 4", "", "lab.ranks is missing; write an integer"),
        ("ranks = 4", "ranks = 0", "lab.ranks=0 is out of range; use 1 or more"),
        ("memory_gib = 24", "memory_gb = 24", "lab.memory_gb is an unknown key; did you mean"),
        ('"cuda"', '"rocm"', 'lab.backend="rocm" is unknown; write cpu, cuda, xla or neuron'),
        ("memory_gbps = 900", "memory_gbps = -1", "=-1.0 is out of range; use a number above 0"),
        ("memory_gib = 24", "memory_gib = nan", "lab.memory_gib=nan is out of range"),
        ("link_gbps = 12", "link_gbps = inf", "lab.link_gbps=inf is out of range; use 0 or more"),
        ("link_gbps = 12", "link_gbps = 0", "lab.link_gbps=0 with 4 ranks; write what"),
        ("ranks = 4", "ranks = true", "lab.ranks=true is a truth value; write an integer"),
        ("[lab]", "[lab]\nlink_efficiency = 1.5", "lab.link_efficiency=1.5 is out of range"),
        ("[lab]", "[lab]\ndescription = 3", "lab.description=3 is an integer; write a"),
        (
            "ranks = 4",
            "like = 'p5.48xlarg'",
            "lab.like='p5.48xlarg' is not a machine that is known",
        ),
        ("ranks = 4", "like = 3", "lab.like=3 is not a machine that is known"),
        ("[lab]", "[lab]\nname = 'x'", "lab.name is an unknown key"),
        ("[lab]", "top = 1\n[lab]", "top stands outside a table"),
        ("[lab]", "[other]\nranks = 1\n[lab]", "has 2 tables"),
        ("[lab]", "[other]\nranks = 1\n[lab]", "add :other or :lab to the file's name"),
        ("ranks = 4", "like = 'trn1'", "did you mean trn1.32xlarge, trn1n.32xlarge or trn1.2xlarg"),
    ],
)
def test_a_machine_file_is_checked(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(MINE.replace(before, after))
    with pytest.raises(ConfigError, match="lab") as error:
        load_machine(str(path))
    assert said in str(error.value)


def test_this_machine_is_measured_and_cut_into_ranks() -> None:
    here = load_machine("cpu")
    assert here.float32_tflops > 0
    half = here.with_ranks(2)
    assert (half.ranks, half.memory_gib) == (2, here.memory_gib / 2)
    assert half.reserve_gib == here.reserve_gib  # every process has its own Python
    assert Machine.with_ranks(TRN1, 8) == replace(TRN1, ranks=8)  # the others are idle


def test_this_machine_has_its_control_groups_share_of_memory(tmp_path: Path) -> None:
    old, new = (tmp_path / "sys/fs/cgroup" / each for each in ("memory", "memory.max"))
    old.mkdir(parents=True)
    assert memory_share(8 * GIB, tmp_path) == 8 * GIB
    for limit, said in ((new, "max"), (old / "memory.limit_in_bytes", "9223372036854771712")):
        limit.write_text(f"{said}\n")
        assert memory_share(8 * GIB, tmp_path) == 8 * GIB
        limit.write_text(f"{GIB // 4}\n")
        assert memory_share(8 * GIB, tmp_path) == GIB // 4
        assert measure_machine(tmp_path).memory_gib == 0.25
        limit.unlink()


def test_all_mistakes_of_a_machine_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text("[lab]\nlike = 'p4d.24xlarge'\nranks = 0\nmemory = 3\nlink_gbps = 'x'\n")
    with pytest.raises(ConfigError) as error:
        load_machine(str(path))
    assert str(error.value).splitlines() == [
        f"{path}: 3 problems",
        "  lab.memory is an unknown key; did you mean memory_gib?",
        '  lab.link_gbps="x" is a string; write a number',
        "  lab.ranks=0 is out of range; use 1 or more",
    ]


def test_a_machine_like_another_shares_its_figures_alone(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text('[lab]\nlike = "P5EN.48xlarge"\nranks = 4\n')
    lab, p5 = load_machine(str(path)), load_machine("p5.48xlarge")
    assert (lab.name, lab.ranks, lab.memory_gib, lab.efa) == ("lab", 4, 139.0, 16)
    assert lab.bfloat16_tflops == p5.bfloat16_tflops
    assert (lab.description, lab.also, lab.gpu_names) == ("", (), ())


def test_names_are_taken_in_any_case() -> None:
    assert load_machine("TRN1.32xlarge") is TRN1
    assert find_machine("H100") is find_machine("p5.48xlarge") is not None
    assert find_machine("p6.48xlarge") is None
    assert load_machine("CPU").name == "cpu"
    names = [
        name for machine in known_machines().values() for name in (machine.name, *machine.also)
    ]
    assert len({name.lower() for name in names}) == len(names)
    with pytest.raises(ConfigError, match=r"`instance` trn1.32xlage is neither .* mean trn1"):
        load_machine("trn1.32xlage")


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("nvidia l40s", 362e12, 91.6e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA H100 PCIe", None, None),  # slower than the one on SXM
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),  # a seventh of one
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),  # a smaller chip
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
    ],
)
def test_a_gpu_is_rated_by_its_whole_name_and_type(
    gpu: str, bfloat16: float | None, float32: float | None
) -> None:
    assert gpu_peak_flops(gpu, "bfloat16") == bfloat16
    assert gpu_peak_flops(gpu, "float32") == float32


def test_a_machine_has_a_peak_for_each_type() -> None:
    assert (TRN1.peak_flops("bfloat16"), TRN1.peak_flops("float32")) == (95e12, 23.75e12)
    assert TRN1.peak_flops("float16") == 95e12
    with pytest.raises(KeyError):
        TRN1.peak_flops("float64")


def test_each_backend_has_a_machine_that_it_is_planned_for() -> None:
    backends = ("cpu", "xla", "neuron", "cuda")
    names = ["cpu", "trn1.32xlarge", "trn2.48xlarge", "p5.48xlarge"]
    assert [default_machine(backend) for backend in backends] == names
    assert set(names) <= set(machine_names())


def test_what_a_machine_is_called_at_its_launchers() -> None:
    p5, trn2 = load_machine("p5.48xlarge"), load_machine("trn2")
    told = [(m.unit, m.resource, m.monitor, m.backends) for m in (TRN1, trn2, p5)]
    neuron = ("NeuronCores", "aws.amazon.com/neuron", "neuron-top", ("xla", "neuron"))
    assert told == [neuron, neuron, ("GPUs", "nvidia.com/gpu", "nvidia-smi dmon", ("cuda",))]
    assert (LOCAL.unit, LOCAL.monitor, LOCAL.neuron) == ("cores", "top", False)


def test_no_other_file_states_the_peak_of_a_device() -> None:
    root = KNOWN.parents[2]
    for path in (*(root / "llamax").rglob("*.py"), *(root / "launch").rglob("*.py")):
        text = path.read_text()
        assert not re.search(r"\b\d+(\.\d+)?e12\b", text.replace("1e12", "")), path


def test_a_node_of_one_rank_needs_no_links(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(
        MINE.replace("ranks = 4", "ranks = 1").replace("link_gbps = 12", "link_gbps = 0")
    )
    assert load_machine(str(path)).link_gbps == 0.0


def test_a_node_has_no_more_ranks_than_devices() -> None:
    assert TRN1.with_ranks(32) == TRN1
    with pytest.raises(ConfigError, match=r"`ranks=33` is more than the 32 devices of trn1\.32xl"):
        TRN1.with_ranks(33)


def test_figures_that_are_missing_come_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text("[lab]\nranks = 4\nlink_gbps = 12\n")
    with pytest.raises(ConfigError) as error:
        load_machine(str(path))
    assert str(error.value) == (
        f"{path}: lab.backend, lab.memory_gib, lab.bfloat16_tflops, lab.float32_tflops, "
        "lab.memory_gbps, lab.dollars_per_hour are missing; write them, or take those of a machine "
        'that is known, such as like = "trn1.32xlarge"'
    )
    path.write_text("[lab]\nlike = 'p9'\nmemory_gib = -1\n")
    with pytest.raises(ConfigError) as error:
        load_machine(str(path))
    like, memory = str(error.value).splitlines()[1:]
    assert like.startswith("  lab.like='p9' is not a machine that is known; there are trn1.32xl")
    assert memory == "  lab.memory_gib=-1.0 is out of range; use a number above 0"


def test_one_machine_of_several_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machines.toml"
    path.write_text("[small]\nlike = 'l4'\nranks = 2\n['p5.4xlarge']\nlike = 'h100'\nranks = 1\n")
    assert load_machine(f"{path}:small").ranks == 2
    big = load_machine(f"{path}:p5.4xlarge")
    assert (big.ranks, big.memory_gib, big.instance_type) == (1, 79.6, "p5.4xlarge")
    with pytest.raises(ConfigError, match=r"has no table \[smal\]; did you mean small\?"):
        load_machine(f"{path}:smal")
    path.write_text("")
    with pytest.raises(ConfigError, match=r"has 0 tables; write one such as \[my-node\] with like"):
        load_machine(str(path))


def test_a_machine_of_a_file_in_plan_and_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures that differ are the file's, all others those of the machine that it is like."""
    path = tmp_path / "lab.toml"
    path.write_text('[lab]\nlike = "P4D.24xlarge"\nranks = 4\ndevices = 4\nmemory_gib = 79.2\n')
    arguments = ["--config", "llama3.2-1b", "--run.backend=cuda", "--parallel.tensor=4", "--json"]
    found = {}
    for instance in (str(path), "p4d.24xlarge"):
        ranks = [] if instance == str(path) else ["--ranks", "4"]
        assert main([*arguments, *ranks, "--instance", instance]) == 0
        found[instance] = json.loads(capsys.readouterr().out)
    mine, known = found.values()
    assert (mine["instance"], mine["memory_bytes"]["available"]) == ("lab", 79.2 * GIB)
    assert mine["step_s"] == known["step_s"]
    assert main([*arguments, "--search", "--instance", str(path)]) == 0
    offered = json.loads(capsys.readouterr().out)["layouts"]
    assert {each["instance"] for each in offered} == {"lab"}
    assert max(each["parallel"]["tensor"] for each in offered) == 4
