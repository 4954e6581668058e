"""A program's own modules are initialised, cut, reduced, saved and resumed as Llama's are.

A step on a mesh equals the step of the whole model, for parameters of every kind: scalars, vectors
and matrices that all ranks hold, a bias that is cut, scales of a rank's heads, a scale of logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LLAMA2 as MODEL
from support.own_modules import OwnLlama
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, share
from support.world import WorldError, Worlds, axes
from torch import Tensor, nn

from llamax import ops
from llamax.checkpoint import Checkpoint, Saver, load_owned
from llamax.checkpoint.plain_llama import own_names
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.sharding import join
from llamax.runtime.errors import ConfigError
from llamax.training.resolve import ResolvedRun, resolve
from llamax.training.step import TrainState

MESHES = [(2, 1, False), (2, 1, True), (4, 1, True), (2, 2, True), (2, 2, False), (1, 2, False)]


class NoHead(OwnLlama):
    head_declared = False


class NoLogits(OwnLlama):
    logits_declared = False


class Deaf(OwnLlama):
    """Its first layer attends to this rank's tokens alone."""

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, *args: Any, **options: Any) -> Any:
        given = options.pop("attend")

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            return given(q, k, v, layer) if layer else ops.attention(q, k, v)

        return super().loss(ids_BS, labels_BS, *args, attend=attend, **options)


class Narrow(OwnLlama):
    """Its loss has no ``attend``."""

    def loss(  # type: ignore[override]
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        *,
        documents_BS: Tensor | None = None,
        keys_B: Tensor | None = None,
    ) -> Any:
        return super().loss(ids_BS, labels_BS, positions_BS, documents_BS=documents_BS)


class Shifted(OwnLlama):
    """A convolution over tokens beside the last norm; one over features alone is fine."""

    kernel = 2

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        D = self.config.hidden_size
        self.model.norm.conv = nn.Conv1d(D, D, self.kernel)
        self.model.norm.conv.requires_grad_(False)


class Pointwise(Shifted):
    kernel = 1


KINDS = (OwnLlama, NoHead, NoLogits, Deaf, Narrow, Shifted, Pointwise)
CLASSES = {kind.__name__: kind for kind in KINDS}


def settings(mesh: Mesh, sequence: bool, zero: int) -> ResolvedRun:
    config = Config(
        MODEL,
        ParallelConfig(tensor=mesh.tp, context=mesh.cp, sequence=sequence, zero=zero),
        OPTIM,
        DataConfig(path="data", sequence_length=SEQUENCE, global_batch=GLOBAL_BATCH, micro_batch=2),
        run=RunConfig(steps=8),
    )
    return resolve(config, mesh.world_size)


def build(
    at: Axes, mesh: Mesh, sequence: bool = False, zero: int = 1, kind: str = "OwnLlama"
) -> TrainState:
    model = CLASSES[kind](MODEL, at.tp, sequence_parallel=sequence).init(0)
    return TrainState.build(settings(mesh, sequence, zero), model, at)


def result(state: TrainState, steps: range) -> dict[str, Any]:
    done = [state.step(share(state.axes, 1), number) for number in steps]
    parameters = state.model.sharded_parameters()
    return {
        "loss": [float(step.loss) for step in done],
        "norm": [float(step.grad_norm) for step in done],
        "weights": {n: t.detach().clone() for n, t in parameters.tensors.items()},
        "cuts": parameters.cuts,
    }


def on_mesh(
    tp: int, dp: int, sequence: bool, zero: int, kind: str = "OwnLlama", cp: int = 1
) -> Any:
    mesh = Mesh(tp=tp, dp=dp, cp=cp)
    return result(build(axes(mesh), mesh, sequence, zero, kind), range(1, 3))


def joined(results: list[dict[str, Any]], tp: int) -> dict[str, Tensor]:
    return {
        name: join([one["weights"][name] for one in results[:tp]], how)
        for name, how in results[0]["cuts"].items()
    }


