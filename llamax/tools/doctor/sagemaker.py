"""A job of SageMaker: what can be known of it on the machine that starts it.

Its containers have neither the folders nor the packages of this machine, so those are not looked
at; data and base are, where they are folders of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llamax.config.hardware import GIB
from llamax.launch.jobfile import JobFile
from llamax.runtime.units import count, show_bytes
from llamax.tools.doctor import run_inputs
from llamax.tools.doctor.finding import Finding, passed, unknown
from llamax.tools.doctor.storage import checkpoint_bytes
from llamax.training.resolve import ResolvedRun

LOCAL = "file://"


def disk(job: JobFile, run: ResolvedRun) -> Iterator[Finding]:
    """Whether the volume of an instance holds the checkpoints that the run keeps."""
    size, kept = checkpoint_bytes(run.config), run.most_checkpoints
    volume = job.sagemaker.volume_gib
    need = f"{count(kept, 'checkpoint')} of {show_bytes(size)}, sagemaker.volume_gib={volume}"
    if kept * size > volume * GIB:
        yield Finding(
            "warning",
            "disk",
            need,
            "a checkpoint that cannot be written ends the run; some instances have disks of their "
            "own instead",
            "raise sagemaker.volume_gib, or lower checkpoint.keep",
        )
    else:
        yield passed("disk", need)


def inputs(job: JobFile) -> Iterator[Finding]:
    """The findings about data and base; what is on S3 or in the image is only named."""
    config, given = job.config, job.sagemaker
    if given.data.startswith(LOCAL):
        path = given.data.removeprefix(LOCAL)
        data = replace(config.data, path=path, validation="")
        yield from run_inputs.data(replace(config, data=data), has_storage=True)
    else:
        yield unknown("dataset", f"{given.data} is not on this machine", listed(given.data))
    init_from = given.base.removeprefix(LOCAL) or config.checkpoint.init_from
    if given.base and not given.base.startswith(LOCAL):
        yield unknown("base", f"{given.base} is not on this machine", listed(given.base))
    elif os.path.isabs(init_from) and not given.base:
        where = "run doctor in the container"
        yield unknown("base", f"{init_from} is a folder of the image", where)
    else:
        start = replace(config.checkpoint, init_from=init_from, resume="never")
        yield from run_inputs.base(Path("/"), replace(config, checkpoint=start))


def listed(url: str) -> str:
    return f"aws s3 ls --recursive {url}"
