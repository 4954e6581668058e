"""The NKI kernels of llamax in an interpreter that others wrote: that of triton-viz, "NKI beta 2".

    python benchmarks/nki_interpreter.py TRITON_VIZ

TRITON_VIZ is a checkout of github.com/Deep-Learning-Profiling-Tools/triton-viz; ml_dtypes must be
installed.  The interpreter has matrix products, copies, activations and arithmetic of tiles with
checks of its own.  What it lacks is computed here in NumPy: memset, affine_select, iota,
activation_reduce, scalar_tensor_tensor, registers and loops of the device, and some operators.
Printed is the largest error over the largest element of each result, against float64.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamax import ops
from llamax.kernels.attention import nki_op as attention
from llamax.kernels.cross_entropy import nki_op as cross_entropy
from llamax.kernels.cross_entropy import op as plain_cross_entropy
from llamax.kernels.rms_norm import nki_op as rms_norm
from llamax.kernels.simulator.run import modules
from llamax.kernels.swiglu import nki_op as swiglu


def interpreter(checkout: Path) -> Any:
    """triton-viz's interpreter in place of ``nki``, with what it lacks."""
    sys.modules.update(modules())  # names of memories, engines and dtypes
    for name in ("triton_viz", "triton_viz.core", "triton_viz.core.simulation", "triton_viz.utils"):
        package = types.ModuleType(name)  # without the package's start, which imports triton
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    beta2: Any = importlib.import_module("triton_viz.core.simulation.nki_beta2")
    beta2.nki_patch_lang()
    isa: Any = importlib.import_module("nki.isa")
    language: Any = importlib.import_module("nki.language")
    for name in ("float32", "bfloat16", "int32"):
        setattr(language, name, name)
    language.shared_hbm = beta2.hbm
    language.dynamic_range = lambda count: iter(range(int(count.data.item())))
    functions: dict[str, Callable[..., Any]] = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "silu_dx": lambda x: (1 + x * (1 - 1 / (1 + np.exp(-x)))) / (1 + np.exp(-x)),
        "square": np.square,
        "log": np.log,
        "equal": lambda x, y: x == y,
        "not_equal": lambda x, y: x != y,
        "greater_equal": lambda x, y: x >= y,
    }
    for name, function in functions.items():
        setattr(language, name, beta2.SubOp(function, False, False, name=name))
    for function in _missing(beta2):
        setattr(isa, function.__name__, function)
    return beta2


def _missing(beta2: Any) -> Iterator[Callable[..., Any]]:
    """The instructions that the interpreter lacks."""

    def affine(shape: tuple[int, ...], pattern: Any, offset: int, multiplier: int) -> Any:
        steps = np.zeros(1, np.int64)
        for step, count in pattern:
            steps = (steps[:, None] + np.arange(count) * step).reshape(-1)
        rows = offset + np.arange(shape[0])[:, None] * multiplier + steps
        return rows.reshape(shape)

    def memset(dst: Any, value: float) -> None:
        beta2._store(dst, np.full(dst.shape, value))

    def iota(dst: Any, pattern: Any, offset: int, channel_multiplier: int = 0) -> None:
        beta2._store(dst, affine(dst.shape, pattern, offset, channel_multiplier))

    def affine_select(
        dst: Any,
        pattern: Any,
        offset: int,
        channel_multiplier: int,
        on_true_tile: Any,
        on_false_value: float,
        cmp_op: Any,
    ) -> None:
        kept = cmp_op.run(affine(dst.shape, pattern, offset, channel_multiplier), 0)
        beta2._store(dst, np.where(kept, beta2._array(on_true_tile, np.float32), on_false_value))

    def activation_reduce(
        dst: Any, op: Any, data: Any, reduce_op: Any, reduce_res: Any, **more: Any
    ) -> None:
        beta2.activation(dst, op, data, reduce_op=reduce_op, reduce_res=reduce_res, **more)

    def scalar_tensor_tensor(
        dst: Any,
        data: Any,
        op0: Any,
        operand0: Any,
        op1: Any,
        operand1: Any,
        reverse0: bool = False,
        reverse1: bool = False,
    ) -> None:
        first = beta2.NDArray("sbuf", data.shape, "float32", origin="tensor")
        beta2.tensor_scalar(first, data, op0, operand0, reverse0)
        both = (operand1, first) if reverse1 else (first, operand1)
        beta2.tensor_tensor(dst, *both, op1)

    def register_alloc() -> Any:
        return types.SimpleNamespace(data=np.zeros(1, np.int32))

    def register_load(dst: Any, src: Any) -> None:
        dst.data = beta2._array(src).reshape(-1)

    yield from (memset, iota, affine_select, activation_reduce, scalar_tensor_tensor)
    yield from (register_alloc, register_load)


