"""What the header of a safetensors file may hold; no torch is needed to know it."""

from __future__ import annotations

# The dtypes of tensors that llamax reads: their names in a header, and in torch.
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}
MAX_HEADER_BYTES = 16 << 20  # the header of a model of 405B parameters takes 1 MiB
