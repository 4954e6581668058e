"""A Hugging Face Llama, cut into a checkpoint for a number of tensor-parallel ranks.

The reverse of ``consolidate``: the file of each tensor rank gets its part of every tensor; two
files are written at a time, each through a buffer of 16 MiB.  The checkpoint has weights only, in
the folder's dtype.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llamax.checkpoint import hf_folder
from llamax.checkpoint import manifest as files
from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.load import check_shapes
from llamax.checkpoint.owned_runs import is_writer, slices
from llamax.checkpoint.places import CUT_FROM
from llamax.checkpoint.prompt_record import prompt_of
from llamax.checkpoint.runs import Run
from llamax.checkpoint.safetensors_io import (
    TAGS,
    Progress,
    TensorStream,
    WrittenFile,
    no_progress,
    write_safetensors,
)
from llamax.checkpoint.slabs import Buffers, Slabs, new_buffers
from llamax.checkpoint.source import dtype_name
from llamax.config.model import ModelConfig
from llamax.data.chat.record import PROMPT
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.parallel.sharding import ShardedParameter, ShardedParameters, local_shape
from llamax.runtime.errors import ConfigError
from llamax.runtime.versions import LLAMAX


def shard(
    folder: Path | str, out: Path | str, tensor: int = 1, *, progress: Progress = no_progress
) -> Path:
    """Write the model of a Hugging Face folder as the checkpoint ``out``; return that folder.

    Args:
        folder: Hugging Face folder with a Llama in safetensors files.
        out: Checkpoint folder to make.
        tensor: Tensor-parallel degree: the number of ranks over which the weights are cut.
        progress: Called with the bytes written.

    Raises:
        ConfigError: If ``tensor`` is below 1 or does not divide the weights.
        CheckpointError: If the folder does not hold the Llama that its config.json describes,
            ``out`` exists or the disk is full.
    """
    if tensor < 1:
        raise ConfigError(f"`tensor={tensor}` is below 1; use 1 or more")
    source = hf_folder.HfFolder(folder)
    model = Llama(ModelConfig.from_hub(source.model), Solo("tp"), device="meta")
    check_shapes(source, model.sharded_parameters())
    try:
        ranks = [_share(source, model, tensor, rank) for rank in range(tensor)]
    except ConfigError:
        fit = [str(degree) for degree in range(1, 2 * tensor) if _fits(source, model, degree)]
        raise ConfigError(
            f"`tensor={tensor}` does not cut the weights of {folder} into equal parts; use "
            f"{' or '.join(fit)}"
        ) from None
    manifest = files.Manifest(
        format=files.FORMAT_VERSION,
        step=0,
        llamax=LLAMAX,
        torch=torch.__version__,
        mesh={"tensor": tensor, "data": 1, "zero": 0},
        model=model.config.to_hub(dtype_name(source.dtype(hf_folder.EMBEDDING))),
        state=_state(source),
        files=[],
    )
    buffers = new_buffers()
    with new_folder(Path(out)) as part, ThreadPoolExecutor(max_workers=2) as pool:

        def write_rank(rank: int) -> WrittenFile:
            path = part / files.file_name("weights", rank, 0)
            return write_safetensors(
                path, _streams(source, ranks[rank], buffers), progress=progress
            )

        for rank, written in enumerate(pool.map(write_rank, range(tensor))):
            manifest.files.append(files.FileRecord(files.file_name("weights", rank, 0), *written))
            for name, run in _runs(ranks[rank]):
                tag = TAGS[source.dtype(name)]
                manifest.kind(name, "weight", source.shape(name), tag).add(rank, run)
        files.write_manifest(part, manifest, "")
        files.write_done(part)
    return Path(out)


def _state(source: hf_folder.HfFolder) -> dict[str, Any]:
    """What the folder says of generating and prompting, and where its tokenizer is."""
    prompt = prompt_of(source)
    found = {
        "generation": source.generation,
        PROMPT: prompt and prompt.to_json(),
        CUT_FROM: str(source.folder.absolute()),
    }
    return {name: value for name, value in found.items() if value}


def _share(source: hf_folder.HfFolder, model: Llama, degree: int, rank: int) -> ShardedParameters:
    """A rank's share of each tensor of the folder, without memory.

    Raises ConfigError if ``degree`` does not divide one of them.
    """
    shares = {}
    for name, how in model.sharded_parameters().hub_cuts().items():
        shape = local_shape(source.shape(name), how, degree)
        shares[name] = ShardedParameter(torch.empty(shape, device="meta"), how)
    return ShardedParameters(shares, degree, rank)


def _fits(source: hf_folder.HfFolder, model: Llama, degree: int) -> bool:
    try:
        return bool(_share(source, model, degree, 0))
    except ConfigError:
        return False


def _runs(share: ShardedParameters) -> list[tuple[str, Run]]:
    """The runs of each tensor that a rank writes: those that no lower rank holds too."""
    return [
        (name, piece.run)
        for name, (tensor, how) in share.items()
        if is_writer(how, share.degree, share.rank)
        for piece in slices(share, name, 0, tensor.numel())
    ]


def _streams(
    source: hf_folder.HfFolder, share: ShardedParameters, buffers: Buffers
) -> list[TensorStream]:
    return [
        TensorStream(
            files.run_key(name, "weight", run),
            source.dtype(name),
            (run.length,),
            Slabs(source, name, "weight", run, source.dtype(name), buffers),
        )
        for name, run in _runs(share)
    ]
