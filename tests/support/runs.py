"""Runs on meshes that a test chooses, without a data set."""

from __future__ import annotations

from dataclasses import replace

from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.sizes import Share
from llamax.training.resolve import ResolvedRun, resolve


def on_mesh(config: Config, mesh: Mesh) -> ResolvedRun:
    """The run of ``config`` on the degrees of ``mesh``."""
    parallel = replace(
        config.parallel, tensor=mesh.tp, context=mesh.cp, data=0, zero_ranks=mesh.shard
    )
    alone = replace(parallel, pipeline=1, chunks=1, layers_per_stage="")
    config = replace(config, parallel=alone)
    run = resolve(config, mesh.world_size // mesh.pp)  # as one stage: any recomputation
    parallel = replace(parallel, pipeline=mesh.pp)
    ends = mesh.pp > 1 and (parallel.chunks > 1 or config.model.tie_word_embeddings)
    whole = replace(run.mesh, pp=mesh.pp, ends=ends)
    assert replace(whole, kv=mesh.kv, ends=mesh.ends) == mesh
    return replace(run, mesh=whole, config=replace(config, parallel=parallel))


def share(config: Config, mesh: Mesh) -> Share:
    """What a rank of ``mesh`` has of the run of ``config``."""
    return Share(on_mesh(config, mesh))
