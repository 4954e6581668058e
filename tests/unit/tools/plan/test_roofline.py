"""The time of a step by formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.runs import on_mesh
from support.runs import share as share_of

from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.runtime.units import show_flops
from llamax.tools.plan.memory import loss
from llamax.tools.plan.nki_loss import kernel_seconds
from llamax.tools.plan.planner import plan as planned
from llamax.tools.plan.products import layer_flops, weight_flops
from llamax.tools.plan.roofline import microstep, wire
from llamax.tools.plan.roofline import time as step_time
from llamax.tools.plan.sizes import Share, stages_of

TRN1, H100 = load_machine("trn1.32xlarge"), load_machine("p5.48xlarge")


ONE = [f"--{key}" for key in ("data.separate_documents=false",)]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, overrides)


def test_a_group_within_a_node_uses_links_and_a_wider_one_the_network() -> None:
    assert wire(TRN1, 8, 1).name == "links"
    assert wire(TRN1, 4, 8).name == "links"
    across = wire(TRN1, 16, 8)
    assert across.name == "network"
    assert across.bytes_per_s == pytest.approx(100e9 * 0.7 / 8)  # eight rings share the node's
    # A ring of 8 moves 7/8 of the whole, and waits 7 times.
    assert wire(TRN1, 8, 1).ring(8e9) == pytest.approx(7 * (1e9 / (192e9 * 0.48) + 5e-6))
    assert wire(TRN1, 1, 1).ring(8e9) == 0


def test_time_of_matmuls_by_hand() -> None:
    config = recipe("llama2-7b", "--run.recompute=selective", *ONE)
    found = {
        line.name: line.value
        for line in step_time(share_of(config, Mesh(tp=8, dp=16)), TRN1, 4).lines
    }
    weights = 32 * (4 * 4096 * 512 + 3 * 4096 * 1408) + 4096 * 4096  # of 1376 and 4000, in tiles
    assert found["matmuls"] == pytest.approx(64 * 6 * 4096 * weights / (95e12 * 0.56))
    # 4 heads, forward twice, by the tally; each time q and k, [4096, 512], are read for bounds
    kernels = 2 * (5.58e-12 * 2**23 + 3.57e-9 * 4096) + 1.85e-11 * 2**23 + 6.16e-9 * 4096
    bandwidth = 1e9 * TRN1.memory_gbps * TRN1.memory_efficiency
    bounds = 2 * 2 * 4096 * 2 * 512 / bandwidth
    assert found["attention"] == pytest.approx(64 * 32 * (4 * kernels + bounds))
    # Forward and twice as much backward, without the rotation: 512 tokens of norms and residuals.
    elements = 3 * 2 * (10 * 512 * 4096 + 4096 * 3 * 11008 // 8) / bandwidth
    assert found["element-wise"] == pytest.approx(64 * 32 * elements)


def test_a_part_of_a_tile_takes_as_long_as_a_whole_one() -> None:
    """448 features of a share are 3.5 tiles of 128; a GPU's row is taken as it is."""
    config = recipe("llama3.1-8b", "--parallel.tensor=32", *ONE)
    share = share_of(config, Mesh(tp=32, dp=1))
    multiplied, whole = weight_flops(share, TRN1, loss_apart=True)
    weights = 4096 * (2 * 128 + 2 * 128 + 3 * 448)
    assert multiplied == 3 * 2.0 * share.tokens * 32 * weights
    assert whole == multiplied * (512 + 3 * 512) / (512 + 3 * 448)
    line = next(line for line in microstep(share, TRN1) if line.name == "matmuls")
    assert f"({show_flops(weight_flops(share, TRN1, False)[1])} in whole tiles)" in line.formula
    assert weight_flops(share, H100, loss_apart=True) == (multiplied, multiplied)


def test_adapters_take_tiles_of_their_rank() -> None:
    config = recipe("llama2-7b", "--checkpoint.init_from=base", "--parallel.tensor=8", *ONE)
    tuned = [
        share_of(replace(config, finetune=replace(config.finetune, method="lora", r=r)), Mesh(tp=8))
        for r in (16, 128)
    ]
    (few, small), (many, large) = (weight_flops(share, TRN1, True) for share in tuned)
    assert few < many
    assert small == large


def test_adapters_of_a_recomputed_layer_are_computed_again() -> None:
    """All but B of the down projection, whose output nothing in backward reads."""

    def products(mode: str, targets: str) -> float:
        asked = ["--finetune.method=lora", f"--finetune.targets={targets}", "--finetune.r=16"]
        asked += ["--checkpoint.init_from=base", f"--run.recompute={mode}", *ONE]
        share = share_of(recipe("llama2-7b", *asked, "--parallel.tensor=8"), Mesh(tp=8))
        return weight_flops(share, H100, True)[0] - sum(layer_flops(share))

    unit = 2.0 * 4096 * 32 * 16  # tokens, layers, rank
    both = 4096 + 512  # the input of A, and this rank's share of the output of B
    for mode, q_proj, down_proj in (
        ("none", 3 * both, 3 * (4096 + 1376)),
        ("full", 4 * both, 3 * (4096 + 1376) + 1376),
    ):
        assert products(mode, "q_proj") == unit * q_proj
        assert products(mode, "down_proj") == unit * down_proj


