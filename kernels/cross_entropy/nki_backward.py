"""Linear and cross-entropy backward on a NeuronCore-v2, in NKI: logits are computed again.

The gradient p of the logits of a segment of tokens and a block of 1,024 rows of the vocabulary is
held in SBUF, in the dtype of the weight, and meets the weight and the tokens in two more products::

                              1,024 rows of W ->
    all tokens of     [ p = exp(logits - lse) - (row == label) ]  ---> dX += p W     turned p, PSUM
    the segment       [ SBUF, 128 tokens on the partitions     ]  ---> dW += p^T X   in PSUM

dW of a block is summed in PSUM over the tokens of a segment, dX of a tile of tokens over the rows
of a block.  Between blocks dX waits in HBM in float32, and dW between segments.

A token without loss has -lse = -1e9: its p is 0.  Labels and padding as in ``nki_forward``.

No part of this has been compiled by neuronx-cc or run on Trainium.  Source: Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", section 4.3.
"""

import nki.isa as nisa
import nki.language as nl

from llamax.kernels.attention.nki_forward import TILE, identity_matrix
from llamax.kernels.cross_entropy.nki_forward import (
    BLOCK,
    GROUP,
    WIDE,
    column_numbers,
    load_features,
    load_padding,
    tile_logits,
    turned_rows,
)

ROWS = 1024  # of the vocabulary, whose gradients are held in SBUF
SEGMENT = 4096  # tokens of at most WIDE features; half as many of more


def cross_entropy_backward(x, x_t, weight, labels, minus_lse):
    """dX [T, D] in the dtype of x and dW [V, D] in float32, of the summed loss.

    x [T, D], x_t [D, T], weight [V, D]; labels and minus the log-sum-exp over the vocabulary of all
    ranks, float32 [128, T / 128].
    """
    return _backward(x, x_t, weight, labels, minus_lse, None, True)


def cross_entropy_backward_padded(x, x_t, weight, labels, minus_lse, padding):
    """``cross_entropy_backward`` of a padded vocabulary: padding [128, V] float32, equal rows."""
    return _backward(x, x_t, weight, labels, minus_lse, padding, True)


def cross_entropy_backward_frozen(x, x_t, weight, labels, minus_lse):
    """dX alone."""
    return _backward(x, x_t, weight, labels, minus_lse, None, False)


def cross_entropy_backward_frozen_padded(x, x_t, weight, labels, minus_lse, padding):
    """dX alone, of a padded vocabulary."""
    return _backward(x, x_t, weight, labels, minus_lse, padding, False)


def _backward(x, x_t, weight, labels, minus_lse, padding, trains):
    tokens, width = x.shape
    rows, tiles = weight.shape[0], tokens // TILE
    segment = SEGMENT if width <= WIDE else SEGMENT // 2
    dx = nl.ndarray((tokens, width), dtype=x.dtype, buffer=nl.shared_hbm)
    waiting = dx  # dX between blocks of rows, float32
    if rows > ROWS:
        waiting = nl.ndarray((tokens, width), dtype=nl.float32, buffer=nl.hbm)
    dw = None
    if trains:
        dw = nl.ndarray((rows, width), dtype=nl.float32, buffer=nl.shared_hbm)
    identity = identity_matrix(weight.dtype)
    columns = column_numbers()
    statistics = []
    for source in (labels, minus_lse):
        kept = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=kept, src=source)
        statistics.append(kept)
    for low in range(0, rows, ROWS):
        size = min(ROWS, rows - low)
        target = dx if low + size == rows else waiting
        for start in range(0, tokens, segment):
            inputs = (x, x_t, weight, padding, statistics, columns, identity)
            count = min(segment, tokens - start) // TILE
            _segment(inputs, start, low, (TILE, count, size), (waiting, target, dw))
    return (dx, dw) if trains else dx


def _segment(inputs, start, low, shape, results):
    """Add a segment of tokens and a block of rows, whose p has this shape, to dX and dW."""
    x, weight, identity = inputs[0], inputs[2], inputs[6]
    waiting, target, dw = results
    p = nl.ndarray(shape, dtype=weight.dtype, buffer=nl.sbuf)
    for part in range(0, shape[2], BLOCK):
        _logit_gradients(p, inputs[1:], start, low, part)
    _input_gradient(p, weight, low, start, waiting, target, identity)
    if dw is not None:
        _weight_gradient(p, x, low, start, dw)


