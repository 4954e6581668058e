"""llamax as its training program runs it."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from llamax.backends import choose
from llamax.config.schema import OptimConfig
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel import context_parallel
from llamax.parallel.mesh import Mesh
from llamax.parallel.pipeline import layers_of
from llamax.parallel.rendezvous import Rendezvous
from llamax.training.step import TrainState
from peers.job import BETAS, DECAY, DTYPES, EPS, LR, Job, Step

_open = ExitStack()  # the process group lives as long as the process


def train(job: Job) -> Step:
    where = Rendezvous(job.rank, job.ranks, job.rank, job.ranks, port=job.port)
    backend = choose("cpu", where, job.threads)
    axes = _open.enter_context(
        backend.joined(
            Mesh(job.tensor, job.data, job.context, job.pipeline, shard=job.zero_ranks), 300.0
        )
    )
    model = Llama(
        job.model,
        axes.tp,
        sequence_parallel=job.sequence_parallel,
        dtype=DTYPES[job.dtype],
        recompute=job.recompute,
        stage=layers_of(*axes.pp, job.stage_layers),
    ).init(0)
    optim = OptimConfig(
        lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, max_grad_norm=0.0
    )
    optimizer = Zero(
        model.sharded_parameters(),
        optim,
        axes,
        sequence_parallel=model.sequence_parallel,
        zero=job.zero,
        **({"bucket_bytes": job.bucket_bytes} if job.bucket_bytes else {}),
    )
    state = TrainState(
        model,
        optimizer,
        axes,
        backend,
        step_tokens=job.batch * job.length,
        learning_rate=lambda step: LR,
        context_by=job.context_by,
    )
    each = -(-job.length // job.documents)
    place = torch.arange(job.length)
    positions = (place % each).unsqueeze(0)
    if job.chunk_tokens:
        loss = model.loss

        def chunked(*args, **kwargs):  # the loss of other chunks than llamax's own choice
            return loss(*args, **kwargs, chunk_tokens=job.chunk_tokens)

        model.loss = chunked

    def step(number: int) -> float:
        ids, labels = job.samples(number)
        documents = None
        if job.documents > 1:
            documents = (place // each).expand(ids.shape)
        inputs = [ids, labels, positions.expand(ids.shape)]
        if job.context > 1:
            inputs = [context_parallel.cut(x, *axes.part) for x in inputs]
            if documents is not None:
                documents = context_parallel.in_rank_order(documents, job.context)
        cuts = [
            [None] * job.micros if x is None else x.chunk(job.micros) for x in (*inputs, documents)
        ]
        batches = [Batch(*parts) for parts in zip(*cuts, strict=True)]
        return state.step(batches, number).loss.item()

    return step
