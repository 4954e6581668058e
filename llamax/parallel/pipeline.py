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
microbatches in flight, and n microbatches take the time of n + p - 1 on p stages.

*Split*, a backward computes the gradient of its input alone, which the stage below waits for, and
the gradients of weights (W) come later, while a swap is on its way; stage s puts them off by s
microbatches::

    stage 0   F0 |   F1 |     B0 W0 F2 |     B1 W1 F3 |  B2 W2 |  B3 W3
    stage 1      |F0 B0 | F1 B1 |W0 F2 B2 |W1 F3 B3 |W2 W3

If F, B and W take equal times, the wait is a third, and each stage keeps as much as p microbatches
in flight (ZB-H1 of Qi et al. 2023).

*Interleaved*, a stage holds several runs of layers, its *chunks*, and a microbatch goes round the
stages as often: chunk 0 of all stages, then chunk 1, and so on, so that the last stage has an edge
to the first.  Work comes in rounds of a forward and a backward of one chunk, which all stages begin
together; each round ends in the swaps.  With v chunks the wait of 1F1B is divided by v, for more
microbatches in flight.  *GPipe*, the plain schedule, does all forwards before the first backward.

Since both sides of an edge list the same swaps in the same order, no schedule can wait for ever,
and no transfer needs a tag.

Sources: Narayanan et al. 2019, "PipeDream"; Narayanan et al. 2021, "Efficient Large-Scale Language
Model Training on GPU Clusters", section 2.2; Huang et al. 2019, "GPipe"; Qi et al. 2023, "Zero
Bubble Pipeline Parallelism", section 2.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from llamax.parallel.mesh import EDGES

LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING = "model.embed_tokens.weight"


class Micro(NamedTuple):
    """A microbatch at one of the chunks of a stage."""

    number: int
    chunk: int = 0


class Work(NamedTuple):
    """The forward or the backward pass of a microbatch through a chunk, or what was put off."""

    kind: Literal["forward", "backward", "weights"]
    micro: Micro


class Swap(NamedTuple):
    """An exchange of stage ``edge`` with the stage above, which of the last stage is the first.

    ``up`` is the microbatch whose activation goes to the upper stage, ``down`` the one whose
    gradient goes to the lower, each at the receiver's chunk; None: nothing of use travels that way.
    """

    edge: int
    up: Micro | None
    down: Micro | None


Schedule = list[Work | Swap]


def schedule(
    stage: int, stages: int, micros: int, chunks: int = 1, split: bool = False
) -> Schedule:
    """1F1B, or interleaved 1F1B: what ``stage`` of ``stages`` does with ``micros`` microbatches.

    ``split``, without chunks alone: gradients of weights come while the swap below, which has sent
    the input's, is on its way; on stage 0 in the backward.
    """
    if chunks > 1:
        return _rounds(stage, stages, micros, chunks, turn=stages * chunks - 1)
    above, works = stages - 1 - stage, Schedule()

    def swap(edge: int, number: int) -> None:  # gradients lag by the lower stage's first forwards
        lag = stages - 1 - edge
        if 0 <= edge < stages - 1:
            up = Micro(number) if number < micros else None
            works.append(Swap(edge, up, Micro(number - lag) if number >= lag else None))

    def weights(first: int, stop: int) -> None:
        if split and stage:
            works.extend(Work("weights", Micro(number)) for number in range(max(first, 0), stop))

    for number in range(micros + above):
        swap(stage - 1, number)
        weights(number - 1 - above - stage, number - above - stage)
        if number < micros:
            works.append(Work("forward", Micro(number)))
        swap(stage, number)
        if number >= above:
            works.append(Work("backward", Micro(number - above)))
    swap(stage - 1, micros + above)
    weights(micros - 1 - stage, micros)
    return works


def gpipe(stage: int, stages: int, micros: int, chunks: int = 1) -> Schedule:
    """GPipe: all forward passes, then all backward passes."""
    return _rounds(stage, stages, micros, chunks, turn=_slots(stages, micros, chunks) + stages - 2)


def forwards(stage: int, stages: int, micros: int, chunks: int = 1) -> Schedule:
    """The forward passes alone, as for validation."""
    return _rounds(stage, stages, micros, chunks, turn=None)


