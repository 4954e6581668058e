"""The sizes on one rank of a run, from which bytes and seconds follow.

Letters are those of ``model/llama.py`` (capital: whole, lower case: this rank's share); T = B S is
the tokens of a microbatch, and s = S / tp the tokens of each sequence between the tensor-parallel
layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from llamax.config.constants import DTYPE_BYTES, nf4_bits
from llamax.config.model import ModelConfig
from llamax.config.rules.finetune import target_names
from llamax.config.rules.pipeline import splits, stage_layers
from llamax.config.schema import Config, FinetuneConfig
from llamax.parallel.mesh import Mesh
from llamax.parallel.pipeline import in_flight
from llamax.training.resolve import ResolvedRun

GENERATOR_BYTES = 5056  # of torch.get_rng_state()


class Group(NamedTuple):
    """Weights in one flat vector.

    ``uneven``: the elements count differently in the gradient norm.  ``summed``: their gradient is
    summed over tensor ranks.  ``whole``: every data rank keeps all gradients and weights, whatever
    parallel.zero is.
    """

    elements: int
    uneven: bool = False
    summed: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Share:
    """The sizes on one rank of a run, at a ``stage`` of its pipeline; each is computed once."""

    run: ResolvedRun
    stage: int = 0

    @cached_property
    def config(self) -> Config:
        return self.run.config

    @cached_property
    def mesh(self) -> Mesh:
        return self.run.mesh

    @cached_property
    def model(self) -> ModelConfig:
        return self.config.model

    @cached_property
    def width(self) -> int:
        """Bytes of an element of a weight or an activation."""
        return DTYPE_BYTES[self.config.run.dtype]

    @cached_property
    def layers(self) -> int:
        """Layers of the stage."""
        return stage_layers(self.config.parallel, self.model.num_hidden_layers)[self.stage]

    @cached_property
    def embeds(self) -> bool:
        """Whether the stage begins with the embedding."""
        return self.stage == 0

    @cached_property
    def projects(self) -> bool:
        """Whether the stage ends in the output matrix and the loss."""
        return self.stage == self.mesh.pp - 1

    def splits(self, backend: str, recompute: str) -> bool:
        """Whether gradients of weights are put off."""
        stages, chunks = self.mesh.pp, self.config.parallel.chunks
        return not self.tuned and splits(stages, chunks, recompute, backend)

    def flying(self, backend: str, recompute: str) -> float:
        """Microbatches in flight at the same time, in those through the whole stage.

        One whose gradients of weights are put off counts: their factors take as many bytes.
        """
        chunks, split = self.config.parallel.chunks, self.splits(backend, recompute)
        return in_flight(self.stage, self.mesh.pp, self.accumulation, chunks, split) / chunks

    def random_states(self, backend: str, recompute: str) -> int:
        """Bytes that torch keeps of the host's generator, for each layer that is computed again."""
        return self.layers * GENERATOR_BYTES if backend == "cpu" and recompute != "none" else 0

    @cached_property
    def vocabularies(self) -> int:
        """Matrices over the vocabulary: embedding and output matrix, one where they are tied."""
        both = self.embeds + self.projects
        return min(both, 1) if self.model.tie_word_embeddings else both

    @cached_property
    def norms(self) -> int:
        """Elements of the norms."""
        return (2 * self.layers + self.projects) * self.model.hidden_size

    @cached_property
    def sequence(self) -> bool:
        """Whether the run is sequence-parallel."""
        return self.config.parallel.sequence and self.mesh.tp > 1

    @cached_property
    def tokens(self) -> int:
        """T, the tokens of a microbatch."""
        data = self.config.data
        return data.micro_batch * data.sequence_length // self.mesh.cp

    @cached_property
    def tokens_between(self) -> int:
        """Tokens of a microbatch on this rank between the tensor-parallel layers."""
        return self.tokens // self.mesh.tp if self.sequence else self.tokens

    @cached_property
    def accumulation(self) -> int:
        """Microsteps in one optimizer step."""
        return self.run.accumulation

    @cached_property
    def heads(self) -> int:
        """Query heads."""
        return self.model.num_attention_heads // self.mesh.tp

    @cached_property
    def kv_heads(self) -> int:
        """Key/value heads, at least one: neighbours share a head if there are more tensor ranks."""
        return max(self.model.num_key_value_heads // self.mesh.tp, 1)

    @cached_property
    def kv_shared(self) -> bool:
        """Whether several tensor ranks hold the same key/value head."""
        return self.mesh.tp > self.model.num_key_value_heads

    @cached_property
    def query(self) -> int:
        """Features of the query heads."""
        return self.heads * self.model.head_dim

    @cached_property
    def key(self) -> int:
        """Features of the key heads."""
        return self.kv_heads * self.model.head_dim

    @cached_property
    def feed_forward(self) -> int:
        """Features between the up and down projections."""
        return self.model.intermediate_size // self.mesh.tp

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the vocabulary, with padding."""
        return -(-self.model.vocab_size // self.mesh.tp)

    @cached_property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer."""
        return self.layer_elements()

    def layer_elements(self, tile: int = 1) -> int:
        """Elements of the matrices of one layer, each side a multiple of ``tile``."""
        sides = self.model.hidden_size, self.query, self.key, self.feed_forward
        D, query, key, inner = (rounded_up(side, tile) for side in sides)
        return D * (2 * query + 2 * key) + 3 * D * inner

    @cached_property
    def head_weights(self) -> int:
        """Elements of the embedding or of the output matrix."""
        return self.vocabulary * self.model.hidden_size

    @cached_property
    def tuned(self) -> bool:
        """Whether adapters are trained and the base is frozen."""
        return self.config.finetune.method != "full"

    @cached_property
    def adapters(self) -> int:
        """Elements of the adapters: of A [r, in] and B [out, r], one is whole and one is cut."""
        widths = self.model.hidden_size, self.query, self.key, self.feed_forward
        return self.layers * adapter_width(self.config.finetune, *widths)

    @cached_property
    def base(self) -> tuple[int, float]:
        """Bytes of a frozen base: embeddings and norms; the linear layers, perhaps quantised."""
        finetune = self.config.finetune
        plain = (self.vocabularies * self.head_weights + self.norms) * self.width
        bits = 8.0 * self.width
        if finetune.method == "qlora":
            bits = 8.0 if finetune.quant == "int8" else nf4_bits(finetune.double_quant)
        ranks = self.mesh.owners if self.shards_base else 1
        return plain, self.layers * self.layer_weights * bits / 8 / ranks

    @cached_property
    def shards_base(self) -> bool:
        """Whether a frozen base is cut over the data ranks and gathered in use."""
        finetune = self.config.finetune
        if finetune.method == "qlora":
            return finetune.shard_base
        return finetune.method == "lora" and self.config.parallel.zero == 3

    @cached_property
    def gathered(self) -> int:
        """Elements of weights that ZeRO-3 gathers in a microstep: those of layers twice."""
        if self.config.parallel.zero < 3 or self.tuned or self.mesh.owners == 1:
            return 0
        return 2 * (self.layers * self.layer_weights + self.head_weights)  # embedding and head

    @cached_property
    def groups(self) -> list[Group]:
        """The flat groups of weights that optim/zero.py makes."""
        if self.tuned:
            return [Group(self.adapters, summed=self.sequence, whole=True)]
        model = self.model
        vocabulary = self.vocabularies * self.head_weights
        qkv = self.layers * model.hidden_size * (self.query + 2 * self.key)
        padded = model.vocab_size % self.mesh.tp != 0
        uneven = (qkv if self.kv_shared else 0) + (vocabulary if padded else 0)
        plain = vocabulary + self.layers * self.layer_weights - uneven
        groups = (
            Group(plain),
            Group(uneven, uneven=True, summed=self.kv_shared),
            Group(self.norms, summed=self.sequence, whole=True),
        )
        return [group for group in groups if group.elements]

    @cached_property
    def elements(self) -> int:
        """Elements of all groups of weights."""
        return sum(group.elements for group in self.groups)

    @cached_property
    def owners(self) -> int:
        """Data ranks that share the optimizer state."""
        return self.mesh.owners if self.config.parallel.zero else 1

    @cached_property
    def padded_groups(self) -> list[Group]:
        """The groups of weights, each padded to a multiple of the owners."""
        ranks = self.owners
        return [group._replace(elements=rounded_up(group.elements, ranks)) for group in self.groups]

    @cached_property
    def padded_elements(self) -> int:
        """Elements of all groups of weights, with padding."""
        return sum(group.elements for group in self.padded_groups)


def rounded_up(number: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not below ``number``."""
    return -(-number // unit) * unit


def stages_of(run: ResolvedRun) -> list[tuple[Share, int]]:
    """The share of a rank of each kind of stage of a pipeline, with the number of such stages."""
    layers = stage_layers(run.config.parallel, run.config.model.num_hidden_layers)
    kinds: dict[tuple[bool, bool, int], list[int]] = {}
    for stage, held in enumerate(layers):  # of equal ones, the first has most in flight
        kinds.setdefault((stage == 0, stage == len(layers) - 1, held), []).append(stage)
    return [(Share(run, stages[0]), len(stages)) for stages in kinds.values()]


def adapter_width(finetune: FinetuneConfig, hidden: int, query: int, key: int, inner: int) -> int:
    """Elements of the adapters of one layer, from the widths of its projections."""
    both = dict.fromkeys(("q_proj", "o_proj"), hidden + query)
    both |= dict.fromkeys(("k_proj", "v_proj"), hidden + key)
    both |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
    return finetune.r * sum(both[name] for name in set(target_names(finetune.targets)))


def adapter_elements(config: Config) -> int:
    """Elements of the adapters of a whole model."""
    model, E = config.model, config.model.head_dim
    heads = model.num_attention_heads * E, model.num_key_value_heads * E
    widths = model.hidden_size, *heads, model.intermediate_size
    return model.num_hidden_layers * adapter_width(config.finetune, *widths)
