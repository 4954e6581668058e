"""What ranks do over the store by which they met: no collective, no program, no device.

They get a value of rank 0, and wait for each other.
"""

from __future__ import annotations

from torch.distributed import Store  # type: ignore[attr-defined]
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


def wait_for_all(store: Store, name: str, size: int) -> None:
    """Wait until ``size`` ranks have called this with ``name``."""
    if store.add(name, 1) == size:
        store.set(f"{name}/all", "")
    store.wait([f"{name}/all"])


class StoreBarrier:
    """A barrier of all ranks over the store; every rank passes the same ones in the same order."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.size, self._passed = rendezvous.world_size, 0

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self._passed += 1
            wait_for_all(_get_default_store(), f"llamax/{self._passed}", self.size)
