"""Llama, whole: rotary embedding, norm, attention, feed-forward, block, model.

Parameters are named as Llama checkpoints on the Hugging Face Hub name them
(``model.layers.3.mlp.down_proj.weight``), with two fusions: ``self_attn.qkv_proj`` stacks q, k, v
and ``mlp.gate_up_proj`` stacks gate, up, so each is one matmul.  ``Llama.sharded_parameters``
lists every parameter with its cut, which is all that the rest of llamax needs to know.

Shapes are suffixes.  A capital is the whole dimension, lower case is this rank's share:

    B batch    S sequence      D hidden_size       F intermediate_size    V vocab_size
    H query heads              K key/value heads   E head_dim

``x_BsD`` lies inside the sequence-parallel region, ``q_BShE`` has this rank's heads and
``logits_BSv`` its share of the vocabulary.  Without sequence parallelism s is S; on one
rank every share is whole.

Sources: Llama (Touvron et al. 2023), Llama 3 (Grattafiori et al. 2024); the arithmetic follows
transformers' LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from llamax import ops
from llamax.config.model import ModelConfig
from llamax.config.validate import check_model
from llamax.model import recompute, rope
from llamax.model.causal import Causal
from llamax.model.dropout import Dropout
from llamax.model.initial_weights import draw
from llamax.model.inputs import check_ids, check_inputs
from llamax.model.recompute import Recompute
from llamax.parallel import regions
from llamax.parallel.collectives import Axis, Solo
from llamax.parallel.context_parallel import Attend as Attend
from llamax.parallel.cross_entropy import vocab_parallel_loss
from llamax.parallel.pipeline import EMBEDDING, holds
from llamax.parallel.sharding import Block as Rows
from llamax.parallel.sharding import Replica, ShardedParameters
from llamax.parallel.tensor_parallel import (
    PARALLEL_LAYERS,
    ColumnLinear,
    ParallelLayer,
    RowLinear,
    VocabEmbedding,
    sharded_parameters,
)
from llamax.runtime.errors import DataError

# What a model may be held in, by its name in configurations.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Norm(nn.Module):
    """RMSNorm: x_BsD -> x_BsD.  Its weight is whole on every rank."""

    def __init__(self, hidden_size: int, eps: float, like: Tensor) -> None:
        super().__init__()
        self.eps, self.shard = eps, Replica()
        self.weight = nn.Parameter(like.new_ones(hidden_size))

    def forward(self, x_BsD: Tensor) -> Tensor:
        return ops.rms_norm(x_BsD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: x_BsD -> x_BsD."""

    def __init__(
        self, model: ModelConfig, layer: int, tp: Axis, sequence: bool, like: Tensor
    ) -> None:
        super().__init__()
        D, E = model.hidden_size, model.head_dim
        H, K = model.num_attention_heads, model.num_key_value_heads
        self.layer, self.head_dim, self.num_heads = layer, E, H // tp.size
        query, key, value = (
            Rows(heads * E, unit=E, name=name)
            for name, heads in (("q_proj", H), ("k_proj", K), ("v_proj", K))
        )
        self.qkv_proj = ColumnLinear((query, key, value), D, tp, sequence, like)
        self.o_proj = RowLinear(Rows(H * E, unit=E), D, tp, sequence, like)

    def forward(
        self, x_BsD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, attend: Attend, rerun: bool
    ) -> Tensor:
        def core(qkv_BSf: Tensor) -> Tensor:
            if isinstance(attend, Causal):
                return attend.rotated(qkv_BSf, cos_BSE, sin_BSE, self.num_heads)
            heads_BShE = qkv_BSf.unflatten(-1, (-1, self.head_dim))
            kv_heads = (heads_BShE.shape[2] - self.num_heads) // 2
            # Not ``split``, as in ``ops.reference_rotated_attention``.
            qk_BSfE, v_BSkE = heads_BShE.tensor_split((self.num_heads + kv_heads,), dim=2)
            qk_BSfE = ops.rotate(qk_BSfE, cos_BSE, sin_BSE)
            q_BShE, k_BSkE = qk_BSfE.tensor_split((self.num_heads,), dim=2)
            return attend(q_BShE, k_BSkE, v_BSkE, self.layer).flatten(-2)

        run = recompute.again if rerun else recompute.plain
        y_BsD: Tensor = self.o_proj(run(core, self.qkv_proj(x_BsD)))
        return y_BsD


