"""The environment and the secrets of a job, as doctor finds them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support.launch_jobs import job

from llamax.launch.jobfile import JobFile
from llamax.tools.doctor import Host
from llamax.tools.doctor.doctor import examine
from llamax.tools.doctor.finding import Finding, passed, unknown
from llamax.tools.doctor.job_files import environment, secrets


def local(folder: Path, **changes: str) -> JobFile:
    small = {"recipe": "demo", "instance": "local", "ranks_per_node": 2, "overrides": {}}
    return job(**small, storage={"mount": str(folder)}, **changes)


def test_another_environment_is_not_the_one_that_was_seen(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "it's b"):
        (folder / "bin").mkdir(parents=True)
    assert list(environment(local(tmp_path))) == []
    (here,) = environment(local(tmp_path, venv="a"), str(tmp_path / "a"))
    assert here == passed("venv", f"{tmp_path}/a, which runs doctor")
    (other,) = environment(local(tmp_path, venv=f"{tmp_path}/it's b"), "/usr")
    assert other == unknown(
        "venv",
        f"the packages above are those of /usr, and the job runs in {tmp_path}/it's b",
        f"'{tmp_path}/it'\"'\"'s b/bin/python3' -m llamax doctor",
    )
    (missing,) = environment(local(tmp_path, venv="~/venv"))
    assert (missing.level, missing.what) == ("error", f"there is no folder {tmp_path}/~/venv/bin")
    (elsewhere,) = environment(local(tmp_path / "none", venv="venv"))
    assert elsewhere == unknown("venv", f"{tmp_path}/none/venv is not here", "run doctor on a node")


def test_the_files_of_secrets_are_for_one_user(tmp_path: Path) -> None:
    path = tmp_path / "my key"

    def found() -> Finding:
        (one,) = secrets(job(secrets={"WANDB_API_KEY": str(path)}))
        return one

    assert found() == unknown(
        "secrets",
        f"secrets.WANDB_API_KEY: {path} cannot be read here (No such file or directory)",
        "run doctor where the job starts",
    )
    path.write_text("")
    assert (found().level, found().what) == ("error", f"secrets.WANDB_API_KEY: {path} is empty")
    path.write_text("sekrit")
    path.chmod(0o640)
    assert (found().level, found().fix) == ("warning", f"chmod 600 '{path}'")
    os.chmod(path, 0o600)
    assert found() == passed("secrets", f"secrets.WANDB_API_KEY in {path}")
    assert list(secrets(job())) == []


def test_doctor_looks_at_both(tmp_path: Path) -> None:
    this = local(tmp_path, venv=sys.prefix, secrets={"A": str(tmp_path)})
    names = [each.name for each in examine(Host(packages={"torch": "2.13.0"}), this, 0)]
    assert names.index("venv") < names.index("devices") < names.index("secrets")
