"""``llamax train --precompile``: compile every program of a run without training.

``neuron_parallel_compile torchrun ... -m llamax.train --config X --precompile`` runs the training
program with NEURON_EXTRACT_GRAPHS_ONLY=1: programs are collected and every result is zero.  So no
weights are loaded or drawn, no checkpoint is read, written or removed, no loss is judged, and the
run folder stays as it is; what remains are two steps and two batches of validation, which trace all
programs of the run.  Then the collected programs are compiled, many at once, into the cache, where
rank 0 has left a note of each: ``llamax.tools.audit.compile_cache``.

Source: AWS Neuron, "PyTorch NeuronX neuron_parallel_compile CLI".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from llamax.config.schema import Config
from llamax.parallel.rendezvous import Rendezvous, report_errors_once
from llamax.runtime.errors import BackendError
from llamax.runtime.hub_name import hub_name
from llamax.runtime.logging import logger
from llamax.tools.audit import compile_cache
from llamax.training.setup import loaders, open_run, prepare

EXTRACT, CACHE = "NEURON_EXTRACT_GRAPHS_ONLY", "NEURON_COMPILE_CACHE_URL"
STEPS, BATCHES = 2, 2


def asked(environ: Mapping[str, str]) -> bool:
    """Whether neuron_parallel_compile started this process."""
    return environ.get(EXTRACT) == "1"


def precompile(config: Config, where: Rendezvous, environ: Mapping[str, str]) -> None:
    """Trace and compile every program of ``config`` on this rank of the world ``where``."""
    run = config.run
    base = config.checkpoint.init_from
    there = bool(base) and (hub_name(base) is not None or Path(base).is_dir())
    tied = config.model.tie_word_embeddings and there  # or says so: see open_inputs
    base = base if config.finetune.method != "full" or tied else ""
    with TemporaryDirectory(prefix="llamax-") as folder:
        config = replace(
            config,
            run=replace(config.run, folder=folder),
            checkpoint=replace(config.checkpoint, resume="never", init_from=base),
        )
        with report_errors_once(where):
            backend, inputs, resolved = open_run(config, where)
        inputs = replace(inputs, first=None)  # only names of the base are read
        with backend.joined(resolved.mesh, run.timeout_s) as axes:
            job = prepare(resolved, backend, axes, inputs, draw=False)
            training, validation = loaders(job)
            for step in range(1, STEPS + 1):
                job.state.step(training.step(), step)
            if validation is not None and config.run.validates:
                job.state.validate(islice(validation.epoch(), BATCHES))
            backend.synchronize()
        if where.rank == 0 and config.run.backend == "xla":
            _note(resolved.config, where, environ)
    logger.info("precompiled: all programs of the run were traced; nothing was saved")


def _note(config: Config, where: Rendezvous, environ: Mapping[str, str]) -> None:
    """Leave a note of each program in the compile cache, where that is a folder."""
    cache = environ.get(CACHE, "")
    if not cache or "://" in cache:
        return
    try:
        found = compile_cache.hashes(config, where.world_size, where.local_world_size, environ)
    except BackendError as error:  # what was traced is compiled all the same
        logger.warning("%s; llamax doctor will not know what is in %s", error, cache)
        return
    compile_cache.write_notes(Path(cache), found, environ)
