"""The planner's bytes against those of the traced programs, on a small Llama.

State is equal to the byte.  What a layer keeps, and the fullest moment, are the planner's formulas
against the audit's estimate, which fuses and orders operations in its own way: the planner may say
up to a tenth more, and no less.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from support.runs import on_mesh
from support.runs import share as share_of

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from llamax.backends.tracing import Tracer
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.rules.finetune import target_names
from llamax.config.schema import Config, FinetuneConfig, ParallelConfig
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.tools.audit import hlo
from llamax.tools.audit.auditor import audit, measure, with_kernels
from llamax.tools.audit.flash import kernels_stand_in
from llamax.tools.audit.report import Memory
from llamax.tools.audit.trace import TracedRun, made_up_tokens
from llamax.tools.plan import search
from llamax.tools.plan.memory import layer_kept, memory, pairs
from llamax.tools.plan.program import PRODUCT_FLOPS, largest_program
from llamax.tools.plan.state import update
from llamax.training.resolve import resolve

MESH, TRN1 = Mesh(tp=2, dp=2), load_machine("trn1.2xlarge")
FEW, MORE = 3, 6


def small(layers: int, mode: Any, dtype: Any) -> Config:
    """Heads of 32, which the kernels refuse: all pairs of tokens are there in both counts."""
    cfg = load_config("demo")
    sizes = dict(hidden_size=256, intermediate_size=640, vocab_size=1024, num_hidden_layers=layers)
    return replace(
        cfg,
        model=replace(cfg.model, **sizes),
        parallel=ParallelConfig(tensor=2, bucket_bytes=2**18),
        data=replace(cfg.data, micro_batch=2, global_batch=8),
        run=replace(cfg.run, backend="xla", dtype=dtype, recompute=mode),
    )


def traced(cfg: Config, tracer: Tracer, mesh: Mesh = MESH) -> Memory:
    resolved = on_mesh(cfg, mesh)
    with made_up_tokens(resolved) as data:
        run = TracedRun(resolved, 0, tracer, data)
        programs = {each.kind: hlo.read(each.text) for each in run.step(1, (0,))}
    return measure(run, programs, TRN1)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("none", "bfloat16"),
        ("selective", "bfloat16"),
        ("full", "bfloat16"),
        ("full", "float32"),
    ],
)
def test_planned_bytes_are_those_of_the_programs(mode: Any, dtype: Any) -> None:
    tracer = Tracer(Rendezvous(), debug=False)
    few, more = (traced(small(layers, mode, dtype), tracer) for layers in (FEW, MORE))
    share = share_of(small(MORE, mode, dtype), MESH)
    planned = memory(share, TRN1)
    lines = {line.name: line.value for line in planned.lines}
    assert lines["weights"] == more.weights
    assert lines["gradients"] == more.gradients
    assert lines["masters"] + lines["moments"] + lines.get("norm weights", 0) == more.optimizer
    a_layer = (more.peak - few.peak - (more.resident - few.resident)) / (MORE - FEW)
    assert a_layer <= layer_kept(share, TRN1, mode)[0] <= 1.06 * a_layer
    counted = more.peak - more.reserve
    assert counted <= planned.peak - lines["reserve"] <= 1.10 * counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=2, dp=2), Mesh(tp=2, dp=8)], ids=str)
def test_planned_bytes_of_the_update_are_those_of_the_program(mesh: Mesh, dtype: Any) -> None:
    """The new weights take the place of the old ones, whose memory the update can use before."""
    cfg = small(MORE, "full", dtype)
    cfg = replace(cfg, data=replace(cfg.data, global_batch=16))
    found = traced(cfg, Tracer(Rendezvous(), debug=False), mesh)
    live, share = found.live["update"], share_of(cfg, mesh)
    assert live.replaced_bytes == found.weights
    beside = {line.name: line.value for line in memory(share, TRN1).lines}
    assert live.output_bytes - live.replaced_bytes < 1024  # the numbers of a step
    planned = update(share, TRN1).value
    assert planned - cfg.parallel.bucket_bytes <= live.added_bytes
    assert live.added_bytes <= planned + beside["communication"]


def test_the_flash_kernel_is_traced_by_its_tensors_alone() -> None:
    """What forward keeps with the kernel: q, k, v and the output by heads, no pairs of tokens."""
    tracer = Tracer(Rendezvous(), debug=False)
    cfg = small(2, "none", "bfloat16")
    cfg = replace(
        cfg,
        model=replace(cfg.model, max_position_embeddings=2048, head_dim=64),
        data=replace(cfg.data, sequence_length=2048, micro_batch=1, separate_documents=False),
    )
    resolved = on_mesh(cfg, MESH)
    with made_up_tokens(resolved) as data:
        run = TracedRun(resolved, 0, tracer, data)
        programs = {each.kind: hlo.read(each.text) for each in run.step(1, (0,))}
        plain = measure(run, programs, TRN1)
        flash = measure(run, {**programs, **with_kernels(run)}, TRN1)
    share = share_of(cfg, MESH)
    scores = 4 * pairs(share)
    assert plain.live["microstep"].added_bytes > scores > flash.live["microstep"].added_bytes
    planned = memory(share, TRN1)
    assert flash.peak <= planned.peak <= 1.10 * flash.peak
    separate = replace(cfg, data=replace(cfg.data, separate_documents=True))
    with made_up_tokens(resolved) as data:
        run = TracedRun(on_mesh(separate, MESH), 0, tracer, data)
        programs = {each.kind: hlo.read(each.text) for each in run.step(1, (0,))}
        apart = measure(run, {**programs, **with_kernels(run)}, TRN1)
    assert apart.peak <= memory(share_of(separate, MESH), TRN1).peak <= 1.10 * apart.peak
    narrow = replace(cfg, model=replace(cfg.model, head_dim=16))
    exact = replace(narrow, run=replace(narrow.run, dtype="float32"))
    with made_up_tokens(resolved) as data:
        assert with_kernels(TracedRun(on_mesh(exact, MESH), 0, tracer, data)) == {}


def test_a_loss_by_kernels_is_counted_where_those_of_attention_refuse_its_shape() -> None:
    tracer = Tracer(Rendezvous(), debug=False)
    cfg = small(2, "full", "bfloat16")
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=2**15))
    resolved = on_mesh(cfg, MESH)
    with made_up_tokens(resolved) as data:
        run = TracedRun(resolved, 0, tracer, data)
        plain = {each.kind: hlo.read(each.text) for each in run.step(1, (0,))}
        found = with_kernels(run)
    text = found["microstep"].normal
    assert 'custom_call_target="loss"' in text
    assert 'custom_call_target="flash"' not in text
    counted, planned = measure(run, {**plain, **found}, TRN1), memory(share_of(cfg, MESH), TRN1)
    logits = 4 * cfg.data.micro_batch * cfg.data.sequence_length * 2**14
    assert measure(run, plain, TRN1).peak - counted.peak > logits / 2
    assert counted.peak <= planned.peak <= 1.10 * counted.peak


def test_a_loss_by_kernels_is_traced_without_logits() -> None:
    """One program for all ranks, no 64 bits, two collectives; the planner's bytes."""
    tracer = Tracer(Rendezvous(), debug=False)
    cfg = small(2, "none", "bfloat16")
    cfg = replace(
        cfg,
        model=replace(cfg.model, max_position_embeddings=2048, head_dim=64, vocab_size=8191),
        data=replace(cfg.data, sequence_length=2048, micro_batch=1, separate_documents=False),
    )
    resolved = on_mesh(cfg, MESH)
    texts = []
    for rank in (0, 1):
        with made_up_tokens(resolved) as data, kernels_stand_in():
            run = TracedRun(resolved, rank, tracer, data)
            programs = {each.kind: each.text for each in run.step(1, (0,))}
        texts.append(hlo.normal(programs["microstep"]))
    assert texts[0] == texts[1]
    assert not re.search(r"[fsu]64\[", texts[0])
    assert "[2048,4096]" not in texts[0]
    assert "pred[4096]" in texts[0]  # the rows of padding
    calls = [line for line in texts[0].splitlines() if 'custom_call_target="loss"' in line]
    assert len(calls) == 2
    sums = [x for x in texts[0].splitlines() if "all-reduce(" in x and "(f32" in x and "2048]" in x]
    assert len(sums) == 2
    found = measure(run, {kind: hlo.read(text) for kind, text in programs.items()}, TRN1)
    assert found.peak <= memory(share_of(cfg, MESH), TRN1).peak <= 1.10 * found.peak


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_logits_of_a_chunk_go_before_those_of_the_next_come(dtype: Any) -> None:
    """However many there are: 2 and 6 chunks, of a length that the kernels refuse."""
    tracer, spans = Tracer(Rendezvous(), debug=False), []
    logits = 4 * 1024 * 2**14
    for micro_batch in (8, 24):
        cfg = small(2, "full", dtype)
        cfg = replace(
            cfg,
            model=replace(cfg.model, vocab_size=2**15),
            data=replace(
                cfg.data, sequence_length=250, micro_batch=micro_batch, global_batch=2 * micro_batch
            ),
        )
        found, planned = traced(cfg, tracer), memory(share_of(cfg, MESH), TRN1)
        counted = found.peak - found.reserve  # with the logits once more, as of two passes
        assert counted - logits <= planned.peak - found.reserve <= 1.10 * counted
        spans.append(found.live["microstep"].between_bytes)
    assert 2 * logits <= spans[0] <= spans[1] < 3 * logits


