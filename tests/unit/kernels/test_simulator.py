"""The simulator of a NeuronCore-v2: what it computes, what it refuses, what it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llamax.kernels.simulator import machine
from llamax.kernels.simulator.machine import NkiError
from llamax.kernels.simulator.memory import BFLOAT16, rounded
from llamax.kernels.simulator.run import bf16, modules, run

MODULES = modules()
nl: Any = MODULES["nki.language"]
nisa: Any = MODULES["nki.isa"]
RANDOM = np.random.default_rng(5)


def tile(*shape: int, dtype: Any = None, memory: Any = None, fill: float | None = 0.0) -> Any:
    made = nl.ndarray(shape, dtype=dtype or nl.float32, buffer=memory or nl.sbuf)
    if fill is not None:
        nisa.memset(made, value=fill)
    return made


def psum(*shape: int, fill: float | None = None) -> Any:
    return tile(*shape, memory=nl.psum, fill=fill)


def matmul(a: Any, b: Any) -> Any:
    """[K, M], [K, N] in HBM -> [M, N]: K and M in steps of 128, N in steps of 512."""
    (k, m), (_, n) = a.shape, b.shape
    out = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.shared_hbm)
    for i in range(0, m, 128):
        rows = min(128, m - i)
        for j in range(0, n, 512):
            columns = min(512, n - j)
            total = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.psum)
            for start in range(0, k, 128):
                depth = min(128, k - start)
                left = nl.ndarray((depth, rows), dtype=a.dtype)
                right = nl.ndarray((depth, columns), dtype=b.dtype)
                nisa.dma_copy(left, a[nl.ds(start, depth), nl.ds(i, rows)])
                nisa.dma_copy(right, b[nl.ds(start, depth), nl.ds(j, columns)])
                nisa.nc_matmul(total, left, right)
            copied = nl.ndarray((rows, columns), dtype=nl.float32)
            nisa.tensor_copy(copied, total)
            nisa.dma_copy(out[nl.ds(i, rows), nl.ds(j, columns)], copied)
    return out


@pytest.mark.parametrize("shape", [(128, 128, 512), (300, 130, 700), (1, 1, 1), (256, 7, 513)])
def test_a_tiled_matrix_product_is_numpys(shape: tuple[int, int, int]) -> None:
    k, m, n = shape
    a, b = RANDOM.standard_normal((k, m)), RANDOM.standard_normal((k, n))
    out, tally = run(matmul, a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(out, a.T @ b, rtol=1e-4, atol=1e-4)
    assert tally.macs == k * m * n
    narrow, _ = run(matmul, bf16(a), bf16(b))
    exact = bf16(a).array.astype(float).T @ bf16(b).array
    np.testing.assert_allclose(narrow, exact, rtol=1e-4, atol=1e-4)


def test_costs_are_those_of_the_documentation() -> None:
    def kernel() -> None:
        a, b = (tile(128, n, dtype=nl.bfloat16) for n in (128, 512))
        total = psum(128, 512)
        nisa.nc_matmul(total, a, b)
        nisa.tensor_tensor(b, total, b, op=nl.add)
        nisa.tensor_tensor(b, b, b, op=nl.add)
        nisa.activation(b, op=nl.exp, data=total)

    _, tally = run(kernel)
    assert tally.cycles["tensor"] == 512
    assert tally.cycles["vector"] == 64 + 256 + 512 + 512  # zeros of two bytes take half
    assert tally.cycles["scalar"] == 512
    assert tally.sbuf_high_bytes == 2 * (128 + 512)
    assert tally.psum_high_banks == 1
    port = (512 / 1.12e9) + 512 / 1.4e9
    assert tally.port_s["psum"] == pytest.approx(port)
    assert tally.seconds() == pytest.approx(tally.cycles["vector"] / 1.12e9)
    assert tally.bound() == "vector"


def test_float32_products_cost_four_times_and_hbm_bytes_count_once() -> None:
    def kernel(x: Any) -> Any:
        held = nl.ndarray((128, 512), dtype=nl.float32)
        nisa.dma_copy(held, x)
        nisa.nc_matmul(psum(128, 512), held[:, 0:128], held)
        out = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.hbm)
        nisa.dma_copy(out, held)
        return out

    _, tally = run(kernel, np.ones((128, 512), np.float32))
    assert tally.cycles["tensor"] == 2048
    assert tally.hbm_bytes == 2 * 128 * 512 * 4


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, np.nan], np.float32)
    want = np.array([1, 1 + 2**-6, 1 + 2**-7, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(rounded(values, BFLOAT16), want)


def test_a_device_loop_runs_as_often_as_its_register_says() -> None:
    def kernel(count: Any) -> Any:
        total = tile(1, 1)
        register = nisa.register_alloc()
        nisa.register_load(register, count)
        for _ in nl.dynamic_range(register):
            nisa.tensor_scalar(total, total, op0=nl.add, operand0=1.0)
        out = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, total)
        return out

    for count in (0, 1, 5):
        assert run(kernel, np.array([count], np.int32))[0] == count


def too_many_partitions() -> None:
    nl.ndarray((129, 4), dtype=nl.float32)


def sbuf_is_full() -> None:
    held = [tile(128, 24 * 1024, fill=None) for _ in range(3)]
    assert held


def psum_is_full() -> None:
    held = [psum(128, 512) for _ in range(9)]
    assert held


def stationary_too_wide() -> None:
    nisa.nc_matmul(psum(128, 64), tile(128, 129), tile(128, 64))


def moving_too_wide() -> None:
    nisa.nc_matmul(psum(128, 513), tile(128, 128), tile(128, 513))


def product_crosses_a_bank() -> None:
    nisa.nc_matmul(psum(128, 1024)[:, 300:600], tile(128, 128), tile(128, 300))


def product_reads_psum() -> None:
    nisa.nc_matmul(psum(128, 64), psum(128, 128, fill=0.0), tile(128, 64))


def product_writes_sbuf() -> None:
    nisa.nc_matmul(tile(128, 64), tile(128, 128), tile(128, 64))


def product_writes_bfloat16() -> None:
    dst = nl.ndarray((128, 64), dtype=nl.bfloat16, buffer=nl.psum)
    nisa.nc_matmul(dst, tile(128, 128), tile(128, 64))


def product_mixes_dtypes() -> None:
    nisa.nc_matmul(psum(128, 64), tile(128, 128, dtype=nl.bfloat16), tile(128, 64))


def product_of_other_depths() -> None:
    nisa.nc_matmul(psum(128, 64), tile(64, 128), tile(128, 64))


def adds_to_no_sum() -> None:
    total = psum(128, 64, fill=1.0)
    nisa.nc_matmul(total, tile(128, 128), tile(128, 64), accumulate=True)


def covers_half_a_sum() -> None:
    total = psum(128, 64)
    nisa.nc_matmul(total[:, 0:32], tile(128, 128), tile(128, 32))
    nisa.nc_matmul(total, tile(128, 128), tile(128, 64))


def sum_begins_in_a_device_loop() -> None:
    total = psum(128, 64)
    for _ in nl.dynamic_range(2):
        nisa.nc_matmul(total, tile(128, 128), tile(128, 64))


def dma_reaches_psum() -> None:
    nisa.dma_copy(tile(128, 64), psum(128, 64, fill=0.0))


def unwritten() -> None:
    nisa.tensor_copy(tile(128, 4), tile(128, 4, fill=None))


def partly_written() -> None:
    source = tile(128, 4, fill=None)
    nisa.memset(source[:, 0:3], value=0.0)
    nisa.tensor_copy(tile(128, 4), source)


def outside() -> None:
    nisa.tensor_copy(tile(128, 4), tile(128, 6)[:, 3:7])


def start_partition() -> None:
    nisa.memset(tile(128, 4)[16:48], value=0.0)


def start_of_sixty_five() -> None:
    nisa.memset(tile(128, 4)[63:128], value=0.0)


def strided_partitions() -> None:
    nisa.memset(tile(128, 4)[0:128:2], value=0.0)


def gpsimd_reads_psum() -> None:
    nisa.tensor_copy(tile(128, 4), psum(128, 4, fill=0.0), engine=nisa.engine.gpsimd)


def select_reads_psum() -> None:
    nisa.affine_select(
        tile(128, 4), [[1, 4]], 1, psum(128, 4, fill=0.0), 0.0, cmp_op=nl.greater_equal
    )


def scalar_engine_copies() -> None:
    nisa.tensor_copy(tile(128, 4), tile(128, 4), engine=nisa.engine.scalar)


def bias_is_a_number() -> None:
    nisa.activation(tile(128, 4), op=nl.exp, data=tile(128, 4), bias=1.0)


def scalar_engine_reduces_maxima() -> None:
    nisa.activation_reduce(
        tile(128, 4), op=nl.exp, data=tile(128, 4), reduce_op=nl.maximum, reduce_res=tile(128, 1)
    )


def both_in_psum() -> None:
    nisa.tensor_tensor(tile(128, 4), psum(128, 4, fill=0), psum(128, 4, fill=0), op=nl.add)


def reduces_partitions() -> None:
    nisa.tensor_reduce(tile(128, 4), op=nl.add, data=tile(128, 4), axis=0)


def operand_too_wide() -> None:
    nisa.tensor_scalar(tile(128, 4), tile(128, 4), op0=nl.add, operand0=tile(128, 2))


def shapes_differ() -> None:
    nisa.tensor_tensor(tile(128, 4), tile(128, 4), tile(128, 5), op=nl.add)


def transposes_to_bfloat16() -> None:
    dst = nl.ndarray((64, 128), dtype=nl.bfloat16, buffer=nl.psum)
    nisa.nc_transpose(dst, tile(128, 64))


def transposes_infinity() -> None:
    nisa.nc_transpose(psum(64, 128), tile(128, 64, fill=np.inf))


def register_as_condition() -> None:
    if nisa.register_alloc(1):
        pass


def language_operation() -> None:
    nl.add(tile(128, 4), tile(128, 4))


def returns_sbuf() -> Any:
    return tile(128, 4)


def returns_unwritten() -> Any:
    return nl.ndarray((128, 4), dtype=nl.float32, buffer=nl.shared_hbm)


LIMITS: list[tuple[Callable[[], Any], str]] = [
    (too_many_partitions, "129 partitions, above 128"),
    (sbuf_is_full, "SBUF is full: 294912 bytes of a partition in use, above 196608"),
    (psum_is_full, "PSUM is full: 9 banks in use, above 8"),
    (stationary_too_wide, "stationary has 129 columns, above 128"),
    (moving_too_wide, "moving has 513 columns, above 512"),
    (product_crosses_a_bank, "crosses a bank"),
    (product_reads_psum, "an operand is in psum; it must be in sbuf"),
    (product_writes_sbuf, "an operand is in sbuf; it must be in psum"),
    (product_writes_bfloat16, "dst is bfloat16; NeuronCore-v2 writes float32"),
    (product_mixes_dtypes, "float32 and narrower operands cannot be mixed"),
    (product_of_other_depths, "differ in partitions, the summed dimension"),
    (adds_to_no_sum, "accumulate=True where no product began a sum"),
    (covers_half_a_sum, "places with and without an unfinished sum"),
    (sum_begins_in_a_device_loop, "begin the sum before the loop"),
    (dma_reaches_psum, "dma_copy cannot reach PSUM"),
    (unwritten, "read before it is written"),
    (partly_written, "read before it is written"),
    (outside, "index 3:7 is outside dimension 1"),
    (start_partition, "32 partitions cannot start at 16"),
    (start_of_sixty_five, "65 partitions cannot start at 63"),
    (strided_partitions, "cannot be strided"),
    (gpsimd_reads_psum, "an operand is in psum; it must be in sbuf"),
    (select_reads_psum, "an operand is in psum; it must be in sbuf"),
    (scalar_engine_copies, "does not run on the scalar engine"),
    (bias_is_a_number, "bias must be a tile"),
    (scalar_engine_reduces_maxima, "the scalar engine sums, no more"),
    (both_in_psum, "both inputs are in PSUM"),
    (reduces_partitions, "only the last free dimensions"),
    (operand_too_wide, r"it must be a number or \(128, 1\)"),
    (shapes_differ, "differ in partitions or elements"),
    (transposes_to_bfloat16, "to float32 PSUM"),
    (transposes_infinity, "turns inf into NaN"),
    (register_as_condition, "no value for the compiler"),
    (language_operation, "use the instruction of nki.isa"),
    (returns_sbuf, "results must be in HBM"),
    (returns_unwritten, "does not write all of its result"),
]


@pytest.mark.parametrize(("kernel", "message"), LIMITS, ids=[k.__name__ for k, _ in LIMITS])
def test_a_limit_is_an_error(kernel: Callable[[], Any], message: str) -> None:
    with pytest.raises(NkiError, match=message):
        run(kernel)


def test_an_error_names_the_line_of_the_kernel() -> None:
    line = outside.__code__.co_firstlineno + 1
    with pytest.raises(NkiError, match=f"^test_simulator.py:{line}: "):
        run(outside)


def test_memory_is_free_when_its_tile_is_gone() -> None:
    def kernel() -> None:
        for _ in range(20):
            tile(128, 40 * 1024, fill=None)
            psum(128, 2048)

    _, tally = run(kernel)
    assert tally.psum_high_banks <= machine.PSUM_BANKS
    assert tally.sbuf_bytes == 0


def test_a_core_runs_one_program() -> None:
    kernel = MODULES["nki"].jit(outside)
    with pytest.raises(NkiError, match="a grid of 2 programs"):
        kernel[2]


# --- planted faults of the simulator -------------------------------------------------------------

FAULTS: list[tuple[str, Any, Callable[[], Any]]] = [
    ("memory.PARTITIONS", 256, too_many_partitions),
    ("memory.SBUF_BYTES", 2 * machine.SBUF_BYTES, sbuf_is_full),
    ("memory.PSUM_BANKS", 16, psum_is_full),
    ("isa.STATIONARY_COLUMNS", 256, stationary_too_wide),
    ("isa.MOVING_COLUMNS", 1024, moving_too_wide),
    ("isa.BANK_BYTES", 2**20, product_crosses_a_bank),
    ("memory.START_PARTITIONS", {128: range(128)}, start_partition),
    ("memory.START_PARTITIONS", {32: (0,), 64: (0,), 128: (0, 63)}, start_of_sixty_five),
    ("isa.pick_engine", lambda *_: "vector", scalar_engine_copies),
    ("elementwise.check_alike", lambda *_: None, shapes_differ),
    ("isa.FLOAT32", BFLOAT16, product_writes_bfloat16),
    ("memory.Tensor.read", lambda tile: np.nan_to_num(tile.data), unwritten),
]


@pytest.mark.parametrize(("name", "value", "kernel"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_a_limit_that_is_not_enforced_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, kernel: Callable[[], Any]
) -> None:
    """With a fault planted, the test of that limit no longer sees its error."""
    message = dict(LIMITS)[kernel]
    with pytest.raises(NkiError, match=message):
        run(kernel)
    monkeypatch.setattr(f"llamax.kernels.simulator.{name}", value)
    with pytest.raises((pytest.fail.Exception, AssertionError, ValueError)):
        test_a_limit_is_an_error(kernel, message)
