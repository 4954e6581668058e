"""A bare Llama of torch's own modules, and torch's tensor parallelism (DTensor) on it.

The plan is the one of torch's tensor-parallel tutorial: columns and rows, sequence parallelism
between them, and a loss over logits that stay cut along the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from llamax.config.model import ModelConfig
from peers.job import Job, Step


class Attention(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        D, self.width = model.hidden_size, model.head_dim
        heads, kv = model.num_attention_heads * self.width, model.num_key_value_heads * self.width
        self.q_proj, self.o_proj = nn.Linear(D, heads, bias=False), nn.Linear(heads, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(D, kv, bias=False), nn.Linear(D, kv, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (y * cos + torch.cat((-y[..., 32:], y[..., :32]), -1) * sin for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        D, F_ = model.hidden_size, model.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = nn.RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.mlp = FeedForward(model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Bare(nn.Module):
    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.model.layers = nn.ModuleList(Layer(model) for _ in range(model.num_hidden_layers))
        self.model.norm = nn.RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        pairs = torch.arange(0, model.head_dim, 2).float() / model.head_dim
        angles = torch.outer(torch.arange(length).float(), model.rope_theta**-pairs).repeat(1, 2)
        self.tables = angles.cos(), angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, *self.tables)
        return self.lm_head(self.model.norm(x))


def train(job: Job) -> Step:
    model = Bare(job.model, job.length)
    model.load_state_dict(job.weights())
    return job.loop(model, model)


def dtensor(job: Job) -> Step:
    """parallelize_module with sequence parallelism; every rank gets all logits."""
    return parallel(job, logits=Replicate())


def dtensor_loss_parallel(job: Job) -> Step:
    """The same with logits that stay cut along the vocabulary."""
    return parallel(job, logits=Shard(-1))


def parallel(job: Job, logits: Placement) -> Step:
    job.join()
    model = Bare(job.model, job.length)
    model.load_state_dict(job.weights())
    mesh = init_device_mesh("cpu", (job.ranks,))
    gather = {
        "input_layouts": (Shard(1), None, None),
        "desired_input_layouts": (Replicate(), None, None),
    }
    block = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(**gather),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, block)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=logits, use_local_output=logits.is_replicate()
        ),
    }
    parallelize_module(model, mesh, ends)
    if logits.is_replicate():
        return job.loop(model, model)
    optimizer = job.adamw(model)

    def step(number: int) -> float:
        ids, labels = job.samples(number)
        with loss_parallel():
            loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.full_tensor().item()

    return step