def test_time_of_a_loss_by_kernels_by_hand() -> None:
    """Hidden size 2048: the head's products are in the kernels' time, and no logits are moved."""
    config = recipe("llama3.2-1b", "--parallel.tensor=8", *ONE)
    share = share_of(config, Mesh(tp=8, dp=4))
    found = {line.name: line.value for line in microstep(share, TRN1)}
    bandwidth = 1e9 * TRN1.memory_gbps * TRN1.memory_efficiency
    turned = 2 * 2 * 2 * 8192 * 2048  # the input, read and written for each kernel
    products = 4 * 8192 * 16032 * 2048 / (128 * 128 * 2.8e9)
    assert found["logits"] == pytest.approx(
        sum(kernel_seconds(8192, 16032, 2048)) + turned / bandwidth
    )
    assert products < found["logits"] < 1.05 * products
    weights = 16 * 2048 * (2 * 256 + 2 * 128 + 3 * 1024)  # the key head of 64 in a tile of 128
    assert found["matmuls"] == pytest.approx(3 * 2.0 * 8192 * weights / (95e12 * 0.56))
    wide = share_of(replace(config, run=replace(config.run, dtype="float32")), share.mesh)
    by_compiler = {line.name: line.value for line in microstep(wide, TRN1)}
    assert by_compiler["logits"] == pytest.approx(24 * 8192 * 16032 / bandwidth)


def test_memory_of_a_loss_by_kernels_by_hand() -> None:
    config = recipe("llama3.2-1b", "--parallel.tensor=8", "--model.vocab_size=128250")
    share = share_of(config, Mesh(tp=8, dp=4))
    T, D, rows = 8192, 2048, 16032
    hidden = 2 * T * D // 8 + 2 * 2 * T * D  # the share and its gradient are in other lines too
    beside = 2 * T * D + 4 * T * D + 4 * 128 * rows  # turned; waiting in float32; padding
    assert loss(share, TRN1).value == hidden + beside + 4 * rows * D
    assert "no logits" in loss(share, TRN1).formula


def test_full_recomputation_costs_time_and_saves_memory() -> None:
    config = recipe("llama2-7b", *ONE)
    plans = {
        mode: planned(replace(config, run=replace(config.run, recompute=mode)), TRN1, 4)
        for mode in ("none", "selective", "full")
    }
    seconds = [plans[mode].time.step_s for mode in ("none", "selective", "full")]
    peaks = [plans[mode].memory.peak for mode in ("none", "selective", "full")]
    assert seconds == sorted(seconds)
    assert peaks[2] < peaks[1] <= peaks[0]


def test_a_longer_pipeline_waits_longer() -> None:
    config = recipe("llama2-13b", *ONE, "--parallel.tensor=8", "--parallel.chunks=1")
    times = [
        step_time(share_of(config, Mesh(tp=8, dp=128 // pp, pp=pp)), TRN1, 32) for pp in (1, 4)
    ]
    assert times[1].step_s > times[0].step_s


def test_the_slowest_stage_sets_the_pace_and_chunks_shorten_the_bubble() -> None:
    config = recipe("llama3.1-8b", *ONE, "--parallel.tensor=8")
    mesh = Mesh(tp=8, dp=32, pp=4)

    def parts(layers: str, chunks: int = 1) -> dict[str, float]:
        parallel = replace(config.parallel, layers_per_stage=layers, chunks=chunks)
        run = on_mesh(replace(config, parallel=parallel), replace(mesh, ends=chunks > 1))
        stages = [(microstep(each, TRN1), number) for each, number in stages_of(run)]
        found = {line.name: line.value for line in step_time(Share(run), TRN1, 32).lines}
        found["of stages"] = sum(
            number * sum(line.value for line in lines) for lines, number in stages
        )
        found["slowest"] = max(sum(line.value for line in lines) for lines, _ in stages)
        found["step"] = step_time(Share(run), TRN1, 32).step_s
        return found

    even, shorter_last = parts("8,8,8,8"), parts("9,8,8,7")
    assert even["pipeline bubble"] == pytest.approx(even["of stages"] - even["slowest"])
    assert even["logits"] > 0, "the last stage is the slowest"
    assert shorter_last["slowest"] < even["slowest"]
    assert shorter_last["step"] < even["step"]
    halves = parts("", 2)
    assert halves["pipeline bubble"] == pytest.approx(3 * halves["slowest"] / 2)


@pytest.mark.parametrize(("zero", "said"), [(1, "4 B + 2 B x "), (0, "2 x 4 B x ")])
def test_what_data_ranks_send_is_what_is_counted(zero: int, said: str) -> None:
    config = recipe("llama3.2-1b", "--parallel.tensor=8", f"--parallel.zero={zero}")
    lines = planned(config, TRN1, 1).time.lines
    assert next(line for line in lines if line.name == "data collectives").formula.startswith(said)
