"""The audit traces what a run compiles, passes where ranks and steps agree, and names the line
where they do not."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import adapters
from support.audited_runs import TP2_DP2, audited, tiny
from support.models import TINY
from support.runs import on_mesh
from support.tiny_run import config, make_dataset, write
from torch import Tensor

from llamax.backends.tracing import Tracer
from llamax.config.flops import flops_per_token
from llamax.config.hardware import load_machine
from llamax.config.schema import Config, FinetuneConfig, OptimConfig, ParallelConfig
from llamax.parallel import tensor_parallel
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.tools.audit import compile_cache, hlo
from llamax.tools.audit.auditor import audit_run, first_of_stages
from llamax.tools.audit.compile_cache import Note
from llamax.tools.audit.generation import audit_generation
from llamax.tools.audit.report import AuditReport
from llamax.tools.audit.trace import TracedRun, made_up_tokens
from llamax.training.resolve import resolve

HERE = Path(__file__).name


def dumped(*command: str, folder: Path) -> set[str]:
    """The normal text of every program that a command hands to the CPU client."""
    folder.mkdir()
    environ = os.environ | {
        "PJRT_DEVICE": "CPU",
        "XLA_SAVE_TENSORS_FMT": "hlo",
        "XLA_SAVE_TENSORS_FILE": str(folder / "programs"),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-m", *command], check=True, env=environ, timeout=1500)
    (written,) = folder.iterdir()
    graphs = written.read_text().split("## BEGIN_GRAPH\n")[1:]
    return {hlo.normal(graph.partition("\n\nGraph Hash")[0]) for graph in graphs}


QLORA = FinetuneConfig(method="qlora", r=4, dropout=0.1)


@pytest.mark.parametrize("finetune", [FinetuneConfig(), QLORA], ids=["full", "qlora"])
def test_audit_precompile_and_a_run_see_the_same_programs(
    tmp_path: Path, finetune: FinetuneConfig
) -> None:
    cfg = tiny(make_dataset(tmp_path))
    cfg = replace(cfg, parallel=ParallelConfig(), run=replace(cfg.run, steps=2))
    if finetune.method != "full":
        model = replace(adapters.MODEL, num_hidden_layers=1)
        base = adapters.base_folder(tmp_path / "base", model)
        checkpoint = replace(cfg.checkpoint, init_from=str(base))
        cfg = replace(cfg, model=model, finetune=finetune, checkpoint=checkpoint)
    path = write(cfg, tmp_path / "run.toml")
    ran = dumped("llamax.train", "--config", str(path), folder=tmp_path / "a")
    assert len(ran) == 3
    again = replace(cfg, run=replace(cfg.run, folder=str(tmp_path / "untouched")))
    path = write(again, tmp_path / "again.toml")
    assert (
        dumped("llamax.train", "--config", str(path), "--precompile", folder=tmp_path / "b") == ran
    )
    assert not (tmp_path / "untouched").exists()
    tracer = Tracer(Rendezvous())
    resolved = resolve(cfg, 1)
    with made_up_tokens(resolved) as data:
        traced = {hlo.normal(each.text) for each in TracedRun(resolved, 0, tracer, data).whole()}
    assert traced == ran


def test_precompile_notes_what_doctor_asks_for(tmp_path: Path) -> None:
    cfg = tiny(make_dataset(tmp_path))
    cfg = replace(cfg, parallel=ParallelConfig(), run=replace(cfg.run, steps=2, validate_every=1))
    path, cache = write(cfg, tmp_path / "run.toml"), tmp_path / "cache"
    environ = os.environ | {"PJRT_DEVICE": "CPU", "NEURON_COMPILE_CACHE_URL": str(cache)}
    command = [sys.executable, "-m", "llamax.train", "--config", str(path), "--precompile"]
    subprocess.run(command, check=True, env=environ, timeout=1500)
    tracer = Tracer(Rendezvous())
    resolved = resolve(cfg, 1)
    with made_up_tokens(resolved) as data:
        kinds, _, _ = first_of_stages(resolved, load_machine("trn1.32xlarge"), tracer, data)
    audited = {kind.name: hlo.digest(kind.program.normal) for kind in kinds}
    assert sorted(audited.values()) == sorted(note.stem for note in cache.glob("*/*.json"))

    def lacking(changed: Config) -> list[str]:
        return compile_cache.missing(
            cache, compile_cache.hashes(changed, 1, 1, environ), Note.of(environ)
        )

    assert lacking(replace(cfg, optim=replace(cfg.optim, lr=1e-2))) == []
    assert lacking(replace(cfg, optim=replace(cfg.optim, beta2=0.9))) == ["update"]
    longer = replace(cfg, data=replace(cfg.data, sequence_length=64))
    assert lacking(longer) == ["microstep", "validation"]


# --- every rank, every step


@pytest.mark.parametrize(
    ("mesh", "sequence", "zero", "recompute", "dtype"),
    [
        (TP2_DP2, True, True, "full", "bfloat16"),
        (TP2_DP2, False, True, "selective", "float32"),
        (TP2_DP2, True, False, "none", "bfloat16"),
        (Mesh(tp=4, dp=2), True, True, "selective", "bfloat16"),
        (Mesh(tp=4, dp=2), True, 2, "none", "bfloat16"),
        (Mesh(tp=4, dp=2), True, 3, "full", "bfloat16"),
        (Mesh(cp=2, dp=2), False, 3, "full", "float32"),
        (Mesh(tp=2, cp=4), True, 1, "none", "bfloat16"),
        (Mesh(cp=2, dp=2), False, 1, "selective", "float32"),
        (Mesh(tp=2, dp=4, shard=2), True, 1, "none", "bfloat16"),
        (Mesh(tp=4, dp=4, shard=2), True, 3, "full", "bfloat16"),
        (Mesh(cp=2, dp=4, shard=4), False, 2, "none", "float32"),
    ],
)
def test_every_rank_and_step_is_one_program(
    data: Path, mesh: Mesh, sequence: bool, zero: int, recompute: Any, dtype: Any
) -> None:
    cfg = tiny(data, recompute=recompute, dtype=dtype)
    parallel = ParallelConfig(
        tensor=mesh.tp,
        context=mesh.cp,
        context_by="ring" if mesh.cp > 1 and zero == 1 else "gather",
        sequence=sequence,
        zero=zero,
        zero_ranks=mesh.shard,
        bucket_bytes=4096,
    )
    found = audited(replace(cfg, parallel=parallel), mesh)
    assert found.passes, found.problems
    assert [kind.name for kind in found.kinds] == ["microstep", "update", "validation"]
    assert len(found.ranks) == 2
    for kind in found.kinds:  # as counted by hand, to the byte
        assert kind.formula is not None
        assert sorted(map(str, kind.collectives)) == sorted(map(str, kind.formula)), kind.name
    assert found.kinds[0].work.matmul_flops > found.kinds[0].model_flops
    assert found.memory.weights > 0


@pytest.mark.parametrize("sequence", [True, False])
def test_a_loss_in_chunks_is_one_program_with_two_sums_a_chunk(data: Path, sequence: bool) -> None:
    """Half of 2^15 rows on each tensor rank: chunks of 1,024 tokens."""
    cfg = tiny(data)
    cfg = replace(
        cfg,
        model=replace(cfg.model, vocab_size=2**15, max_position_embeddings=1024),
        data=replace(cfg.data, sequence_length=1024, micro_batch=3, global_batch=6),
        parallel=replace(cfg.parallel, sequence=sequence, bucket_bytes=2**20),
    )
    found = audited(cfg)
    assert found.passes, found.problems
    for kind in found.kinds:
        assert kind.formula is not None
        assert sorted(map(str, kind.collectives)) == sorted(map(str, kind.formula)), kind.name
    microstep = found.kinds[0]
    around = 0 if sequence else 4 * cfg.model.num_hidden_layers + 2
    (sums,) = (
        each for each in microstep.collectives if (each.axis, each.kind) == ("tp", "all-reduce")
    )
    assert sums.count == 2 * 3 + around
    chunk = hlo.Shape("f32", (1024, 2**14), False)
    assert any(each.shape == chunk for each in microstep.program.instructions)
    logits = 3 * chunk.nbytes
    assert all(each.nbytes < logits for each in microstep.program.instructions)


# --- the command


def llamax(*args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "llamax", *args], capture_output=True, text=True, timeout=1500
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command(data: Path, tmp_path: Path) -> None:
    cfg = replace(tiny(data), data=replace(tiny(data).data, global_batch=8))
    path = write(cfg, tmp_path / "run.toml")
    code, out, _ = llamax(
        "audit", "--config", str(path), "--nodes", "2", "--instance", "trn1.2xlarge"
    )
    assert code == 0
    assert out.endswith("each program compiles once for the whole cluster\n")
    assert "the sequence length 32 is not a multiple of 128" in out
    code, out, _ = llamax(
        "audit", "--config", str(path), "--instance", "trn1.2xlarge", "--ranks=deep", "--json"
    )
    assert code == 0
    numbers = json.loads(out)
    assert numbers["passes"]
    assert numbers["ranks"] == ["all 2 trace one program of each kind"]
    assert {row["axis"] for row in numbers["programs"]["microstep"]["collectives"]} == {"tp"}


@pytest.mark.parametrize(("chunks", "tied"), [(1, True), (2, False)])
def test_an_audit_of_stages_counts_the_work_of_each_kind(
    data: Path, chunks: int, tied: bool
) -> None:
    """Its programs agree on all ranks, and their FLOPs by formula are those of the whole model."""
    cfg, stages = tiny(data), 2
    cfg = replace(
        cfg,
        model=replace(cfg.model, num_hidden_layers=4, tie_word_embeddings=tied),
        parallel=ParallelConfig(tensor=2, pipeline=stages, chunks=chunks),
        data=replace(cfg.data, global_batch=2 * cfg.data.micro_batch),
        run=replace(cfg.run, backend="xla", recompute="full", validate_every=1),
    )
    run = resolve(cfg, 4)
    audit = audit_run(run, load_machine("trn1.32xlarge"))
    assert audit.divergences == ()
    work = {kind.name: kind for kind in audit.kinds if kind.model_flops}
    tokens = cfg.data.micro_batch * cfg.data.sequence_length
    whole = flops_per_token(cfg.model, cfg.data.sequence_length) * tokens / 2
    middle = 2 if chunks == 2 else 0  # chunks that share their programs
    counted = {name: middle if "middle" in name else 1 for name in work}
    passes = [name for name in work if name.startswith(("forward", "backward"))]
    assert sum(counted[name] * work[name].model_flops for name in passes) == pytest.approx(whole)
    validation = [name for name in work if name.startswith("validation")]
    total = sum(counted[name] * work[name].model_flops for name in validation)
    assert total == pytest.approx(whole / 3)
    for name in validation:  # the whole square of scores is computed on a CPU, not half of it
        assert 1 <= work[name].work.matmul_flops / work[name].model_flops < 1.2, name
    assert {name.partition(",")[0] for name in work} == {"forward", "backward", "validation"}


# --- generating


def audited_generation(**model: Any) -> AuditReport:
    cfg = Config(replace(TINY, **model), ParallelConfig(tensor=2))
    return audit_generation(cfg, 2, 60, greedy=True)


def test_the_programs_of_generating_are_the_same_on_every_rank_and_at_every_step() -> None:
    report = audited_generation()
    assert report.passes, report.problems
    assert [kind.name for kind in report.kinds] == ["prefill of 60 tokens", "decode"]
    for kind in report.kinds:
        assert not kind.remarks
        assert len(kind.traced) == 2
        sums = {each.kind: each.count for each in kind.collectives}
        assert sums == {"all-reduce": 1 + 2 * TINY.num_hidden_layers, "all-gather": 1}
        assert len(kind.program.outputs) == 2 * TINY.num_hidden_layers + 3, "only what is kept"
        assert kind.model_flops <= kind.work.matmul_flops < 1.3 * kind.model_flops
    assert report.memory.cache == 2 * 2 * 2 * 60 * (32 // 4) * 4  # k and v, layers, batch, places


@pytest.mark.parametrize("planted", ["rank", "step"])
def test_a_number_in_the_programs_of_generating_is_found(planted: str) -> None:
    layer = tensor_parallel.ParallelLayer
    share, steps = layer.project, itertools.count()

    def numbered(self: tensor_parallel.ParallelLayer, x: Tensor) -> Tensor:
        number = self.tp.rank if planted == "rank" else next(steps)
        return share(self, x) + torch.full_like(share(self, x), number)

    with mock.patch.object(layer, "project", numbered):
        found = audited_generation(num_hidden_layers=1).divergences
    assert found[0].where == ("rank 1" if planted == "rank" else "rank 0, 2 prompts")
    assert HERE in found[0].how.found.source


@pytest.mark.parametrize("mesh", [Mesh(tp=2, dp=2), Mesh(tp=2, pp=2)])
def test_skipping_outliers_makes_no_other_program(tmp_path: Path, mesh: Mesh) -> None:
    folder = make_dataset(tmp_path)
    plain = config(folder, folder / "run", backend="xla")
    plain = replace(plain, parallel=ParallelConfig(tensor=2, bucket_bytes=8192))
    skipping = replace(plain, optim=OptimConfig(skip_spikes="both", spike_window=16))
    off, on = (
        audit_run(on_mesh(each, mesh), load_machine("trn1.32xlarge")) for each in (plain, skipping)
    )
    assert on.problems == off.problems == []
    assert [kind.name for kind in on.kinds] == [kind.name for kind in off.kinds]
    for kind, plainly in zip(on.kinds, off.kinds, strict=True):
        assert len(kind.traced) == len(plainly.traced)
        assert sum(each.count for each in kind.collectives) == sum(
            each.count for each in plainly.collectives
        )
        if kind.formula is not None:
            assert set(kind.formula) == set(kind.collectives)
