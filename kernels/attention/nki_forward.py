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
-1e30) where some pairs do, neither where none does.

No part of this has been compiled by neuronx-cc or run on Trainium.  Source: Dao et al. 2022,
"FlashAttention"; Milakov and Gimelshein 2018, for the running maxima.
"""

import nki.isa as nisa
import nki.language as nl

TILE = 128  # keys of a step, and queries of a row of tiles: the partitions of the core
BLOCK = 512  # queries of a block, and keys of an exact step: the float32 columns of a PSUM bank
HIDDEN = -1.0e30  # added to a score of another document


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


def _forward(q_t, k_t, v, bias, exact, documents):
    batch, heads, width, length = q_t.shape
    scale = width**-0.5
    groups = heads // k_t.shape[1]
    tiles = length // TILE
    out = nl.ndarray((batch, heads, length, width), dtype=q_t.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((batch, heads, TILE, tiles), dtype=nl.float32, buffer=nl.shared_hbm)
    identity = identity_matrix(q_t.dtype)
    zeros = nl.ndarray((TILE, TILE), dtype=q_t.dtype, buffer=nl.sbuf)
    nisa.memset(dst=zeros, value=0.0)
    for b in nl.affine_range(batch):
        numbers = load_documents(documents, b, length)
        for kv in nl.affine_range(k_t.shape[1]):
            keys = nl.ndarray((width, length), dtype=k_t.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=keys, src=k_t[b, kv])
            values = nl.ndarray((TILE, tiles, width + 1), dtype=v.dtype, buffer=nl.sbuf)
            nisa.memset(dst=values[:, :, nl.ds(width, 1)], value=1.0)
            for j in nl.affine_range(tiles):
                rows = v[b, kv, nl.ds(j * TILE, TILE), :]
                nisa.dma_copy(dst=values[:, j, nl.ds(0, width)], src=rows)
            for member in nl.affine_range(groups):
                h = kv * groups + member
                centres = nl.ndarray((TILE, bias.shape[3]), dtype=nl.float32, buffer=nl.sbuf)
                nisa.dma_copy(dst=centres, src=bias[b, h])
                sums = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
                offsets = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
                for block in nl.affine_range(bias.shape[3]):
                    start = block * BLOCK
                    size = min(BLOCK, length - start)
                    queries = nl.ndarray((width, size), dtype=q_t.dtype, buffer=nl.sbuf)
                    nisa.dma_copy(dst=queries, src=q_t[b, h, :, nl.ds(start, size)])
                    centre = centres[:, nl.ds(block, 1)]
                    work = (queries, keys, values, numbers, start, size, scale)
                    result = out[b, h]
                    _block(work, centre, sums, offsets, result, zeros, documents, b, block)
                    again = nisa.register_alloc()
                    nisa.register_load(dst=again, src=exact[b, h, nl.ds(block, 1)])
                    for _ in nl.dynamic_range(again):
                        _exact(work, sums, offsets, result, identity)
                logs = nl.ndarray((TILE, tiles), dtype=nl.float32, buffer=nl.sbuf)
                nisa.activation(dst=logs, op=nl.log, data=sums)
                nisa.tensor_tensor(dst=logs, data1=logs, data2=offsets, op=nl.add)
                nisa.dma_copy(dst=lse[b, h], src=logs)
    return out, lse


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


def load_documents(documents, b, length):
    """Document numbers in SBUF, [128, S] along and [128, S / 128] across; or None."""
    if documents is None:
        return None
    along = nl.ndarray((TILE, length), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=along, src=documents[0][b])
    across = nl.ndarray((TILE, length // TILE), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=across, src=documents[1][b])
    return along, across
