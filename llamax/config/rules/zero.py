"""Rules on what the data ranks share out: gradients (parallel.zero=2) and weights (3)."""

from __future__ import annotations

from collections.abc import Iterator

from llamax.config.rules import Rules, World
from llamax.config.schema import Config

RULES = Rules()


@RULES.reading("parallel.zero", "parallel.pipeline")
def zero_fits_pipeline(c: Config, world: World) -> Iterator[str]:
    zero, pipeline = c.parallel.zero, c.parallel.pipeline
    if zero > 1 and pipeline > 1:
        yield (
            f"parallel.zero={zero} sums gradients over the data ranks after each of a pipeline's "
            f"many microbatches, and parallel.pipeline={pipeline} divides them already; "
            "use parallel.zero=1"
        )


@RULES.reading("parallel.zero", "run.recompute", "run.backend", "finetune.method")
def gathered_weights_are_dropped(c: Config, world: World) -> Iterator[str]:
    mode, traced = c.run.recompute, c.run.backend == "xla"
    if c.parallel.zero == 3 and traced and mode != "full" and c.finetune.method == "full":
        yield (
            "parallel.zero=3 gathers the weights of a layer when it is used, but with "
            f"run.backend=xla and run.recompute={mode} a program would keep them all for backward; "
            "use run.recompute=full, or parallel.zero=2"
        )
