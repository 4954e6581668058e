"""What a run is: plain frozen dataclasses, one per section of the TOML file.

::

    Config ── model       the network: spelled as config.json on the Hugging Face Hub spells it
           ├─ parallel    how it lies on the ranks
           ├─ optim       AdamW and its schedule
           ├─ data        tokens, and how many of them make a step
           ├─ checkpoint  what is kept of the run, and what it starts from
           └─ run         folder, length, device, precision, what is reported

Every field carries its unit, one line of help and the range it lives in; ``llamax.configfile``
reads, writes and explains them.  What must hold *between* fields is in ``llamax.rules``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from llamax.errors import ConfigError


class Range(NamedTuple):
    """The numbers a field may hold, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


COUNT = Range("1 or more", lambda x: 1 <= x < math.inf)
NATURAL = Range("0 or more", lambda x: 0 <= x < math.inf)
POSITIVE = Range("a number above 0", lambda x: 0 < x < math.inf)
FRACTION = Range("0 or more and below 1", lambda x: 0 <= x < 1)


def about(help: str, unit: str = "", range: Range | None = None) -> dict[str, Any]:
    """The metadata of a field."""
    return {"help": help, "unit": unit, "range": range}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of low rotary frequencies (rope type "llama3")."""

    factor: float = field(
        default=8.0, metadata=about("how far low frequencies are stretched", "times", POSITIVE)
    )
    low_freq_factor: float = field(
        default=1.0,
        metadata=about(
            "stretch in full where fewer turns fit the original context", "turns", POSITIVE
        ),
    )
    high_freq_factor: float = field(
        default=4.0,
        metadata=about("keep where more turns fit the original context", "turns", POSITIVE),
    )
    original_max_position_embeddings: int = field(
        default=8192, metadata=about("context length before stretching", "tokens", COUNT)
    )


@dataclass(frozen=True)
class Model:
    """The network's shape; ``head_dim`` 0 becomes hidden_size / num_attention_heads."""

    hidden_size: int = field(metadata=about("width of the residual stream", "features", COUNT))
    intermediate_size: int = field(metadata=about("width of the feed-forward", "features", COUNT))
    num_hidden_layers: int = field(metadata=about("depth", "layers", COUNT))
    num_attention_heads: int = field(metadata=about("query heads", "heads", COUNT))
    num_key_value_heads: int = field(
        metadata=about("key/value heads, shared by query heads", "heads", COUNT)
    )
    vocab_size: int = field(metadata=about("vocabulary of the tokenizer", "tokens", COUNT))
    head_dim: int = field(
        default=0,
        metadata=about("width of a head; 0: hidden_size / num_attention_heads", "features", COUNT),
    )
    max_position_embeddings: int = field(
        default=2048, metadata=about("longest context the model is meant for", "tokens", COUNT)
    )
    rope_theta: float = field(
        default=10_000.0, metadata=about("base of the rotary frequencies", "", POSITIVE)
    )
    rope_scaling: RopeScaling | None = field(
        default=None, metadata=about("Llama 3.1's rotary scaling; absent: none")
    )
    rms_norm_eps: float = field(
        default=1e-5, metadata=about("added to the mean square in norms", "", POSITIVE)
    )
    tie_word_embeddings: bool = field(
        default=False, metadata=about("one matrix for embedding and output")
    )
    initializer_range: float = field(
        default=0.02, metadata=about("standard deviation of initial weights", "", POSITIVE)
    )
    bos_token_id: int | None = field(
        default=None, metadata=about("token that starts a text; absent: none", "id", NATURAL)
    )
    eos_token_id: int | tuple[int, ...] | None = field(
        default=None, metadata=about("token or tokens that end a text; absent: none", "id", NATURAL)
    )

    def __post_init__(self) -> None:
        if not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text, always as a tuple."""
        if isinstance(self.eos_token_id, tuple):
            return self.eos_token_id
        return () if self.eos_token_id is None else (self.eos_token_id,)

    def num_parameters(self) -> int:
        """The exact number of weights of the whole model, tied ones counted once."""
        D, E = self.hidden_size, self.head_dim
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * D * self.intermediate_size + 2 * D
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + D

    def difference(self, other: Model) -> str | None:
        """The first field in which ``other`` computes something else with the same weights."""
        told = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id")
        names = (field.name for field in fields(self) if field.name not in told)
        return next((n for n in names if getattr(self, n) != getattr(other, n)), None)

    @classmethod
    def from_hub(cls, hub: Mapping[str, Any]) -> Model:
        """The model that a Hugging Face ``config.json`` describes.

        Raises ConfigError for what is not a Llama or what llamax does not compute.
        """
        from llamax.hub import read

        return read(hub)

    def to_hub(self, dtype: str) -> dict[str, Any]:
        """The ``config.json`` of this model; ``dtype`` is float32 or bfloat16."""
        from llamax.hub import write

        return write(self, dtype)


@dataclass(frozen=True)
class Parallel:
    """How the model lies on the ranks."""

    tensor: int = field(default=1, metadata=about("tensor-parallel degree", "ranks", COUNT))
    data: int = field(
        default=0,
        metadata=about("data-parallel degree; 0: what the world leaves", "ranks", NATURAL),
    )
    sequence: bool = field(
        default=True, metadata=about("cut activations between layers over the tensor ranks")
    )
    zero1: bool = field(
        default=True, metadata=about("cut optimizer state over the data ranks (ZeRO-1)")
    )
    bucket_bytes: int = field(
        default=16 * 2**20, metadata=about("gradients reduced in one collective", "bytes", COUNT)
    )


@dataclass(frozen=True)
class Optim:
    """AdamW, clipping, and the learning rate over the run."""

    lr: float = field(default=3e-4, metadata=about("highest learning rate", "", POSITIVE))
    min_lr: float = field(
        default=3e-5, metadata=about("learning rate at the end of the schedule", "", NATURAL)
    )
    beta1: float = field(
        default=0.9, metadata=about("decay of the mean of gradients", "per step", FRACTION)
    )
    beta2: float = field(
        default=0.95, metadata=about("decay of the mean of their squares", "per step", FRACTION)
    )
    eps: float = field(
        default=1e-8, metadata=about("added to the root of the squares", "", POSITIVE)
    )
    weight_decay: float = field(
        default=0.1, metadata=about("decoupled decay of matrices", "per lr and step", NATURAL)
    )
    max_grad_norm: float = field(
        default=1.0, metadata=about("clip the global gradient norm; 0: never", "", NATURAL)
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = field(
        default="cosine", metadata=about("shape after warm-up; wsd: warmup, stable, decay")
    )
    warmup_steps: int = field(
        default=0, metadata=about("rise from 0 to lr at the start", "steps", NATURAL)
    )
    decay_steps: int = field(
        default=0, metadata=about("fall to min_lr at the end; schedule wsd only", "steps", NATURAL)
    )


@dataclass(frozen=True)
class Data:
    """Which tokens, and how many of them make a step."""

    path: str = field(default="data", metadata=about("dataset folder of llamax prepare"))
    sequence_length: int = field(default=2048, metadata=about("one sample", "tokens", COUNT))
    global_batch: int = field(
        default=1, metadata=about("samples in one optimizer step", "sequences", COUNT)
    )
    micro_batch: int = field(
        default=1, metadata=about("samples a rank computes at once", "sequences", COUNT)
    )
    separate_documents: bool = field(
        default=True, metadata=about("no attention or positions across documents in a sample")
    )
    verify: Literal["start", "read", "off"] = field(
        default="start", metadata=about("when checksums of the token file are checked")
    )


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of the run, and what it starts from."""

    every: int = field(
        default=0, metadata=about("save interval; 0: only at the end", "steps", NATURAL)
    )
    keep: int = field(
        default=2, metadata=about("newest checkpoints kept; 0: all", "checkpoints", NATURAL)
    )
    resume: str = field(
        default="auto", metadata=about("auto: newest of this run; never; or a checkpoint folder")
    )
    background: bool = field(default=True, metadata=about("write files while training goes on"))
    init_from: str = field(
        default="",
        metadata=about("Hugging Face or llamax folder to start from; empty: random"),
    )


