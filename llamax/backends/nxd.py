"""neuronx-distributed (NxD) beside us: one set of process groups for both, where it is installed.

llamax needs nothing of NxD.  On a trn1 node that has it, a researcher may want one of its layers in
a model of ours; such a layer asks NxD's ``parallel_state`` for its groups.  So the groups are built
there first, from the same degrees, and ours are read back from it::

    Mesh(tp=4, dp=8) -> initialize_model_parallel(4, 1, 1) -> tp groups (0 8 16 24) (1 9 17 25) ..
                     -> Mesh(tp=4, dp=8, order=(0, 8, 16, 24, 1, ..))

``order`` carries NxD's placement, so whatever it does on a machine (four tensor ranks on trn1 are
not neighbours), both agree on which rank is which, or the run is refused before it starts.

Attention through NxD's flash kernel is a kernel like others: ``kernels/attention/nki_kernel.py``.
Source: neuronx_distributed 0.17, ``parallel_layers/parallel_state.py``.
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
def beside(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh as NxD places it, its groups standing while the block runs; ``mesh`` without NxD.

    The process group of the world is there already.
    Raises BackendError where NxD holds other groups than these degrees make.
    """
    if find_spec(PACKAGE) is None:
        yield mesh
        return
    try:
        state = import_module(f"{PACKAGE}.parallel_layers.parallel_state")
    except ImportError as error:  # the package index has a placeholder of this name
        logger.warning("%s is installed but does not load (%s); going on without", PACKAGE, error)
        yield mesh
        return
    ours = not state.model_parallel_is_initialized()
    if ours:
        state.initialize_model_parallel(
            tensor_model_parallel_size=mesh.tp,
            pipeline_model_parallel_size=mesh.pp,
            context_parallel_size=mesh.cp,
        )
    try:
        yield placed(mesh, state)
    finally:
        if ours:
            state.destroy_model_parallel()


def placed(mesh: Mesh, state: ModuleType) -> Mesh:
    """``mesh`` on the places that NxD's initialised ``parallel_state`` gave the ranks."""
    theirs: dict[str, Groups] = {
        axis: tuple(tuple(group) for group in getattr(state, getter)())
        for axis, getter in GROUPS.items()
    }
    order = tuple(rank for group in theirs["tp"] for rank in group)
    agreed = sorted(order) == [*range(mesh.world_size)]
    if agreed:
        mesh = replace(mesh, order=order)
    for axis, groups in theirs.items():
        if not agreed or {*groups} != {*mesh.groups(axis)}:
            raise BackendError(
                f"{PACKAGE} holds {axis} groups {groups[0]}, ... where tensor {mesh.tp}, context "
                f"{mesh.cp}, pipeline {mesh.pp}, data {mesh.dp} make {mesh.groups(axis)[0]}, ...; "
                "initialize it with these degrees, or leave that to llamax"
            )
    return mesh