def test_the_audit_accepts_what_the_search_offers_and_counts_the_same() -> None:
    """The fastest layout of each tensor degree, on two nodes; beside the reserve of both."""
    offered, refused = search(small(2, "none", "bfloat16"), TRN1, 2)
    assert any("a node of 2 ranks" in each.reason for each in refused)
    fastest = {each.run.mesh.tp: each for each in reversed(offered)}
    assert sorted(fastest) == [1, 2]
    for each in fastest.values():
        report = audit(each.run.config, TRN1, 2, "corners")
        assert report.passes
        planned, estimated = (
            total - report.memory.reserve for total in (each.memory.peak, report.memory.peak)
        )
        assert estimated * 0.97 < planned < estimated * 1.15, each.run.mesh


@pytest.mark.parametrize(
    ("mode", "tensor", "pipeline", "chunks"),
    [
        ("none", 2, 1, 1),
        ("selective", 2, 1, 1),
        ("full", 2, 1, 1),
        ("full", 1, 2, 1),
        ("full", 1, 2, 2),
    ],
)
def test_the_products_of_the_largest_program_are_those_that_are_traced(
    mode: Any, tensor: int, pipeline: int, chunks: int
) -> None:
    cfg = small(4, mode, "bfloat16")
    cfg = replace(cfg, parallel=ParallelConfig(tensor, pipeline=pipeline, chunks=chunks))
    found = audit(cfg, TRN1, ranks="corners")
    products = max(kind.work.matmul_flops for kind in found.kinds) / PRODUCT_FLOPS
    assert largest_program(resolve(cfg, 2), TRN1) == products
    assert not any("instructions" in note for note in found.notes)
    few = replace(TRN1, program_instructions=round(products) - 1)
    (note,) = (note for note in audit(cfg, few, ranks="corners").notes if "instructions" in note)
    assert "llamax plan --search" in note


