"""Training checkpoints: saved by any mesh of ranks, loaded by any other; and Hugging Face folders.

A researcher needs five names::

    saver = Saver(run / "checkpoints", axes, model.sharded_parameters())
    saver.save(step, optimizer.owned(), state, model_hub, config_text)
    saver.wait()  # on rank 0 the checkpoint is complete

    checkpoint = Checkpoint(newest_checkpoint(run))
    load_weights(checkpoint, model.sharded_parameters())
    load_owned(checkpoint, optimizer.owned(), model.sharded_parameters())

Tensors have the names and shapes of the Hub.  Everything that can be read is a ``Source`` of them,
so every writer works with every reader::

    hf_folder.HfFolder ---+                  +--> load           parameters and optimizer state
    reader.Checkpoint ----+--> source.Source +--> hf_writer      consolidate, merge, hf_beside
    peft.PeftFolder ------+                  +--> shard_hf, peft.export_adapter
    merged.Merged --------+                  +--> formats        NxD and Meta
    formats (other trainers) --> formats.convert --> a Hugging Face folder or a checkpoint

    save.Saver   one file per rank --> manifest --> retention (publish, delete)
    listing      the checkpoints of a run: newest, newest intact, a given one

Read in this order: ``runs`` (which elements a file holds, the arithmetic behind resharding),
``manifest`` (what is in a checkpoint folder), ``source`` and ``load``, ``save``.  Below them are
``safetensors_io`` (files), ``checksums`` (of blocks), ``slabs`` (streaming), ``atomic`` (files and
folders that appear complete) and ``lock``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from llamax.checkpoint.listing import find_checkpoint, newest_checkpoint
    from llamax.checkpoint.load import check_shapes, load_owned, load_weights
    from llamax.checkpoint.reader import Checkpoint
    from llamax.checkpoint.save import Saver
    from llamax.checkpoint.source import Source

__all__ = [
    "Checkpoint",
    "Saver",
    "Source",
    "check_shapes",
    "find_checkpoint",
    "load_owned",
    "load_weights",
    "newest_checkpoint",
]

_MODULES = {
    "Checkpoint": "reader",
    "Saver": "save",
    "Source": "source",
    "check_shapes": "load",
    "find_checkpoint": "listing",
    "load_owned": "load",
    "load_weights": "load",
    "newest_checkpoint": "listing",
}


def __getattr__(name: str) -> Any:  # imported at their first use: a manifest needs no torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