def _slots(stages: int, micros: int, chunks: int) -> int:
    """The forward passes of a stage, if its last group of microbatches were full."""
    return -(-micros // stages) * stages * chunks


def _nth(place: int, stages: int, micros: int, chunks: int, backward: bool) -> Micro | None:
    """What a stage computes in the ``place``-th forward or backward pass, if anything.

    As many microbatches as there are stages go through a chunk before the next chunk's turn.
    """
    if not 0 <= place < _slots(stages, micros, chunks):
        return None
    group, place = divmod(place, stages * chunks)
    chunk, member = divmod(place, stages)
    number = group * stages + member
    return Micro(number, chunks - 1 - chunk if backward else chunk) if number < micros else None


def _rounds(stage: int, stages: int, micros: int, chunks: int, turn: int | None) -> Schedule:
    """Rounds of at most one forward, one backward and the swaps after them, all stages in step.

    The last stage goes backward for the first time in round ``turn``, or never.
    """
    rounds, works = (turn or 0) + _slots(stages, micros, chunks) + stages - 1, Schedule()

    def forward(stage: int, number: int) -> Micro | None:
        return _nth(number - stage, stages, micros, chunks, False)

    def backward(stage: int, number: int) -> Micro | None:
        first = rounds if turn is None else turn + stages - 1 - stage
        return _nth(number - first, stages, micros, chunks, True)

    edges = sorted(
        {stage, (stage - 1) % stages}, key=lambda edge: EDGES.index(edge_name(edge, stages))
    )
    for number in range(rounds):
        if micro := forward(stage, number):
            works.append(Work("forward", micro))
        if micro := backward(stage, number):
            works.append(Work("backward", micro))
        for edge in edges:
            upper = (edge + 1) % stages
            up, down = forward(edge, number), backward(upper, number)
            up, down = up and onward(up, edge, stages, chunks), down and back(down, upper)
            if up or down:
                works.append(Swap(edge, up, down))
    return works


def onward(micro: Micro, stage: int, stages: int, chunks: int) -> Micro | None:
    """``micro`` at the chunk after that of ``stage``; None after the last layer."""
    chunk = micro.chunk + (stage == stages - 1)
    return Micro(micro.number, chunk) if chunk < chunks else None


def back(micro: Micro, stage: int) -> Micro | None:
    """``micro`` at the chunk before that of ``stage``; None before the first layer."""
    chunk = micro.chunk - (stage == 0)
    return Micro(micro.number, chunk) if chunk >= 0 else None


def edge_name(edge: int, stages: int) -> str:
    """The name of the axis of an edge (``llamax.parallel.mesh``).

    Edges of one name have no stage in common.
    """
    return "ends" if edge == stages - 1 else EDGES[edge % 2]


def in_flight(stage: int, stages: int, micros: int, chunks: int = 1, split: bool = False) -> int:
    """The most microbatches between forward and backward at the same time, summed over chunks.

    ``split``: those whose gradients of weights are put off count as well.
    """
    above = stages - 1 - stage
    bound = above + 1 if chunks == 1 else 2 * above + (chunks - 1) * stages + 1
    bound = stages if split else bound
    return min(bound, micros * chunks)


# --- layers --------------------------------------------------------------------------------------


def layers_of(stage: int, stages: int, layers_per_chunk: Sequence[int]) -> tuple[range, ...]:
    """The layers of each chunk of a stage, counted over the whole model.

    ``layers_per_chunk`` counts the layers in the order of the model: those of chunk 0 of every
    stage, then those of chunk 1, and so on.
    """
    stops = (0, *accumulate(layers_per_chunk))
    chunks = range(stage, len(layers_per_chunk), stages)
    return tuple(range(stops[chunk], stops[chunk + 1]) for chunk in chunks)


def holds(held: Sequence[range], layers: int, tied: bool, name: str) -> bool:
    """Whether the stage with the chunks ``held`` of all ``layers`` has the parameter ``name``.

    The first stage has the embedding, the last one the norm and the output matrix; where this is
    ``tied`` to the embedding, both stages have it.
    """
    first, last = held[0].start == 0, held[-1].stop == layers
    if found := LAYER.match(name):
        number = int(found[1])
        return any(number in chunk for chunk in held) or (number >= layers and last)
    return first or (tied and last) if name.startswith("model.embed_tokens.") else last
