"""Ask a tuned model, with or without a context: python ask.py run "When?" "Built in 1887." """

from __future__ import annotations

import sys

from llamax.inference.generate import GenerationSettings, generate


def ask(model: str, question: str, context: str = "", tokens: int = 256) -> str:
    """The answer of the model to a question, put in the template of the training."""
    settings = GenerationSettings(
        max_new_tokens=tokens, temperature=0.0, template="dolly", context=context
    )
    (completion,) = generate(model, question, settings)
    return completion.text


if __name__ == "__main__":
    model, question, *context = sys.argv[1:]
    print(ask(model, question, " ".join(context)))
