"""Causal grouped-query attention forward on a NeuronCore-v2, in NKI.

Scores are computed transposed, keys on the partitions, so that the weights come out of the scalar
engine as the stationary side of their product with the values: nothing is transposed::

                512 queries ->                        a column of ones sums the weights
    128 keys  [ scores = k q^T  ]  exp   [ weights ]      [ v | 1 ]      [ out | sum ]
    per step  [ PSUM, one bank  ] -----> [ SBUF    ] ---> 128 keys  ---> 4 x 128 queries in PSUM

Tiles of keys after the queries are never touched; of a tile on the diagonal only the queries from
its first key on are computed, and ``affine_select`` clears what lies above the diagonal.

**The exponent.**  A running maximum would cost a pass of the vector engine over every score.  The
weights are exp(scale * score - centre) instead, with one centre for a block of 512 queries that the
caller takes between bounds of all their scores (``nki_op.centres``).  Where the bounds are too far
apart for float32, ``exact`` is 1 and the block is computed again with running maxima (``_exact``),
in a loop of the device that runs ``exact`` times: the program is the same for all data.

**Documents.**  ``plain`` and ``mixed`` count, for a block of queries and a tile of keys, how often
each kind of step runs: plain where both lie in one document, mixed (scores of other documents get
-1e9) where some pairs do, neither where none does.

No part of this has been compiled by neuronx-cc or run on Trainium.  Source: Dao et al. 2022,
"FlashAttention"; Milakov and Gimelshein 2018, for the running maxima.
"""

import nki.isa as nisa
import nki.language as nl

from llamax.kernels.rope.nki_rotate import (
    hold_tables,
    load_rows,
    rotate,
    store_rows,
    take_tables,
    turn,
)

TILE = 128  # keys of a step, and queries of a row of tiles: the partitions of the core
BLOCK = 512  # queries of a block, and keys of an exact step: the float32 columns of a PSUM bank
HIDDEN = -1.0e9  # added to a score of another document; see llamax.config.hidden


def attention_forward(q_t, k_t, v, bias, exact):
    """out [B, H, S, D] and the log-sum-exp of scaled scores [B, H, 128, S / 128], float32.

    q_t [B, H, D, S], k_t [B, K, D, S], v [B, K, S, D]; bias [B, H, 128, blocks] is minus the centre
    of a block of queries, the same in all partitions; exact [B, H, blocks] int32.  Token 128 t + p
    of the log-sum-exp is at [p, t].
    """
    return _forward(q_t, k_t, v, bias, exact, None)


def attention_forward_documents(q_t, k_t, v, bias, exact, along, across, plain, mixed):
    """``attention_forward`` within documents.

    Document numbers, float32, along the free dimension and the same in all partitions, ``along``
    [B, 128, S], and along the partitions, ``across`` [B, 128, S / 128]; plain and mixed [B, blocks,
    S / 128] int32.
    """
    return _forward(q_t, k_t, v, bias, exact, (along, across, plain, mixed))


def rotated_attention_forward(qkv, cos, sin, bias, exact):
    """Attention of a projection's output, whose queries and keys are rotated as they are loaded.

    out [B, S, H, D], the log-sum-exp as ``attention_forward``, and qkv with rotated q and k, from
    qkv [B, S, (H + 2 K) D] and the halves cos, sin of the rotary tables, float32 [B, S, D / 2].
    """
    return _rotated(qkv, (cos, sin), bias, exact, None)


def rotated_attention_forward_documents(qkv, cos, sin, bias, exact, along, across, plain, mixed):
    """``rotated_attention_forward`` within documents, as ``attention_forward_documents``."""
    return _rotated(qkv, (cos, sin), bias, exact, (along, across, plain, mixed))


