"""One set of process groups for llamax and neuronx-distributed (NxD), where that is installed.

llamax does not need NxD.  Where a trn1 node has it, its layers can be used in a model of llamax;
they take their groups from NxD's ``parallel_state``.  So the groups are built there first, from the
same degrees, and the mesh is read back from it::

    Mesh(tp=4, dp=8) -> initialize_model_parallel(4, 1, 1) -> tp groups (0 8 16 24) (1 9 17 25) ..
                     -> Mesh(tp=4, dp=8, order=(0, 8, 16, 24, 1, ..))

``order`` is NxD's placement of ranks, which depends on the machine (four tensor ranks on trn1 are
not neighbours).  If the two disagree about a group, the run is refused before it starts.

The flash attention kernel of NxD is called in ``kernels/attention/nki_kernel.py``.
Source: neuronx_distributed 0.17 and 0.18, ``parallel_layers/parallel_state.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from llamax.parallel.mesh import Groups, Mesh
from llamax.runtime.errors import BackendError
from llamax.runtime.logging import logger

PACKAGE = "neuronx_distributed"
GROUPS = {
    "tp": "get_tensor_model_parallel_replica_groups",
    "pp": "get_pipeline_model_parallel_replica_groups",
    "dp": "get_data_parallel_replica_groups",
    "cp": "get_context_model_parallel_replica_groups",
}


@contextmanager
def shared_groups(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh in NxD's placement, with NxD's groups while the block runs; ``mesh`` without NxD.

    The process group of the world must exist.  Degrees that NxD cannot place go without it, too.
    Raises BackendError where NxD has other groups than these degrees make.
    """
    if find_spec(PACKAGE) is None:
        yield mesh
        return
    try:
        state = import_module(f"{PACKAGE}.parallel_layers.parallel_state")
    except ImportError as error:  # the public package index has a placeholder of this name
        logger.warning(
            "%s is installed but cannot be imported (%s); continuing without it", PACKAGE, error
        )
        yield mesh
        return
    initialize = not state.model_parallel_is_initialized()
    if initialize:
        try:
            state.initialize_model_parallel(
                tensor_model_parallel_size=mesh.tp,
                pipeline_model_parallel_size=mesh.pp,
                context_parallel_size=mesh.cp,
            )
        except RuntimeError as error:  # tensor 4 on trn1, unless data fills whole nodes
            logger.warning(
                "%s cannot place tensor %d, context %d, pipeline %d, data %d (%s); continuing "
                "without its groups",
                PACKAGE,
                *(mesh.tp, mesh.cp, mesh.pp, mesh.dp),
                " ".join(str(error).split()),
            )
            yield mesh
            return
    try:
        yield placed(mesh, state)
    finally:
        if initialize:
            state.destroy_model_parallel()


def placed(mesh: Mesh, state: ModuleType) -> Mesh:
    """``mesh`` with the ranks placed as in NxD's initialised ``parallel_state``."""
    nxd_groups: dict[str, Groups] = {
        axis: tuple(tuple(group) for group in getattr(state, getter)())
        for axis, getter in GROUPS.items()
    }
    order = tuple(rank for group in nxd_groups["tp"] for rank in group)
    agreed = sorted(order) == [*range(mesh.world_size)]
    if agreed:
        mesh = replace(mesh, order=order)
    for axis, groups in nxd_groups.items():
        if not agreed or {*groups} != {*mesh.groups(axis)}:
            raise BackendError(
                f"{PACKAGE} has {axis} groups {groups[0]}, ... where tensor {mesh.tp}, context "
                f"{mesh.cp}, pipeline {mesh.pp}, data {mesh.dp} make {mesh.groups(axis)[0]}, ...; "
                "initialize it with these degrees, or let llamax initialize it"
            )
    return mesh
