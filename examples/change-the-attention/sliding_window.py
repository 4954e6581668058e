"""Train a Llama in which every other layer attends to a window of recent tokens only.

    torchrun --nproc-per-node 4 sliding_window.py --config sliding-window.toml

The model of llamax takes attention as an argument: a function of this rank's heads.  Nothing else
changes, so tensor parallelism, sequence parallelism and ZeRO-1 work as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamax import ops
from llamax.backends import choose
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.data.dataset import open_dataset
from llamax.data.samples import Samples
from llamax.model.llama import Attend, Llama
from llamax.parallel.rendezvous import Rendezvous, rendezvous
from llamax.runtime.errors import ConfigError
from llamax.training.resolve import resolve
from llamax.training.step import TrainState

WINDOW = 64


def sliding_window(window: int, documents_BS: Tensor | None) -> Attend:
    """Attention for odd layers to the last ``window`` tokens, for even layers to all before.

    As everywhere in llamax, a token sees only tokens of its own document.
    """

    def attend(q_BShE: Tensor, k_BSkE: Tensor, v_BSkE: Tensor, layer: int) -> Tensor:
        if layer % 2 == 0:
            return ops.attention(q_BShE, k_BSkE, v_BSkE, documents_BS)
        place_S = torch.arange(q_BShE.shape[1], device=q_BShE.device)
        back_SS = place_S[:, None] - place_S[None, :]
        seen = (back_SS >= 0) & (back_SS < window)
        if documents_BS is not None:
            same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
            seen = (seen & same_BSS)[:, None]  # the same for every head
        q_BhSE, k_BkSE, v_BkSE = (x.transpose(1, 2) for x in (q_BShE, k_BSkE, v_BSkE))
        o_BhSE = F.scaled_dot_product_attention(
            q_BhSE, k_BkSE, v_BkSE, attn_mask=seen, enable_gqa=True
        )
        return o_BhSE.transpose(1, 2)

    return attend


class SlidingWindowLlama(Llama):
    """Llama with that attention in ``hidden``, which computes the layers of every loss."""

    def hidden(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        attend: Attend | None = None,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        attend = attend or sliding_window(WINDOW, documents_BS)
        return super().hidden(ids_BS, positions_BS, documents_BS, attend, *more, **options)


def train(config: Config, where: Rendezvous) -> list[float]:
    """Train on this rank; the loss of every step."""
    run = resolve(config, where.world_size)
    if run.mesh.cp > 1:
        raise ConfigError("the window needs whole sequences; leave parallel.context at 1")
    backend = choose(config.run.backend, where, config.run.threads)
    losses: list[float] = []
    with backend.joined(run.mesh, config.run.timeout_s) as axes:
        sequence = config.parallel.sequence
        model = SlidingWindowLlama(config.model, axes.tp, sequence_parallel=sequence)
        model.init(config.run.seed)
        state = TrainState.build(run, model, axes, backend)
        dataset = open_dataset(config.data.path, "read", config.model.vocab_size)
        samples = Samples(dataset.train, config.data, config.run.seed)
        loader = samples.loader(axes.data, 0, shuffle=True)
        for step in range(1, run.steps + 1):
            result = state.step(loader.step(), step)
            losses += backend.fetch([result.loss])
            if where.rank == 0 and step % config.run.log_every == 0:
                print(f"step {step}/{run.steps}  loss {losses[-1]:.4f}", flush=True)
    return losses


def main(arguments: Sequence[str]) -> None:
    where = rendezvous(os.environ)
    assert arguments[:1] == ["--config"], "sliding_window.py --config FILE [--section.key=value]"
    train(load_config(arguments[1], arguments[2:], where.world_size), where)


if __name__ == "__main__":
    main(sys.argv[1:])
