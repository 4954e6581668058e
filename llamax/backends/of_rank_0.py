"""A value of rank 0 for all ranks, over the store by which they met: no collective, no program."""

from __future__ import annotations

from torch.distributed.distributed_c10d import _get_default_store

from llamax.parallel.rendezvous import Rendezvous


def of_rank_0(rendezvous: Rendezvous, name: str, value: int) -> int:
    """What rank 0 gives as ``value``; ``name`` differs in each call.  Waits for rank 0."""
    if rendezvous.world_size == 1:
        return value
    store = _get_default_store()
    if rendezvous.rank == 0:
        store.set(f"llamax/{name}", str(value))
    return int(store.get(f"llamax/{name}"))
