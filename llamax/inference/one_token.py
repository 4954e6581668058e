"""``Llama.forward`` for one new token of each sequence on a CPU, as a plain list of operations.

::

    x  = embedding
    x += o (attention to the cache (rotate (qkv (norm x))))       of each layer
    x += down (swiglu (gate_up (norm x)))
    logits = head (norm x)

A product of few rows reads a whole weight and leaves little else in the processor's caches, so
every call in Python until the next product takes several times as long as in a loop of its own.
Here no module is called, no kernel is looked for, and a shape is [B,D], not [B,1,D].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from llamax import ops
from llamax.inference.kv_cache import Layers, visible
from llamax.model import rope
from llamax.model.int8 import Int8Linear, Product
from llamax.model.llama import Attend, Attention, Decoder, DecoderLayer, FeedForward, Llama, Norm
from llamax.parallel.tensor_parallel import ColumnLinear, RowLinear

BLOCKS = (Decoder, DecoderLayer, Attention, FeedForward, Norm)  # whose arithmetic is repeated here


class Cache(Protocol):
    """Keys and values of the tokens so far."""

    @property
    def layers(self) -> Layers:
        """Those of each layer; the first sequences are those of the batch."""
        ...

    def decode(self, positions_B1: Tensor, width: int) -> Attend:
        """Attention of one new token per sequence at its position; all lie below ``width``."""
        ...


# (ids_B1, positions_B1, cache, width) -> logits_B1V; all positions lie below ``width``.
OneTokenForward = Callable[[Tensor, Tensor, Cache, int], Tensor]


def one_token(model: Llama) -> OneTokenForward:
    """``model`` for one new token of each sequence, as a list of operations if it can be one.

    It is for a CPU that multiplies the model's dtype, without blocks or hooks of a user's own.
    """
    blocks = [model.model, *model.model.layers.values(), model.model.norm]
    for layer in model.model.layers.values():
        blocks += layer.children()
    weight = next(model.parameters())
    on_cpu = weight.device.type == "cpu" and ops.product_dtype(weight) == weight.dtype
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    ours = type(model) is Llama and all(type(block) in BLOCKS for block in blocks)
    if on_cpu and ours and not hooked:
        return OneToken(model)
    return lambda ids_B1, positions_B1, cache, width: model(
        ids_B1, positions_B1, attend=cache.decode(positions_B1, width)
    )


class Layer(NamedTuple):
    """The weights of the norms and the products of a layer, in the order of their use."""

    number: int
    attention_norm: Tensor
    qkv: Product
    o: Product
    feed_forward_norm: Tensor
    gate_up: Product
    down: Product


class OneToken:
    """The logits after one new token of each sequence, whose keys and values enter the cache."""

    def __init__(self, model: Llama) -> None:
        embedding, norm = model.model.embed_tokens, model.model.norm
        assert embedding is not None
        assert norm is not None
        self.model, self.embedding, self.norm = model, embedding, norm.weight
        self.heads = model.config.num_attention_heads // model.tp.size
        self.swiglu = ops.kernel("swiglu", self.norm)
        self._layers: tuple[int, list[Layer]] = 0, []

    def __call__(self, ids_B1: Tensor, positions_B1: Tensor, cache: Cache, width: int) -> Tensor:
        x_BD = self.embedding(ids_B1)[:, 0]
        (B, D), dtype, eps = x_BD.shape, x_BD.dtype, self.model.config.rms_norm_eps
        h, E = self.heads, self.model.config.head_dim
        cos_B1E, sin_B1E = rope.rope_tables(positions_B1, self.model.model.inverse_frequencies)
        sin_B1E[..., : E // 2].neg_()
        mask_BT = visible(positions_B1, width)
        mask_B11T = None if mask_BT is None else mask_BT[:, None, None]
        places = ops.cache_places(positions_B1, cache.layers[0][0][:B])
        for layer in self.layers(B):
            normed_BD = F.rms_norm(x_BD, (D,), layer.attention_norm, eps)
            heads_BfE = layer.qkv(normed_BD).to(dtype).view(B, -1, E)
            keys, values = cache.layers[layer.number]
            k = keys.shape[1]
            # Rotation: the halves of a head change places, and the first meets minus the sine.
            qk_BfE = heads_BfE[:, : h + k]
            turned_BfE = qk_BfE.view(B, h + k, 2, -1).flip(2).view(B, h + k, E)
            qk_BfE = (qk_BfE * cos_B1E).addcmul_(turned_BfE, sin_B1E).to(dtype)
            keys.view(-1, E).index_copy_(0, places, qk_BfE[:, h:].reshape(-1, E))
            values.view(-1, E).index_copy_(0, places, heads_BfE[:, h + k :].reshape(-1, E))
            # The query heads of a key/value head are queries of one head, so it is read once.
            q_BkgE = qk_BfE[:, :h].view(B, k, -1, E)
            seen = keys[:B, :, :width], values[:B, :, :width]
            y_BkgE = F.scaled_dot_product_attention(q_BkgE, *seen, mask_B11T)
            x_BD.add_(layer.o(y_BkgE.view(B, -1)))
            normed_BD = F.rms_norm(x_BD, (D,), layer.feed_forward_norm, eps)
            x_BD.add_(layer.down(self.swiglu(layer.gate_up(normed_BD))))
        return self.model.logits_of(F.rms_norm(x_BD, (D,), self.norm, eps)[:, None])

    def layers(self, count: int) -> list[Layer]:
        """The layers with their products of ``count`` rows."""
        if self._layers[0] != count:
            layers = self.model.model.layers.items()
            self._layers = count, [_layer(int(number), each, count) for number, each in layers]
        return self._layers[1]


def _layer(number: int, layer: nn.Module, count: int) -> Layer:
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        number,
        layer.input_layernorm.weight,
        _product(attention.qkv_proj, count),
        _product(attention.o_proj, count),
        layer.post_attention_layernorm.weight,
        _product(mlp.gate_up_proj, count),
        _product(mlp.down_proj, count),
    )


def _product(layer: nn.Module, count: int) -> Product:
    """The function of a linear layer; the product alone, where that is all there is to it."""
    if isinstance(layer, Int8Linear) and layer.tp.size == 1:
        return layer.product(count)
    if isinstance(layer, ColumnLinear | RowLinear) and layer.tp.size == 1 and layer.store is None:
        return partial(ops.kernel("linear", layer.weight), weight=layer.weight)
    return layer.forward
