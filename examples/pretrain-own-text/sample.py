"""Continue a prompt with a trained model: python sample.py hub "Once upon a time" """

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llamax.inference.engine import open_model
from llamax.inference.sampling import Sampling, complete, generate
from llamax.parallel.collectives import Solo


def sample(folder: str, prompt: str, tokens: int = 100, temperature: float = 0.8) -> str:
    """The text that the model in ``folder`` (a Hugging Face folder or a run) continues with."""
    loaded = open_model(Path(folder))
    model = loaded.build(Solo("tp"), torch.device("cpu"))
    ids = loaded.tokenizer.encode(prompt)
    if loaded.model.bos_token_id is not None:
        ids = [loaded.model.bos_token_id, *ids]
    sampling = Sampling(temperature=temperature, top_p=0.95)
    (new,) = complete(generate(model, [ids], max_new_tokens=tokens, sampling=sampling))
    return loaded.tokenizer.decode(new)


if __name__ == "__main__":
    print(sys.argv[2] + sample(sys.argv[1], sys.argv[2]))
