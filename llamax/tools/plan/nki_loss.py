"""Seconds and bytes of the NKI kernels of the loss, which keep the logits on the chip.

The seconds are those that the simulator's tally counts (kernels/simulator): the time of the busiest
engine, as if no instruction waited.  The formulas follow the loops of kernels/cross_entropy, whose
tally a test compares with them.
"""

from __future__ import annotations

from math import ceil

from llamax.config.constants import GRADIENT_BYTES, nki_loss_refusal
from llamax.config.constants import NKI_MULTIPLE as TILE
from llamax.config.hardware import Machine
from llamax.config.schema import Config
from llamax.runtime.units import show_bytes
from llamax.tools.plan.line import Line
from llamax.tools.plan.sizes import Share

TENSOR_HZ, VECTOR_HZ, SCALAR_HZ, DMA_BYTES_PER_S = 2.8e9, 1.12e9, 1.4e9, 272e9
BLOCK = 512  # rows of the vocabulary of a tile of logits
ROWS = 1024  # of the vocabulary, between which dX waits in HBM
SEGMENT, WIDE = 4096, 4096  # tokens, between which dW waits, of at most so many features


def loss_by_nki(share: Share, machine: Machine) -> bool:
    """Whether the loss runs by the NKI kernels of llamax on this stage."""
    return machine.backend == "xla" and share.projects and kernels_fit(share.config)


def kernels_fit(config: Config) -> bool:
    """Whether the NKI kernels compute the loss of a run."""
    data = config.data
    tokens = data.micro_batch * data.sequence_length // config.parallel.context
    narrow = config.run.dtype == "bfloat16"
    return narrow and not nki_loss_refusal(tokens, config.model.hidden_size)


def kernel_seconds(tokens: int, rows: int, width: int, trains: bool = True) -> tuple[float, float]:
    """Forward and backward over ``rows`` of the vocabulary; ``trains``: the weight is trained."""
    tiles, chunks, row_bytes = tokens / TILE, ceil(rows / TILE), 2 * width
    logits = rows * width * tokens / TILE**2 + rows * width / TILE  # and to turn the weight
    gradients = tiles * chunks * (TILE + width * (1 + trains))
    blocks, groups = ceil(rows / BLOCK), ceil(rows / ROWS)
    segments = ceil(tokens / (SEGMENT if width <= WIDE else SEGMENT // 2))
    forward_bytes = (rows + blocks * tokens) * row_bytes
    waiting = (8 * (groups - 1) + 2 + 2 * groups * trains) * tokens * width
    weight = 2 * segments * rows * row_bytes + trains * 4 * (2 * segments - 1) * rows * width
    # Maximum, sum and label of each logit: the vector engine, and with the scalar one PSUM's port.
    vector = tiles * (4 * rows + 5 * 64 * blocks) / VECTOR_HZ
    port = tiles * rows * (3 / VECTOR_HZ + 1 / SCALAR_HZ) + rows * width / TILE / SCALAR_HZ
    return (
        max(logits / TENSOR_HZ, forward_bytes / DMA_BYTES_PER_S, vector, port),
        max(
            (logits + gradients) / TENSOR_HZ,
            (blocks * tokens * row_bytes + waiting + weight) / DMA_BYTES_PER_S,
        ),
    )


def loss_seconds(share: Share, bandwidth: float) -> float:
    """A microbatch on one rank: both kernels, and the layout of the input, made for each."""
    width = share.model.hidden_size
    kernels = kernel_seconds(share.tokens, share.vocabulary, width, not share.tuned)
    return sum(kernels) + 2 * 2 * share.width * share.tokens * width / bandwidth


def loss_line(share: Share) -> Line:
    """The bytes of the loss: hidden states, sums that wait in HBM, the gradient of the head."""
    D, width, T, v = share.model.hidden_size, share.width, share.tokens, share.vocabulary
    hidden = (share.tokens_between + T) * D * width + (T * D * width if share.sequence else 0)
    turned, waiting = T * D * width, 4 * T * D if v > ROWS else 0
    padding = 4 * TILE * v if v * share.mesh.tp != share.model.vocab_size else 0
    head = 0 if share.tuned else GRADIENT_BYTES * v * D
    return Line(
        "loss",
        hidden + turned + waiting + padding + head,
        f"no logits by the NKI kernels; {show_bytes(head)} gradient of the head, "
        f"{show_bytes(turned + waiting + padding)} layouts and sums, "
        f"{show_bytes(hidden)} hidden state and its gradient",
    )
