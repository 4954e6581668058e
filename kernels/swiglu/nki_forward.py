"""SwiGLU forward on a NeuronCore-v2, in NKI.

128 tokens lie on the partitions, their features along the free dimension::

    scalar engine   silu(gate)  in float32
    vector engine                            times up, rounded once

Each number crosses HBM once, and DMA bounds the kernel.  No part of this has been compiled by
neuronx-cc or run on Trainium.  Source: Shazeer 2020, equation 6.
"""

import nki.isa as nisa
import nki.language as nl

TILE = 128  # tokens: the partitions of the core
BLOCK = 2048  # features of a step


def swiglu_forward(gate_up):
    """silu(gate) * up [T, F] of the halves of gate_up [T, 2 F]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = nl.ndarray((tokens, width), dtype=gate_up.dtype, buffer=nl.shared_hbm)
    for i in nl.affine_range(tokens // TILE):
        place = nl.ds(i * TILE, TILE)
        for start in range(0, width, BLOCK):
            size = min(BLOCK, width - start)
            gate, up = load_halves(gate_up, place, start, size)
            activated = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=activated, op=nl.silu, data=gate)
            product = nl.ndarray((TILE, size), dtype=gate_up.dtype, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=product, data1=activated, data2=up, op=nl.multiply)
            nisa.dma_copy(dst=y[place, nl.ds(start, size)], src=product)
    return y


def load_halves(gate_up, place, start, size):
    """Features [start, start + size) of gate and up in SBUF, [128, size] each."""
    width = gate_up.shape[1] // 2
    halves = []
    for low in (start, width + start):
        half = nl.ndarray((TILE, size), dtype=gate_up.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=half, src=gate_up[place, nl.ds(low, size)])
        halves.append(half)
    return halves