class FeedForward(nn.Module):
    """SwiGLU: x_BsD -> x_BsD."""

    def __init__(self, model: ModelConfig, tp: Axis, sequence: bool, like: Tensor) -> None:
        super().__init__()
        D, F = model.hidden_size, model.intermediate_size
        self.gate_up_proj = ColumnLinear(
            (Rows(F, name="gate_proj"), Rows(F, name="up_proj")), D, tp, sequence, like
        )
        self.down_proj = RowLinear(Rows(F), D, tp, sequence, like)

    def forward(self, x_BsD: Tensor) -> Tensor:
        y_BsD: Tensor = self.down_proj(ops.swiglu(self.gate_up_proj(x_BsD)))
        return y_BsD

    def partial(self, x_BsD: Tensor) -> Tensor:
        """All but the sum over ranks: x_BsD -> z_BSD."""
        z_BSD: Tensor = self.down_proj.partial(ops.swiglu(self.gate_up_proj(x_BsD)))
        return z_BSD


class DecoderLayer(nn.Module):
    """One block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self, model: ModelConfig, layer: int, tp: Axis, sequence: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.input_layernorm = Norm(model.hidden_size, model.rms_norm_eps, like)
        self.self_attn = Attention(model, layer, tp, sequence, like)
        self.post_attention_layernorm = Norm(model.hidden_size, model.rms_norm_eps, like)
        self.mlp = FeedForward(model, tp, sequence, like)

    def forward(
        self, x_BsD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, attend: Attend, mode: Recompute
    ) -> Tensor:
        def block(x_BsD: Tensor) -> tuple[Tensor, Tensor]:
            more = cos_BSE, sin_BSE, attend, mode == "selective"
            x_BsD = x_BsD + self.self_attn(self.input_layernorm(x_BsD), *more)
            mlp = self.mlp.partial if splits else self.mlp
            return x_BsD, mlp(self.post_attention_layernorm(x_BsD))

        # Backward reads nothing of the last sum, so it stays outside and is not done again.
        splits = mode == "full" and _splits(self.mlp)
        run = recompute.again if mode == "full" else recompute.plain
        x_BsD, y_BsD = run(block, x_BsD)
        if splits:
            y_BsD = self.mlp.down_proj.reduced(y_BsD)
        return x_BsD + y_BsD


class Decoder(nn.Module):
    """The trunk: ids_BS -> x_BsD after the last norm.

    ``stage`` has the runs of layers held here, one for each chunk.  Only with the first layer is
    the embedding here too, or, where the output matrix is tied to it, with the last layer; only
    with the last layer is the norm.
    """

    def __init__(
        self,
        model: ModelConfig,
        tp: Axis,
        sequence: bool,
        like: Tensor,
        stage: Sequence[range],
        mode: Recompute,
    ) -> None:
        super().__init__()
        self.model, self.mode = model, mode
        self.embed_tokens: VocabEmbedding | None = None
        ends = stage[-1].stop == model.num_hidden_layers
        if stage[0].start == 0 or (model.tie_word_embeddings and ends):
            rows = model.vocab_size
            self.embed_tokens = VocabEmbedding(rows, model.hidden_size, tp, sequence, like)
        self.layers = nn.ModuleDict(
            {str(n): DecoderLayer(model, n, tp, sequence, like) for n in chain(*stage)}
        )
        self.norm: Norm | None = None
        if ends:
            self.norm = Norm(model.hidden_size, model.rms_norm_eps, like)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", None, persistent=False)
        self._set_frequencies(tp.rank_index.device)

    def _set_frequencies(self, device: torch.device) -> None:
        model = self.model.head_dim, self.model.rope_theta, self.model.rope_scaling
        self.inverse_frequencies = rope.inverse_frequencies(*model).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Move or convert the model as ``to`` does, but keep the rotary angles exact, in fp32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_frequencies(self.inverse_frequencies.device)
        return self

    def forward(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        attend: Attend,
        x_BsD: Tensor | None = None,
        layers: range | None = None,
    ) -> Tensor:
        cos_BSE, sin_BSE = rope.rope_tables(positions_BS, self.inverse_frequencies)
        if x_BsD is None:
            assert self.embed_tokens is not None, "without the embedding there is an input"
            x_BsD = self.embed_tokens(ids_BS)
        mode: Recompute = self.mode if torch.is_grad_enabled() else "none"
        for number, layer in self.layers.items():
            if layers is None or int(number) in layers:
                x_BsD = layer(x_BsD, cos_BSE, sin_BSE, attend, mode)
        ends = layers is None or layers.stop == self.model.num_hidden_layers
        return self.norm(x_BsD) if self.norm is not None and ends else x_BsD


class Llama(nn.Module):
    """A Llama on one rank of a tensor-parallel axis, or what a pipeline ``stage`` holds of one.

    ``sequence_parallel`` cuts activations between the parallel layers along the sequence, whose
    length the axis must then divide.  Weights are uninitialised: call ``init`` or load them.
    Raises ConfigError where there is no such model, or ``tp`` does not divide it.
    """

    metric_names: tuple[str, ...] = ()  # of what a subclass' ``loss`` leaves, summed, to be logged
    metric_sums: Mapping[str, Tensor]

    def __init__(
        self,
        model: ModelConfig,
        tp: Axis | None = None,
        *,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: Recompute = "none",
        stage: Sequence[range] = (),
    ) -> None:
        super().__init__()
        self.config, self.tp = model, tp or Solo("tp", device)
        check_model(model, self.tp.size, recompute)
        self.sequence_parallel = sequence_parallel and self.tp.size > 1
        self.dropout: Dropout | None = None  # of the adapters, where there are some
        like = torch.empty(0, dtype=dtype, device=device)
        self.stage = stage = stage or (range(model.num_hidden_layers),)
        self.model = Decoder(model, self.tp, self.sequence_parallel, like, stage, recompute)
        self.lm_head: ParallelLayer | None = None
        if not model.tie_word_embeddings and self.model.norm is not None:
            rows = (Rows(model.vocab_size, pad=True),)
            self.lm_head = ColumnLinear(
                rows, model.hidden_size, self.tp, self.sequence_parallel, like
            )

    def sharded_parameters(self) -> ShardedParameters:
        """Every parameter of this rank with its cut over the tensor-parallel axis, by name.

        Raises ConfigError for a parameter of another shape than its module's ``shard`` declares.
        """
        layers, tied = self.config.num_hidden_layers, self.config.tie_word_embeddings
        twice = [EMBEDDING] if tied and len(self.model.layers) < layers else []
        held = partial(holds, self.stage, layers, tied)
        return sharded_parameters(self, self.tp, held, twice)

    @property
    def head(self) -> ParallelLayer:
        """The output projection: the embedding where they are tied."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None, "only the last stage has the output projection"
        return head

    @torch.no_grad()
    def init(self, seed: int) -> Llama:
        """Draw the weights of llamax's parallel layers from N(0, initializer_range); norms are 1.

        The same on every mesh: each Hub tensor is drawn whole from a generator seeded by (seed, its
        name), then cut.  A parameter of any other module keeps the value it was made with.
        """
        parameters, owners = self.sharded_parameters(), dict(self.named_modules())
        for name, (parameter, _) in parameters.items():
            above, _, leaf = name.rpartition(".")
            if type(owners[above]) is Norm:
                parameter.fill_(1.0)
            if leaf == "weight" and isinstance(owners[above], PARALLEL_LAYERS):
                draw(parameters, name, self.config.initializer_range, seed)
        return self

    def forward(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        *,
        documents_BS: Tensor | None = None,
        attend: Attend | None = None,
        last_B: Tensor | None = None,
    ) -> Tensor:
        """Logits over the whole vocabulary, the same on every rank: [B,S] -> [B,S,V].

        ``documents_BS`` keeps packed documents apart: a token attends to earlier tokens with its
        number.  ``positions_BS`` defaults to 0, 1, 2, ...; ``attend`` replaces attention.  With
        ``last_B`` only that place of each sequence is projected, [B,1,V].
        """
        x_BsD = self.hidden(ids_BS, positions_BS, documents_BS=documents_BS, attend=attend)
        if last_B is not None:
            assert not self.sequence_parallel, "last_B indexes whole sequences"
            x_BsD = ops.at_places(x_BsD, last_B)
        return self.logits_of(x_BsD)

    def logits_of(self, x_BsD: Tensor) -> Tensor:
        """Logits over the whole vocabulary, the same on every rank: [B,s,D] -> [B,S,V]."""
        return regions.join(self.head.project(x_BsD), self.tp, 2)[..., : self.config.vocab_size]

    def loss(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        *,
        documents_BS: Tensor | None = None,
        attend: Attend | None = None,
        chunk_tokens: int | None = None,
        keys_B: Tensor | None = None,
        places_S: Tensor | None = None,
        x_BsD: Tensor | None = None,
        layers: range | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy in nats and the count of labels that are not -100, both 0-d.

        ``labels_BS`` are the tokens to predict at each place: shifted, unlike transformers'.
        Adapters drop features if ``keys_B`` gives each sample a key (``llamax.model.dropout``), and
        ``places_S`` the places of the tokens in their sequences, by default 0, 1, 2, ...
        In a pipeline ``x_BsD`` is what left the stage before, and ``layers`` a chunk of this one.
        """
        check_ids(labels_BS, self.config.vocab_size, labels=True)
        if labels_BS.shape != ids_BS.shape:
            raise DataError(
                f"labels are {list(labels_BS.shape)}, and ids {list(ids_BS.shape)}; give a label "
                "for every id"
            )
        x_BsD = self.hidden(
            ids_BS,
            positions_BS,
            documents_BS=documents_BS,
            attend=attend,
            keys_B=keys_B,
            places_S=places_S,
            x_BsD=x_BsD,
            layers=layers,
        )
        return vocab_parallel_loss(
            x_BsD,
            self.head.dense(),
            labels_BS,
            self.tp,
            self.config.vocab_size,
            self.sequence_parallel,
            chunk_tokens,
        )

    def auxiliary_loss(self, layers: range) -> Tensor | None:
        """What a step adds to ``loss`` for ``layers`` just computed, 0-d; for subclasses.

        A sum over this rank's tokens: with sequence parallelism over those of its activations.
        """
        return None

    def hidden(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        attend: Attend | None = None,
        keys_B: Tensor | None = None,
        places_S: Tensor | None = None,
        x_BsD: Tensor | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """Activations after the last norm, or after the last of ``layers``: [B,S] -> [B,s,D]."""
        check_ids(ids_BS, self.config.vocab_size)
        check_inputs(ids_BS, positions_BS, documents_BS, self.tp.size, self.sequence_parallel)
        if self.dropout is not None:
            self.dropout.begin(keys_B, ids_BS.shape[1], places_S)
        if positions_BS is None:
            positions_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).unsqueeze(0)
        attend = attend or Causal(documents_BS)
        y_BsD: Tensor = self.model(ids_BS, positions_BS, attend, x_BsD, layers)
        return y_BsD


def _splits(mlp: nn.Module) -> bool:
    """Whether a feed-forward is ``partial``, then the sum over ranks: no forward replaces them."""
    last = getattr(mlp, "down_proj", None)
    if type(mlp).forward is not FeedForward.forward or not hasattr(last, "reduced"):
        return False
    return not isinstance(last, RowLinear) or type(last).forward is RowLinear.forward
