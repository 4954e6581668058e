"""A model written for another trainer: a Hugging Face folder, or NxD's or Meta's format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.formats.meta_writer import write_meta
from llamax.checkpoint.formats.nxd_writer import (
    NxdTarget,
    NxdWriter,
)
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.hf_writer import plan_files
from llamax.checkpoint.manifest import CONFIG_TOML
from llamax.checkpoint.peft import adapter_info
from llamax.checkpoint.plain_llama import check_plain
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import Progress, Started, no_progress, no_start
from llamax.checkpoint.source import Source
from llamax.config.choices import EXPORT_FORMATS, NXD_ATTENTION, NXD_OPTIMIZERS
from llamax.config.load import recorded_config
from llamax.config.model import ModelConfig
from llamax.config.schema import OptimConfig
from llamax.optim.schedule import lr_at
from llamax.runtime.errors import ConfigError


def export(
    source: Path | str,
    out: Path | str,
    *,
    to: Literal["hf", "nxd", "meta"],
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    qkv: str = "",
    kv_multiplier: int = 0,
    optimizer: str = "auto",
    tag: str = "",
    xser: bool = False,
    started: Started = no_start,
    progress: Progress = no_progress,
) -> Path:
    """Write a model for another trainer; return the folder that was written.

    Args:
        source: A run, a checkpoint or a Hugging Face folder.
        out: Folder to make.
        to: "hf" is what ``consolidate`` writes; "nxd" and "meta" are formats that
            ``import_checkpoint`` reads.
        tensor: Tensor-parallel ranks; for "nxd" and "meta".
        pipeline: Pipeline stages; for "nxd".
        data: Data-parallel ranks that share the optimizer's state by ZeRO-1; for "nxd".
        qkv: Layout of the attention weights: "stacked", "gqa", "gqa-fused" or "separate"; by
            default what the model's heads need; for "nxd".
        kv_multiplier: Copies of each key/value head; 0: as many as ``tensor`` needs; for "nxd".
        optimizer: "none", "zero1" or "zero1-masters"; "auto": what the source has; for "nxd".
        tag: Name of the folder in ``out``, such as "pretrained_weight"; by default "step_N"; for
            "nxd".
        xser: One file per tensor, as torch_xla's serialization; for "nxd".
        started: Called once, with the amount of work and its unit, "tensor" or "B".
        progress: Called with the amount of work that is done.

    Raises:
        ConfigError: For a parameter that is out of range or has no meaning for the format.
        CheckpointError: If the source holds no model, ``out`` exists or the disk is full.
    """
    if to not in EXPORT_FORMATS:
        raise ConfigError(f"`to={to}` is not known; use {', '.join(EXPORT_FORMATS)}")
    for name, value, choices in (
        ("qkv", qkv, ("", *NXD_ATTENTION)),
        ("optimizer", optimizer, NXD_OPTIMIZERS),
    ):
        if value not in choices:
            known = ", ".join(filter(None, choices))
            raise ConfigError(f"`{name}={value}` is not known; use {known}")
    changed = {
        "tensor": tensor != 1,
        "pipeline": pipeline != 1,
        "data": data != 1,
        "qkv": qkv != "",
        "kv_multiplier": kv_multiplier != 0,
        "optimizer": optimizer != "auto",
        "tag": tag != "",
        "xser": xser,
    }
    meaningful = {"nxd": changed.keys(), "meta": {"tensor"}, "hf": set[str]()}[to]
    for name, is_changed in changed.items():
        if is_changed and name not in meaningful:
            raise ConfigError(f"`{name}` has no meaning for `to={to}`; leave it out")
    if tag and (Path(tag).name != tag or tag in (".", "..")):
        raise ConfigError(f"`tag={tag}` is not the name of a folder; use one such as step_1000")
    opened, folder = open_source(source), Path(out)
    model = ModelConfig.from_hub(opened.model)
    if to == "hf":
        if not isinstance(opened, Checkpoint):
            raise ConfigError(f"{source} is a Hugging Face folder already; copy it")
        if adapter_info(opened) is None:
            started(sum(each.size_bytes for each in plan_files(opened)), "B")
        return consolidate(opened.folder, folder, progress=progress)
    check_plain(opened, "Meta's format" if to == "meta" else "NxD's format")
    if to == "meta":
        with new_folder(folder) as part:
            write_meta(opened, model, part, tensor, started=started, progress=progress)
        return folder
    if optimizer == "auto":
        has_state = "exp_avg" in opened.kinds("model.norm.weight")
        optimizer = "zero1-masters" if has_state else "none"
    copies = kv_multiplier or model.kv_replicas(tensor)
    equal_heads = model.num_attention_heads == model.num_key_value_heads
    target = NxdTarget(
        model,
        tensor,
        pipeline,
        data,
        qkv or ("stacked" if equal_heads and copies == 1 else "gqa"),
        copies,
        moments=optimizer != "none",
        masters=optimizer == "zero1-masters",
        xser=xser,
    )
    return to_nxd(opened, folder, target, tag, started=started, progress=progress)


def to_nxd(
    source: Source,
    out: Path,
    target: NxdTarget,
    tag: str = "",
    *,
    started: Started = no_start,
    progress: Progress = no_progress,
) -> Path:
    """Write a checkpoint for NxD into ``out``; return its tag's folder, by default ``out/step_N``.

    ``started`` is called with the number of shares of tensors, ``progress`` for each.
    The optimizer has the hyper-parameters of the run that the source is from.
    """
    optim, lr, step = OptimConfig(), OptimConfig().lr, 0
    if isinstance(source, Checkpoint):
        step = source.step
        if (source.folder / CONFIG_TOML).is_file():
            run = recorded_config(source.folder / CONFIG_TOML)
            optim, lr = run.optim, lr_at(step + 1, run.optim, max(run.run.steps, step + 1))
    tag = tag or f"step_{step}"
    writer = NxdWriter(source, target, optim, lr, step)
    started(writer.shares, "tensor")
    with new_folder(out) as part:
        writer.write(part / tag, progress)
    return out / tag
