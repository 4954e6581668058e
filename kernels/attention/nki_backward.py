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
    zero_matrix,
)
from llamax.kernels.rope.nki_rotate import (
    hold_tables,
    load_rows,
    rotate,
    store_rows,
    take_tables,
    turn,
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


def rotated_attention_backward(rotated, dout, out, minus_lse, cos, sin):
    """The gradient of qkv [B, S, (H + 2 K) D], before rotation.

    rotated: qkv with rotated q and k, of the forward; dout, out [B, S, H, D]; minus the log-sum-exp
    [B, H, 128, S / 128]; the halves cos, sin of the rotary tables, float32 [B, S, D / 2].
    """
    return _backward_rotated(rotated, dout, out, minus_lse, (cos, sin), None)


def rotated_attention_backward_documents(
    rotated, dout, out, minus_lse, cos, sin, along, across, plain, mixed
):
    """``rotated_attention_backward`` within documents: plain and mixed [B, S / 128, blocks]."""
    documents = (along, across, plain, mixed)
    return _backward_rotated(rotated, dout, out, minus_lse, (cos, sin), documents)


def _backward(q, dout, k, turned, statistics, documents):
    batch, heads, length = q.shape[0], q.shape[1], q.shape[2]
    dq = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    dk = nl.ndarray(k.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    dv = nl.ndarray(k.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    constants = identity_matrix(q.dtype), zero_matrix(q.dtype)
    groups = heads // k.shape[1]
    for b in nl.affine_range(batch):
        numbers = load_documents(documents, b, length)
        for kv in nl.affine_range(k.shape[1]):
            members = []
            for member in range(groups):
                h = kv * groups + member
                tensors = (q[b, h], dout[b, h], turned[0][b, h], turned[1][b, h])
                limits = (statistics[0][b, h], statistics[1][b, h])
                members.append((tensors, limits, dq[b, h]))
            of_keys = (k[b, kv], turned[2][b, kv], turned[3][b, kv], dk[b, kv], dv[b, kv])
            _group(members, of_keys, (numbers, documents, b), constants, None)
    return dq, dk, dv


def _backward_rotated(rotated, dout, out, minus_lse, tables, documents):
    batch, length, heads, width = dout.shape
    dqkv = nl.ndarray(rotated.shape, dtype=rotated.dtype, buffer=nl.shared_hbm)
    constants = identity_matrix(rotated.dtype), zero_matrix(rotated.dtype)
    kv_heads = (rotated.shape[2] // width - heads) // 2
    groups = heads // kv_heads
    for b in nl.affine_range(batch):
        numbers = load_documents(documents, b, length)
        held = hold_tables((tables[0][b], tables[1][b]), length)
        for kv in nl.affine_range(kv_heads):
            members = []
            for member in range(groups):
                h = kv * groups + member
                place = nl.ds(h * width, width)
                tensors = (rotated[b, :, place], dout[b, :, h, :], None, None)
                limits = (minus_lse[b, h], out[b, :, h, :])
                members.append((tensors, limits, dqkv[b, :, place]))
            place = nl.ds((heads + kv) * width, width)
            last = nl.ds((heads + kv_heads + kv) * width, width)
            of_keys = (rotated[b, :, place], None, rotated[b, :, last], dqkv[b, :, place])
            of_keys = (*of_keys, dqkv[b, :, last])
            _group(members, of_keys, (numbers, documents, b), constants, held)
    return dqkv


def _group(members, of_keys, seen, constants, held):
    """Gradients of a key/value head and of the query heads that share it.

    members: (q, dout and their transposes; minus the log-sum-exp and minus delta; dq) of each head;
    of_keys: k, k^T, v^T, dk, dv.  With ``held`` tables there are no transposes, v stands for v^T
    and the forward's output for minus delta.
    """
    k = of_keys[0]
    length, width = k.shape
    scale = width**-0.5
    waiting = []  # dq of a head between segments, float32
    if length > SEGMENT:
        for _ in range(len(members)):
            shape = (TILE, length // TILE, width)
            waiting.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.hbm))
    for low in range(0, length, SEGMENT):
        keys = _load_keys(of_keys, low, length, constants[0])
        size = min(SEGMENT, length - low)
        shape = (TILE, size // TILE, width)
        key_sums = []
        for _ in range(2):  # dk and dv
            total = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.memset(dst=total, value=0.0)
            key_sums.append(total)
        for member in range(len(members)):
            tensors, limits, result = members[member]
            for start in range(low, length, SEGMENT):
                room = min(SEGMENT, length - start)
                queries = _load_queries(tensors, limits, start, room, constants[0])
                part = nl.ds(start // TILE, room // TILE)
                total = queries[6]
                if low == 0:
                    nisa.memset(dst=total, value=0.0)
                else:
                    nisa.dma_copy(dst=total, src=waiting[member][:, part, :])
                for block in range(low, low + size, BLOCK):
                    work = (queries, keys, seen[0], seen[1], seen[2], scale)
                    _key_block(work, start, low, block, key_sums, constants[0], constants[1])
                if start == low:
                    _store(result, total, start, scale, held)
                else:
                    nisa.dma_copy(dst=waiting[member][:, part, :], src=total)
        _store(of_keys[3], key_sums[0], low, scale, held)
        _store(of_keys[4], key_sums[1], low, 1.0, None)


def _load_keys(of_keys, low, length, identity):
    """Keys and values of a segment in SBUF: k^T, v^T [D, s], k [128, s / 128, D]."""
    k, k_t, values = of_keys[0], of_keys[1], of_keys[2]
    size = min(SEGMENT, length - low)
    width = k.shape[1]
    turned_keys = nl.ndarray((width, size), dtype=k.dtype, buffer=nl.sbuf)
    turned_values = nl.ndarray((width, size), dtype=k.dtype, buffer=nl.sbuf)
    rows = load_rows(k, low, size)
    if k_t is not None:
        nisa.dma_copy(dst=turned_keys, src=k_t[:, nl.ds(low, size)])
        nisa.dma_copy(dst=turned_values, src=values[:, nl.ds(low, size)])
    else:
        turn(turned_keys, rows, identity)
        for start in range(0, size, BLOCK):
            part = min(BLOCK, size - start)
            columns = turned_values[:, nl.ds(start, part)]
            turn(columns, load_rows(values, low + start, part), identity)
    return turned_keys, turned_values, rows


def _load_queries(tensors, limits, start, size, identity):
    """A segment of a head in SBUF: q, dout, their transposes, -lse, -delta, and room for dq."""
    q, dout, q_t, dout_t = tensors
    loaded = [load_rows(q, start, size), load_rows(dout, start, size)]
    for x, rows in ((q_t, loaded[0]), (dout_t, loaded[1])):
        tile = nl.ndarray((q.shape[1], size), dtype=q.dtype, buffer=nl.sbuf)
        if x is not None:
            nisa.dma_copy(dst=tile, src=x[:, nl.ds(start, size)])
        else:
            turn(tile, rows, identity)
        loaded.append(tile)
    part = nl.ds(start // TILE, size // TILE)
    for number in range(2):
        tile = nl.ndarray((TILE, size // TILE), dtype=nl.float32, buffer=nl.sbuf)
        if number == 0 or q_t is not None:
            nisa.dma_copy(dst=tile, src=limits[number][:, part])
        else:
            _minus_delta(tile, limits[1], loaded[1], start)
        loaded.append(tile)
    shape = (TILE, size // TILE, q.shape[1])
    loaded.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf))
    return loaded


def _minus_delta(tile, out, dout, start):
    """Write minus the sum of dout * out of each token from ``start`` on to [128, n]."""
    for i in range(tile.shape[1]):
        rows = load_rows(out, start + i * TILE, TILE)
        product = nl.ndarray((TILE, out.shape[1]), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=product, data1=rows[:, 0, :], data2=dout[:, i, :], op=nl.multiply)
        total = tile[:, nl.ds(i, 1)]
        nisa.tensor_reduce(dst=total, op=nl.add, data=product, axis=1, negate=True)


def _store(result, total, start, scale, held):
    """Write ``scale`` times [128, n, D] to the tokens of [S, D] from ``start`` on.

    With the ``held`` rotary tables the gradient is rotated back.
    """
    count, width = total.shape[1], total.shape[2]
    for low in range(0, count, BLOCK // TILE):
        size = min(BLOCK // TILE, count - low)
        part = total[:, nl.ds(low, size), :]
        if held is not None:
            tables = take_tables(held, start + low * TILE, size * TILE)
            rows = rotate(part, tables, result.dtype, scale, True)
        else:
            rows = nl.ndarray((TILE, size, width), dtype=result.dtype, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=rows, data=part, op0=nl.multiply, operand0=scale)
        store_rows(result, rows, start + low * TILE)


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
