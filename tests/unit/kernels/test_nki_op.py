"""The NKI kernels in a program: the contract with ``nki.jit``, and when they are chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.simulated import Launcher
from support.stand_ins import install_module

from llamax import ops
from llamax.kernels.attention import nki_op
from llamax.kernels.cross_entropy import nki_op as cross_entropy_op
from llamax.kernels.cross_entropy import op as plain_cross_entropy
from llamax.kernels.simulator.run import modules


class Jit:
    """``nki.jit`` of nki 0.2.0 by its documented signature; the compiled kernel is simulated."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.launcher = Launcher()

    def __call__(
        self, func: Callable[..., Any] | None = None, mode: str = "auto", **kwargs: Any
    ) -> Callable[..., Any]:
        assert func is not None
        assert mode in ("jax", "torchxla", "auto")
        assert not kwargs
        module = func.__module__.removeprefix("llamax.kernels.")

        def compiled(*tensors: Any) -> Any:
            """A custom call: flat tensors in, tensors out."""
            assert all(isinstance(x, torch.Tensor) and x.is_contiguous() for x in tensors)
            assert {x.dtype for x in tensors} <= {torch.bfloat16, torch.float32, torch.int32}
            self.calls.append((func.__name__, mode))
            return self.launcher(module, func.__name__, *tensors)

        return compiled


def on_xla(length: int, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> Any:
    shape = (1, length, 8, width)
    return SimpleNamespace(device=SimpleNamespace(type="xla"), shape=shape, dtype=dtype)


@pytest.fixture
def neuron_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jit]:
    """A process on NeuronCores with nki 0.2.0, as far as llamax looks."""
    simulated = modules()
    jit = Jit()
    install_module(monkeypatch, "torch_xla.runtime", device_type=lambda: "NEURON")
    nki = install_module(monkeypatch, "nki", jit=jit)
    for name in ("isa", "language"):
        members = vars(simulated[f"nki.{name}"])
        install_module(
            monkeypatch, f"nki.{name}", **{k: v for k, v in members.items() if k[:2] != "__"}
        )
    monkeypatch.setattr(nki_op, "version", lambda _: "0.2.0+gabc")
    assert nki is not None
    nki_op.available.cache_clear()
    nki_op.log_choice.cache_clear()
    cross_entropy_op.log_choice.cache_clear()
    yield jit
    nki_op.available.cache_clear()
    nki_op.log_choice.cache_clear()


@pytest.mark.parametrize("apart", [False, True])
def test_the_contract_with_nki_jit(neuron_core: Jit, apart: bool) -> None:
    """Flat contiguous tensors, one call each way, results and gradients of the reference."""
    torch.manual_seed(1)
    shapes = ((2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64))
    ours = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    plain = [x.detach().double().requires_grad_() for x in ours]
    documents = torch.arange(256).expand(2, -1) // 100 if apart else None
    found = nki_op.attention(*ours, documents)
    want = ops.reference_attention(*plain, documents)
    dout = torch.randn(want.shape)
    found.backward(dout.bfloat16())
    want.backward(dout.bfloat16().double())
    for a, b in ((found, want), *((x.grad, y.grad) for x, y in zip(ours, plain, strict=True))):
        assert a is not None
        assert b is not None
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() < 1.2e-2 * b.abs().max()
    suffix = "_documents" if apart else ""
    names = [f"attention_forward{suffix}", f"attention_backward{suffix}"]
    assert neuron_core.calls == [(name, "torchxla") for name in names]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("trains", [False, True])
