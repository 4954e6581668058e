"""Pipeline parallelism as data: which layers a stage holds, and the order of its work.

The layers are cut into stages, and the microbatches of a step pass through them one after the
other.  A schedule says what each stage does, in order: forwards, backwards and *swaps*.  A swap is
the only transfer: two neighbours meet, the lower one gives an output and gets a gradient, the upper
one gives a gradient and gets its input.  Four microbatches on three stages (F forward, B backward,
| a swap with the stage below or above)::

    stage 0   F0 |  F1 |  F2 |  B0  F3 |  B1   |  B2   |  B3
    stage 1      |  F0 |  F1 |  B0  |  F2 | B1 | F3 | B2 | B3 |
    stage 2            |  F0 B0 |   F1 B1 | F2 B2 | F3 B3 |

This is 1F1B (one forward, one backward): a stage with a stages above it has at most a + 1
microbatches in flight, and n microbatches take the time of n + p - 1 on p stages.  Since both
sides of an edge list the same swaps in the same order, no schedule can wait for ever, and no
transfer needs a tag.

Sources: Narayanan et al. 2019, "PipeDream"; Narayanan et al. 2021, "Efficient Large-Scale Language
Model Training on GPU Clusters", section 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Work(NamedTuple):
    """The forward or the backward pass of a microbatch."""

    kind: Literal["forward", "backward"]
    micro: int


class Swap(NamedTuple):
    """An exchange of stage ``edge`` with stage ``edge + 1``.

    ``up`` is the microbatch that goes to the upper stage, ``down`` the one with a gradient for the
    lower; None: nothing of use travels that way.
    """

    edge: int
    up: int | None
    down: int | None


Schedule = list[Work | Swap]


def schedule(stage: int, stages: int, micros: int) -> Schedule:
    """1F1B: what ``stage`` of ``stages`` does with ``micros`` microbatches, in order."""
    above, works = stages - 1 - stage, Schedule()

    def swap(edge: int, number: int) -> None:  # gradients lag by the lower stage's first forwards
        lag = stages - 1 - edge
        if 0 <= edge < stages - 1:
            up = number if number < micros else None
            works.append(Swap(edge, up, number - lag if number >= lag else None))

    for number in range(micros + above):
        swap(stage - 1, number)
        if number < micros:
            works.append(Work("forward", number))
        swap(stage, number)
        if number >= above:
            works.append(Work("backward", number - above))
    swap(stage - 1, micros + above)
    return works


def forwards(stage: int, stages: int, micros: int) -> Schedule:
    """The forward passes alone, as for validation."""
    works = Schedule()
    for micro in range(micros):
        if stage > 0:
            works.append(Swap(stage - 1, micro, None))
        works.append(Work("forward", micro))
        if stage < stages - 1:
            works.append(Swap(stage, micro, None))
    return works


def in_flight(stage: int, stages: int, micros: int) -> int:
    """The most microbatches between their forward and their backward pass at the same time."""
    return min(stages - stage, micros)


# --- layers --------------------------------------------------------------------------------------


def layers_of(stage: int, layers_per_stage: Sequence[int]) -> range:
    """The layers of a stage, counted over the whole model."""
    stops = (0, *accumulate(layers_per_stage))
    return range(stops[stage], stops[stage + 1])


def holds(held: range, layers: int, name: str) -> bool:
    """Whether the stage with ``held`` of all ``layers`` has the parameter ``name``.

    The first stage has the embedding, the last one the norm and the output matrix.
    """
    if found := LAYER.match(name):
        return int(found[1]) in held or (int(found[1]) >= layers and held.stop == layers)
    return held.start == 0 if name.startswith("model.embed_tokens.") else held.stop == layers
