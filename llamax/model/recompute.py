"""Recompute activations in backward instead of keeping them (Chen et al. 2016).

=========  ===============================  ==========================================
mode       kept per block                   done again in backward
=========  ===============================  ==========================================
none       everything backward reads        nothing
selective  all but the inside of attention  rotary embedding and attention
full       the block's input x_BsD          the block, but for its last sum over ranks
=========  ===============================  ==========================================

"Selective" is Korthikanti et al. 2022, section 5: attention holds much memory for few FLOPs.  The
collectives inside a recomputed block run again too.  On a CPU results of norms and of SwiGLU are
made again in every mode (``llamax.parallel.tensor_parallel``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch.utils.checkpoint
from torch import Tensor

from llamax.backends import xla

Recompute = Literal["none", "selective", "full"]
Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


def again(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """``function(*tensors)`` that keeps only ``tensors`` and runs again in backward."""
    if tensors[0].device.type == "xla":
        return cast(Result, xla.recomputed(function, *tensors))
    # torch's random state is that of before, too: modules of a program's own may draw.
    result = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
    return cast(Result, result)


def plain(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """``function(*tensors)``, with whatever autograd keeps."""
    return function(*tensors)
