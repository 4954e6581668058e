"""Checks of what a model is given: ids, labels, positions and numbers of documents."""

from __future__ import annotations

import torch
from torch import Tensor

from llamax import ops
from llamax.runtime.errors import DataError


def check_ids(ids_BS: Tensor, vocab_size: int, labels: bool = False) -> None:
    """DataError where ids, or labels that count, are not of the vocabulary.

    On a rank that holds a part of it such an id would pass for another rank's.  Devices are not
    waited for: only ids on the host are looked at.
    """
    what = "labels" if labels else "ids"
    if ids_BS.dim() != 2 or not ids_BS.numel():
        raise DataError(f"{what} are {list(ids_BS.shape)}; a model takes [batch, sequence]")
    if ids_BS.dtype not in (torch.int32, torch.int64):
        raise DataError(f"{what} are {ids_BS.dtype}; a model takes int32 or int64")
    if ids_BS.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counted = ids_BS.masked_fill(ids_BS == ops.IGNORE_INDEX, 0) if labels else ids_BS
    for found in map(int, counted.aminmax()):
        if not 0 <= found < vocab_size:
            use = f"{ops.IGNORE_INDEX} where none counts" if labels else "the model's tokenizer"
            raise DataError(
                f"{what} hold {found}, and the model has ids 0 to {vocab_size - 1}; use {use}"
            )


def check_inputs(
    ids_BS: Tensor,
    positions_BS: Tensor | None,
    documents_BS: Tensor | None,
    tensor: int,
    sequence_parallel: bool,
) -> None:
    """DataError where a sequence cannot be cut, or positions or documents do not fit the ids."""
    if sequence_parallel and ids_BS.shape[1] % tensor:
        raise DataError(
            f"{ids_BS.shape[1]} places are not divided by {tensor} tensor ranks, as "
            "sequence parallelism needs; pad them, or use a model without it"
        )
    if positions_BS is not None and positions_BS.shape not in (ids_BS.shape, (1, ids_BS.shape[1])):
        raise DataError(
            f"positions are {list(positions_BS.shape)}, and ids {list(ids_BS.shape)}; give one "
            "for every id, or [1, sequence] for all samples"
        )
    if documents_BS is not None and documents_BS.shape != ids_BS.shape:
        raise DataError(
            f"documents are {list(documents_BS.shape)}, and ids {list(ids_BS.shape)}; give a "
            "number for every id"
        )
