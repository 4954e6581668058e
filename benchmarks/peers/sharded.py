"""torch's own ways to hold less on a rank, on the bare Llama: DDP, FSDP2, pipelining."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from llamax.parallel.pipeline import layers_of
from peers.bare import Bare
from peers.job import Job, Step


def ddp(job: Job) -> Step:
    """DistributedDataParallel; microbatches before the last send nothing."""
    job.join()
    model = bare(job)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = job.adamw(model)

    def step(number: int) -> float:
        loss = 0.0
        ids, labels = (x.chunk(job.micros) for x in job.samples(number))
        for micro in range(job.micros):
            parallel.require_backward_grad_sync = micro == job.micros - 1
            logits = parallel(ids[micro]).flatten(0, 1)
            each = F.cross_entropy(logits, labels[micro].flatten()) / job.micros
            each.backward()
            loss += each.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def fsdp2(job: Job) -> Step:
    """fully_shard of each layer, the embedding and the head, as torch's tutorial does it."""
    job.join()
    model = bare(job)
    cut = job.zero_ranks or job.ranks
    shape, names = (job.ranks // cut, cut), ("replicate", "shard")
    whole = cut == job.ranks
    mesh = init_device_mesh("cpu", shape[whole:], mesh_dim_names=names[whole:])
    for module in (model.model.embed_tokens, *model.model.layers, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    return job.loop(model, model)


def pipelining(job: Job) -> Step:
    """PipelineStage and Schedule1F1B; the loss is on the last stage."""
    job.join()
    whole, stages = bare(job), len(job.stage_layers)
    first, last = job.rank == 0, job.rank == stages - 1
    (layers,) = layers_of(job.rank, stages, job.stage_layers)
    part = Part(whole, layers, first, last)
    del whole
    stage = PipelineStage(part, job.rank, stages, next(part.parameters()).device)
    schedule = Schedule1F1B(stage, job.micros, partial(mean_loss))
    optimizer = job.adamw(part)

    def step(number: int) -> float:
        ids, labels = job.samples(number)
        losses: list[Tensor] = []
        schedule.step(
            *([ids] if first else []), **({"target": labels, "losses": losses} if last else {})
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = sum(losses).item() / job.micros if last else 0.0
        return loss * stages  # the race takes the mean of all ranks

    return step


class Part(nn.Module):
    """A run of layers of the bare Llama, with the embedding and the head at its ends."""

    def __init__(self, whole: Bare, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.embed = whole.model.embed_tokens if first else nn.Identity()
        self.layers = nn.ModuleList(whole.model.layers[layer] for layer in layers)
        self.ends = nn.Sequential(whole.model.norm, whole.lm_head) if last else nn.Identity()
        self.tables = whole.tables

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, *self.tables)
        return self.ends(x)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def bare(job: Job) -> Bare:
    model = Bare(job.model, job.length)
    model.load_state_dict(job.weights())
    if job.recompute == "full":
        layers = model.model.layers
        for number, layer in enumerate(layers):
            layers[number] = checkpoint_wrapper(layer)
    return model
