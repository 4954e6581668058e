"""Linear and cross-entropy forward on a NeuronCore-v2, in NKI: logits that never leave the core.

A tile of logits is a bank of PSUM, tokens on the partitions.  Three numbers of each token remain
of it, those that ranks with other rows of the vocabulary can add theirs to::

                      512 rows of W, turned by the tensor engine, in SBUF
                      [ W^T      D x 512 ]
                              |
    [ X^T  D x 128 ]  --> [ logits  128 x 512 ]  -->  m = max(m, logits)
      128 tokens          [ PSUM, one bank    ]       s = s exp(m_before - m) + sum exp(logits - m)
                                                      y = y + logit of the label, if it is here

The outer loop takes blocks of 512 rows, so the weight is read and turned once; the inner one all
tokens.  A last block or tile that is not full is a shorter slice: no row of it is made up.

**Labels** are float32 row numbers of this weight; -1 for a token whose label is elsewhere or does
not count.  **Padding** is added to the logits: 0, or ``HIDDEN`` at a row beyond the vocabulary.

No part of this has been compiled by neuronx-cc or run on Trainium.  Sources: Milakov and Gimelshein
2018, for the running maxima; Shoeybi et al. 2019, section 3, for the three numbers.
"""

import nki.isa as nisa
import nki.language as nl

from llamax.kernels.attention.nki_forward import HIDDEN, TILE, identity_matrix

BLOCK = 512  # rows of the vocabulary: the float32 columns of a PSUM bank
GROUP = 512  # tokens that are loaded together, of at most WIDE features; half as many of more
WIDE = 4096


def cross_entropy_forward(x_t, weight, labels):
    """Maximum, sum of exp(logit - maximum) and the label's logit: 3 x [128, T / 128] float32.

    x_t [D, T], weight [V, D]; labels [128, T / 128] float32.  Token 128 t + p is at [p, t].
    """
    return _forward(x_t, weight, labels, None)


def cross_entropy_forward_padded(x_t, weight, labels, padding):
    """``cross_entropy_forward`` of a padded vocabulary: padding [128, V] float32, equal rows."""
    return _forward(x_t, weight, labels, padding)


def _forward(x_t, weight, labels, padding):
    tokens, rows = x_t.shape[1], weight.shape[0]
    tiles = tokens // TILE
    identity = identity_matrix(weight.dtype)
    columns = column_numbers()
    numbers = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=numbers, src=labels)
    statistics = []
    for start in (3.0 * HIDDEN, 0.0, 0.0):
        kept = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=kept, value=start)
        statistics.append(kept)
    for low in range(0, rows, BLOCK):
        size = min(BLOCK, rows - low)
        constants = identity, columns
        _add_block((x_t, weight, padding), low, size, numbers, statistics, constants)
    results = []
    for kept in statistics:
        result = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=result, src=kept)
        results.append(result)
    return results[0], results[1], results[2]


def _add_block(inputs, low, size, numbers, statistics, constants):
    """Add the rows [low, low + size) of the vocabulary to the statistics of all tokens."""
    x_t, weight, padding = inputs
    weight_t = turned_rows(weight, low, size, constants[0])
    hidden = load_padding(padding, low, size)
    places = nl.ndarray(numbers.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=places, data=numbers, op0=nl.subtract, operand0=low * 1.0)
    group = GROUP if x_t.shape[0] <= WIDE else GROUP // 2
    for start in range(0, x_t.shape[1], group):
        features = load_features(x_t, start, min(group, x_t.shape[1] - start))
        for i in range(features.shape[2] // TILE):
            logits = tile_logits(features, i, weight_t, hidden)
            token = nl.ds(start // TILE + i, 1)
            kept = [each[:, token] for each in statistics]
            _add(logits, constants[1], places[:, token], kept)


def _add(logits, columns, place, statistics):
    """Add a tile of logits to the maximum, the sum and the label's logit of its 128 tokens."""
    top, total, at_label = statistics
    size = logits.shape[1]
    new = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=new, op=nl.maximum, data=logits, axis=1)
    nisa.tensor_tensor(dst=new, data1=new, data2=top, op=nl.maximum)
    minus = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=minus, data=new, op0=nl.multiply, operand0=-1.0)
    kept = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=kept, op=nl.exp, data=top, bias=minus)
    nisa.tensor_copy(dst=top, src=new)
    weights = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.sbuf)
    added = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation_reduce(
        dst=weights, op=nl.exp, data=logits, reduce_op=nl.add, reduce_res=added, bias=minus
    )
    nisa.scalar_tensor_tensor(
        dst=total, data=total, op0=nl.multiply, operand0=kept, op1=nl.add, operand1=added
    )
    chosen = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=chosen,
        data=columns[:, nl.ds(0, size)],
        op0=nl.equal,
        operand0=place,
        op1=nl.multiply,
        operand1=logits,
    )
    found = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=found, op=nl.add, data=chosen, axis=1)
    nisa.tensor_tensor(dst=at_label, data1=at_label, data2=found, op=nl.add)


def tile_logits(features, i, weight_t, hidden):
    """Logits of the tile i of the loaded tokens: [128, size], in PSUM, or in SBUF if padded."""
    size = weight_t.shape[2]
    tokens = nl.ds(i * TILE, TILE)
    logits = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.psum)
    for c in range(weight_t.shape[1]):
        nisa.nc_matmul(dst=logits, stationary=features[:, c, tokens], moving=weight_t[:, c, :])
    if hidden is None:
        return logits
    padded = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=padded, data1=logits, data2=hidden, op=nl.add)
    return padded


def turned_rows(weight, low, size, identity):
    """Rows [low, low + size) of [V, D], turned, in SBUF: [128, D / 128, size]."""
    width = weight.shape[1]
    turned = nl.ndarray((TILE, width // TILE, size), dtype=weight.dtype, buffer=nl.sbuf)
    for start in range(0, size, TILE):
        count = min(TILE, size - start)
        rows = nl.ndarray((count, width), dtype=weight.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows, src=weight[nl.ds(low + start, count), :])
        square = identity[nl.ds(0, count), nl.ds(0, count)]
        for c in range(width // TILE):
            columns = nl.ndarray((TILE, count), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(dst=columns, stationary=rows[:, nl.ds(c * TILE, TILE)], moving=square)
            nisa.activation(dst=turned[:, c, nl.ds(start, count)], op=nl.copy, data=columns)
    return turned


def load_features(x_t, start, size):
    """Tokens [start, start + size) of [D, T] in SBUF: [128, D / 128, size]."""
    chunks = x_t.shape[0] // TILE
    features = nl.ndarray((TILE, chunks, size), dtype=x_t.dtype, buffer=nl.sbuf)
    for c in range(chunks):
        source = x_t[nl.ds(c * TILE, TILE), nl.ds(start, size)]
        nisa.dma_copy(dst=features[:, c, :], src=source)
    return features


def load_padding(padding, low, size):
    """What is added to the logits of rows [low, low + size) in SBUF, [128, size]; or None."""
    if padding is None:
        return None
    hidden = nl.ndarray((TILE, size), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=hidden, src=padding[:, nl.ds(low, size)])
    return hidden


def column_numbers():
    """0 to 511 along the free dimension of every partition, float32, in SBUF."""
    numbers = nl.ndarray((TILE, BLOCK), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=numbers, pattern=[[1, BLOCK]], offset=0, channel_multiplier=0)
    columns = nl.ndarray((TILE, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=columns, src=numbers)
    return columns