def test_init_keeps_what_a_module_was_made_with() -> None:
    model = OwnLlama(MODEL).init(0)
    weights = dict(model.named_parameters())
    home = "model.layers.1."
    assert not weights[f"{home}mlp.gate"].any()
    assert not weights[f"{home}post_attention_layernorm.weight"].any()
    assert not weights[f"{home}mlp.up.weight"].any()
    assert weights[f"{home}mlp.down.weight"].abs().max() > 0.1, "torch's own initial values"
    assert not weights[f"{home}self_attn.qkv_proj.bias"].any()
    assert weights[f"{home}self_attn.qkv_proj.weight"].std() > 0.05, "drawn, as a plain Llama's"
    assert torch.equal(weights[f"{home}input_layernorm.weight"], torch.ones(MODEL.hidden_size))
    own = own_names(model.sharded_parameters().hub_shapes(), MODEL)
    assert f"{home}self_attn.q_proj.bias" in own
    assert f"{home}self_attn.q_proj.weight" not in own


@pytest.mark.parametrize("zero", [2, 1, 0])
@pytest.mark.parametrize(("tp", "dp", "sequence"), MESHES)
def test_a_step_on_a_mesh_equals_that_of_the_whole(
    worlds: Worlds, tp: int, dp: int, sequence: bool, zero: int
) -> None:
    mesh = Mesh()
    whole = result(build(Axes.solo(), mesh), range(1, 3))
    results = worlds(tp * dp).run(on_mesh, tp, dp, sequence, zero)
    found = joined(results, tp)
    for one in results:
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert one["norm"] == pytest.approx(whole["norm"], rel=1e-5), "every element counts once"
    started = dict(OwnLlama(MODEL).init(0).named_parameters())
    for name, weight in whole["weights"].items():
        assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-6), name
        assert not torch.equal(weight, started[name]), f"{name} is not trained"
        for one in results[tp::tp]:
            assert torch.equal(one["weights"][name], results[0]["weights"][name]), name


@pytest.mark.parametrize("zero", [2, 1, 0])
@pytest.mark.parametrize(
    ("tp", "dp", "cp", "sequence"),
    [
        (1, 1, 2, False),
        (1, 2, 2, False),
        (2, 1, 2, True),
        (2, 1, 2, False),
        (1, 1, 4, False),
        (2, 2, 2, True),
    ],
)
def test_ranks_that_share_sequences_step_as_the_whole(
    worlds: Worlds, tp: int, dp: int, cp: int, sequence: bool, zero: int
) -> None:
    whole = result(build(Axes.solo(), Mesh()), range(1, 3))
    results = worlds(tp * dp * cp).run(on_mesh, tp, dp, sequence, zero, "OwnLlama", cp)
    found = joined(results, tp)
    for one in results:
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert one["norm"] == pytest.approx(whole["norm"], rel=1e-5)
    for name, weight in whole["weights"].items():
        assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-6), name
        for one in results[tp::tp]:
            assert torch.equal(one["weights"][name], results[0]["weights"][name]), name


@pytest.mark.parametrize(
    ("kind", "tp", "cp", "words"),
    [
        ("Deaf", 1, 2, "attention of Deaf in layers 0 does not call the `attend` that its loss"),
        ("Narrow", 1, 2, "the loss of Narrow with parallel.context=2: .*'attend'.*; define loss"),
        ("Shifted", 1, 2, r"model.norm.conv .Conv1d. computes over several tokens.*context=2 a ra"),
        ("Shifted", 2, 1, r"several tokens, and with parallel.sequence=true a rank has a part"),
    ],
)
def test_what_cannot_work_on_parts_of_sequences_is_refused(
    worlds: Worlds, kind: str, tp: int, cp: int, words: str
) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        worlds(2).run(on_mesh, tp, 1, tp > 1, True, kind, cp)
    assert "ConfigError" in str(caught.value)


def test_what_works_on_parts_of_sequences_is_not(worlds: Worlds) -> None:
    worlds(2).run(on_mesh, 1, 1, False, True, "Pointwise", 2)
    worlds(2).run(on_mesh, 2, 1, True, True, "Pointwise")
    worlds(2).run(on_mesh, 2, 1, False, True, "Shifted")
    worlds(2).run(on_mesh, 1, 2, False, True, "Narrow")


class Bare(OwnLlama):
    def loss(self, ids_BS: Tensor, labels_BS: Tensor) -> Any:  # type: ignore[override]
        return super().loss(ids_BS, labels_BS)


def test_a_loss_that_no_step_can_call_is_refused() -> None:
    mesh = Mesh()
    with pytest.raises(ConfigError, match=r"cannot call the loss of Bare: too many positional"):
        TrainState.build(settings(mesh, False, True), Bare(MODEL).init(0), Axes.solo())


