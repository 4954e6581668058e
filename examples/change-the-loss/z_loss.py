"""Train a Llama with another loss: cross-entropy, and a penalty for large log-partitions (z-loss).

    torchrun --nproc-per-node 2 z_loss.py --config z-loss.toml

A training step calls ``loss`` of the model, which returns a sum over tokens and the number of them.
``llamax.train`` does the rest, with checkpoints, validation and logs, on any mesh.

Source of the z-loss: Chowdhery et al. 2022, "PaLM", section 5.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import llamax
from llamax.config.load import load_config
from llamax.model.llama import Llama
from llamax.ops import IGNORE_INDEX
from llamax.parallel.rendezvous import rendezvous

WEIGHT = 1e-2  # PaLM has 1e-4; in a short run that would hardly show


class ZLossLlama(Llama):
    """Cross-entropy + WEIGHT * log(Z)^2 for each counted token; Z is the sum of exp(logits)."""

    def loss(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of this rank's tokens in nats, and the number of them that count."""
        # The logits of the whole vocabulary, on every tensor rank: [B, S, V].
        logits_BSV = self.logits_of(self.hidden(ids_BS, positions_BS, **options)).float()
        counted_BS = labels_BS != IGNORE_INDEX
        cross_entropy = F.cross_entropy(
            logits_BSV.flatten(0, 1), labels_BS.flatten().long(), reduction="sum"
        )
        log_z_BS = logits_BSV.logsumexp(-1)
        penalty = (log_z_BS.square() * counted_BS).sum()
        return cross_entropy + WEIGHT * penalty, counted_BS.sum().float()


def main(arguments: Sequence[str]) -> None:
    where = rendezvous(os.environ)
    assert arguments[:1] == ["--config"], "z_loss.py --config FILE [--section.key=value]"
    config = load_config(arguments[1], arguments[2:], where.world_size)
    run = llamax.train(config, model_class=ZLossLlama)
    if where.rank == 0:
        print(f"loss with the penalty {run.loss:.4f}; saved: {run.checkpoint}")


if __name__ == "__main__":
    main(sys.argv[1:])