def test_the_contract_of_the_loss(neuron_core: Jit, padding: int, trains: bool) -> None:
    """The same for the kernels of linear and cross-entropy, strided inputs among them."""
    torch.manual_seed(2)
    x, weight = torch.randn(256, 256).t().bfloat16(), torch.randn(200, 256).bfloat16() / 8
    columns = torch.randint(-1, 200 - padding, (256,), dtype=torch.int32)
    hidden = torch.arange(200) >= 200 - padding if padding else None
    wide = x.double(), weight.double(), columns
    found = cross_entropy_op.statistics(x, weight, columns, hidden)
    want = plain_cross_entropy.statistics(*wide, hidden)
    assert (found.double() - want).abs().amax() < 1e-5 * want.abs().amax()
    log_sums = found[1].log() + found[0]
    dx, dw = cross_entropy_op.gradients(x, weight, columns, log_sums, hidden, trains)
    wanted = plain_cross_entropy.gradients(*wide, log_sums.double(), hidden, trains)
    for ours, exact in zip((dx, dw), wanted, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None and exact is not None:
            assert (ours.double() - exact).abs().max() < 1.2e-2 * exact.abs().max()
    names = ["cross_entropy_forward", "cross_entropy_backward" + ("" if trains else "_frozen")]
    suffix = "_padded" if padding else ""
    assert neuron_core.calls == [(name + suffix, "torchxla") for name in names]


@pytest.mark.usefixtures("neuron_core")
def test_the_choice_of_the_loss_is_named_once(messages: list[str]) -> None:
    labels = torch.zeros(1, 128)
    for width, dtype in ((2048, torch.bfloat16), (4096, torch.bfloat16), (2048, torch.float32)):
        x = on_xla(128, width, dtype)
        x.shape = (64, width)
        for _ in range(2):
            found = ops.has_kernel("logit_statistics", x, x, labels)
            assert found == (width == 2048 and dtype == torch.bfloat16)
    instead = "the loss runs by plain operations in place of llamax's NKI kernels: "
    assert messages == [
        "the loss runs by llamax's NKI kernels, which were tested in a simulator only",
        f"{instead}above hidden_size=3072 logits take longer to compute twice than to move",
        f"{instead}the tensors are torch.float32 and torch.float32, not torch.bfloat16",
    ]


@pytest.mark.parametrize("apart", [False, True])
def test_the_contract_of_rotated_attention(neuron_core: Jit, apart: bool) -> None:
    """A projection's output in, its gradient out, one call each way; then ``o_proj`` can follow."""
    torch.manual_seed(2)
    ours = torch.randn(2, 256, (4 + 2 * 2) * 64).bfloat16().requires_grad_()
    plain = ours.detach().double().requires_grad_()
    angles = (torch.arange(256)[None, :, None] / torch.arange(1, 33)).repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    documents = torch.arange(256).expand(2, -1) // 100 if apart else None
    found = nki_op.rotated_attention(ours, *tables, 4, documents)
    want = ops.reference_rotated_attention(plain, *(x.double() for x in tables), 4, documents)
    assert found.shape == want.shape == (2, 256, 256)
    dout = torch.randn(want.shape)
    found.backward(dout.bfloat16())
    want.backward(dout.bfloat16().double())
    for a, b in ((found, want), (ours.grad, plain.grad)):
        assert a is not None
        assert b is not None
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() < 1.2e-2 * b.abs().max()
    suffix = "_documents" if apart else ""
    names = [f"rotated_attention_{way}{suffix}" for way in ("forward", "backward")]
    assert neuron_core.calls == [(name, "torchxla") for name in names]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged; caplog has it twice if an earlier test made the logger stop propagating."""
    logged: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("llamax")
    monkeypatch.setattr(handler, "emit", lambda record: logged.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield logged
    logger.setLevel(level)


@pytest.mark.usefixtures("neuron_core")
def test_the_kernel_is_chosen_by_shape_and_named_once(messages: list[str]) -> None:
    for x in (on_xla(4096), on_xla(384, 64)):
        for documents in (None, x):
            assert ops.kernel("attention", x, x, x, documents) is nki_op.attention
    assert messages == [
        "attention runs by llamax's NKI kernels, which were tested in a simulator only"
    ]
    for q, why in (
        (on_xla(2047), "the sequence length 2047 is not a multiple of 128"),
        (on_xla(2048, 96), "head_dim=96 is neither 64 nor 128"),
        (on_xla(2048, dtype=torch.float32), "the tensors are torch.float32, not torch.bfloat16"),
    ):
        for _ in range(2):
            assert ops.kernel("attention", q, q, q, None) is ops.traced_attention
        assert why in messages[-1]
    assert len(messages) == 4
    few = on_xla(128)
    assert ops.kernel("attention", few, on_xla(256), on_xla(256), None) is ops.traced_attention
    assert "fewer queries than keys" in messages[-1]


@pytest.mark.usefixtures("neuron_core")
def test_a_model_rotates_in_the_kernel_where_the_shapes_allow(messages: list[str]) -> None:
    tables = on_xla(4096)
    for length in (4096, 384):
        x = on_xla(length)
        assert ops.kernel("rotated_attention", x, tables, None) is nki_op.rotated_attention
    assert len(messages) == 1
    narrow, whole = on_xla(4096, 96), on_xla(2048, dtype=torch.float32)
    plain = ops.reference_rotated_attention
    for x, cos in ((on_xla(2047), tables), (tables, narrow), (whole, tables)):
        assert ops.kernel("rotated_attention", x, cos, None) is plain
    assert len(messages) == 1, "the reason is given by the attention that runs instead"


@pytest.mark.usefixtures("neuron_core")
def test_an_nki_that_is_too_new_for_trn1_is_named_and_not_used(
    messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nki_op, "version", lambda _: "0.3.0")
    x = on_xla(4096)
    for _ in range(2):
        assert ops.kernel("attention", x, x, x, None) is ops.traced_attention
    assert messages == [
        "llamax's NKI kernels do not run: nki 0.3.0 does not compile for trn1; install nki 0.2 of "
        "Neuron SDK 2.28"
    ]


@pytest.mark.usefixtures("neuron_core")
def test_other_devices_of_torch_xla_do_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install_module(monkeypatch, "torch_xla.runtime", device_type=lambda: "CPU")
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is ops.traced_attention
