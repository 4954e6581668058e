"""Continue a prompt with a trained model: python sample.py hub "Once upon a time" """

from __future__ import annotations

import sys

from llamax.inference.generate import GenerationSettings, generate


def sample(model: str, prompt: str, tokens: int = 100) -> str:
    """The text with which the model of a folder (Hugging Face, or a run) continues a prompt."""
    settings = GenerationSettings(max_new_tokens=tokens, temperature=0.8, top_p=0.95)
    (completion,) = generate(model, prompt, settings)
    return completion.text


if __name__ == "__main__":
    print(sys.argv[2] + sample(sys.argv[1], sys.argv[2]))