@dataclass(frozen=True)
class Run:
    """Folder, length, device, precision, and what is reported."""

    folder: str = field(default="run", metadata=about("where the run writes everything"))
    steps: int = field(default=1000, metadata=about("length of the run", "steps", COUNT))
    seed: int = field(default=0, metadata=about("first weights and order of samples", "", NATURAL))
    backend: Literal["cpu", "cuda", "xla", "neuron"] = field(
        default="cpu", metadata=about("device and its collectives")
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata=about("weights and activations; masters are float32")
    )
    recompute: Literal["none", "selective", "full"] = field(
        default="none", metadata=about("computed again in backward: nothing, attention, layers")
    )
    log_every: int = field(default=1, metadata=about("report interval", "steps", COUNT))
    validate_every: int = field(
        default=0, metadata=about("validation interval; 0: never", "steps", NATURAL)
    )
    validate_batches: int = field(
        default=8, metadata=about("length of a validation", "global batches", COUNT)
    )
    tensorboard: bool = field(default=False, metadata=about("also write TensorBoard events"))
    progress: Literal["auto", "on", "off"] = field(
        default="auto", metadata=about("progress bar; auto: when stderr is a terminal")
    )
    timeout_s: int = field(
        default=600, metadata=about("a collective that takes longer has failed", "s", COUNT)
    )
    threads: int = field(
        default=0, metadata=about("CPU threads of a rank; 0: as torch finds", "threads", NATURAL)
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: Model
    parallel: Parallel = Parallel()
    optim: Optim = Optim()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()

    def accumulation(self, data_degree: int) -> int:
        """Microsteps in one optimizer step, on ``data_degree`` data ranks.

        Raises ConfigError where the global batch is not a whole number of them.
        """
        from llamax.rules import batch_divides

        for problem in batch_divides(self.data, data_degree):
            raise ConfigError(problem)
        return self.data.global_batch // (self.data.micro_batch * data_degree)

    def problems(self, world_size: int | None = None) -> list[str]:
        """Everything that is wrong, a line each; ``world_size`` in ranks, None: not known yet."""
        from llamax.rules import problems

        return list(problems(self, world_size))

    def check(self, world_size: int | None = None) -> None:
        """Raise one ConfigError that lists all problems, a line each, if there are any."""
        refuse(self.problems(world_size), "configuration")


def sections(config: Config) -> Iterator[tuple[str, Any]]:
    """(prefix, dataclass) of every section, nested ones after their owner."""
    for name in ("model", "parallel", "optim", "data", "checkpoint", "run"):
        section = getattr(config, name)
        yield name, section
        if isinstance(section, Model) and section.rope_scaling:
            yield "model.rope_scaling", section.rope_scaling


def refuse(found: list[str], where: str) -> None:
    """Raise one ConfigError that names ``where`` and tells every line of ``found``, if any."""
    if len(found) == 1:
        raise ConfigError(f"{where}: {found[0]}")
    if found:
        raise ConfigError("\n  ".join([f"{where}: {len(found)} problems", *found]))
