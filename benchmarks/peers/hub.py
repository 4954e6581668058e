"""transformers' Llama: alone, and under DistributedDataParallel."""

from __future__ import annotations

import transformers
from torch.nn.parallel import DistributedDataParallel

from peers.job import DTYPES, Job, Step


def train(job: Job) -> Step:
    config = transformers.LlamaConfig(**job.model.to_hub(job.dtype))
    model = transformers.LlamaForCausalLM(config).to(DTYPES[job.dtype])
    model.load_state_dict(job.weights())
    model.config.use_cache = False
    if job.ranks == 1:
        return job.loop(model, lambda ids: model(input_ids=ids).logits)
    job.join()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return job.loop(parallel, lambda ids: parallel(input_ids=ids).logits)
