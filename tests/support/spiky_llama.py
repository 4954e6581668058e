"""A model whose loss spikes on chosen samples, and a data set that has such samples."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamax.config.schema import Config
from llamax.data.header import Header
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.model.llama import Llama
from llamax.parallel.mesh import ALONE
from support.models import TINY
from support.tiny_run import describe

MARK = TINY.vocab_size - 1  # only in samples with a spike


class SpikyLlama(Llama):
    """Multiplies the loss of microbatches with ``MARK`` by 30, without a branch."""

    def loss(self, ids: Tensor, labels: Tensor, *args: Any, **options: Any) -> Any:
        total, count = super().loss(ids, labels, *args, **options)
        marked = (ids == torch.full_like(ids, MARK)).any().to(total.dtype)
        return total * (marked * 29 + torch.ones_like(total)), count


def make_spiky(folder: Path, config: Config, steps: Collection[int], samples: int) -> Path:
    """A data set of ``samples`` samples, of which those of ``steps`` in ``config`` have MARK."""
    length, batch = config.data.sequence_length, config.data.global_batch
    random = np.random.default_rng(0)
    tokens = np.cumsum(random.integers(0, 2, samples * length + 1)) % (MARK - 1)
    folder.mkdir()
    fingerprint = describe(folder, b"a tokenizer")

    def write(name: str, tokens: np.ndarray) -> Path:
        path = folder / f"{name}.tokens"
        with TokenWriter(path, Header(fingerprint, TINY.vocab_size)) as writer:
            writer.add(tokens.astype(np.uint16), np.array([len(tokens)]), len(tokens))
        return path

    path = write("train", tokens)
    loader = Samples(TokenFile(path, "off"), config.data, config.run.seed).loader(
        ALONE, 0, shuffle=True
    )
    for step in steps:
        for sample in loader.sample_ids((step - 1) * batch):
            tokens[sample * length + 3] = MARK
    path.unlink()
    write("train", tokens)
    write("validation", tokens[: 4 * length + 1] % (MARK - 1))
    return folder
