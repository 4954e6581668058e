"""A stand-in for neuronx-nemo-megatron: one model as its converter writes it, with torch.save."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from support.foreign import Values, save


@contextmanager
def nemo_serialization() -> Iterator[type]:
    """A stand-in for NeMo's module, so that its class is pickled under its name."""
    names = ["nemo", "nemo.collections", "nemo.collections.nlp", "nemo.collections.nlp.parts"]
    names.append("nemo.collections.nlp.parts.serialization")

    class TensorReference:
        def __init__(self, tid: int, shape: torch.Size, dtype: torch.dtype) -> None:
            self.tid, self.shape, self.dtype = tid, shape, dtype

    TensorReference.__module__, TensorReference.__qualname__ = names[-1], "TensorReference"
    sys.modules.update({name: ModuleType(name) for name in names})
    sys.modules[names[-1]].TensorReference = TensorReference  # type: ignore[attr-defined]
    yield TensorReference
    for name in names:
        del sys.modules[name]


def save_nemo_xser(held: Any, path: Path) -> None:
    """``nlp/parts/serialization.py``: references with shape and dtype, tensors beside the file."""
    folder = path.with_name(path.name + ".tensors")
    folder.mkdir(parents=True)
    count = 0

    def referred(value: Any) -> Any:
        nonlocal count
        if isinstance(value, Tensor):
            torch.save(value.clone(), folder / f"tensor_{count}.pt")
            count += 1
            return Reference(count - 1, value.shape, value.dtype)
        return {k: referred(v) for k, v in value.items()} if isinstance(value, dict) else value

    with nemo_serialization() as Reference:
        torch.save(referred(held), path)


def interleaved(split: list[Tensor]) -> Tensor:
    """The rows of equally high matrices, taken in turn: k0 v0 k1 v1 ..."""
    return torch.stack(split, 1).flatten(0, 2)


def nnm(
    folder: Path,
    values: Values,
    model: ModelConfig,
    tp: int = 1,
    pp: int = 1,
    gqa_qkv: bool = False,
    xser: bool = False,
    vpp: int = 1,
    step: int = 1000,
) -> Path:
    """The files that ``convert_hf_checkpoint_to_nemo_llama_70b.py`` writes for a step."""
    K, E = model.num_key_value_heads, model.head_dim
    each = model.num_hidden_layers // (pp * vpp)
    for stage in range(pp):
        for rank in range(tp):

            def mine(whole: Tensor, dim: int = 0, rank: int = rank) -> Tensor:
                return whole.chunk(tp, dim)[rank].clone()

            chunks = []
            for chunk in range(vpp):
                encoder: dict[str, Tensor] = {}
                for local in range(each):
                    number = (chunk * pp + stage) * each + local
                    hub = f"model.layers.{number}."
                    read = {
                        name.removeprefix(hub).removesuffix(".weight"): tensor
                        for (name, kind), tensor in values.items()
                        if name.startswith(hub) and kind == "weight"
                    }
                    q, k, v = (read[f"self_attn.{part}_proj"] for part in "qkv")
                    k, v = k.unflatten(0, (K, E)), v.unflatten(0, (K, E))
                    layer = f"layers.{local}."
                    if gqa_qkv:
                        groups = torch.cat((q.unflatten(0, (K, -1)), k, v), 1)
                        encoder[f"{layer}self_attention.query_key_value.weight"] = mine(
                            groups.flatten(0, 1)
                        )
                    else:
                        encoder[f"{layer}self_attention.query.weight"] = mine(q)
                        encoder[f"{layer}self_attention.key_value.weight"] = mine(
                            interleaved([k, v])
                        )
                    gate, up = (mine(read[f"mlp.{part}_proj"]) for part in ("gate", "up"))
                    encoder |= {
                        f"{layer}self_attention.dense.weight": mine(read["self_attn.o_proj"], 1),
                        f"{layer}mlp.dense_h_to_4h.weight": torch.cat((gate, up)),
                        f"{layer}mlp.dense_4h_to_h.weight": mine(read["mlp.down_proj"], 1),
                        f"{layer}input_layernorm.weight": read["input_layernorm"],
                        f"{layer}post_attention_layernorm.weight": read["post_attention_layernorm"],
                    }
                chunks.append(encoder)
            embedding = mine(values["model.embed_tokens.weight", "weight"])
            head = mine(values["lm_head.weight", "weight"])
            if stage == pp - 1:
                chunks[-1]["final_layernorm.weight"] = values["model.norm.weight", "weight"]
            held: dict[str, Any] = {"pytorch-lightning_version": "1.9.5", "global_step": 0}
            if vpp == 1:
                state = {f"model.language_model.encoder.{n}": t for n, t in chunks[0].items()}
                if stage == 0:
                    state["model.language_model.embedding.word_embeddings.weight"] = embedding
                if stage == pp - 1:
                    state["model.word_embeddings.weight"] = head
                held["state_dict"] = state
            else:
                held["state_dict"] = {}
                for chunk, encoder in enumerate(chunks):
                    held[f"model{chunk}"] = {"language_model": {"encoder": encoder}}
                if stage == 0:
                    held["model0"]["language_model"]["embedding"] = {
                        "word_embeddings": {"weight": embedding}
                    }
                if stage == pp - 1:
                    held[f"model{vpp - 1}"]["word_embeddings_for_head"] = {"weight": head}
            home = folder
            if pp > 1:
                home = folder / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            elif tp > 1:
                home = folder / f"mp_rank_{rank:02d}"
            home.mkdir(parents=True, exist_ok=True)
            write = save_nemo_xser if xser else save
            write(held, home / f"llmv2_converted_checkpoint--step={step}.ckpt")
    return folder
