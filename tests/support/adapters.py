"""Two tuning steps on ranks: a base in a folder, its adapters, and the results to compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llamax.backends.base import EAGER_DEVICE, Backend
from llamax.checkpoint.build_model import load_base
from llamax.checkpoint.hf_folder import open_source
from llamax.config.model import ModelConfig
from llamax.config.rules.pipeline import evenly
from llamax.config.schema import FinetuneConfig, OptimConfig
from llamax.config.types import ContextBy
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel import pipeline, sharding
from llamax.parallel.collectives import Axes
from llamax.parallel.sharding import Cut
from llamax.training.step import TrainState
from support.models import WIDE
from support.step_reference import part_of

# Over 4 tensor ranks a key/value head has two, and blocks of 64 columns are cut through (192 / 4);
# the scales of a feed-forward weight have two scales of their own.
MODEL = WIDE
# With the usual eps AdamW would turn the rounding of a gradient near 0 into a whole step.
OPTIM = OptimConfig(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
SEQUENCE, GLOBAL_BATCH = 16, 8


def base_folder(folder: Path, model: ModelConfig = MODEL) -> Path:
    """A Hugging Face folder of a model drawn from a fixed seed."""
    folder.mkdir()
    drawn = Llama(model).init(0)
    tensors = {}
    for name, parameter in drawn.named_parameters():
        for part in drawn.sharded_parameters().parts(name):
            whole = isinstance(part.how, sharding.Replica)
            rows = parameter if whole else parameter.narrow(part.how.dim, part.start, part.length)
            noise = torch.arange(rows.numel()).view(rows.shape) / rows.numel() / 5
            tensors[part.name] = (rows + noise if whole else rows).detach().clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.to_hub("float32")))
    return folder


def batch(packed: bool = False) -> Batch:
    """The global batch, a quarter of its labels ignored; ``packed``: documents in each sample."""
    generator = torch.Generator().manual_seed(1)
    shape = (GLOBAL_BATCH, SEQUENCE)
    ids = torch.randint(MODEL.vocab_size, shape, generator=generator)
    labels = torch.randint(MODEL.vocab_size, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.25, -100)
    places = torch.arange(SEQUENCE).expand(shape)
    if not packed:
        return Batch(ids, labels, places, None)
    begins = torch.rand(shape, generator=generator) < 0.3
    first = places.where(begins, torch.zeros(())).long().cummax(1).values
    return Batch(ids, labels, places - first, begins.cumsum(1).int())


def share(axes: Axes, accumulation: int, packed: bool = False) -> list[Batch]:
    """This data rank's microbatches, dealt as the loader deals them: microsteps outermost."""
    rows = GLOBAL_BATCH // axes.dp.size // accumulation
    firsts = [(i * axes.dp.size + axes.dp.rank) * rows for i in range(accumulation)]
    whole = part_of(batch(packed), axes)
    return [Batch(*(p if p is None else p[f : f + rows] for p in whole)) for f in firsts]


def build(
    folder: Path,
    axes: Axes,
    finetune: FinetuneConfig,
    sequence: bool = False,
    recompute: Any = "none",
    sharded: bool = False,
    layers: tuple[int, ...] | None = None,
) -> Llama:
    """A base with adapters whose B is not zero, so that every factor has a gradient."""
    device = "meta" if finetune.method == "qlora" else "cpu"
    source = open_source(folder)
    config = ModelConfig.from_hub(source.model)
    counts = layers or evenly(config.num_hidden_layers, axes.pp.size)
    model = Llama(
        config,
        axes.tp,
        stage=pipeline.layers_of(*axes.pp, counts),
        sequence_parallel=sequence,
        recompute=recompute,
        device=device,
    )
    load_base(model, source, finetune, torch.empty(0), axes.shard, 5, sharded)
    with torch.no_grad():
        for name, parameter in model.sharded_parameters().trained().tensors.items():
            if "lora_B" in name:
                how, shape = model.sharded_parameters()[name].cut, list(parameter.shape)
                if isinstance(how, sharding.Shard):
                    shape[0] = how.blocks[0].size
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) / 5
                parameter.copy_(sharding.cut(whole, how, axes.tp.size, axes.tp.rank))
    return model


def steps(
    model: Llama,
    axes: Axes,
    accumulation: int,
    backend: Backend | None = None,
    packed: bool = False,
    zero: int = 1,
    context_by: ContextBy = "gather",
) -> dict[str, Any]:
    """Losses and norms of two steps, and the adapters after them; the base stays as it was.

    With ``backend`` the model moves to its device first, as training moves it.
    """
    optimizer = Zero(
        model.sharded_parameters(),
        OPTIM,
        axes,
        sequence_parallel=model.sequence_parallel,
        zero=zero,
        bucket_bytes=1024,
    )
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    state = TrainState(
        model,
        optimizer,
        axes,
        backend or EAGER_DEVICE,
        step_tokens=GLOBAL_BATCH * SEQUENCE,
        learning_rate=lambda step: OPTIM.lr,
        context_by=context_by,
    )
    if backend is not None:
        state.to(backend.device)
    batches = share(axes, accumulation, packed)
    found = [state.step(batches, n) for n in (1, 2)]
    for name, parameter in frozen.items():
        assert torch.equal(parameter.cpu(), before[name]), f"{name} is frozen"
        assert parameter.grad is None
    return {
        "loss": [float(each.loss.cpu()) for each in found],
        "norm": [float(each.grad_norm.cpu()) for each in found],
        "adapters": {
            n: p.detach().cpu().clone()
            for n, p in model.sharded_parameters().trained().tensors.items()
        },
    }


def differences(
    mine: dict[str, Any],
    whole: dict[str, Any],
    shards: Mapping[str, Cut],
    degree: int,
    rank: int,
    tolerance: float,
) -> list[str]:
    """The results of tensor rank ``rank`` that differ from its share of one rank's, a line each."""
    found = []
    for name, theirs in whole["adapters"].items():
        if name not in mine["adapters"]:  # of another stage
            continue
        expected = sharding.cut(theirs, shards[name], degree, rank)
        error = (mine["adapters"][name] - expected).abs().max() / theirs.abs().max()
        if not error <= 5 * tolerance:
            found.append(f"{name} {error:.1e}")
    for what in ("loss", "norm"):
        for number, (a, b) in enumerate(zip(mine[what], whole[what], strict=True), 1):
            if not abs(a - b) <= 2 * tolerance * abs(b):
                found.append(f"{what} of step {number}: {a!r} {b!r}")
    return found


def hub_folder(folder: Path, model: ModelConfig, seed: int = 0) -> Path:
    import transformers  # not installed beside torch-xla, where the rest of this module is used

    transformers.set_seed(seed)
    hub = transformers.LlamaConfig(**model.to_hub("float32"))
    transformers.LlamaForCausalLM(hub).save_pretrained(folder)
    return folder
