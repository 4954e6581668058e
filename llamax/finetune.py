"""From a base in files to the model that is tuned, or was.

``build`` gives training its model: whole (``finetune.method=full``), or a frozen base with new
adapters (``lora``; ``qlora`` quantises the base as it is loaded).  ``load_tuned`` gives generation
and evaluation a base with the adapters of a PEFT folder or a run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llamax import lora
from llamax.checkpoint import adapters
from llamax.checkpoint.hub import open_source
from llamax.checkpoint.load import Checkpoint, Source, load_weights
from llamax.collectives import Axes, Axis
from llamax.config import Config, Finetune, Model
from llamax.errors import CheckpointError, ConfigError
from llamax.model import DTYPES, Llama


def build(
    config: Config, first: Source | None, fresh: bool, axes: Axes, device: torch.device
) -> Llama:
    """The model of a run on this rank, with the weights it starts from.

    ``first``: where first weights, or the frozen base, are.  ``fresh``: without them, draw some.
    """
    finetune, tp, seed = config.finetune, axes.tp, config.run.seed
    model = Llama(
        config.model,
        tp,
        sequence_parallel=config.parallel.sequence,
        dtype=DTYPES[config.run.dtype],
        device=device,
        recompute=config.run.recompute,
    )
    if first is not None:
        parameters = dict(model.named_parameters())
        load_weights(first, parameters, model.shards, tp.size, tp.rank, convert=True)
    elif fresh:
        model.init(seed)
    if finetune.method != "full":
        like = torch.empty(0, dtype=DTYPES[config.run.dtype], device=device)
        lora.adapt(model, finetune, like, seed)
        lora.init(model, seed)
    return model


def about(finetune: Finetune, base: Source | None) -> adapters.About | None:
    """What the checkpoints of a run say of its adapters; None where it trains a whole model.

    Raises CheckpointError where the base is an adapter itself.
    """
    if base is not None and adapters.about(base) is not None:
        raise CheckpointError(
            f"{base.folder} holds adapters, not a model; merge them with llamax merge first"
        )
    if finetune.method == "full":
        return None
    assert base is not None, "rules.adapters_have_a_base"
    return adapters.About(finetune, str(base.folder), adapters.fingerprint(base))


def check_resumed(finetune: Finetune, resumed: Checkpoint, base: Source | None) -> None:
    """Refuse to go on from a checkpoint of another method, other adapters or another base."""
    found = adapters.about(resumed)
    if (found is None) != (finetune.method == "full"):
        theirs = "full" if found is None else found.finetune.method
        raise ConfigError(
            f"finetune.method={finetune.method} but {resumed.folder} was trained with {theirs}; "
            "use that, or another run.folder"
        )
    if found is None:
        return
    for name in adapters.SHAPE:
        mine, theirs = getattr(finetune, name), getattr(found.finetune, name)
        if mine != theirs:
            raise ConfigError(
                f"finetune.{name}={mine} but {resumed.folder} was trained with {theirs}; "
                "use that, or another run.folder"
            )
    assert base is not None, "rules.adapters_have_a_base"
    found.check(resumed.folder, base)


def load_tuned(
    adapter: Path | str,
    base: Path | str | None = None,
    tp: Axis | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama:
    """A base with adapters beside it, for generation and evaluation.

    ``adapter``: a PEFT folder, or a run or checkpoint of adapters.  ``base``: where the adapter
    says, unless given.  ``dtype``: that of the base's files unless given.
    Raises CheckpointError where they do not belong together.
    """
    source, found = adapters.open_adapter(adapter)
    if base is None and not Path(found.base).is_dir():
        raise CheckpointError(
            f"{adapter} is an adapter of {found.base or 'an unnamed base'}, which is not here; "
            "give the base's folder"
        )
    frozen = open_source(base or found.base)
    about(Finetune(), frozen)
    found.check(source.folder, frozen)
    narrow = frozen.dtype("model.embed_tokens.weight") == torch.bfloat16
    kind = dtype or (torch.bfloat16 if narrow else torch.float32)
    model = Llama(Model.from_hub(frozen.model), tp, dtype=kind, device=device)
    degree, rank = model.tp.size, model.tp.rank
    parameters = dict(model.named_parameters())
    load_weights(frozen, parameters, model.shards, degree, rank, convert=True)
    lora.adapt(model, found.finetune, torch.empty(0, dtype=kind, device=device))
    load_weights(source, lora.trained(model), model.shards, degree, rank, convert=True)
    return model
