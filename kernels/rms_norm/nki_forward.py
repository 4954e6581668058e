"""RMSNorm forward on a NeuronCore-v2, in NKI.

128 tokens lie on the partitions, their features along the free dimension::

    scalar engine   sum of squares  ->  r = rsqrt(sum / D + eps)  ->  x * r, rounded
    vector engine                                                     times the weight

The kernel reads x once and writes y once, and DMA bounds it.  No part of this has been compiled by
neuronx-cc or run on Trainium.  Source: Zhang and Sennrich 2019, equation 4.
"""

import nki.isa as nisa
import nki.language as nl

TILE = 128  # tokens: the partitions of the core


def rms_norm_forward(x, weight, eps):
    """y [T, D] and r [128, T / 128] from x [T, D], weight [128, D] (equal rows), eps [128, 1]."""
    tokens, width = x.shape
    y = nl.ndarray((tokens, width), dtype=x.dtype, buffer=nl.shared_hbm)
    inverses = nl.ndarray((TILE, tokens // TILE), dtype=nl.float32, buffer=nl.shared_hbm)
    factors = nl.ndarray((TILE, width), dtype=weight.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=factors, src=weight)
    small = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=small, src=eps)
    kept = nl.ndarray((TILE, tokens // TILE), dtype=nl.float32, buffer=nl.sbuf)
    for i in nl.affine_range(tokens // TILE):
        rows = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows, src=x[nl.ds(i * TILE, TILE), :])
        unit = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        total = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation_reduce(
            dst=unit, op=nl.square, data=rows, reduce_op=nl.add, reduce_res=total
        )
        inverse = kept[:, nl.ds(i, 1)]
        nisa.activation(dst=inverse, op=nl.rsqrt, data=total, bias=small, scale=1.0 / width)
        nisa.activation(dst=unit, op=nl.copy, data=rows, scale=inverse)
        scaled = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=scaled, data1=unit, data2=factors, op=nl.multiply)
        nisa.dma_copy(dst=y[nl.ds(i * TILE, TILE), :], src=scaled)
    nisa.dma_copy(dst=inverses, src=kept)
    return y, inverses
