"""Other projects' models, where their packages are found: litgpt, torchtitan, picotron."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import torch

from peers.job import Job, Step, rename


def litgpt(job: Job) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT

    model = job.model
    gpt = GPT(
        Config(
            name="race",
            block_size=job.length,
            padded_vocab_size=model.vocab_size,
            n_layer=model.num_hidden_layers,
            n_head=model.num_attention_heads,
            n_query_groups=model.num_key_value_heads,
            n_embd=model.hidden_size,
            intermediate_size=model.intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            norm_eps=model.rms_norm_eps,
            rope_base=int(model.rope_theta),
        )
    )
    weights = job.weights()
    for layer in range(model.num_hidden_layers):
        at = f"model.layers.{layer}.self_attn."
        qkv = [weights.pop(f"{at}{part}_proj.weight") for part in "qkv"]
        weights[f"{at}qkv.weight"] = torch.cat(qkv)
    names = rename(
        weights,
        ("model.layers", "transformer.h"),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
        ("input_layernorm", "norm_1"),
        ("post_attention_layernorm", "norm_2"),
        ("self_attn.o_proj", "attn.proj"),
        ("self_attn", "attn"),
        ("mlp.gate_proj", "mlp.fc_1"),
        ("mlp.up_proj", "mlp.fc_2"),
        ("mlp.down_proj", "mlp.proj"),
    )
    gpt.load_state_dict(names)
    return job.loop(gpt, gpt)


def torchtitan(job: Job) -> Step:
    """torchtitan's Llama 3 with torch's SDPA: its own default needs a GPU."""
    from torchtitan.models import llama3
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    model = job.model
    D, V = model.hidden_size, model.vocab_size
    layers = llama3._build_llama3_layers(
        n_layers=model.num_hidden_layers,
        dim=D,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.num_key_value_heads,
        hidden_dim=model.intermediate_size,
        rope=CosSinRoPE.Config(dim=model.head_dim, max_seq_len=job.length, theta=model.rope_theta),
        fuse_qkv=False,
        attn_backend="varlen",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    titan = llama3.Llama3Model(
        llama3.Llama3Model.Config(
            dim=D,
            vocab_size=V,
            tok_embeddings=Embedding.Config(num_embeddings=V, embedding_dim=D),
            norm=RMSNorm.Config(normalized_shape=D),
            lm_head=Linear.Config(in_features=D, out_features=V),
            layers=layers,
        )
    )
    names = rename(
        job.weights(),
        ("model.embed_tokens", "tok_embeddings"),
        ("model.", ""),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attention.wo"),
        *((f"self_attn.{part}_proj", f"attention.qkv_linear.w{part}") for part in "qkv"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
    )
    titan.load_state_dict(names)
    return job.loop(titan, titan)


def picotron(job: Job) -> Step:
    """picotron's model and its tensor parallelism, without the flash_attn package."""
    os.environ.update(FLASH_ATTEN="0", DTYPE="float32", DEVICE="cpu", LOCAL_RANK=str(job.rank))
    for name, used in {
        "flash_attn": [],
        "flash_attn.flash_attn_interface": ["flash_attn_func"],
        "flash_attn.layers": [],
        "flash_attn.layers.rotary": ["apply_rotary_emb"],
        "flash_attn.ops": [],
        "flash_attn.ops.triton": [],
        "flash_attn.ops.triton.layer_norm": ["layer_norm_fn"],
    }.items():
        sys.modules[name] = ModuleType(name)
        for function in used:
            setattr(sys.modules[name], function, None)
    job.join()
    from picotron import process_group_manager
    from picotron.tensor_parallel.tensor_parallel import apply_tensor_parallel

    process_group_manager.setup_process_group_manager(job.tensor, 1, 1, job.data)
    from picotron.model import Llama

    shape = dict(vars(job.model))
    llama = Llama(SimpleNamespace(**shape))
    if job.tensor > 1:
        llama = apply_tensor_parallel(llama)
    names = rename(
        job.weights(),
        ("model.layers", "decoder_layers"),
        ("model.embed_tokens", "embedding"),
        ("model.norm", "final_norm"),
        ("lm_head", "final_proj"),
        ("self_attn.o_proj", "attention.out_proj"),
        ("self_attn", "attention"),
    )
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            share = names[name]
            for dim, (whole, mine) in enumerate(zip(share.shape, parameter.shape, strict=True)):
                if whole != mine:
                    share = share.chunk(job.tensor, dim)[job.rank]
            parameter.copy_(share)
    return job.loop(llama, llama)
