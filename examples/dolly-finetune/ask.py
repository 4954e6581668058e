"""Ask a tuned model, with or without a context: python ask.py run "When?" "Built in 1887." """

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llamax.inference.engine import open_model
from llamax.inference.prompts import PromptFormat
from llamax.inference.sampling import Sampling, complete, generate
from llamax.parallel.collectives import Solo


def ask(folder: str, question: str, context: str = "", tokens: int = 256) -> str:
    """The answer of the model in ``folder``, to a question in the template of the training."""
    loaded = open_model(Path(folder))
    model = loaded.build(Solo("tp"), torch.device("cpu"))
    prompts = PromptFormat(loaded.tokenizer, loaded.tokenizer.bos_id, "dolly", context=context)
    prompt = prompts.ask({"prompt": question})
    end = loaded.tokenizer.eos_id
    steps = generate(
        model,
        [prompt.ids],
        max_new_tokens=tokens,
        sampling=Sampling(),  # the most likely token
        stop_ids=[] if end is None else [end],
    )
    (new,) = complete(steps)
    return loaded.tokenizer.decode([token for token in new if token != end])


if __name__ == "__main__":
    folder, question, *context = sys.argv[1:]
    print(ask(folder, question, *context[:1]))
