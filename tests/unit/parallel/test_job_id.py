"""The name of a job, as its launcher gives it."""

from __future__ import annotations

import pytest

from llamax.parallel.rendezvous import job_id


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, "local"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "local"),
        ({"TORCHELASTIC_RUN_ID": "a/b c"}, "a-b-c"),
        ({"SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "x"}, "4711"),
    ],
)
def test_a_job_has_the_name_its_launcher_gives(environ: dict[str, str], job: str) -> None:
    assert job_id(environ) == job
