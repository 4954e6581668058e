"""SwiGLU backward on a NeuronCore-v2, in NKI.

::

    scalar engine   silu(gate), silu'(gate)
    vector engine   dup = dy * silu(gate)        dgate = (dy * up) * silu'(gate)

in the dtype of the input, for which the vector engine takes a cycle of an element and not two, so
that DMA bounds the kernel.  No part of this has been compiled by neuronx-cc or run on Trainium.
Source: as in ``nki_forward``.
"""

import nki.isa as nisa
import nki.language as nl

from llamax.kernels.swiglu.nki_forward import BLOCK, TILE, load_halves


def swiglu_backward(dy, gate_up):
    """The gradient of gate_up [T, 2 F] from dy [T, F] and gate_up."""
    tokens, width = dy.shape
    dtype = gate_up.dtype
    gradient = nl.ndarray(gate_up.shape, dtype=dtype, buffer=nl.shared_hbm)
    for i in nl.affine_range(tokens // TILE):
        place = nl.ds(i * TILE, TILE)
        for start in range(0, width, BLOCK):
            size = min(BLOCK, width - start)
            gate, up = load_halves(gate_up, place, start, size)
            slopes = nl.ndarray((TILE, size), dtype=dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=slopes, src=dy[place, nl.ds(start, size)])
            activated = nl.ndarray((TILE, size), dtype=dtype, buffer=nl.sbuf)
            nisa.activation(dst=activated, op=nl.silu, data=gate)
            nisa.tensor_tensor(dst=activated, data1=activated, data2=slopes, op=nl.multiply)
            nisa.dma_copy(dst=gradient[place, nl.ds(width + start, size)], src=activated)
            derived = nl.ndarray((TILE, size), dtype=dtype, buffer=nl.sbuf)
            nisa.activation(dst=derived, op=nl.silu_dx, data=gate)
            nisa.tensor_tensor(dst=up, data1=up, data2=slopes, op=nl.multiply)
            nisa.tensor_tensor(dst=up, data1=up, data2=derived, op=nl.multiply)
            nisa.dma_copy(dst=gradient[place, nl.ds(start, size)], src=up)
    return gradient
