"""RMSNorm backward on a NeuronCore-v2, in NKI.

With u = x * r and g = dy * weight, both rounded to the dtype of x::

    dx      = r * (g - u * mean(g * u))     the mean along the free dimension, on the scalar engine
    dweight = sum over tokens of dy * u     by the tensor engine, in one bank of PSUM

A column of dweight is (dy * u)^T times ones: 128 features on the partitions, the sum over tokens.
No part of this has been compiled by neuronx-cc or run on Trainium.  Source: as in ``nki_forward``.
"""

import nki.isa as nisa
import nki.language as nl

from llamax.kernels.rms_norm.nki_forward import TILE


def rms_norm_backward(dy, x, weight, inverses):
    """dx [T, D] and dweight [128, D / 128] float32: feature 128 c + p is at [p, c].

    dy, x [T, D]; weight [128, D], the same rows; r [128, T / 128] of the forward.
    """
    tokens, width = x.shape
    chunks = width // TILE
    dx = nl.ndarray((tokens, width), dtype=x.dtype, buffer=nl.shared_hbm)
    dweight = nl.ndarray((TILE, chunks), dtype=nl.float32, buffer=nl.shared_hbm)
    factors = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=factors, src=weight)
    kept = nl.ndarray((TILE, tokens // TILE), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=kept, src=inverses)
    ones = nl.ndarray((TILE, 1), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    sums = nl.ndarray((TILE, chunks), dtype=nl.float32, buffer=nl.psum)
    for i in nl.affine_range(tokens // TILE):
        place = nl.ds(i * TILE, TILE)
        inverse = kept[:, nl.ds(i, 1)]
        rows = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows, src=x[place, :])
        slopes = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=slopes, src=dy[place, :])
        unit = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.activation(dst=unit, op=nl.copy, data=rows, scale=inverse)
        product = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=product, data1=slopes, data2=unit, op=nl.multiply)
        for c in range(chunks):
            features = product[:, nl.ds(c * TILE, TILE)]
            nisa.nc_matmul(dst=sums[:, nl.ds(c, 1)], stationary=features, moving=ones)
        gradient = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=gradient, data1=slopes, data2=factors, op=nl.multiply)
        along = nl.ndarray((TILE, width), dtype=x.dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=along, data1=product, data2=factors, op=nl.multiply)
        total = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation_reduce(dst=rows, op=nl.copy, data=along, reduce_op=nl.add, reduce_res=total)
        minus_mean = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=minus_mean, data=total, op0=nl.multiply, operand0=-1.0 / width)
        nisa.activation(dst=rows, op=nl.copy, data=unit, scale=minus_mean)
        nisa.tensor_tensor(dst=gradient, data1=gradient, data2=rows, op=nl.add)
        nisa.activation(dst=slopes, op=nl.copy, data=gradient, scale=inverse)
        nisa.dma_copy(dst=dx[place, :], src=slopes)
    columns = nl.ndarray((TILE, chunks), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=columns, src=sums)
    nisa.dma_copy(dst=dweight, src=columns)
    return dx, dweight
