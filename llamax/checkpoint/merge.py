"""A base model and its LoRA adapters, merged into a Hugging Face folder.

``merge`` reads ``llamax.checkpoint.merged.Merged`` into new files, a slab of rows at a time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llamax.checkpoint import hf_folder, hf_writer, slabs
from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.build_model import finetune_info
from llamax.checkpoint.consolidate import dtype_of, size
from llamax.checkpoint.hf_folder import has_tokenizer
from llamax.checkpoint.merged import Merged
from llamax.checkpoint.peft import find_base_folder, open_adapter
from llamax.checkpoint.places import dataset_of
from llamax.checkpoint.safetensors_io import Progress, no_progress
from llamax.config.schema import FinetuneConfig


def merge(
    adapter: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = hf_writer.FILE_BYTES,
    started: Progress = no_progress,
    progress: Progress = no_progress,
) -> Path:
    """Write a base model with its adapters merged as the folder ``out``; return that folder.

    Args:
        adapter: PEFT folder, or a run or checkpoint of adapters.
        out: Hugging Face folder to make.
        base: Hugging Face folder, run or checkpoint; by default the one that the adapter names.
        dtype: Type of the written weights, "float32", "bfloat16" or "float16"; by default that of
            the base.
        max_shard_size: Largest size of a weights file: bytes, or text such as "5GB" or "500MB".
        started: Called once, with the bytes to write in all.
        progress: Called with the bytes written, tensor by tensor.

    Raises:
        ConfigError: For a parameter out of range.
        CheckpointError: If base and adapter do not belong together, a weight is too large for
            ``dtype``, ``out`` exists or the disk is full.
    """
    weight_dtype, file_bytes = dtype_of(dtype), size(max_shard_size)
    adapters, info = open_adapter(adapter)
    base_model = hf_folder.open_source(base or find_base_folder(adapters.folder, info))
    finetune_info(FinetuneConfig(), base_model)
    merged = Merged(base_model, adapters, info)
    planned, buffers = hf_writer.plan_files(merged, weight_dtype, file_bytes), slabs.new_buffers()
    places = (folder for folder in (adapters.folder, merged.folder) if has_tokenizer(folder))
    tokenizer = next(places, dataset_of(adapters.folder, adapters.state))
    if tokenizer is not None and not tokenizer.is_dir():
        tokenizer = None
    with new_folder(Path(out)) as folder:
        hf_writer.write_metadata(merged, planned, folder, tokenizer)
        offsets = hf_writer.allocate_files(folder, planned)
        started(sum(tensor.size_bytes for tensor in planned))
        for tensor in planned:
            at = offsets[tensor.name]
            progress(hf_writer.write_tensor(merged, folder, tensor, at, buffers, check=True))
    return Path(out)
