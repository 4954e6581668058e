"""Causal grouped-query attention backward on a NeuronCore-v2, in NKI.

Queries lie on the partitions, because the log-sum-exp and ``delta`` of a query are then operands of
the scalar engine; only ds must be turned, for dq::

    512 keys ->
    128 queries  [ p  = exp(scale q k^T - lse) ]  ---> dv += p^T dout     in PSUM, over all queries
                 [ ds = p (dout v^T - delta)   ]  ---> dk += ds^T q       in PSUM, over all queries
                         turned by the tensor engine -> dq += ds k        in SBUF, over all keys

The outer loop takes blocks of keys, the inner one the queries from there on.  The query heads of a
group add to the same dk and dv in SBUF.  A sequence longer than ``SEGMENT`` is taken in pairs of
segments that fit SBUF; dq waits in HBM in float32 between them.

``plain`` and ``mixed`` are those of ``nki_forward``, for a tile of queries and a block of keys.  A
score that counts is at most its log-sum-exp: exponents are above 0 only where a mask clears them.

No part of this has been compiled by neuronx-cc or run on Trainium.  Source: Dao et al. 2022,
"FlashAttention", section B.4.
"""

import nki.isa as nisa
import nki.language as nl

from llamax.kernels.attention.nki_forward import (
    BLOCK,
    TILE,
    identity_matrix,
    load_documents,
    masked_scores,
)

SEGMENT = 4096  # tokens


def attention_backward(q, dout, k, q_t, dout_t, k_t, v_t, minus_lse, minus_delta):
    """dq [B, H, S, D], dk and dv [B, K, S, D].

    q, dout [B, H, S, D], k [B, K, S, D]; q_t, dout_t [B, H, D, S], k_t, v_t [B, K, D, S]; minus the
    log-sum-exp and minus delta = rowsum(dout * out), float32 [B, H, 128, S / 128].
    """
    turned, statistics = (q_t, dout_t, k_t, v_t), (minus_lse, minus_delta)
    return _backward(q, dout, k, turned, statistics, None)


def attention_backward_documents(
    q, dout, k, q_t, dout_t, k_t, v_t, minus_lse, minus_delta, along, across, plain, mixed
):
    """``attention_backward`` within documents: plain and mixed [B, S / 128, blocks]."""
    turned, statistics = (q_t, dout_t, k_t, v_t), (minus_lse, minus_delta)
    return _backward(q, dout, k, turned, statistics, (along, across, plain, mixed))


