"""Rules on adapters and their frozen base."""

from __future__ import annotations

from collections.abc import Iterator

from llamax.config.constants import NF4_BLOCK_WEIGHTS
from llamax.config.rules import Rules, World
from llamax.config.schema import Config

RULES = Rules()

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def target_names(targets: str) -> tuple[str, ...]:
    """The projections that ``finetune.targets`` names, as written."""
    if targets.strip() == "all-linear":
        return LINEAR
    return tuple(name.strip() for name in targets.split(","))


@RULES.reading("finetune.method", "finetune.targets")
def targets_match_modules(c: Config, world: World) -> Iterator[str]:
    unknown = [name for name in target_names(c.finetune.targets) if name not in LINEAR]
    if c.finetune.method != "full" and unknown:
        yield (
            f"finetune.targets={c.finetune.targets!r}: {unknown[0]!r} matches no module; "
            f"use all-linear or some of {', '.join(LINEAR)}"
        )


@RULES.reading("finetune.method", "checkpoint.init_from")
def adapters_have_a_base(c: Config, world: World) -> Iterator[str]:
    if c.finetune.method != "full" and not c.checkpoint.init_from:
        yield (
            f"finetune.method={c.finetune.method} trains adapters of a model, and "
            f"checkpoint.init_from is empty; use the folder of the base"
        )


@RULES.reading(
    "finetune.method",
    "finetune.quant",
    "parallel.tensor",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_attention_heads",
    "model.head_dim",
)
def blocks_fit_shares(c: Config, world: World) -> Iterator[str]:
    if (c.finetune.method, c.finetune.quant) != ("qlora", "nf4"):
        return
    model, tensor = c.model, c.parallel.tensor
    inputs = {
        "model.hidden_size": (model.hidden_size, 1),
        "model.intermediate_size": (model.intermediate_size, tensor),
        "model.num_attention_heads x head_dim": (
            model.num_attention_heads * model.head_dim,
            tensor,
        ),
    }
    for key, (width, cut) in inputs.items():
        if width % NF4_BLOCK_WEIGHTS:
            yield (
                f"{key}={width} is not a multiple of {NF4_BLOCK_WEIGHTS}, the block of "
                f"finetune.quant=nf4; use finetune.quant=int8 or finetune.method=lora"
            )
        elif width % (2 * cut):
            yield (
                f"parallel.tensor={tensor} leaves an odd share of {key}={width}, and "
                f"finetune.quant=nf4 packs weights in pairs; use finetune.quant=int8"
            )


@RULES.reading("checkpoint.also_hf", "finetune.method")
def adapters_are_no_model(c: Config, world: World) -> Iterator[str]:
    if c.checkpoint.also_hf and c.finetune.method != "full":
        yield (
            f"checkpoint.also_hf=true with finetune.method={c.finetune.method}: a checkpoint of "
            "adapters is no whole model; use checkpoint.also_hf=false, and llamax merge afterwards"
        )
