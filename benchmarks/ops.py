"""How fast each operation is, forward and backward, beside what its peers do.

    python benchmarks/ops.py [attention rms_norm ...] [--rounds 15] [--threads 2]
        [--length 512] [--tokens 2048]

Shapes are those of the 57 M Llama (hidden 512, 8 heads, 4 key/value heads, ffn 1408), 2048 tokens;
those of the small layer (hidden 32, 16 tokens) leave little but the time of Python and of calls.
Contenders take turns within a round; times are medians in milliseconds, ratios are of the sums.
``kept`` is what autograd holds from forward to backward, MiB, beyond the operation's own inputs and
result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import modeling_llama as hub

from llamax import ops
from llamax.backends import cpu
from llamax.config.model import ModelConfig
from llamax.model import rope
from llamax.model.causal import Causal
from llamax.model.llama import Llama

HIDDEN, HEADS, KV, WIDTH, FFN = 512, 8, 4, 64, 1408
Function = Callable[..., Tensor]


def cases(tokens: int, length: int) -> dict[str, tuple[dict[str, Function], Sequence[Tensor]]]:
    """Contenders and inputs of every operation; ours first."""
    batch = tokens // length
    x = torch.randn(batch, length, HIDDEN)
    weight = torch.randn(FFN, HIDDEN) * 0.05
    norm = torch.randn(HIDDEN)
    qkv = torch.randn(batch, length, HEADS + 2 * KV, WIDTH)
    q, k, v = (part.contiguous() for part in qkv.split((HEADS, KV, KV), dim=2))
    frequencies = rope.inverse_frequencies(WIDTH, 10_000.0, None)
    cos, sin = rope.rope_tables(torch.arange(length).expand(batch, -1), frequencies)
    gate_up = torch.randn(batch, length, 2 * FFN)
    documents = torch.arange(length).div(length // 3 + 1, rounding_mode="floor").expand(batch, -1)

    def hub_rotate(x: Tensor) -> Tensor:
        heads_first = x.transpose(1, 2)
        return hub.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0].transpose(1, 2)

    def hub_norm(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(
            hub.LlamaRMSNorm(HIDDEN, 1e-5), {"weight": weight}, x
        )
        return y

    def packed(kernel: Function) -> Function:
        return lambda q, k, v: kernel(q, k, v, documents)

    def whole(kernel: Function) -> Function:
        return lambda q, k, v: kernel(q, k, v, None)

    narrow = [x.bfloat16(), weight.bfloat16()]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    layer = Llama(ModelConfig(**small)).init(0).model.layers["0"]
    hub_layer = hub.LlamaDecoderLayer(hub.LlamaConfig(**small, attn_implementation="sdpa"), 0)
    angles = rope.rope_tables(
        torch.arange(16).unsqueeze(0), rope.inverse_frequencies(8, 10_000.0, None)
    )
    return {
        "small layer": (
            {
                "llamax": lambda x: layer(x, *angles, Causal(None), "none"),
                "transformers": lambda x: hub_layer(x, position_embeddings=angles),
            },
            (torch.randn(1, 16, 32),),
        ),
        "attention": (
            {
                "llamax": whole(ops.attention),
                "torch SDPA": whole(ops.fused_attention),
                "eager": whole(ops.reference_attention),
            },
            (q, k, v),
        ),
        "attention, 3 documents": (
            {
                "llamax": packed(ops.attention),
                "llamax, one document": whole(ops.attention),
                "torch SDPA with a mask": packed(ops.fused_attention),
            },
            (q, k, v),
        ),
        "rms_norm": (
            {
                "llamax": lambda x, weight: ops.rms_norm(x, weight, 1e-5),
                "transformers": hub_norm,
                "torch F.rms_norm": lambda x, weight: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
            },
            (x, norm),
        ),
        "rotate": (
            {"llamax": lambda x: ops.rotate(x, cos, sin), "transformers": hub_rotate},
            (q,),
        ),
        "swiglu": (
            {"llamax": ops.swiglu, "plain": ops.reference_swiglu},
            (gate_up,),
        ),
        "linear bf16": (
            {
                "llamax": ops.linear,
                "fp32": lambda x, weight: F.linear(x.float(), weight.float()).bfloat16(),
                "native": F.linear,
            },
            narrow,
        ),
    }


def timed(function: Function, inputs: Sequence[Tensor]) -> tuple[float, float, int]:
    """Seconds forward, seconds backward, bytes kept in between."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        start = time.perf_counter()
        y = function(*leaves)
        forward = time.perf_counter() - start
    dy = torch.ones_like(y)
    start = time.perf_counter()
    torch.autograd.backward(y, dy)
    backward = time.perf_counter() - start
    own = {tensor.untyped_storage().data_ptr() for tensor in (*leaves, y)}
    return forward, backward, sum(size for place, size in held.items() if place not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", help="parts of their names; all if none is given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="sequence length; divides --tokens")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of all sequences")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu.keep_heap()
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, sequences of {arguments.length}, "
        f"fp32 matmul {cpu.measure_peak_flops(torch.float32) / 1e9:.0f} GFLOP/s"
    )
    print(f"{'operation':24}{'contender':24}{'forward':>9}{'backward':>9}{'ratio':>7}{'kept':>7}")
    for operation, (contenders, inputs) in cases(arguments.tokens, arguments.length).items():
        if arguments.operations and not any(part in operation for part in arguments.operations):
            continue
        rounds = [
            {name: timed(function, inputs) for name, function in contenders.items()}
            for _ in range(arguments.rounds + 1)
        ][1:]
        ours = 0.0
        for name in contenders:
            forward, backward, kept = (
                statistics.median(taken[name][place] for taken in rounds) for place in range(3)
            )
            ours = ours or forward + backward
            print(
                f"{operation:24}{name:24}{forward * 1e3:9.2f}{backward * 1e3:9.2f}"
                f"{(forward + backward) / ours:7.2f}{kept / 2**20:7.1f}"
            )


if __name__ == "__main__":
    main()