def _forward(q_t, k_t, v, bias, exact, documents):
    batch, heads, width, length = q_t.shape
    groups = heads // k_t.shape[1]
    tiles = length // TILE
    out = nl.ndarray((batch, heads, length, width), dtype=q_t.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((batch, heads, TILE, tiles), dtype=nl.float32, buffer=nl.shared_hbm)
    constants = identity_matrix(q_t.dtype), zero_matrix(q_t.dtype)
    for b in nl.affine_range(batch):
        numbers = load_documents(documents, b, length)
        for kv in nl.affine_range(k_t.shape[1]):
            keys = nl.ndarray((width, length), dtype=k_t.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=keys, src=k_t[b, kv])
            values = _load_values(v[b, kv], length)
            for member in nl.affine_range(groups):
                h = kv * groups + member
                seen = (keys, values, numbers, documents, b)
                limits = (bias[b, h], exact[b, h])
                _head((q_t[b, h], None, None), seen, limits, out[b, h], lse[b, h], constants)
    return out, lse


def _rotated(qkv, tables, bias, exact, documents):
    batch, length, features = qkv.shape
    heads, width = bias.shape[1], 2 * tables[0].shape[2]
    kv_heads = (features // width - heads) // 2
    groups = heads // kv_heads
    out = nl.ndarray((batch, length, heads, width), dtype=qkv.dtype, buffer=nl.shared_hbm)
    shape = (batch, heads, TILE, length // TILE)
    lse = nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm)
    rotated = nl.ndarray(qkv.shape, dtype=qkv.dtype, buffer=nl.shared_hbm)
    constants = identity_matrix(qkv.dtype), zero_matrix(qkv.dtype)
    for b in nl.affine_range(batch):
        numbers = load_documents(documents, b, length)
        held = hold_tables((tables[0][b], tables[1][b]), length)
        for kv in nl.affine_range(kv_heads):
            columns = nl.ds((heads + kv) * width, width)
            keys = nl.ndarray((width, length), dtype=qkv.dtype, buffer=nl.sbuf)
            for start in range(0, length, BLOCK):
                size = min(BLOCK, length - start)
                rows = (qkv[b, :, columns], rotated[b, :, columns])
                part = keys[:, nl.ds(start, size)]
                _turn_rotated(part, rows, held, start, size, constants[0])
            columns = nl.ds((heads + kv_heads + kv) * width, width)
            values = _load_values(qkv[b, :, columns], length)
            store_rows(rotated[b, :, columns], values[:, :, nl.ds(0, width)], 0)
            for member in nl.affine_range(groups):
                h = kv * groups + member
                columns = nl.ds(h * width, width)
                rows = (qkv[b, :, columns], rotated[b, :, columns])
                seen = (keys, values, numbers, documents, b)
                limits = (bias[b, h], exact[b, h])
                _head((None, rows, held), seen, limits, out[b, :, h, :], lse[b, h], constants)
    return out, lse, rotated


def _load_values(v, length):
    """Values of [S, D] in SBUF with a column of ones: [128, S / 128, D + 1]."""
    width = v.shape[1]
    values = nl.ndarray((TILE, length // TILE, width + 1), dtype=v.dtype, buffer=nl.sbuf)
    nisa.memset(dst=values[:, :, nl.ds(width, 1)], value=1.0)
    for j in nl.affine_range(length // TILE):
        rows = v[nl.ds(j * TILE, TILE), :]
        nisa.dma_copy(dst=values[:, j, nl.ds(0, width)], src=rows)
    return values


def _turn_rotated(dst, rows, held, start, size, identity):
    """Rotate tokens of rows[0] [S, D], write them to rows[1] and their transpose to [D, size]."""
    loaded = load_rows(rows[0], start, size)
    tables = take_tables(held, start, size)
    turned = rotate(loaded, tables, dst.dtype, 1.0, False)
    store_rows(rows[1], turned, start)
    turn(dst, turned, identity)


def _head(source, seen, limits, result, lse, constants):
    """Attention of one head: writes ``result`` [S, D] and its log-sum-exp [128, S / 128].

    Queries come transposed from source[0] [D, S], or from rows that are rotated first.
    """
    keys, values, numbers, documents, b = seen
    width, length = keys.shape
    tiles = length // TILE
    blocks = limits[0].shape[1]
    scale = width**-0.5
    centres = nl.ndarray((TILE, blocks), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=centres, src=limits[0])
    sums = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
    offsets = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
    for block in nl.affine_range(blocks):
        start = block * BLOCK
        size = min(BLOCK, length - start)
        queries = nl.ndarray((width, size), dtype=keys.dtype, buffer=nl.sbuf)
        if source[0] is not None:
            nisa.dma_copy(dst=queries, src=source[0][:, nl.ds(start, size)])
        else:
            _turn_rotated(queries, source[1], source[2], start, size, constants[0])
        centre = centres[:, nl.ds(block, 1)]
        work = (queries, keys, values, numbers, start, size, scale)
        _block(work, centre, sums, offsets, result, constants[1], documents, b, block)
        again = nisa.register_alloc()
        nisa.register_load(dst=again, src=limits[1][nl.ds(block, 1)])
        for _ in nl.dynamic_range(again):
            _exact(work, sums, offsets, result, constants[0])
    logs = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=logs, op=nl.log, data=sums)
    nisa.tensor_tensor(dst=logs, data1=logs, data2=offsets, op=nl.add)
    nisa.dma_copy(dst=lse, src=logs)


def _block(work, centre, sums, offsets, result, zeros, documents, b, block):
    """Attention of a block of queries with one centre.

    Writes ``result`` and, for the log-sum-exp, the sums of weights and the offsets of exponents.
    """
    values, start, size = work[2], work[4], work[5]
    rows = size // TILE
    first = start // TILE
    totals = []  # two rows of queries in a bank: [128, 2, D + 1]
    for _ in range((rows + 1) // 2):
        pair = (TILE, 2, values.shape[2])
        totals.append(nl.ndarray(pair, dtype=nl.float32, buffer=nl.psum))
    if documents is None:
        for row in range(rows):  # the first of these begins all sums, since its keys come first
            _step(work, centre, totals, first + row, row, True, False)
        for j in range(first):
            _step(work, centre, totals, j, 0, False, False)
    else:
        for row in range(rows):  # begin the sums with zeros, because the steps below may not run
            total = totals[row // 2][:, row % 2, :]
            nisa.nc_matmul(dst=total, stationary=zeros, moving=values[:, 0, :])
        for j in range(first + rows):
            row = max(0, j - first)
            for masked in (False, True):
                count = nisa.register_alloc()
                flags = documents[3] if masked else documents[2]
                nisa.register_load(dst=count, src=flags[b, block, nl.ds(j, 1)])
                for _ in nl.dynamic_range(count):
                    _step(work, centre, totals, j, row, j >= first, masked)
    for row in range(rows):
        total = totals[row // 2][:, row % 2, :]
        column = nl.ds(first + row, 1)
        _finish(total, sums[:, column], result, first + row)
        nisa.tensor_scalar(dst=offsets[:, column], data=centre, op0=nl.multiply, operand0=-1.0)


def _step(work, centre, totals, j, row, diagonal, masked):
    """Add the tile j of keys to the queries from ``row`` on."""
    queries, keys, values, numbers, start, size, scale = work
    columns = size - row * TILE
    key_tile = keys[:, nl.ds(j * TILE, TILE)]
    scores = nl.ndarray((TILE, columns), dtype=nl.float32, buffer=nl.psum)
    moving = queries[:, nl.ds(row * TILE, columns)]
    nisa.nc_matmul(dst=scores, stationary=key_tile, moving=moving)
    if masked:
        along = numbers[0][:, nl.ds(start + row * TILE, columns)]
        scores = masked_scores(scores, along, numbers[1][:, nl.ds(j, 1)], columns)
    weights = nl.ndarray((TILE, columns), dtype=queries.dtype, buffer=nl.sbuf)
    nisa.activation(dst=weights, op=nl.exp, data=scores, bias=centre, scale=scale)
    if diagonal:  # keep where query - key >= 0
        square = weights[:, nl.ds(0, TILE)]
        nisa.affine_select(
            dst=square,
            pattern=[[1, TILE]],
            offset=0,
            channel_multiplier=-1,
            on_true_tile=square,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
        )
    for t in range(row, size // TILE):
        stationary = weights[:, nl.ds((t - row) * TILE, TILE)]
        total = totals[t // 2][:, t % 2, :]
        nisa.nc_matmul(dst=total, stationary=stationary, moving=values[:, j, :])


def masked_scores(scores, along, across, columns):
    """The scores in SBUF, with ``HIDDEN`` added where the document numbers differ."""
    penalty = nl.ndarray((TILE, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=penalty,
        data=along,
        op0=nl.not_equal,
        operand0=across,
        op1=nl.multiply,
        operand1=HIDDEN,
        engine=nisa.engine.gpsimd,
    )
    hidden = nl.ndarray((TILE, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=hidden, data1=scores, data2=penalty, op=nl.add)
    return hidden


def _finish(total, column, result, tile):
    """Divide [128, D + 1] by its last column, write the tile of tokens, and copy the column."""
    width = total.shape[1] - 1
    inverse = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=total[:, nl.ds(width, 1)])
    nisa.tensor_copy(dst=column, src=total[:, nl.ds(width, 1)])
    mean = nl.ndarray((TILE, width), dtype=result.dtype, buffer=nl.sbuf)
    mixed = total[:, nl.ds(0, width)]
    nisa.tensor_scalar(dst=mean, data=mixed, op0=nl.multiply, operand0=inverse)
    nisa.dma_copy(dst=result[nl.ds(tile * TILE, TILE), :], src=mean)


def _exact(work, sums, offsets, result, identity):
    """Attention of a block of queries with running maxima, queries on the partitions.

    For each 512 keys: the new maximum m' = max(m, scores); weights exp(scale (score - m')); what
    was summed before is multiplied by exp(scale (m - m')).
    """
    queries, keys, values, numbers, start, size, scale = work
    width = values.shape[2]
    for row in range(size // TILE):
        tile = start // TILE + row
        end = (tile + 1) * TILE
        top = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
        total = nl.ndarray((TILE, width), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=top, value=HIDDEN * 3.0)
        nisa.memset(dst=total, value=0.0)
        stationary = queries[:, nl.ds(row * TILE, TILE)]
        for low in range(0, end, BLOCK):
            columns = min(BLOCK, end - low)
            product = nl.ndarray((TILE, columns), dtype=nl.float32, buffer=nl.psum)
            moving = keys[:, nl.ds(low, columns)]
            nisa.nc_matmul(dst=product, stationary=stationary, moving=moving)
            if numbers is None:
                scores = nl.ndarray((TILE, columns), dtype=nl.float32, buffer=nl.sbuf)
                nisa.tensor_copy(dst=scores, src=product)
            else:
                along = numbers[0][:, nl.ds(low, columns)]
                scores = masked_scores(product, along, numbers[1][:, nl.ds(tile, 1)], columns)
            if low + columns == end:  # keep where query - key >= 0
                square = scores[:, nl.ds(columns - TILE, TILE)]
                nisa.affine_select(
                    dst=square,
                    pattern=[[-1, TILE]],
                    offset=0,
                    channel_multiplier=1,
                    on_true_tile=square,
                    on_false_value=2.0 * HIDDEN,
                    cmp_op=nl.greater_equal,
                )
            _running(scores, top, total, values, low, columns, scale, identity)
        column = nl.ds(tile, 1)
        _finish(total, sums[:, column], result, tile)
        nisa.tensor_scalar(dst=offsets[:, column], data=top, op0=nl.multiply, operand0=scale)


def _running(scores, top, total, values, low, columns, scale, identity):
    """Add the keys [low, low + columns) to ``total`` and their maxima to ``top``."""
    width = values.shape[2]
    new = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=new, op=nl.maximum, data=scores, axis=1)
    nisa.tensor_tensor(dst=new, data1=new, data2=top, op=nl.maximum)
    minus = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=minus, data=new, op0=nl.multiply, operand0=-scale)
    kept = nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=kept, op=nl.exp, data=top, bias=minus, scale=scale)
    nisa.tensor_copy(dst=top, src=new)
    weights = nl.ndarray((TILE, columns), dtype=values.dtype, buffer=nl.sbuf)
    nisa.activation(dst=weights, op=nl.exp, data=scores, bias=minus, scale=scale)
    added = nl.ndarray((TILE, width), dtype=nl.float32, buffer=nl.psum)
    for c in range(columns // TILE):
        turned = nl.ndarray((TILE, TILE), dtype=nl.float32, buffer=nl.psum)
        square = weights[:, nl.ds(c * TILE, TILE)]
        nisa.nc_matmul(dst=turned, stationary=square, moving=identity)
        weights_t = nl.ndarray((TILE, TILE), dtype=values.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=weights_t, src=turned)
        moving = values[:, low // TILE + c, :]
        nisa.nc_matmul(dst=added, stationary=weights_t, moving=moving)
    nisa.scalar_tensor_tensor(
        dst=total, data=total, op0=nl.multiply, operand0=kept, op1=nl.add, operand1=added
    )


def identity_matrix(dtype):
    """An identity matrix [128, 128] in SBUF."""
    identity = nl.ndarray((TILE, TILE), dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=identity, value=1.0)
    nisa.affine_select(
        dst=identity,
        pattern=[[-1, TILE]],
        offset=0,
        channel_multiplier=1,
        on_true_tile=identity,
        on_false_value=0.0,
        cmp_op=nl.equal,
    )
    return identity


def zero_matrix(dtype):
    """Zeros [128, 128] in SBUF."""
    zeros = nl.ndarray((TILE, TILE), dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=zeros, value=0.0)
    return zeros


def load_documents(documents, b, length):
    """Document numbers in SBUF, [128, S] along and [128, S / 128] across; or None."""
    if documents is None:
        return None
    along = nl.ndarray((TILE, length), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=along, src=documents[0][b])
    across = nl.ndarray((TILE, length // TILE), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=across, src=documents[1][b])
    return along, across
