"""A run that tunes adapters beside a base, small enough for seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llamax.config.schema import FinetuneConfig
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train
from support.adapters import hub_folder
from support.tiny_run import config, make_dataset


def tuned_run(folder: Path) -> Path:
    """Make ``folder``/base and ``folder``/run, the run of its adapters; return ``folder``."""
    (folder / "data").mkdir()
    cfg = config(make_dataset(folder / "data"), folder / "run")
    base = hub_folder(folder / "base", cfg.model)
    cfg = dataclasses.replace(
        cfg,
        checkpoint=dataclasses.replace(cfg.checkpoint, init_from=str(base), every=0),
        finetune=FinetuneConfig(method="lora", r=4, dropout=0.1),
        optim=dataclasses.replace(cfg.optim, lr=3e-2),
    )
    train(cfg, Rendezvous())
    return folder
