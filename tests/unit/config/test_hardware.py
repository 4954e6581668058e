"""The table of machines: files of a user, and this machine measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llamax.cli.plan import main
from llamax.config.hardware import (
    GIB,
    Machine,
    load_machine,
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
        ("[lab]", "top = 1\n[lab]", "top stands outside a table"),
        ("[lab]", "[other]\nranks = 1\n[lab]", "has 2 tables"),
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
