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


@RULES.reading("parallel.zero", "run.backend")
def reduced_in_backward(c: Config, world: World) -> Iterator[str]:
    if c.parallel.zero > 1 and c.run.backend == "xla":
        yield (
            f"parallel.zero={c.parallel.zero} does not run on run.backend=xla yet; "
            "use parallel.zero=1"
        )