def launcher(beta2: Any) -> Callable[..., Any]:
    """A stand-in for ``launch`` of the kernels' callers."""
    bfloat16 = beta2._storage_dtype("bfloat16")

    def given(x: Tensor) -> Any:
        x = x.detach()
        if x.dtype == torch.bfloat16:
            return beta2.NDArray("hbm", value=x.float().numpy().astype(bfloat16), dtype="bfloat16")
        return beta2.NDArray("hbm", value=x.numpy(), dtype=str(x.numpy().dtype))

    def taken(x: Any) -> Tensor:
        tensor = torch.from_numpy(np.asarray(x.data, np.float32))
        return tensor.bfloat16() if x.data.dtype == bfloat16 else tensor

    def launch(module: str, name: str, *tensors: Tensor) -> Any:
        kernel = getattr(importlib.import_module(f"llamax.kernels.{module}"), name)
        results = kernel(*map(given, tensors))
        return tuple(map(taken, results)) if isinstance(results, tuple) else taken(results)

    return launch


def drawn(*shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=_generator()) * size).bfloat16()


@cache
def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def compared(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor
) -> list[float]:
    """Errors of the result and of the gradients of all inputs."""
    found, want = [], []
    for function, dtype, results in ((ours, torch.bfloat16, found), (plain, torch.float64, want)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        results += [out, *torch.autograd.grad(out, leaves, weight.to(out.dtype))]
    return [_error(a, b) for a, b in zip(found, want, strict=True)]


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())


def cases() -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Each kernel with its name and shapes."""
    angles = (torch.arange(640)[None, :, None] / torch.arange(1, 33)).repeat(1, 1, 2).double()
    tables = angles.cos(), angles.sin()
    for packed in (False, True):
        documents = torch.arange(640)[None] // 90 if packed else None
        apart = ", documents apart" if packed else ""

        def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = documents) -> Tensor:
            return ops.reference_attention(q, k, v, seen)

        def ours(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = documents) -> Tensor:
            return attention.attention(q, k, v, seen)

        def rotated(qkv: Tensor, seen: Tensor | None = documents) -> Tensor:
            return attention.rotated_attention(qkv, *(x.float() for x in tables), 4, seen)

        def rotated_plain(qkv: Tensor, seen: Tensor | None = documents) -> Tensor:
            return ops.reference_rotated_attention(qkv, *tables, 4, seen)

        for size, scores in ((1.0, ""), (4.0, ", large scores")):
            q, k, v = drawn(1, 640, 4, 64, size=size), drawn(1, 640, 2, 64), drawn(1, 640, 2, 64)
            name = f"attention, 640 tokens, 4 and 2 heads of 64{apart}{scores}"
            yield name, lambda a=ours, b=plain, q=q, k=k, v=v: compared(a, b, q, k, v)
        qkv = drawn(1, 640, 8 * 64)
        name = f"attention with rotation, the same{apart}"
        yield name, lambda a=rotated, b=rotated_plain, x=qkv: compared(a, b, x)
    x, w = drawn(2, 128, 512), drawn(512)
    yield (
        "RMSNorm, 256 x 512",
        lambda: compared(
            lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
            lambda x, w: ops.reference_rms_norm(x, w, 1e-5),
            x,
            w,
        ),
    )
    y = drawn(256, 2 * 1376)
    yield "SwiGLU, 256 x 1376", lambda: compared(swiglu.swiglu, ops.reference_swiglu, y)
    yield "linear + cross-entropy, 256 x 256, 700 rows", loss


def loss() -> list[float]:
    """Errors of the logits' statistics and of both gradients."""
    x, weight = drawn(256, 256), drawn(700, 256, size=0.1)
    columns = torch.arange(256, dtype=torch.int32) * 3 % 701 - 1
    wide = x.double(), weight.double(), columns
    found = cross_entropy.statistics(x, weight, columns, None)
    want = plain_cross_entropy.statistics(*wide, None)
    sums = found[1].log() + found[0]
    gradients = cross_entropy.gradients(x, weight, columns, sums, None, True)
    exact = plain_cross_entropy.gradients(*wide, sums.double(), None, True)
    pairs = [(found, want), *zip(gradients, exact, strict=True)]
    return [_error(a, b) for a, b in pairs if a is not None and b is not None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, metavar="TRITON_VIZ")
    launch = launcher(interpreter(parser.parse_args(argv).checkout))
    for module in (attention, rms_norm, swiglu, cross_entropy):
        module.launch = launch  # type: ignore[attr-defined]
    print("| kernels, forward and backward | errors |")
    print("|---|---|")
    for name, run in cases():
        try:
            text = ", ".join(f"{error:.1e}" for error in run())
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            text = f"not run: {type(error).__name__}: {error}"
        print(f"| {name} | {text} |", flush=True)


if __name__ == "__main__":
    main()
