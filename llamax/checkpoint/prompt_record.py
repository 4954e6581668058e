"""The prompt record of a model in files: see ``llamax.data.chat.record``."""

from __future__ import annotations

from pathlib import Path

from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.hf_folder import read_json, write_json
from llamax.checkpoint.places import dataset_of
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.source import Source
from llamax.data.chat.record import PROMPT, PromptRecord
from llamax.runtime.hub_files import CHAT_TEMPLATE, PROMPT_JSON


def prompt_of(source: Source) -> PromptRecord | None:
    """How the model was trained to be prompted; None if it was not, or if no file says so.

    A checkpoint keeps it; an older one names the dataset that does.  Of a base with adapters that
    of the adapters comes first.
    """
    trained = source.last_trained
    if isinstance(trained, Checkpoint):
        found = PromptRecord.of(trained.state.get(PROMPT)) or _of_dataset(trained)
    else:
        path = trained.folder / PROMPT_JSON
        found = PromptRecord.of(read_json(path)) if path.is_file() else None
    if found is None and trained is not source:
        return prompt_of(source.untrained)
    return found


def _of_dataset(checkpoint: Checkpoint) -> PromptRecord | None:
    dataset = dataset_of(checkpoint.folder, checkpoint.state)
    if dataset is None or not (dataset / "dataset.json").is_file():
        return None
    return PromptRecord.of(read_json(dataset / "dataset.json").get(PROMPT))


def write_prompt(source: Source, folder: Path) -> None:
    """Write the prompt record of a model, if it has one, and its chat template in place of others.

    Raises CheckpointError or NoRoom if the disk refuses.
    """
    if (record := prompt_of(source)) is None:
        return
    write_json(folder / PROMPT_JSON, record.to_json())
    if record.chat_template:
        path, raw = folder / CHAT_TEMPLATE, record.chat_template.encode()
        with explain_write_errors(path, len(raw)):
            path.unlink(missing_ok=True)
            path.write_bytes(raw)
