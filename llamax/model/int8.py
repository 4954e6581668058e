"""Weights in 8 bits for inference on a CPU: rows of integers with a scale each.

::

    w [out, in]  ->  codes int8 [out, in], scales [out]      w ~ codes * scales[:, None]

A few rows of activations, as in decoding, are multiplied by torch's weight-only kernel, which reads
a quarter of the bytes of float32; it takes activations in bfloat16.  For more rows, as in a
prefill, reading is little beside computing, where that kernel is slow: the weight is made dense.
The kernel is for rows of whole blocks of 32; other weights are made dense as well.

Embedding and norms stay as they are.  Source: Dettmers et al. 2022, "LLM.int8()", section 2.1,
weights only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llamax import ops
from llamax.model.llama import Llama
from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.parallel.tensor_parallel import ColumnLinear, ParallelLayer, RowLinear

FEW_ROWS = 32  # up to which torch's kernel is the faster way
KERNEL_COLUMNS = 32  # a block of torch's kernel
AT_ONCE = 2**18  # weights quantised at once: bounds the float32 copies
LARGEST = 127
SMALLEST = 1e-30  # the scale of a row of zeros
Rows = Callable[[int, int], Tensor]


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
            largest = wide.abs().amax(1)
            scales[part] = (largest / LARGEST).clamp(min=SMALLEST)  # rounded, as the kernel takes
            rounded = (wide / scales[part].float()[:, None]).round_()
            codes[part] = rounded.clamp_(-LARGEST, LARGEST).to(torch.int8)
        self.register_buffer("codes", codes, False)
        self.register_buffer("scales", scales, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] <= FEW_ROWS and x.shape[-1] % KERNEL_COLUMNS == 0:
            rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
            y = torch._weight_int8pack_mm(rows, self.codes, self.scales)
            y = y.to(x.dtype).view(*x.shape[:2], -1)
        else:
            y = ops.linear(x, self.dense())
        return regions.leave(y, self.tp, False) if self.reduces else y

    def dense(self) -> Tensor:
        """The weight that the codes stand for: [out, in], in the dtype of the model."""
        return (self.codes * self.scales.float()[:, None]).to(self.dtype)


@torch.no_grad()
def quantize(model: Llama) -> None:
    """Replace the linear layers of a model, the output projection included, by 8 bits in place."""
    if model.lm_head is None:
        model.lm_head = Int8Linear(model.output_weight, model.tp, reduces=False)
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
