"""Where adapters lie: in a folder of PEFT, or where optimum-neuron's trainer saved them in shards.

::

    OUT/adapter_NAME/adapter_config.json, adapter_shards/      at the end of a training
    OUT/checkpoint-N/adapter_NAME/...                          after step N
"""

from __future__ import annotations

from pathlib import Path

from llamax.runtime.errors import CheckpointError
from llamax.runtime.hub_files import ADAPTER_CONFIG, CONFIG_JSON

ADAPTER_SHARDS = "adapter_shards"


def holds_adapters(folder: Path) -> bool:
    """Whether a folder has the settings of PEFT, or adapters in shards of optimum-neuron."""
    return (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_SHARDS).is_dir()


def adapter_folder(path: Path) -> Path:
    """The folder of the adapters that optimum-neuron's trainer saved in ``path``, else ``path``.

    It is adapter_NAME, in ``path`` or in its newest complete checkpoint-N, or above ``path``.
    Raises CheckpointError if there are several.
    """
    if holds_adapters(path) or (path / CONFIG_JSON).is_file():
        return path
    if path.name == ADAPTER_SHARDS and path.is_dir():
        return path.parent
    found = sorted(path.glob(f"adapter_*/{ADAPTER_SHARDS}"))
    if not found:
        saved: dict[tuple[bool, int], list[Path]] = {}
        for shards in sorted(path.glob(f"checkpoint-*/adapter_*/{ADAPTER_SHARDS}")):
            number = shards.parent.parent.name.removeprefix("checkpoint-")
            if number.isdecimal():
                saved.setdefault(((shards / "done").is_file(), int(number)), []).append(shards)
        found = saved[max(saved)] if saved else []
    if len(found) > 1:
        names = ", ".join(shards.parent.name for shards in found)
        raise CheckpointError(
            f"{found[0].parent.parent} has several adapters ({names}); give the folder of one"
        )
    return found[0].parent if found else path
