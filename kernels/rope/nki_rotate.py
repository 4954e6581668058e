"""Rotary embedding of tiles in SBUF, for the NKI kernels that read what a projection wrote.

128 tokens lie on the partitions; pair i of a head is features i and i + E/2 of a row::

    y[:E/2] = x[:E/2] * cos - x[E/2:] * sin        float32 products and sums on the vector engine,
    y[E/2:] = x[E/2:] * cos + x[:E/2] * sin        rounded once; backward: the other sign

``turn`` transposes tokens for matrix products on the tensor engine.  No part of this has been
compiled by neuronx-cc or run on Trainium.  Source: Su et al. 2021, section 3.4.2.
"""

import nki.isa as nisa
import nki.language as nl

TILE = 128  # tokens: the partitions of the core
HELD = 8192  # tokens of a sequence up to which the tables stay in SBUF


def load_rows(x, start, size):
    """Tokens [start, start + size) of [S, E] in SBUF: [128, size / 128, E]."""
    rows = nl.ndarray((TILE, size // TILE, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
    for i in range(size // TILE):
        nisa.dma_copy(dst=rows[:, i, :], src=x[nl.ds(start + i * TILE, TILE), :])
    return rows


def store_rows(x, rows, start):
    """Write [128, n, E] to the tokens of [S, E] from ``start`` on."""
    for i in range(rows.shape[1]):
        nisa.dma_copy(dst=x[nl.ds(start + i * TILE, TILE), :], src=rows[:, i, :])


def hold_tables(tables, length):
    """The tables of a sequence, in SBUF if it is short, and whether they are there."""
    if length > HELD:
        return tables[0], tables[1], False
    return load_rows(tables[0], 0, length), load_rows(tables[1], 0, length), True


def take_tables(held, start, size):
    """Both tables of the tokens [start, start + size): 2 x [128, size / 128, E / 2]."""
    if held[2]:
        part = nl.ds(start // TILE, size // TILE)
        return held[0][:, part, :], held[1][:, part, :]
    return load_rows(held[0], start, size), load_rows(held[1], start, size)


def rotate(rows, tables, dtype, scale, backward):
    """``scale`` times the rotated [128, n, E], in ``dtype``; tables: two of [128, n, E / 2]."""
    count, half = rows.shape[1], rows.shape[2] // 2
    result = nl.ndarray((TILE, count, 2 * half), dtype=dtype, buffer=nl.sbuf)
    halves = nl.ds(0, half), nl.ds(half, half)
    for own in range(2):
        kept = nl.ndarray((TILE, count, half), dtype=nl.float32, buffer=nl.sbuf)
        crossed = nl.ndarray((TILE, count, half), dtype=nl.float32, buffer=nl.sbuf)
        for dst, part, table in ((kept, own, tables[0]), (crossed, 1 - own, tables[1])):
            nisa.scalar_tensor_tensor(
                dst=dst,
                data=rows[:, :, halves[part]],
                op0=nl.multiply,
                operand0=scale,
                op1=nl.multiply,
                operand1=table,
            )
        sign = nl.add if (own == 1) != backward else nl.subtract
        nisa.tensor_tensor(dst=result[:, :, halves[own]], data1=kept, data2=crossed, op=sign)
    return result


def turn(dst, rows, identity):
    """Write the transpose of the tokens [128, n, E] to [E, 128 n], in steps of a PSUM bank."""
    width = rows.shape[2]
    for low in range(0, rows.shape[1], 4):
        count = min(4, rows.shape[1] - low)
        turned = nl.ndarray((width, count * TILE), dtype=nl.float32, buffer=nl.psum)
        for i in range(count):
            columns = turned[:, nl.ds(i * TILE, TILE)]
            nisa.nc_matmul(dst=columns, stationary=rows[:, low + i, :], moving=identity)
        part = dst[:, nl.ds(low * TILE, count * TILE)]
        nisa.activation(dst=part, op=nl.copy, data=turned)
