"""Real ranks with a real optimizer save on one mesh, resume on another, and step on alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.models import TIED, tiny
from support.planted import defect
from support.world import Worlds, axes

from llamax.checkpoint import Checkpoint, Saver, load_owned
from llamax.checkpoint.load import check_shapes
from llamax.config.model import ModelConfig
from llamax.config.rules.pipeline import evenly
from llamax.config.schema import OptimConfig
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Solo
from llamax.parallel.mesh import Mesh
from llamax.parallel.pipeline import layers_of
from llamax.training.room import checkpoint_bytes

MODEL = replace(TIED, num_hidden_layers=2)
OPTIM = OptimConfig()
DEEP = replace(MODEL, num_hidden_layers=4, tie_word_embeddings=False)


# 2 tensor ranks cut its tensors between blocks of 256 elements; norms are too small for 8 bits.
BLOCKS = tiny(
    hidden_size=64,
    intermediate_size=512,
    num_attention_heads=8,
    head_dim=64,
    vocab_size=64,
    max_position_embeddings=64,
)


class On(NamedTuple):
    """Where a checkpoint is saved."""

    tp: int
    dp: int
    zero: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    pp: int = 1
    layers: tuple[int, ...] | None = None
    shard: int = 0


CHAINS = {
    "all at once": (On(2, 2), On(1, 2, zero=0), On(4, 1, sequence_parallel=True)),
    "tensor": (On(2, 1), On(4, 1), On(1, 1)),
    "data": (On(1, 2), On(1, 4), On(1, 1)),
    "ZeRO": (On(2, 2), On(2, 2, zero=0), On(2, 2)),
    "ZeRO-3": (On(2, 2, zero=3), On(2, 2), On(1, 2, zero=0), On(2, 2, zero=3)),
    "ZeRO-3 on other ranks": (On(1, 4, zero=3), On(1, 2, zero=2), On(1, 2, zero=3), On(4, 1)),
    "context": (On(2, 1, cp=2), On(1, 2, cp=2), On(1, 1), On(1, 2, zero=0, cp=2)),
    "pipeline": (On(1, 1), On(1, 1, pp=2), On(1, 1, pp=4), On(2, 1, pp=2), On(1, 1)),
    "uneven stages": (
        On(1, 1),
        On(1, 2, pp=2, layers=(1, 3)),
        On(1, 1, pp=3, layers=(1, 1, 2)),
        On(1, 2, zero=0, pp=2),
    ),
    "chunks": (On(1, 1), On(1, 1, pp=2, layers=(1, 1, 1, 1)), On(2, 1, pp=2), On(1, 1)),
    "hybrid": (
        On(1, 4, zero=3, shard=2),
        On(1, 4, zero=3),
        On(2, 4, zero=2, shard=2),
        On(1, 2, zero=0),
        On(1, 2, zero=2, cp=2, shard=2),
        On(1, 8, shard=4),
    ),
    "hybrid stages": (
        On(1, 4, zero=3, shard=2),
        On(1, 4, pp=2, shard=2),
        On(1, 2, pp=2, zero=0),
        On(1, 1),
    ),
    "sequence parallel": (On(2, 2, sequence_parallel=True), On(2, 2), On(2, 2, True, True)),
}


def train_and_save(
    on: On,
    dtype: torch.dtype,
    source: str,
    out: str,
    steps: int,
    model_config: ModelConfig = MODEL,
    optim: OptimConfig = OPTIM,
) -> None:
    """Some steps from ``source`` (or from scratch), then a checkpoint in ``out``."""
    mesh = Mesh(tp=on.tp, cp=on.cp, dp=on.dp, pp=on.pp, shard=on.shard)
    mine = axes(mesh, max(1, on.tp // model_config.num_key_value_heads))
    stage = layers_of(*mine.pp, on.layers or evenly(model_config.num_hidden_layers, on.pp))
    model = Llama(
        model_config, mine.tp, dtype=dtype, sequence_parallel=on.sequence_parallel, stage=stage
    ).init(0)
    parameters = model.sharded_parameters()
    optimizer = Zero(
        parameters,
        optim,
        mine,
        sequence_parallel=on.sequence_parallel,
        zero=on.zero,
        bucket_bytes=4096,
    )
    if source:
        checkpoint = Checkpoint(source)
        check_shapes(checkpoint, parameters)
        checkpoint.check_rng(mine.world.rank, mine.world.size)
        load_owned(checkpoint, optimizer.owned(), parameters)
        optimizer.gather_parameters()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 61, (4, 9), generator=generator)
        share = ids[mine.data.rank :: mine.data.size]
        optimizer.zero_grad()
        total, _ = model.loss(share[:, :-1], share[:, 1:])
        (total / 32).backward()
        optimizer.step(torch.tensor(1e-3), torch.tensor(float(step + 1)), torch.tensor(1.0))
    saver = Saver(out, mine, parameters, zero=on.zero, timeout_s=300)
    saver.save(
        steps, optimizer.owned(), {}, model_config.to_hub("float32"), "", torch.get_rng_state()
    )
    saver.wait()
    mine.world.all_reduce(torch.zeros(1))
    kept = state(Path(f"{out}/step-{steps:08d}"))
    whole = model_config.num_parameters() if on.pp > 1 else None
    assert checkpoint_bytes(saver, optimizer, whole) == sum(
        tensor.nbytes for tensor in kept.values()
    )


def state(folder: Path) -> dict[tuple[str, str], Any]:
    source = Checkpoint(folder)
    return {(n, k): source.read(n, k) for n in source.names() for k in source.kinds(n)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS)
def test_save_reshard_resume(
    worlds: Worlds, tmp_path: Path, dtype: torch.dtype, chain: str, report: Callable[[str], None]
) -> None:
    """A trains and saves; B loads that and saves, C loads that and saves: all hold the same."""
    source, expected = "", {}
    model = DEEP if any(on.pp > 1 for on in CHAINS[chain]) else MODEL
    for number, on in enumerate(CHAINS[chain]):
        steps = 0 if number else 2
        out = str(tmp_path / str(number))
        worlds(on.tp * on.cp * on.dp * on.pp).run(
            train_and_save, on, dtype, source, out, steps, model
        )
        source = f"{out}/step-{steps:08d}"
        found = state(Path(source))
        expected = expected or found
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value), (on, key)
    assert {kind for _, kind in expected} >= {"weight", "exp_avg", "exp_avg_sq"}
    assert (("model.norm.weight", "master") in expected) == (dtype == torch.bfloat16)
    assert expected["model.embed_tokens.weight", "exp_avg"].any()
    report(f"{chain} changes {len(CHAINS[chain]) - 1} times, {dtype}: state bit-equal: ok")


def test_moments_in_8_bits_are_the_same_on_every_mesh(worlds: Worlds, tmp_path: Path) -> None:
    """Saved by four ranks in host memory, resharded four times; a run in 32 bits takes them."""
    eight = replace(OPTIM, state_bits=8)
    hybrid = On(1, 4, zero=3, shard=2)
    chain = (On(2, 2, zero=3), On(1, 2, zero=2), On(2, 1), On(1, 4, zero=3), hybrid, On(1, 1))
    source, expected = "", {}
    for number, on in enumerate(chain):
        optim, out = replace(eight, offload=number % 2 == 0), str(tmp_path / str(number))
        steps = 0 if number else 2
        worlds(on.tp * on.dp).run(
            train_and_save, on, torch.float16, source, out, steps, BLOCKS, optim
        )
        source = f"{out}/step-{steps:08d}"
        found = state(Path(source))
        expected = expected or found
        for key, value in expected.items():
            assert torch.equal(found[key], value), (on, key)
    first = expected["model.layers.1.mlp.down_proj.weight", "exp_avg"].view(-1, 256)
    levels = {len(row.unique()) for row in first}
    assert max(levels) < 200, "256 numbers, some of which are the same in 8 bits"
    plain = str(tmp_path / "plain")
    worlds(1).run(train_and_save, On(1, 1), torch.float16, source, plain, 0, BLOCKS)
    assert all(
        torch.equal(state(Path(f"{plain}/step-00000000"))[k], v) for k, v in expected.items()
    )


def test_resuming_on_the_same_mesh_is_bitwise(worlds: Worlds, tmp_path: Path) -> None:
    on = On(2, 2, sequence_parallel=True)
    a, b, c = (str(tmp_path / name) for name in "abc")
    worlds(4).run(train_and_save, on, torch.float32, "", a, 2)
    for out in (b, c):
        worlds(4).run(train_and_save, on, torch.float32, f"{a}/step-00000002", out, 1)
    assert [p.name for p in sorted(Path(b).iterdir())] == ["step-00000001"]
    for name in ("weights-tp01-dp01.safetensors", "optimizer-tp00-dp01.safetensors"):
        files = [Path(folder) / "step-00000001" / name for folder in (b, c)]
        assert files[0].read_bytes() == files[1].read_bytes()


# --- groups that own the same --------------------------------------------------------------------


def everything(saver: Saver) -> None:
    saver.replica = Solo("replica")


def first_part(saver: Saver) -> None:
    size, saver.replica = saver.replica.size, Solo("replica")
    saver.replica.size = size


def save_with(change: Callable[[Saver], None] | None, on: On, out: str) -> None:
    """Two steps and a save, with savers changed."""

    def changed(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Saver, *options: Any, **more: Any) -> None:
            original(self, *options, **more)
            if change is not None:
                change(self)

        return __init__

    with defect(Saver, "__init__", changed)():
        train_and_save(on, torch.float32, "", out, 2)


@pytest.mark.parametrize("zero", [1, 3])
def test_groups_write_each_element_once(worlds: Worlds, tmp_path: Path, zero: int) -> None:
    on, expected, caught = On(1, 4, zero=zero, shard=2), 0, []
    for change in (None, everything, first_part):
        folder = tmp_path / (change.__name__ if change else "right")
        try:
            worlds(4).run(save_with, change, on, str(folder))
        except AssertionError:  # what is read back is not what was trained
            caught.append(change)
            continue
        found = Checkpoint(folder / "step-00000002")
        written = sum(file.size_bytes - file.header_bytes for file in found.manifest.files)
        if change is None:
            assert len({file.name for file in found.manifest.files}) == 8
            assert found.manifest.mesh["zero_ranks"] == 2
            expected = written
        elif written != expected:
            caught.append(change)
    assert caught == [everything, first_part]
