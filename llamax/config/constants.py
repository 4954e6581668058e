"""Sizes that the code fixes, for the planner and the audit to compute with.

Names end in the unit.  ``_MULTIPLE``: sizes are rounded to a multiple of it.
"""

from __future__ import annotations

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # one element, by run.dtype

# Optimizer state of one element, in float32 (llamax.optim).
GRADIENT_BYTES = 4  # the sum over microsteps, which ranks reduce
MASTER_BYTES = 4  # the copy of a narrower weight that AdamW updates
MOMENTS_BYTES = 8  # AdamW's two moments
STATE_BLOCK = 256  # numbers of a moment in 8 bits that share a largest magnitude
STATE_LEAST_ELEMENTS = 4096  # of a tensor, for moments in 8 bits
NORM_WEIGHT_BYTES = 4  # the weight in the gradient norm, where it differs between elements

# Inputs of matrix products (llamax.parallel.tensor_parallel), made again in backward on a CPU.
MADE_AGAIN_BYTES = 2**18  # a smaller one is kept: the calls would take longer than the product

# Cross-entropy (llamax.parallel.cross_entropy): float32 logits are computed in chunks of tokens.
LOSS_CHUNK_BYTES = 64 * 2**20
LOSS_CHUNK_TOKENS = 256  # at most, on a CPU: the logits lie in memory at the peak of a step
LOSS_CHUNK_MULTIPLE = 128  # tokens: the tile of a matrix product, so that no chunk has a rest

# Attention (kernels/attention): op.py on a CPU; nki_op.py and nki_kernel.py on a NeuronCore.
ATTENTION_BLOCK_QUERIES = 128  # fewer waste less above the diagonal, more multiply faster
ATTENTION_LENGTHS = range(257, 1024)  # shorter and longer sequences go to torch's kernel
ATTENTION_SCORES_BYTES = 8 * 2**20  # of the sequences processed together; fits a last-level cache
NKI_MULTIPLE = 128  # tokens of a sequence: the partitions of a core
NKI_LONGEST = 32768  # tokens: keys and values of a head fill SBUF
NKI_HEAD_DIMS = (64, 128)
NKI_LOSS_WIDEST = 3072  # hidden_size: wider logits take longer to compute again than to move
FLASH_MULTIPLE = 2048  # tokens of a sequence
FLASH_MAX_HEAD_DIM = 128

# nf4 (llamax.model.quantize).
NF4_BLOCK_WEIGHTS = 64  # weights that share a scale
NF4_BLOCK_SCALES = 256  # scales that share a scale of their own, with finetune.double_quant

# The default port at which the ranks of several nodes rendezvous.
RENDEZVOUS_PORT = 29500

# Names in the folder of a run, which training writes and the monitor reads.
CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "lock"
HEARTBEATS_FOLDER = "heartbeats"
CHECKPOINTS_FOLDER = "checkpoints"

# Keys in the state of a checkpoint.
LOSS_SCALE_STATE = "loss_scale"
SPIKES_STATE = "spikes"

# Collectives over gloo (llamax.backends.torch_distributed): larger messages are not copied.
STAGED_BYTES = 8 * 2**20


def loss_chunk_tokens(rows: int, on_cpu: bool = False) -> int:
    """The tokens of a chunk whose float32 logits over ``rows`` of the vocabulary take 64 MiB.

    ``on_cpu``, no more than ``LOSS_CHUNK_TOKENS``.
    """
    fitting = LOSS_CHUNK_BYTES // (DTYPE_BYTES["float32"] * rows)
    tokens = max(1, fitting // LOSS_CHUNK_MULTIPLE * LOSS_CHUNK_MULTIPLE)
    return min(tokens, LOSS_CHUNK_TOKENS) if on_cpu else tokens


def moments_bytes(bits: int) -> float:
    """Bytes of the two moments of an element in ``optim.state_bits``, with their scales."""
    return MOMENTS_BYTES if bits == 32 else 2 * (1 + 4 / STATE_BLOCK)


def nf4_bits(double_quant: bool) -> float:
    """The bits of one weight in nf4, with its share of the scales."""
    scale_bits = 8 + 32 / NF4_BLOCK_SCALES if double_quant else 32
    return 4 + scale_bits / NF4_BLOCK_WEIGHTS


def nki_refusal(sequence_length: int, head_dim: int) -> str:
    """Why the NKI kernels of llamax cannot compute such an attention; empty where they can."""
    if sequence_length % NKI_MULTIPLE:
        return f"the sequence length {sequence_length} is not a multiple of {NKI_MULTIPLE}"
    if sequence_length > NKI_LONGEST:
        return f"the sequence length {sequence_length} is above {NKI_LONGEST}"
    if head_dim not in NKI_HEAD_DIMS:
        return f"head_dim={head_dim} is neither {' nor '.join(map(str, NKI_HEAD_DIMS))}"
    return ""


def nki_loss_refusal(tokens: int, hidden_size: int) -> str:
    """Why the NKI kernels cannot compute the loss, or do not pay; empty where they run.

    ``tokens`` are those of a microbatch.
    """
    if tokens % NKI_MULTIPLE:
        return f"{tokens} tokens are not a multiple of {NKI_MULTIPLE}"
    if tokens > NKI_LONGEST:
        return f"{tokens} tokens are above {NKI_LONGEST}"
    if hidden_size % NKI_MULTIPLE:
        return f"hidden_size={hidden_size} is not a multiple of {NKI_MULTIPLE}"
    if hidden_size > NKI_LOSS_WIDEST:
        return (
            f"above hidden_size={NKI_LOSS_WIDEST} logits take longer to compute twice than to move"
        )
    return ""


def flash_refusal(
    sequence_length: int, head_dim: int, separate_documents: bool, context: int = 1
) -> str:
    """Why the flash kernel of Neuron cannot compute such an attention; empty where it can.

    With ``context`` ranks it computes blocks of the 2 x ``context`` chunks of a sequence.
    """
    if context > 1 and sequence_length % (2 * context * FLASH_MULTIPLE):
        return (
            f"the {2 * context} chunks of {sequence_length} tokens that parallel.context={context} "
            f"makes are not multiples of {FLASH_MULTIPLE}"
        )
    if sequence_length % FLASH_MULTIPLE:
        return f"the sequence length {sequence_length} is not a multiple of {FLASH_MULTIPLE}"
    if head_dim > FLASH_MAX_HEAD_DIM:
        return f"head_dim={head_dim} is above {FLASH_MAX_HEAD_DIM}"
    if separate_documents:
        return "documents are kept apart (data.separate_documents=true)"
    return ""
