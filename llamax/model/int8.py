"""Weights in 8 bits for inference on a CPU: rows of integers with a scale each.

::

    w [out, in]  ->  codes int8 [out, in], scales [out]      w ~ codes * scales[:, None]

Activations are multiplied with the integers themselves, a quarter of the bytes of float32, where
the processor has units for such products (VNNI, AMX).  There an activation is rounded to 16 bits
and cut into two integers of 8::

    x [in]  ->  high, low int8 [in], largest        x ~ (254 high + low) * largest / 32258

Sums of integers are exact, so these products do not depend on the other rows of a batch.
Elsewhere, and for so few rows that this takes longer (``integer_rows``), torch's weight-only kernel
takes activations in bfloat16, up to 32 rows.  Both kernels are for rows of whole blocks of 32; in
all other cases weights are made dense, some rows at a time.

Embedding and norms stay as they are.  Source: Dettmers et al. 2022, "LLM.int8()", section 2.1,
weights only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from llamax import ops
from llamax.model.llama import Llama
from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.parallel.tensor_parallel import ColumnLinear, ParallelLayer, RowLinear

FEW_ROWS = 32  # up to which torch's weight-only kernel is faster than a dense product
NEVER = 2**31  # rows
KERNEL_COLUMNS = 32  # a block of both kernels
AT_ONCE = 2**18  # weights quantised, or made dense, at once: bounds the float32 copies
ROWS_AT_ONCE = 128  # of activations, in products of integers
SUMS_AT_ONCE = 2**14  # of integers: 64 KiB, less than what a bounded heap maps anew
LARGEST = 127
LOW_STEPS = 2 * LARGEST  # steps of the low integer in one of the high
STEPS = torch.tensor([127.0, 32258.0]).view(2, 1, 1)  # in a largest activation: high, both
SMALLEST = 1e-30  # the scale of a row of zeros
Rows = Callable[[int, int], Tensor]
Product = Callable[[Tensor], Tensor]


class Int8Linear(ParallelLayer):
    """A column- or, if it ``reduces``, a row-parallel layer: [B, S, in] -> [B, S, out]."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, tp: Axis, reduces: bool, rows: Rows | None = None) -> None:
        """``rows(start, stop)`` returns a part of ``weight``, by default of the tensor itself."""
        super().__init__()
        self.tp, self.reduces, self.dtype = tp, reduces, weight.dtype
        self.sequence_parallel = False
        step = max(1, AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), step):
            part = slice(start, min(start + step, len(weight)))
            dense = rows(part.start, part.stop) if rows else weight.detach()[part]
            if not start:
                codes = torch.empty(weight.shape, dtype=torch.int8, device=dense.device)
                scales = torch.empty(len(weight), dtype=torch.bfloat16, device=dense.device)
            wide = dense.float()
            step_sizes = (wide.abs().amax(1) / LARGEST).clamp_(min=SMALLEST)
            scales[part] = step_sizes
            rounded = (wide / scales[part, None]).round_()
            codes[part] = rounded.clamp_(-LARGEST, LARGEST).to(torch.int8)
        self.register_buffer("codes", codes, False)
        self.register_buffer("scales", scales, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.product(len(rows))(rows).to(x.dtype).view(*x.shape[:-1], -1)
        return regions.leave(y, self.tp, False) if self.reduces else y

    def product(self, count: int) -> Product:
        """This rank's product of ``count`` rows: [n, in] -> [n, out], in its kernel's dtype."""
        codes, scales = self.codes, self.scales
        if codes.shape[1] % KERNEL_COLUMNS == 0:
            if integer_rows() <= count:
                wide_scales = scales.float()
                return lambda x: integer_product(x.float(), codes, wide_scales)
            if count <= FEW_ROWS:
                return lambda x: torch._weight_int8pack_mm(x.bfloat16(), codes, scales)
        return self._dense_product

    def _dense_product(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = x.new_empty(len(x), len(self.codes))
        step = max(1, AT_ONCE // x.shape[1])
        for start in range(0, len(self.codes), step):
            part = slice(start, start + step)
            y[:, part] = ops.linear(x, self.dense(part))
        return y

    def dense(self, part: slice = slice(None)) -> Tensor:
        """Rows of the weight that the codes stand for: [out, in], in the dtype of the model."""
        return self.codes[part].float().mul_(self.scales[part, None]).to(self.dtype)


@cache
def integer_rows() -> int:
    """The number of rows from which the product of integers is the fastest.

    With AMX all are multiplied as integers, so an answer does not depend on other requests.  It is
    for no number without VNNI: sums of two products are then cut off at 16 bits.
    """
    if torch.cpu._is_amx_tile_supported():
        return 1
    return 4 if torch.cpu._is_vnni_supported() else NEVER


def integer_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """``x @ (codes * scales[:, None]).T`` with x rounded to 16 bits: [n, in] -> [n, out], fp32.

    A few rows of x and of the codes at a time: sums that the heap has room for.  One row has few,
    and the time of each further operation counts.
    """
    largest = torch.linalg.vector_norm(x, math.inf, 1, keepdim=True).clamp_(min=SMALLEST)
    steps = largest / (LARGEST * LOW_STEPS)
    if len(x) == 1:
        return (_multiplied(codes, _columns(x, largest)).t() * scales).mul_(steps)
    y = x.new_empty(len(x), len(codes))
    for rows in range(0, len(x), ROWS_AT_ONCE):
        block = slice(rows, rows + ROWS_AT_ONCE)
        columns = _columns(x[block], largest[block])
        step = max(1, SUMS_AT_ONCE // (columns.shape[1] * KERNEL_COLUMNS)) * KERNEL_COLUMNS
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            y[block, part] = _multiplied(codes[part], columns).t()
    return y.mul_(scales).mul_(steps)


def _columns(x: Tensor, largest: Tensor) -> Tensor:
    """The high integers of rows, and then the low ones: [n, in], [n, 1] -> int8 [in, 2 n]."""
    parts = (x * (STEPS / largest)).round_()
    parts[1].sub_(parts[0], alpha=LOW_STEPS)
    return parts.to(torch.int8).flatten(0, 1).t()


def _multiplied(codes: Tensor, columns: Tensor) -> Tensor:
    """Products of the codes and of what high and low integers stand for: fp32 [out, n]."""
    high, low = torch._int_mm(codes, columns).float().chunk(2, 1)
    return torch.add(low, high, alpha=LOW_STEPS)


@torch.no_grad()
def quantize(model: Llama) -> None:
    """Replace the linear layers of a model, the output projection included, by 8 bits in place."""
    if model.lm_head is None:
        model.lm_head = Int8Linear(model.head.dense(), model.tp, reduces=False)
    for path, layer in list(model.named_modules()):
        if type(layer) in (ColumnLinear, RowLinear):
            assert isinstance(layer, ColumnLinear | RowLinear)
            owner, _, name = path.rpartition(".")
            small = Int8Linear(layer.dense(), layer.tp, isinstance(layer, RowLinear))
            setattr(model.get_submodule(owner), name, small)


def num_bytes(model: Llama) -> int:
    """The bytes of all weights of a model."""
    tensors = [*model.parameters()]
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            tensors += [layer.codes, layer.scales]  # type: ignore[list-item]
    return sum(tensor.nbytes for tensor in tensors)
