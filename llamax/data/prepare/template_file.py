"""The chat template of a dataset: kept beside the data, for the folders that are exported."""

from __future__ import annotations

from pathlib import Path

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import make_sample
from llamax.data.prepare.chunks import Settings
from llamax.data.prepare.instruction_rows import InstructSettings
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.files import write_atomic


def write_template(out: Path, settings: Settings, tokenizer: Tokenizer) -> list[int]:
    """Write a template of conversations beside the data; the tokens that end its answers."""
    if not isinstance(settings, InstructSettings):
        return []
    encoder = Encoder(tokenizer, settings.bos, settings.eos)
    template = encoder.template(settings.template, settings.source)
    if template.chat:
        question = template.prompt(make_sample("Q"))[0].text
        bos = encoder.names.get(tokenizer.bos_id if tokenizer.bos_id is not None else -1, "")
        adds = settings.bos and not question.startswith(bos)  # what the template itself omits
        source = "{{ bos_token }}" * adds + settings.source
        write_atomic(out / "chat_template.jinja", source.encode())
    return encoder.turn_ends(template)
