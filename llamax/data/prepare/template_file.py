"""The prompt record of a dataset, and the chat template for the folders that are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamax.data.chat.encode import Encoder
from llamax.data.chat.record import PromptRecord, with_system
from llamax.data.chat.templates import make_sample
from llamax.data.prepare.chunks import Settings
from llamax.data.prepare.instruction_rows import InstructSettings
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.files import write_atomic
from llamax.runtime.hub_files import CHAT_TEMPLATE
from llamax.runtime.logging import logger


def write_template(out: Path, settings: Settings, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Write a template of conversations beside the data; the prompt record as JSON."""
    if not isinstance(settings, InstructSettings):
        return None
    encoder = Encoder(tokenizer, settings.bos, settings.eos)
    template = encoder.template(settings.template, settings.source)
    source = ""
    if template.chat:
        question = template.prompt(make_sample("Q", system=settings.system))[0].text
        bos = encoder.names.get(tokenizer.bos_id if tokenizer.bos_id is not None else -1, "")
        adds = settings.bos and not question.startswith(bos)  # what the template itself omits
        source = "{{ bos_token }}{# #}\n" * adds + settings.source
        inside = [name for name in tokenizer.special if name in settings.system]
        if inside:
            logger.warning(
                "the system text has %s inside, which training took as text; chat_template.jinja "
                "leaves the system text out, because other programs would take it as a token",
                inside[0],
            )
        else:
            source = with_system(source, settings.system)
        write_atomic(out / CHAT_TEMPLATE, source.encode())
    record = PromptRecord(
        settings.template,
        settings.source,
        settings.system,
        dict(settings.fields),
        tuple(encoder.turn_ends(template)),
        source,
    )
    return record.to_json()
