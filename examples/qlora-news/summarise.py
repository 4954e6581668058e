"""Summarise the articles of a test file beside their references: python summarise.py run test.jsonl

Prints each summary, its reference and ROUGE-L, then the mean.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from llamax.inference.engine import open_model
from llamax.inference.prompts import PromptFormat
from llamax.inference.sampling import Sampling, complete, generate
from llamax.inference.text_metrics import rouge_l
from llamax.parallel.collectives import Solo

SYSTEM = "Summarise the article in one sentence."


def summarise(folder: str, test_file: str, limit: int = 10, tokens: int = 200) -> float:
    """Print summaries of the first ``limit`` articles; the mean ROUGE-L, 0 to 1."""
    loaded = open_model(Path(folder))  # a run of adapters knows its base
    model = loaded.build(Solo("tp"), torch.device("cpu"))
    tokenizer = loaded.tokenizer
    fields = {"instruction": "document"}
    prompts = PromptFormat(
        tokenizer, tokenizer.bos_id, "human-assistant", fields=fields, system=SYSTEM
    )
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    lines = Path(test_file).read_text(encoding="utf-8").splitlines()[:limit]
    scores = []
    for row in map(json.loads, lines):
        ids = prompts.ask(row).ids
        steps = generate(model, [ids], max_new_tokens=tokens, sampling=Sampling(), stop_ids=stops)
        (new,) = complete(steps)
        text = tokenizer.decode([token for token in new if token not in stops])
        scores.append(rouge_l(text, row["summary"]))
        print(f"{row['title']}\n  summary    {text.strip()}\n  reference  {row['summary']}")
        print(f"  ROUGE-L    {scores[-1]:.3f}")
    mean = sum(scores) / len(scores)
    print(f"mean ROUGE-L of {len(scores)} articles: {mean:.3f}")
    return mean


if __name__ == "__main__":
    summarise(sys.argv[1], sys.argv[2])