@pytest.mark.parametrize(
    ("kind", "sequence", "words"),
    [
        ("NoHead", False, "heads.scale differs between tensor ranks.*Replica.partial=True"),
        ("NoLogits", True, "logits.scale is the same on every tensor rank.*Replica.partial=False"),
    ],
)
def test_a_gradient_that_would_be_reduced_wrongly_is_refused(
    worlds: Worlds, kind: str, sequence: bool, words: str
) -> None:
    with pytest.raises(WorldError, match=words):
        worlds(2).run(on_mesh, 2, 1, sequence, True, kind)
    worlds(2).run(on_mesh, 2, 1, not sequence, True, kind)  # where the default is right


def unequal() -> None:
    mesh = Mesh(tp=2)
    at = axes(mesh)
    model = OwnLlama(MODEL, at.tp).init(0)
    with torch.no_grad():
        model.logits.scale += at.tp.rank
    TrainState.build(settings(mesh, False, True), model, at)


def test_a_replica_that_starts_unequal_is_refused(worlds: Worlds) -> None:
    with pytest.raises(WorldError, match=r"logits.scale starts with other values on some ranks"):
        worlds(2).run(unequal)


def continued(
    tp: int, dp: int, sequence: bool, zero: int, source: str, out: str, first: int, last: int
) -> Any:
    mesh = Mesh(tp=tp, dp=dp)
    at = axes(mesh) if mesh.world_size > 1 else Axes.solo()
    state = build(at, mesh, sequence, zero)
    parameters = state.model.sharded_parameters()
    if source:
        load_owned(Checkpoint(source), state.optimizer.owned(), parameters)
        state.optimizer.gather_parameters()
    found = result(state, range(first, last + 1))
    saver = Saver(out, at, parameters, zero=zero, timeout_s=300)
    model, rng = MODEL.to_hub("float32"), torch.get_rng_state()
    saver.save(last, state.optimizer.owned(), {}, model, "", rng)
    saver.wait()
    at.world.all_reduce(torch.zeros(1))
    return found


def test_a_run_goes_on_exactly_on_another_mesh(worlds: Worlds, tmp_path: Path) -> None:
    """Saved on 2 x 2 with sequence parallelism, resumed on 4 x 1, 1 x 2 and alone."""
    first, step = str(tmp_path / "first"), "step-00000002"
    worlds(4).run(continued, 2, 2, True, True, "", first, 1, 2)
    saved = Checkpoint(f"{first}/{step}")
    assert saved.shape("model.layers.0.mlp.gate") == ()
    whole = [continued(1, 1, False, True, f"{first}/{step}", str(tmp_path / "whole"), 3, 4)]
    same = worlds(4).run(
        continued, 2, 2, True, True, f"{first}/{step}", str(tmp_path / "same"), 3, 4
    )
    uninterrupted = worlds(4).run(continued, 2, 2, True, True, "", str(tmp_path / "all"), 1, 4)
    assert same[0]["loss"] == uninterrupted[0]["loss"][2:], "bitwise on the same mesh"
    for one, other in zip(same, uninterrupted, strict=True):
        assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in one["weights"])
    for tp, dp, sequence, zero in ((4, 1, True, 1), (1, 2, False, 1), (1, 2, False, 0)):
        out = str(tmp_path / f"{tp}-{dp}-{zero}")
        results = worlds(tp * dp).run(
            continued, tp, dp, sequence, zero, f"{first}/{step}", out, 3, 4
        )
        assert results[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)
        found = joined(results, tp)
        for name, weight in joined(whole, 1).items():
            assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-6), name


def unchanged(tp: int, dp: int, source: str, out: str) -> None:
    """Load a checkpoint and save it from another mesh, without a step."""
    continued(tp, dp, tp > 1, True, source, out, 3, 2)


def test_resharding_changes_no_bit(worlds: Worlds, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    worlds(2).run(continued, 2, 1, True, True, "", first, 1, 2)
    source = f"{first}/step-00000002"
    for tp, dp in ((4, 1), (2, 2), (1, 2)):
        out = str(tmp_path / f"{tp}-{dp}")
        worlds(tp * dp).run(unchanged, tp, dp, source, out)
        before, after = Checkpoint(source), Checkpoint(f"{out}/step-00000002")
        assert sorted(before.names()) == sorted(after.names())
        for name in before.names():
            for kind in before.kinds(name):
                assert torch.equal(before.read(name, kind), after.read(name, kind)), name
