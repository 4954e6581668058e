"""Every tensor-parallel rank generates the text that one rank alone generates."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny
from support.world import Worlds, axes

from llamax.inference.sampling import Sampling, generate_tokens, join_steps
from llamax.model.llama import Llama
from llamax.parallel.mesh import Mesh

MODEL = tiny(initializer_range=0.2)  # 4 ranks pad its vocabulary to 64
PROMPTS = [[5, 9, 60], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
NEW = 40


def say(ranks: int, sampling: Sampling) -> list[list[int]]:
    tp = axes(Mesh(tp=ranks), max(1, ranks // 2)).tp if ranks > 1 else None
    model = Llama(MODEL, tp).init(0)
    with torch.no_grad():  # rows that pad the vocabulary would win every draw
        rows = model.head.dense().shape[0]
        first = model.tp.rank * rows
        model.head.dense()[max(0, MODEL.vocab_size - first) :] = 1e3
    return join_steps(generate_tokens(model, PROMPTS, max_new_tokens=NEW, sampling=sampling))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, seed=1), Sampling(1.0, top_k=20, top_p=0.9, seed=2)]
)
def test_ranks_generate_the_tokens_of_one_rank(
    worlds: Worlds, ranks: int, sampling: Sampling
) -> None:
    one = say(1, sampling)
    assert worlds(ranks).run(say, ranks, sampling) == [one] * ranks
    assert len({token for row in one for token in row}) > 8
