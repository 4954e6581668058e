"""Names that options of several programs accept: one list each, readable without torch."""

from __future__ import annotations

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
"""Types in which a Hugging Face folder can be written."""

MODEL_DTYPES = ("float32", "bfloat16", "float16")
"""Types in which a model computes."""

EAGER_BACKENDS = ("cpu", "cuda", "neuron")
"""Backends, and devices, that run each operation at once, so that values can be read as they go."""

BACKENDS = (*EAGER_BACKENDS, "xla")
"""All backends."""

QUANTIZED = ("int8",)
"""Forms of quantised weights in which a model computes on a CPU."""

FOREIGN_FORMATS = ("nxd", "optimum", "nemo", "meta")
"""Checkpoint formats of other trainers that ``llamax import`` reads."""

EXPORT_FORMATS = ("hf", "nxd", "meta")
"""Formats that ``llamax export`` writes."""

NXD_ATTENTION = ("stacked", "gqa", "gqa-fused", "separate")
"""Layouts of the attention weights in NxD's checkpoints."""

NXD_OPTIMIZERS = ("auto", "none", "zero1", "zero1-masters")
"""What ``llamax export --to nxd`` writes of the optimizer state."""

AUDIT_RANKS = ("all", "corners", "deep")
"""Ranks that ``llamax audit`` traces besides those at the corners of the mesh."""
