"""Rules on what the data ranks share out: gradients (parallel.zero=2) and weights (3)."""

from __future__ import annotations

from collections.abc import Iterator

from llamax.config.constants import STATE_BLOCK, STATE_LEAST_ELEMENTS
from llamax.config.rules import Rules, World, divisors, use, ways
from llamax.config.rules.finetune import target_names
from llamax.config.schema import Config
from llamax.runtime.units import count

RULES = Rules()
OF_ZERO_RANKS = (
    "parallel.zero_ranks",
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.data",
)


@RULES.reading("parallel.zero", "parallel.pipeline")
def zero_fits_pipeline(c: Config, world: World) -> Iterator[str]:
    zero, pipeline = c.parallel.zero, c.parallel.pipeline
    if zero > 1 and pipeline > 1:
        yield (
            f"parallel.zero={zero} sums gradients over the data ranks after each of a pipeline's "
            f"many microbatches, and parallel.pipeline={pipeline} divides them already; "
            "use parallel.zero=1"
        )


@RULES.reading("parallel.zero_ranks", "parallel.zero")
def zero_ranks_have_a_stage(c: Config, world: World) -> Iterator[str]:
    if c.parallel.zero_ranks and c.parallel.zero == 0:
        stages = use(c, world, "parallel.zero", [1, 2, 3], named=True)
        yield (
            f"parallel.zero_ranks={c.parallel.zero_ranks} is how many ranks ZeRO cuts over, and "
            f"parallel.zero=0 cuts nothing{ways('parallel.zero_ranks=0', stages)}"
        )


@RULES.reading(*OF_ZERO_RANKS)
def zero_ranks_divide_data_ranks(c: Config, world: World) -> Iterator[str]:
    ranks, of = c.parallel.zero_ranks, data_ranks(c, world)
    if ranks and of % ranks:
        kinds = "data and context rank" if c.parallel.context > 1 else "data rank"
        yield (
            f"parallel.zero_ranks={ranks} does not divide the {count(of, kinds)}"
            f"{other_zero_ranks(c, world, of)}"
        )


@RULES.reading(*OF_ZERO_RANKS)
def zero_ranks_share_nodes(c: Config, world: World) -> Iterator[str]:
    ranks, tensor, node = c.parallel.zero_ranks, c.parallel.tensor, world.node_ranks
    if node is None or not ranks or (of := data_ranks(c, world)) in (0, ranks):
        return
    if of % ranks == 0 and node % (ranks * tensor) and ranks * tensor % node:
        yield (
            f"parallel.zero_ranks={ranks} x parallel.tensor={tensor} is "
            f"{count(ranks * tensor, 'rank')}, which neither divide a node of "
            f"{count(node, 'rank')} nor fill whole ones"
            f"{other_zero_ranks(c, world, of)}"
        )


def other_zero_ranks(c: Config, world: World, data: int) -> str:
    """What parallel.zero_ranks may be instead, where there are so many ``data`` ranks."""
    return ways(use(c, world, "parallel.zero_ranks", [0, *divisors(data)[1:]]))


def data_ranks(c: Config, world: World) -> int:
    """The data and context ranks of a stage; 0 where they are not known."""
    p = c.parallel
    left, over = divmod(world.ranks or 0, p.tensor * p.context * p.pipeline)
    return (p.data or (0 if over else left)) * p.context


@RULES.reading("parallel.zero", "run.recompute", "run.backend", "finetune.method")
def gathered_weights_are_dropped(c: Config, world: World) -> Iterator[str]:
    mode, traced = c.run.recompute, c.run.backend == "xla"
    if c.parallel.zero == 3 and traced and mode != "full" and c.finetune.method == "full":
        yield (
            "parallel.zero=3 gathers the weights of a layer when it is used, but with "
            f"run.backend=xla and run.recompute={mode} a program would keep them all for backward"
            f"{ways('run.recompute=full', use(c, world, 'parallel.zero', [2], named=True))}"
        )


@RULES.reading(
    "optim.state_bits",
    "parallel.tensor",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.vocab_size",
    "finetune.method",
    "finetune.r",
    "finetune.targets",
)
def state_blocks_are_whole(c: Config, world: World) -> Iterator[str]:
    tensor = c.parallel.tensor
    if c.optim.state_bits == 32 or tensor == 1:
        return
    for name, elements, piece in _pieces(c):
        whole_blocks = elements >= STATE_LEAST_ELEMENTS and elements % STATE_BLOCK == 0
        if whole_blocks and piece % STATE_BLOCK:
            yield (
                f"optim.state_bits=8 keeps moments in blocks of {STATE_BLOCK}, and parallel.tensor="
                f"{tensor} cuts {name} into pieces of {piece}; use optim.state_bits=32, or fewer "
                "tensor ranks"
            )


def _pieces(c: Config) -> Iterator[tuple[str, int, int]]:
    """Name, elements, and neighbouring elements on one tensor rank, of what tensor ranks cut."""
    model, tensor = c.model, c.parallel.tensor
    D, F = model.hidden_size, model.intermediate_size
    H, K = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    by_row = {"q_proj": H, "k_proj": K, "v_proj": K, "gate_proj": F, "up_proj": F}
    by_column = {"o_proj": H, "down_proj": F}
    width, chosen, matrices = D, {*by_row, *by_column}, ("", "")
    if c.finetune.method == "full":
        yield "embed_tokens", model.vocab_size * D, -(-model.vocab_size // tensor) * D
    else:
        width, chosen = c.finetune.r, {*target_names(c.finetune.targets)}
        matrices = ".lora_B", ".lora_A"
    for name, rows in by_row.items():
        if name in chosen:  # ranks share a key/value head, if there are too few
            share = max(rows // tensor, model.head_dim if name in ("k_proj", "v_proj") else 0)
            yield name + matrices[0], rows * width, share * width
    for name, columns in by_column.items():
        if name in chosen:
            yield name + matrices[1], columns * width, columns // tensor
