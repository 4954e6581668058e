"""The documented signatures of NKI that the kernels call, and a check of their source against them.

Source: the API reference of ``nki.isa`` and ``nki.language`` in AWS's documentation of Neuron SDK
2.28.1 (nki 0.2.0), 2.29.1 (nki 0.3.0) and 2.32.0 (nki 0.6.0).  A parameter with "=" has a default.
A row without a second column is the same in all three; 0.3.0 and 0.6.0 differ in no row otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

VERSIONS = ("0.2.0", "0.6.0")
INSTRUCTIONS: dict[str, tuple[str, ...]] = {  # by version of VERSIONS
    "activation": ("dst op data bias= scale= reduce_op= reduce_res= reduce_cmd= name=",),
    "activation_reduce": ("dst op data reduce_op reduce_res bias= scale= name=",),
    "affine_select": (
        "dst pattern offset channel_multiplier on_true_tile on_false_value cmp_op= name=",
        "dst pattern channel_multiplier on_true_tile on_false_value cmp_op= offset= name=",
    ),
    "dma_copy": (
        "dst src dst_rmw_op= oob_mode= dge_mode= unique_indices= name=",
        "dst src priority= oob_mode= dge_mode= engine= name=",
    ),
    "iota": (
        "dst pattern offset channel_multiplier= name=",
        "dst pattern offset= channel_multiplier= name=",
    ),
    "memset": ("dst value engine= name=",),
    "nc_matmul": (
        "dst stationary moving is_stationary_onezero= is_moving_onezero= is_transpose= "
        "tile_position= tile_size= perf_mode= name=",
        "dst stationary moving is_stationary_onezero= is_moving_onezero= is_transpose= "
        "accumulate= tile_position= tile_size= perf_mode= name=",
    ),
    "nc_transpose": ("dst data engine= name=",),
    "reciprocal": ("dst data name=",),
    "register_alloc": ("x=",),
    "register_load": ("dst src",),
    "register_move": ("dst imm", "dst src"),
    "scalar_tensor_tensor": ("dst data op0 operand0 op1 operand1 reverse0= reverse1= name=",),
    "tensor_copy": ("dst src engine= name=",),
    "tensor_partition_reduce": ("dst op data name=",),
    "tensor_reduce": ("dst op data axis negate= keepdims= name=",),
    "tensor_scalar": ("dst data op0 operand0 reverse0= op1= operand1= reverse1= engine= name=",),
    "tensor_scalar_reduce": (
        "dst data op0 operand0 reduce_op reduce_res reverse0= name=",
        "dst data op0 operand0 reduce_op reduce_res= reverse0= reduce_cmd= reduce_init= "
        "reduce_res_negate= name=",
    ),
    "tensor_tensor": ("dst data1 data2 op engine= name=",),
}
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "affine_range": ("start stop= step=",),
    "dynamic_range": ("start stop= step=",),  # 0.2.0: in the language guide, not the reference
    "ds": ("start size",),
    "ndarray": ("shape dtype buffer= name=", "shape dtype buffer= name= address="),
}
# Names that are no calls: memories, dtypes, operators; exp, log and the like are those of the table
# of activation functions of 0.2.0.
NAMES = {
    "nisa": {"engine"},
    "nl": {
        *("sbuf", "psum", "hbm", "shared_hbm", "float32", "bfloat16", "int32"),
        *("add", "subtract", "multiply", "maximum", "minimum", "power"),
        *("equal", "not_equal", "greater", "greater_equal", "less", "less_equal"),
        *("exp", "log", "copy", "square", "sqrt", "rsqrt", "sigmoid", "silu"),
        *("silu_dx", "reciprocal"),
    },
}
CALLS = {"nisa": INSTRUCTIONS, "nl": FUNCTIONS}


def problems(path: Path) -> Iterator[str]:
    """What a kernel calls that a documented version lacks, each with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if module in CALLS and name not in CALLS[module] and name not in NAMES[module]:
                yield f"{path.name}:{node.lineno}: {module}.{name} is not in the table"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            rows = CALLS.get(owner.id, {}) if isinstance(owner, ast.Name) else {}
            for version, row in zip(VERSIONS, _both(rows.get(node.func.attr, ())), strict=False):
                for problem in _call_problems(node, row):
                    yield f"{path.name}:{node.lineno}: {node.func.attr}{problem} in nki {version}"


def _both(rows: tuple[str, ...]) -> tuple[str, ...]:
    return rows * 2 if len(rows) == 1 else rows


def _call_problems(call: ast.Call, row: str) -> Iterator[str]:
    parameters = [word.removesuffix("=") for word in row.split()]
    required = [word for word in row.split() if not word.endswith("=")]
    given = [keyword.arg or "**" for keyword in call.keywords]
    if len(call.args) > len(parameters):
        yield f" has {len(call.args)} arguments, more than {len(parameters)}"
    for name in given:
        if name not in parameters:
            yield f"({name}=...) is no parameter"
    for place, name in enumerate(required):
        if name not in given and place >= len(call.args):
            yield f" needs {name}="
