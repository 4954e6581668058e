"""The planner's bytes beside measured ones: a real step on 1, 2 and 4 gloo ranks.

Every allocation and release of a step is counted by torch's own allocator (its profiler reports
them), so what is compared is exact: what is held between steps, what forward keeps, and the fullest
moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.memory import CPU, changes, highest
from support.models import tiny
from support.runs import on_mesh
from support.runs import share as share_of
from support.step_reference import part_of
from support.world import Worlds, axes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llamax import ops
from llamax.config.schema import Config, DataConfig, OptimConfig, ParallelConfig, RunConfig
from llamax.data.loader import Batch
from llamax.model.llama import DTYPES, Llama
from llamax.optim.blockwise import Blockwise
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Solo
from llamax.parallel.cross_entropy import vocab_parallel_loss
from llamax.parallel.fsdp import gathered_again, prefetched
from llamax.parallel.mesh import Mesh
from llamax.parallel.pipeline import layers_of
from llamax.tools.plan.memory import attention_kept, communication, kept, loss, memory
from llamax.tools.plan.sizes import Share
from llamax.tools.plan.state import (
    early_gradients,
    masters,
    moments,
    on_host,
    state,
    update,
)
from llamax.training.step import TrainState

MODEL = tiny(  # large enough for its activations to stand out; padded wherever tensor > 1
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=8,
    vocab_size=3001,
    max_position_embeddings=512,
)
BATCH, LENGTH = 2, 384


def config(mesh: Mesh, mode: str, dtype: str, sequence: bool = True) -> Config:
    return Config(
        MODEL,
        ParallelConfig(tensor=mesh.tp, sequence=sequence, bucket_bytes=2**18),
        data=DataConfig(
            separate_documents=False,
            sequence_length=LENGTH,
            micro_batch=BATCH,
            global_batch=BATCH * mesh.dp,
        ),
        run=RunConfig(dtype=dtype, recompute=mode),
    )


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    stores = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def measure(config: Config, mesh: Mesh) -> dict[str, int]:
    """In a rank: bytes between steps, kept by forward, at the fullest moment, and of buffers."""
    here = axes(mesh, max(1, mesh.tp // MODEL.num_key_value_heads))
    sending = here.tp, here.data, here.shard, here.replica
    for axis in sending:  # axes are shared by all tests of a world
        for role in getattr(axis, "_staged", ()):
            axis._staged[role] = torch.empty(0, dtype=torch.uint8)  # type: ignore[attr-defined]
    sequence = config.parallel.sequence
    dtype = DTYPES[config.run.dtype]
    model = Llama(
        config.model,
        here.tp,
        sequence_parallel=sequence,
        dtype=dtype,
        recompute=config.run.recompute,
    ).init(0)
    optimizer = Zero(
        model.sharded_parameters(),
        config.optim,
        here,
        sequence_parallel=model.sequence_parallel,
        zero=config.parallel.zero,
        bucket_bytes=config.parallel.bucket_bytes,
    )
    tensors: list[Tensor | None] = []
    for group in optimizer.groups:
        tensors += [*group.weights.stored, *group.gradients.stored]
        for bucket in group.buckets:
            tensors += [bucket.master, bucket.root]
            for moment in bucket.moments:
                tensors += (
                    [moment.codes, moment.absmax] if isinstance(moment, Blockwise) else [moment]
                )
    batch = torch.randint(config.model.vocab_size, (2, BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()
    one = torch.tensor(1.0)

    prefetch = prefetched(model)
    prefetch.begin("step")  # from the second one on, weights of ZeRO-3 are gathered ahead
    with gathered_again():
        total, _ = model.loss(batch[0], batch[1], positions)
    total.backward()  # buffers of collectives are made
    optimizer.step(one, one, one)
    prefetch.begin("step")
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward,
        gathered_again(),
    ):
        total, _ = model.loss(batch[0], batch[1], positions)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        total.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepped:
        optimizer.step(one, one, one)
    top, left = highest(changes(forward))
    later, _ = highest(changes(backward), left)
    buffers = [buffer for axis in sending for buffer in _staged(axis)]
    return {
        "ahead": prefetch.hits,
        "state": held(tensors),
        "kept": left,
        "forward": top,
        "peak": max(top, later) + held(tensors),
        "buffers": held(buffers),
        "update": highest(changes(stepped))[0],
    }


def _staged(axis: Any) -> list[Tensor]:
    return list(axis._staged.values()) if axis.size > 1 else []


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("mesh", "dtype", "sequence"),
    [
        (Mesh(), "float32", True),
        (Mesh(tp=2), "float32", True),
        (Mesh(tp=2), "float32", False),
        (Mesh(tp=2, dp=2), "bfloat16", True),
        (Mesh(tp=4), "float32", True),  # two ranks share a key/value head
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_planned_bytes_are_measured_bytes(
    worlds: Worlds, mesh: Mesh, dtype: str, sequence: bool, mode: str
) -> None:
    wanted = config(mesh, mode, dtype, sequence)
    wanted = replace(
        wanted, model=replace(MODEL, vocab_size=4501)
    )  # forward is fullest at the loss
    found = worlds(mesh.world_size).run(measure, wanted, mesh)[0]
    share = share_of(wanted, mesh)
    lasting = sum(line.value for line in (*state(share, CPU), early_gradients(share, CPU)))
    assert lasting == pytest.approx(found["state"], rel=0.001)
    # After the loss its gradients of the head and of the hidden state wait for backward.
    waiting = 4 * share.head_weights + share.tokens_between * MODEL.hidden_size * share.width
    assert kept(share, CPU, mode).value + waiting == pytest.approx(found["kept"], rel=0.02)
    working = kept(share, CPU, mode).value + loss(share, CPU).value
    assert working == pytest.approx(found["forward"], rel=0.05)
    planned = memory(share, CPU)
    told = {line.name: line.value for line in planned.lines}
    beside = sum(told.get(name, 0) for name in ("communication", "batch", "reserve"))
    assert planned.peak - beside == pytest.approx(found["peak"], rel=0.05)
    assert communication(share, CPU).value == pytest.approx(found["buffers"], rel=0.01)
    # The optimizer works in place: a bucket at most, and the numbers of a step.
    bucket = wanted.parallel.bucket_bytes if mesh.world_size > 1 else 0
    assert update(share, CPU).value == 0 <= found["update"] <= bucket + 16384


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("length", [128, 256, 257, 2047, 2048])
def test_attention_keeps_what_its_kernel_keeps(dtype: str, apart: bool, length: int) -> None:
    wanted = config(Mesh(), "none", dtype)
    data = replace(wanted.data, sequence_length=length, separate_documents=apart)
    model = replace(wanted.model, max_position_embeddings=length)
    share = share_of(replace(wanted, model=model, data=data), Mesh())
    q = torch.empty(BATCH, length, MODEL.num_attention_heads, 1, dtype=DTYPES[dtype])
    documents = torch.zeros(BATCH, length) if apart else None
    by_blocks = ops.kernel("attention", q, q, q, documents) is ops.load("attention.op:attention")
    row_sums = 4 * share.tokens * share.heads
    assert (attention_kept(share, CPU) == row_sums) == by_blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mesh", "zero", "recompute"),
    [
        (Mesh(dp=2), 2, "full"),
        (Mesh(dp=2), 3, "full"),
        (Mesh(2, 2), 3, "full"),
        (Mesh(dp=2), 3, "none"),
        (Mesh(dp=2), 3, "selective"),
        (Mesh(dp=4, shard=2), 1, "full"),
        (Mesh(dp=4, shard=2), 2, "full"),
        (Mesh(dp=4, shard=2), 3, "full"),
    ],
)
def test_planned_bytes_of_zero_stages_are_measured_bytes(
    worlds: Worlds, mesh: Mesh, zero: int, recompute: Any, dtype: str
) -> None:
    wanted = config(mesh, recompute, dtype)
    wanted = replace(wanted, parallel=replace(wanted.parallel, zero=zero))
    found = worlds(mesh.world_size).run(measure, wanted, mesh)[0]
    share = share_of(wanted, mesh)
    lasting = sum(line.value for line in (*state(share, CPU), early_gradients(share, CPU)))
    assert lasting == pytest.approx(found["state"], rel=0.005)
    planned = memory(share, CPU)
    told = {line.name: line.value for line in planned.lines}
    beside = sum(told.get(name, 0) for name in ("communication", "batch", "reserve"))
    assert planned.peak - beside == pytest.approx(found["peak"], rel=0.05)
    assert (found["ahead"] > 0) == (zero == 3)
    if mesh.copies > 1 and zero == 1:
        assert communication(share, CPU).value == pytest.approx(found["buffers"], rel=0.01)


def measure_stage(config: Config, mesh: Mesh) -> int:
    """In a rank: bytes at the fullest moment of a step of its stage."""
    run = on_mesh(config, mesh)
    here = axes(replace(run.mesh, kv=1), MODEL.kv_replicas(mesh.tp))
    model = Llama(
        config.model,
        here.tp,
        sequence_parallel=config.parallel.sequence,
        dtype=DTYPES[config.run.dtype],
        recompute=config.run.recompute,
        stage=layers_of(*here.pp, run.chunk_layers),
    ).init(0)
    state = TrainState.build(run, model, here)
    ids = torch.randint(MODEL.vocab_size, (2, BATCH, LENGTH))
    whole = Batch(*ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None)
    batch = part_of(whole, here)
    batches = [batch] * run.accumulation
    state.step(batches, 1)
    tensors: list[Tensor | None] = [state._stage._unused]
    for group in state.optimizer.groups:
        tensors += [*group.weights.stored, *group.gradients.stored]
        for bucket in group.buckets:
            tensors += [bucket.master, bucket.exp_avg, bucket.exp_avg_sq, bucket.root]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepped:
        state.step(batches, 2)
    return held(tensors) + highest(changes(stepped))[0]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("mesh", "dtype", "tied", "chunks"),
    [
        (Mesh(pp=2), "float32", False, 1),
        (Mesh(pp=4), "float32", False, 1),
        (Mesh(pp=2, tp=2), "float32", False, 1),
        (Mesh(pp=2, dp=2), "bfloat16", True, 1),
        (Mesh(pp=2, tp=2), "float32", False, 2),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_planned_bytes_of_stages_are_measured_bytes(
    worlds: Worlds, mesh: Mesh, dtype: str, mode: str, tied: bool, chunks: int
) -> None:
    wanted = config(mesh, mode, dtype)
    wanted = replace(
        wanted,
        model=replace(wanted.model, tie_word_embeddings=tied),
        data=replace(wanted.data, global_batch=4 * BATCH * mesh.dp),
        parallel=replace(wanted.parallel, chunks=chunks),
    )
    found = worlds(mesh.world_size).run(measure_stage, wanted, mesh)
    run = on_mesh(wanted, mesh)
    for rank, peak in enumerate(found):
        planned = memory(Share(run, mesh.coordinate(rank).pp), CPU)
        by_name = {line.name: line.value for line in planned.lines}
        beside = sum(by_name.get(name, 0) for name in ("communication", "batch", "reserve"))
        assert planned.peak - beside == pytest.approx(peak, rel=0.05), planned.moment


@pytest.mark.parametrize("by", ["gather", "ring"])
@pytest.mark.parametrize(
    ("mesh", "dtype", "mode"),
    [
        (Mesh(cp=2), "float32", "full"),
        (Mesh(cp=4), "float32", "none"),
        (Mesh(cp=4), "float32", "selective"),
        (Mesh(cp=4), "float32", "full"),
        (Mesh(tp=2, cp=2), "bfloat16", "none"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_planned_bytes_of_context_ranks_are_measured_bytes(
    worlds: Worlds, mesh: Mesh, dtype: str, by: Any, mode: str
) -> None:
    wanted = config(mesh, mode, dtype)
    parallel = replace(wanted.parallel, context=mesh.cp, context_by=by)
    wanted = replace(wanted, parallel=parallel)
    found = worlds(mesh.world_size).run(measure_stage, wanted, mesh)
    planned = memory(share_of(wanted, mesh), CPU)
    by_name = {line.name: line.value for line in planned.lines}
    beside = sum(by_name.get(name, 0) for name in ("communication", "batch", "reserve"))
    # The first rank needs the most of gathered keys: its second chunk is the last of the sequence.
    assert planned.peak - beside == pytest.approx(found[0], rel=0.05), planned.moment
    assert max(found) == found[0]


def test_the_logits_of_one_chunk_live_at_a_time() -> None:
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((1, 512, 16), (2000, 16)))
    labels = torch.randint(2000, (1, 512))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        vocab_parallel_loss(x, weight, labels, Solo("tp"), 2000, False, chunk_tokens=128)
    top, _ = highest(changes(found))
    logits, kept = 4 * 128 * 2000, 4 * (x.numel() + weight.numel())
    assert logits + kept < top < 1.2 * logits + kept


@pytest.mark.parametrize("bits", [32, 8])
def test_small_state_is_planned_as_it_is_held(worlds: Worlds, bits: int) -> None:
    """A GPU's bytes by what a CPU holds: state in host memory is counted apart."""
    optim = OptimConfig(state_bits=bits, offload=True)
    wanted = replace(config(Mesh(), "full", "float16"), optim=optim)
    found = worlds(1).run(measure, wanted, Mesh())[0]
    share, gpu = share_of(wanted, Mesh()), replace(CPU, backend="cuda", host_memory_gib=1e-3)
    lasting = sum(line.value for line in (*state(share, gpu), early_gradients(share, gpu)))
    away = on_host(share, gpu).value
    assert lasting + away == pytest.approx(found["state"], rel=0.001)
    assert away == sum(line.value for line in (masters(share, CPU), moments(share)))
    assert {line.name for line in state(share, gpu)} & {"masters", "moments"} == set()
    assert update(share, gpu).value == pytest.approx(found["update"], rel=0.35)
    assert on_host(share, CPU).value == 0
    planned = memory(share, gpu)
    assert not planned.host_fits
    assert not planned.fits
    assert memory(share, replace(gpu, host_memory_gib=0.0)).fits
