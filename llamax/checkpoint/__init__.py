"""Training checkpoints: saved by any mesh of ranks, loaded by any other.

A researcher needs five names::

    saver = Saver(run / "checkpoints", axes, dict(model.named_parameters()), model.shards)
    saver.save(step, optimizer.owned(), state, model_hub, config_text)

    checkpoint = Checkpoint(newest_checkpoint(run))
    load_weights(checkpoint, dict(model.named_parameters()), model.shards, tp_degree, tp_rank)
    load_owned(checkpoint, optimizer.owned(), model.shards, tp_degree, tp_rank)
"""

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
