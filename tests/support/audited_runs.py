"""Audits of tiny runs; needs torch-xla."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llamax.config.hardware import load_machine
from llamax.config.schema import Config, ParallelConfig
from llamax.parallel.mesh import Mesh
from llamax.tools.audit.auditor import audit_run
from llamax.tools.audit.report import AuditReport
from support.runs import on_mesh
from support.tiny_run import config

TP2_DP2 = Mesh(tp=2, dp=2)


def tiny(folder: Path, **run: Any) -> Config:
    cfg = config(folder, folder / "run", backend="xla", **run)
    return replace(cfg, parallel=ParallelConfig(tensor=2, bucket_bytes=8192))


def audited(cfg: Config, mesh: Mesh = TP2_DP2) -> AuditReport:
    return audit_run(on_mesh(cfg, mesh), load_machine("trn1.32xlarge"))
