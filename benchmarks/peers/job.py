"""The input of every contender of a race: shape, weights and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llamax.config.model import ModelConfig
from llamax.config.rules.pipeline import evenly
from llamax.model.llama import Llama

LR, BETAS, EPS, DECAY = 3e-4, (0.9, 0.999), 1e-8, 0.01  # torch.optim.AdamW's, but for its lr
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[int], float]


@dataclass(frozen=True)
class Job:
    """One contender's run on one rank; the batch is that of all ranks together."""

    contender: str
    rank: int = 0
    ranks: int = 1
    port: int = 0
    threads: int = 2
    tensor: int = 1
    dtype: str = "float32"
    batch: int = 4
    length: int = 512
    layers: int = 8
    fused: bool = False
    keep_heap: bool = False
    sequence_parallel: bool = True
    recompute: str = "none"
    documents: int = 1
    chunk_tokens: int = 0
    bucket_bytes: int = 0
    zero: int = 1
    zero_ranks: int = 0
    pipeline: int = 1
    context: int = 1
    context_by: str = "gather"
    micros: int = 1
    vocab_size: int = 32000

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.length,
        )

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.context * self.pipeline)

    def samples(self, number: int) -> tuple[Tensor, Tensor]:
        """This data rank's ids and labels of step ``number``, skewed: there is to learn."""
        draws = torch.rand(
            self.batch, self.length + 1, generator=torch.Generator().manual_seed(number)
        )
        tokens = (draws**4 * self.model.vocab_size).long()
        share = self.batch // self.data
        mine = tokens[self.rank // (self.tensor * self.context) % self.data * share :][:share]
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """The number of layers of each pipeline stage."""
        return evenly(self.layers, self.pipeline)

    def join(self) -> None:
        """The process group of a peer."""
        dist.init_process_group(
            "gloo", f"tcp://127.0.0.1:{self.port}", rank=self.rank, world_size=self.ranks
        )

    def weights(self) -> dict[str, Tensor]:
        """The initial weights by their Hub names: llamax's, in fp32, unfused."""
        mine, found = Llama(self.model).init(0), {}
        for name, parameter in mine.state_dict().items():
            for part in mine.sharded_parameters().parts(name):
                whole = parameter
                if part.length >= 0:
                    whole = parameter.narrow(part.how.dim, part.start, part.length)
                found[part.name] = whole
        return found

    def adamw(self, model: nn.Module) -> torch.optim.AdamW:
        """torch's AdamW; norms do not decay, as everywhere."""
        weights = list(model.parameters())
        groups = [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY},
            {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
        ]
        fused = True if self.fused else None
        return torch.optim.AdamW(groups, LR, BETAS, EPS, fused=fused)

    def loop(self, model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Step:
        """The plain loop: logits, cross-entropy, backward, AdamW."""
        optimizer = self.adamw(model)

        def step(number: int) -> float:
            ids, labels = self.samples(number)
            loss = F.cross_entropy(logits(ids).flatten(0, 1).float(), labels.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step


def rename(weights: Mapping[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """``weights`` with every first of ``pairs`` in a name replaced by the second, in order."""
    found = {}
    for name, tensor in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = tensor
    return found