def _logit_gradients(p, work, start, low, part):
    """Write p of the rows [low + part, low + part + 512) and of the tokens of a segment."""
    x_t, weight, padding, statistics, columns, identity = work
    size = min(BLOCK, p.shape[2] - part)
    tokens = p.shape[1] * TILE
    weight_t = turned_rows(weight, low + part, size, identity)
    hidden = load_padding(padding, low + part, size)
    places = nl.ndarray(statistics[0].shape, dtype=nl.float32, buffer=nl.sbuf)
    first = (low + part) * 1.0
    nisa.tensor_scalar(dst=places, data=statistics[0], op0=nl.subtract, operand0=first)
    group = GROUP if x_t.shape[0] <= WIDE else GROUP // 2
    for low_token in range(0, tokens, group):
        features = load_features(x_t, start + low_token, min(group, tokens - low_token))
        for i in range(features.shape[2] // TILE):
            logits = tile_logits(features, i, weight_t, hidden)
            tile = low_token // TILE + i
            token = nl.ds(start // TILE + tile, 1)
            weights = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=weights, op=nl.exp, data=logits, bias=statistics[1][:, token])
            nisa.scalar_tensor_tensor(  # weights - (column == place)
                dst=p[:, tile, nl.ds(part, size)],
                data=columns[:, nl.ds(0, size)],
                op0=nl.equal,
                operand0=places[:, token],
                op1=nl.subtract,
                operand1=weights,
                reverse1=True,
            )


def _input_gradient(p, weight, low, start, waiting, target, identity):
    """Add p W of the rows from ``low`` on to dX of a segment, and write it to ``target``."""
    size, width = p.shape[2], weight.shape[1]
    rows = []  # of the weight, 128 on the partitions
    for first in range(0, size, TILE):
        count = min(TILE, size - first)
        loaded = nl.ndarray((count, width), dtype=weight.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=loaded, src=weight[nl.ds(low + first, count), :])
        rows.append(loaded)
    for tile in range(p.shape[1]):
        tokens = nl.ds(start + tile * TILE, TILE)
        turned = []  # p of a tile of tokens, rows on the partitions
        for c in range(len(rows)):
            count = rows[c].shape[0]
            columns = nl.ndarray((count, TILE), dtype=nl.float32, buffer=nl.psum)
            stationary = p[:, tile, nl.ds(c * TILE, count)]
            nisa.nc_matmul(dst=columns, stationary=stationary, moving=identity)
            kept = nl.ndarray((count, TILE), dtype=p.dtype, buffer=nl.sbuf)
            nisa.activation(dst=kept, op=nl.copy, data=columns)
            turned.append(kept)
        for feature in range(0, width, BLOCK):
            part = min(BLOCK, width - feature)
            place = nl.ds(feature, part)
            total = nl.ndarray((TILE, part), dtype=nl.float32, buffer=nl.psum)
            for c in range(len(rows)):
                nisa.nc_matmul(dst=total, stationary=turned[c], moving=rows[c][:, place])
            _store(total, waiting[tokens, place] if low > 0 else None, target[tokens, place])


def _weight_gradient(p, x, low, start, dw):
    """Add p^T X of a segment of tokens to the rows of dW from ``low`` on."""
    tiles, size, width = p.shape[1], p.shape[2], x.shape[1]
    for feature in range(0, width, BLOCK):
        part = min(BLOCK, width - feature)
        place = nl.ds(feature, part)
        features = nl.ndarray((TILE, tiles, part), dtype=x.dtype, buffer=nl.sbuf)
        for i in range(tiles):
            source = x[nl.ds(start + i * TILE, TILE), place]
            nisa.dma_copy(dst=features[:, i, :], src=source)
        for first in range(0, size, TILE):
            count = min(TILE, size - first)
            total = nl.ndarray((count, part), dtype=nl.float32, buffer=nl.psum)
            for i in range(tiles):
                stationary = p[:, i, nl.ds(first, count)]
                nisa.nc_matmul(dst=total, stationary=stationary, moving=features[:, i, :])
            result = dw[nl.ds(low + first, count), place]
            _store(total, result if start > 0 else None, result)


def _store(total, before, result):
    """Write ``total``, a tile in PSUM, plus ``before``, a part of a sum in HBM or None."""
    rows = nl.ndarray(total.shape, dtype=result.dtype, buffer=nl.sbuf)
    if before is None:
        nisa.tensor_copy(dst=rows, src=total)
    else:
        summed = nl.ndarray(total.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=summed, src=before)
        nisa.tensor_tensor(dst=rows, data1=total, data2=summed, op=nl.add)
    nisa.dma_copy(dst=result, src=rows)
