"""Free space for the checkpoints of a run, checked before its first step.

Every rank computes the same size from its own shares, without a collective: what the ranks write
together is every element of the model once, in each of the kinds that the optimizer keeps.
"""

from __future__ import annotations

import math

from llamax.checkpoint.save import Saver
from llamax.config.constants import MASTER_BYTES, MOMENTS_BYTES
from llamax.config.step_folders import list_checkpoints, step_of
from llamax.model.lora import num_parameters
from llamax.optim.zero import Zero
from llamax.runtime.errors import NoRoom
from llamax.runtime.files import free_bytes
from llamax.runtime.logging import logger
from llamax.runtime.units import show_bytes
from llamax.training.resolve import ResolvedRun


def checkpoint_bytes(saver: Saver, optimizer: Zero, whole: int | None = None) -> int:
    """Bytes of the tensors of one checkpoint, over all ranks, with its Hugging Face folder.

    ``whole`` is the number of trained weights over all stages of a pipeline, which keep equally
    many bytes of each.  Headers, the manifest and random states, some kilobytes a rank, are not
    counted.
    """
    parameters, weights, state, ours = saver.parameters, 0, 0, 0
    shapes = parameters.hub_shapes()

    def elements(name: str) -> int:
        """Those of a parameter over all tensor ranks, each counted once, without padding."""
        return sum(math.prod(shapes[part.name]) for part in parameters.parts(name))

    for group in optimizer.groups:
        trained = sum(map(elements, group.names))
        ours += trained
        weights += trained * group.key.dtype.itemsize
        state += trained * (MOMENTS_BYTES + (MASTER_BYTES if group.separate else 0))
    for name, tensor in saver.frozen.items():
        weights += elements(name) * tensor.dtype.itemsize
    total = weights * (2 if saver.config.also_hf else 1) + state
    return total if whole is None else total * whole // ours


def trained_weights(run: ResolvedRun) -> int | None:
    """The number of weights that all stages of a pipeline train together; None on one stage."""
    model, finetune = run.config.model, run.config.finetune
    if run.mesh.pp == 1:
        return None
    adapters = finetune.method != "full"
    return num_parameters(model, finetune) if adapters else model.num_parameters()


def check_room(
    saver: Saver, optimizer: Zero, run: ResolvedRun, step: int, main: bool = True
) -> None:
    """Raise NoRoom if the next checkpoint does not fit the disk; warn if a later one will not.

    ``step``: the last step done; ``main``: whether this rank logs.  With checkpoint.on_failure=
    continue there is a warning instead of the error.  Where the file system does not report its
    free space, nothing is checked.
    """
    free = free_bytes(saver.folder)
    if step >= run.steps or free is None:
        return
    size = checkpoint_bytes(saver, optimizer, trained_weights(run))
    settings = run.config.checkpoint
    if size > free:
        problem = (  # the same on every rank up to the semicolon, so that one rank reports it
            f"{saver.folder} has no room for a checkpoint of this run ({show_bytes(size)}); "
            f"{show_bytes(free)} is free"
        )
        if settings.on_failure == "stop":
            raise NoRoom(f"{problem}: make room, or set run.folder to a folder on a larger disk")
        if main:
            logger.warning("%s: training goes on without checkpoints", problem)
        return
    here = sum(step_of(path) <= step for path in list_checkpoints(saver.folder))
    more = run.most_checkpoints - here
    if main and more * size > free:
        logger.warning(
            "%s has no room for the %d checkpoints of %s that will be there at the same time; %s "
            "is free: make room%s",
            saver.folder,
            more,
            show_bytes(size),
            show_bytes(free),
            ""
            if settings.keep == 1
            else f", or lower checkpoint.keep={settings.keep}"
            if settings.keep
            else ", or set checkpoint.keep (0 keeps all)",
        )
