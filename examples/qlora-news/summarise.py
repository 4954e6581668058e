"""Summarise the articles of a test file beside their references: python summarise.py run test.jsonl

Prints each summary, its reference and ROUGE-L, then the mean.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llamax.inference.generate import GenerationSettings, generate
from llamax.inference.text_metrics import rouge_l

SYSTEM = "Summarise the article in one sentence."


def summarise(model: str, test_file: str, limit: int = 10, tokens: int = 200) -> float:
    """Print summaries of the first ``limit`` articles; the mean ROUGE-L, 0 to 1.

    ``model`` may be a run of adapters: it knows its base.
    """
    settings = GenerationSettings(
        max_new_tokens=tokens,
        temperature=0.0,
        template="human-assistant",
        system=SYSTEM,
        fields={"instruction": "document"},
    )
    lines = Path(test_file).read_text(encoding="utf-8").splitlines()[:limit]
    rows = [json.loads(line) for line in lines]
    scores = []
    for row, completion in zip(rows, generate(model, rows, settings), strict=True):
        scores.append(rouge_l(completion.text, row["summary"]))
        print(f"{row['title']}\n  summary    {completion.text.strip()}")
        print(f"  reference  {row['summary']}\n  ROUGE-L    {scores[-1]:.3f}")
    mean = sum(scores) / len(scores)
    print(f"mean ROUGE-L of {len(scores)} articles: {mean:.3f}")
    return mean


if __name__ == "__main__":
    summarise(sys.argv[1], sys.argv[2])