def _backward(q, dout, k, turned, statistics, documents):
    scale = q.shape[3] ** -0.5
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    dq = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    dk = nl.ndarray(k.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    dv = nl.ndarray(k.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    identity = identity_matrix(q.dtype)
    zeros = nl.ndarray((TILE, TILE), dtype=q.dtype, buffer=nl.sbuf)
    nisa.memset(dst=zeros, value=0.0)
    for b in nl.affine_range(batch):
        numbers = load_documents(documents, b, length)
        for kv in nl.affine_range(k.shape[1]):
            waiting = []  # dq of a head between segments, float32
            if length > SEGMENT:
                for _ in range(groups):
                    shape = (TILE, length // TILE, width)
                    waiting.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.hbm))
            for low in range(0, length, SEGMENT):
                keys = _load_keys(k[b, kv], turned[2][b, kv], turned[3][b, kv], low, length)
                size = min(SEGMENT, length - low)
                shape = (TILE, size // TILE, width)
                key_sums = []
                for _ in range(2):  # dk and dv
                    total = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
                    nisa.memset(dst=total, value=0.0)
                    key_sums.append(total)
                for member in range(groups):
                    h = kv * groups + member
                    for start in range(low, length, SEGMENT):
                        queries = _load_queries(
                            (q[b, h], dout[b, h], turned[0][b, h], turned[1][b, h]),
                            (statistics[0][b, h], statistics[1][b, h]),
                            start,
                            min(SEGMENT, length - start),
                        )
                        part = nl.ds(start // TILE, min(SEGMENT, length - start) // TILE)
                        total = queries[6]
                        if low == 0:
                            nisa.memset(dst=total, value=0.0)
                        else:
                            nisa.dma_copy(dst=total, src=waiting[member][:, part, :])
                        for block in range(low, low + size, BLOCK):
                            work = (queries, keys, numbers, documents, b, scale)
                            _key_block(work, start, low, block, key_sums, identity, zeros)
                        if start == low:
                            _store(dq[b, h], total, start, scale)
                        else:
                            nisa.dma_copy(dst=waiting[member][:, part, :], src=total)
                _store(dk[b, kv], key_sums[0], low, scale)
                _store(dv[b, kv], key_sums[1], low, 1.0)
    return dq, dk, dv


def _load_keys(k, k_t, v_t, low, length):
    """Keys and values of a segment in SBUF: k^T, v^T [D, s], k [128, s / 128, D]."""
    size = min(SEGMENT, length - low)
    width = k.shape[1]
    turned_keys = nl.ndarray((width, size), dtype=k.dtype, buffer=nl.sbuf)
    turned_values = nl.ndarray((width, size), dtype=k.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=turned_keys, src=k_t[:, nl.ds(low, size)])
    nisa.dma_copy(dst=turned_values, src=v_t[:, nl.ds(low, size)])
    return turned_keys, turned_values, _load_rows(k, low, size)


def _load_rows(x, start, size):
    """Tokens [start, start + size) of [S, D] in SBUF: [128, size / 128, D]."""
    rows = nl.ndarray((TILE, size // TILE, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
    for i in range(size // TILE):
        nisa.dma_copy(dst=rows[:, i, :], src=x[nl.ds(start + i * TILE, TILE), :])
    return rows


def _load_queries(tensors, statistics, start, size):
    """A segment of a head in SBUF: q, dout, their transposes, -lse, -delta, and room for dq."""
    q, dout, q_t, dout_t = tensors
    loaded = [_load_rows(q, start, size), _load_rows(dout, start, size)]
    for x in (q_t, dout_t):
        tile = nl.ndarray((x.shape[0], size), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[:, nl.ds(start, size)])
        loaded.append(tile)
    for x in statistics:
        tile = nl.ndarray((TILE, size // TILE), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[:, nl.ds(start // TILE, size // TILE)])
        loaded.append(tile)
    shape = (TILE, size // TILE, q.shape[1])
    loaded.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf))
    return loaded


def _store(result, total, start, scale):
    """Write ``scale`` times [128, n, D] to the tokens of [S, D] from ``start`` on."""
    for i in range(total.shape[1]):
        rows = nl.ndarray((TILE, total.shape[2]), dtype=result.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=rows, data=total[:, i, :], op0=nl.multiply, operand0=scale)
        nisa.dma_copy(dst=result[nl.ds(start + i * TILE, TILE), :], src=rows)


def _key_block(work, start, low, block, key_sums, identity, zeros):
    """Add the pairs of the queries of a segment and the keys [block, block + 512) to all sums."""
    queries, keys, documents, b = work[0], work[1], work[3], work[4]
    size = min(BLOCK, low + keys[0].shape[1] - block)
    width = key_sums[0].shape[2]
    count = queries[0].shape[1]  # tiles of queries
    shape = (TILE, size // TILE, width)
    sums = []  # dk and dv of the block: a bank each
    for _ in range(2):
        sums.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum))
    first = max(0, (block - start) // TILE)  # the tile of queries at the block's first key
    order = range(first, count)
    if documents is not None:
        for total in sums:  # begin the sums with zeros, because the steps below may not run
            for c in range(size // TILE):
                nisa.nc_matmul(dst=total[:, c, :], stationary=zeros, moving=queries[0][:, 0, :])
    elif block >= start:  # the last tile on the diagonal sees all keys, so it begins all sums
        last = first + size // TILE - 1
        order = [last]
        for i in range(first, count):
            if i != last:
                order.append(i)
    for i in order:
        tile = start // TILE + i
        seen = min(size, (tile + 1) * TILE - block)  # keys up to the last query
        diagonal = block + seen == (tile + 1) * TILE
        position = (low, block, seen, i, tile, diagonal)
        if documents is None:
            _pair(work, position, False, sums, identity)
        else:
            for masked in (False, True):
                runs = nisa.register_alloc()
                flags = documents[3] if masked else documents[2]
                nisa.register_load(dst=runs, src=flags[b, tile, nl.ds(block // BLOCK, 1)])
                for _ in nl.dynamic_range(runs):
                    _pair(work, position, masked, sums, identity)
    for c in range(size // TILE):
        for kept, total in ((key_sums[0], sums[0]), (key_sums[1], sums[1])):
            part = kept[:, (block - low) // TILE + c, :]
            nisa.tensor_tensor(dst=part, data1=total[:, c, :], data2=part, op=nl.add)


def _pair(work, position, masked, sums, identity):
    """A tile of queries and the ``seen`` first keys of a block: adds to dk, dv and dq."""
    queries, keys, numbers, scale = work[0], work[1], work[2], work[5]
    q, dout, q_t, dout_t, minus_lse, minus_delta, dq = queries
    low, block, seen, i, tile, diagonal = position
    dtype = q.dtype
    scores = nl.ndarray((TILE, seen), dtype=nl.float32, buffer=nl.psum)
    columns = nl.ds(block - low, seen)
    rows = nl.ds(i * TILE, TILE)
    nisa.nc_matmul(dst=scores, stationary=q_t[:, rows], moving=keys[0][:, columns])
    if masked:
        along = numbers[0][:, nl.ds(block, seen)]
        scores = masked_scores(scores, along, numbers[1][:, nl.ds(tile, 1)], seen)
    p = nl.ndarray((TILE, seen), dtype=dtype, buffer=nl.sbuf)
    one = nl.ds(i, 1)
    nisa.activation(dst=p, op=nl.exp, data=scores, bias=minus_lse[:, one], scale=scale)
    if diagonal:  # keep where query - key >= 0
        square = p[:, nl.ds(seen - TILE, TILE)]
        nisa.affine_select(
            dst=square,
            pattern=[[-1, TILE]],
            offset=0,
            channel_multiplier=1,
            on_true_tile=square,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
        )
    product = nl.ndarray((TILE, seen), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=product, stationary=dout_t[:, rows], moving=keys[1][:, columns])
    ds = nl.ndarray((TILE, seen), dtype=dtype, buffer=nl.sbuf)
    nisa.activation(dst=ds, op=nl.copy, data=product, bias=minus_delta[:, one], scale=1.0)
    nisa.tensor_tensor(dst=ds, data1=ds, data2=p, op=nl.multiply)
    turned = nl.ndarray((TILE, seen), dtype=nl.float32, buffer=nl.psum)
    for c in range(seen // TILE):
        square = nl.ds(c * TILE, TILE)
        nisa.nc_matmul(dst=sums[1][:, c, :], stationary=p[:, square], moving=dout[:, i, :])
        nisa.nc_matmul(dst=sums[0][:, c, :], stationary=ds[:, square], moving=q[:, i, :])
        nisa.nc_matmul(dst=turned[:, square], stationary=ds[:, square], moving=identity)
    ds_t = nl.ndarray((TILE, seen), dtype=dtype, buffer=nl.sbuf)
    nisa.activation(dst=ds_t, op=nl.copy, data=turned)
    added = nl.ndarray((TILE, q.shape[2]), dtype=nl.float32, buffer=nl.psum)
    for c in range(seen // TILE):
        key_rows = keys[2][:, (block - low) // TILE + c, :]
        nisa.nc_matmul(dst=added, stationary=ds_t[:, nl.ds(c * TILE, TILE)], moving=key_rows)
    nisa.tensor_tensor(dst=dq[:, i, :], data1=added, data2=dq[:, i, :], op=nl.add)