@pytest.mark.parametrize("targets", ["all-linear", "v_proj,down_proj", "q_proj,o_proj"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_products_of_adapters_are_those_that_are_traced(mode: Any, targets: str) -> None:
    """But for the input of the first layer, which needs no gradient where the base is frozen."""
    cfg = small(4, mode, "bfloat16")
    finetune = FinetuneConfig(method="lora", r=4, targets=targets)
    start = replace(cfg.checkpoint, init_from="base")
    cfg = replace(cfg, finetune=finetune, checkpoint=start)
    found = audit(cfg, TRN1, ranks="corners")
    products = max(kind.work.matmul_flops for kind in found.kinds)
    share = share_of(cfg, Mesh(tp=2))
    inputs = share.query + 2 * share.key  # of the products that read the first layer's input
    names = {"q_proj", "k_proj", "v_proj"} & set(target_names(targets))
    unneeded = 2 * share.tokens * share.model.hidden_size * (inputs + finetune.r * len(names))
    assert largest_program(resolve(cfg, 2), TRN1) * PRODUCT_FLOPS - unneeded == products


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_base_cut_over_data_ranks_is_gathered_for_one_layer(mode: Any, quant: Any) -> None:
    """Not for all layers at the start, as it was while what no result needs came first."""
    finetune, peaks = FinetuneConfig(method="qlora", quant=quant), []
    for layers in (FEW, MORE):
        cfg = small(layers, mode, "bfloat16")
        start = replace(cfg.checkpoint, init_from="base")
        parallel = ParallelConfig(bucket_bytes=2**18)
        cfg = replace(cfg, parallel=parallel, finetune=finetune, checkpoint=start)
        found = traced(cfg, Tracer(Rendezvous(), debug=False), Mesh(dp=4))
        planned = memory(share_of(cfg, Mesh(dp=4)), TRN1)
        reserve = next(line.value for line in planned.lines if line.name == "reserve")
        peaks.append((found.peak - found.reserve, planned.peak - reserve))
        assert 0.93 * peaks[-1][0] <= peaks[-1][1] <= 1.1 * peaks[-1][0]
    (few, few_planned), (more, more_planned) = peaks
    assert more - few == pytest.approx(more_planned - few_planned, rel=0.02)
