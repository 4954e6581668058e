"""What a run is: plain frozen dataclasses, one per section of the TOML file.

::

    Config ── model       the network: spelled as config.json on the Hugging Face Hub spells it
           ├─ parallel    how it lies on the ranks
           ├─ optim       AdamW and its schedule
           ├─ data        tokens, and how many of them make a step
           ├─ checkpoint  what is kept of the run, and what it starts from
           ├─ finetune    what of it is trained: all, or adapters
           └─ run         folder, length, device, precision, what is reported

Every field carries its unit, one line of help and the range it lives in (``llamax.config.fields``);
``llamax.config.load`` reads, writes and explains them.  What must hold *between* fields is in
``llamax.config.validate``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llamax.config.fields import COUNT, FRACTION, NATURAL, POSITIVE, about
from llamax.config.model import ModelConfig as Model
from llamax.config.model import RopeScaling as RopeScaling


@dataclass(frozen=True)
class ParallelConfig:
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
class OptimConfig:
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
    most_skipped: int = field(
        default=8,
        metadata=about(
            "steps in a row that are skipped for a loss or gradient not finite before the run ends",
            "steps",
            NATURAL,
        ),
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = field(
        default="cosine", metadata=about("shape after warm-up; wsd: warmup, stable, decay")
    )
    warmup_steps: int = field(
        default=0, metadata=about("rise from 0 to lr at the start", "steps", NATURAL)
    )
    warmup_ratio: float = field(
        default=0.0, metadata=about("the same as a share of the run", "of all steps", FRACTION)
    )
    decay_steps: int = field(
        default=0, metadata=about("fall to min_lr at the end; schedule wsd only", "steps", NATURAL)
    )


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how many of them make a step."""

    path: str = field(
        default="data",
        metadata=about(
            "dataset folder of llamax prepare, prefix of Megatron's .bin and .idx, or a blend: "
            "weight, dataset, weight, dataset"
        ),
    )
    validation: str = field(
        default="", metadata=about("dataset to validate on; empty: what data.path holds out")
    )
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
    packing: Literal["auto", "best-fit", "concat", "padded"] = field(
        default="auto",
        metadata=about(
            "whole documents tightly, the stream cut, one document each; auto: best-fit for "
            "instruction data, concat for text"
        ),
    )
    labels: Literal["answers", "all"] = field(
        default="answers", metadata=about("what of instruction data is learnt")
    )
    too_long: Literal["truncate", "drop", "refuse"] = field(
        default="truncate",
        metadata=about("documents longer than a sample, unless packing is concat"),
    )
    verify: Literal["start", "read", "off"] = field(
        default="start", metadata=about("when checksums of the token file are checked")
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of the run, and what it starts from."""

    every: int = field(
        default=0, metadata=about("save interval; 0: only at the end", "steps", NATURAL)
    )
    each_epoch: bool = field(default=False, metadata=about("also save when an epoch ends"))
    keep: int = field(
        default=2, metadata=about("newest checkpoints kept; 0: all", "checkpoints", NATURAL)
    )
    keep_every: int = field(
        default=0,
        metadata=about(
            "checkpoints of every so many steps stay for good; 0: none", "steps", NATURAL
        ),
    )
    keep_best: bool = field(
        default=False, metadata=about("the one of the lowest validation loss stays as well")
    )
    resume: str = field(
        default="auto",
        metadata=about(
            "auto: newest of this run; intact: newest whose hashes hold; never; or a checkpoint "
            "folder; later ones are renamed to .past once the run saves"
        ),
    )
    on_failure: Literal["stop", "continue"] = field(
        default="stop", metadata=about("what training does when a checkpoint cannot be written")
    )
    also_hf: bool = field(
        default=False, metadata=about("leave a Hugging Face folder hub/ in every checkpoint")
    )
    background: bool = field(default=True, metadata=about("write files while training goes on"))
    init_from: str = field(
        default="",
        metadata=about("Hugging Face or llamax folder to start from; empty: random"),
    )


@dataclass(frozen=True)
class RunConfig:
    """Folder, length, device, precision, and what is reported."""

    folder: str = field(default="run", metadata=about("where the run writes everything"))
    steps: int = field(default=1000, metadata=about("length of the run", "steps", COUNT))
    epochs: int = field(
        default=0, metadata=about("length of the run instead of steps; 0: steps", "epochs", NATURAL)
    )
    seed: int = field(default=0, metadata=about("first weights and order of samples", "", NATURAL))
    backend: Literal["cpu", "cuda", "xla", "neuron"] = field(
        default="cpu", metadata=about("device and its collectives")
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata=about("weights and activations; masters are float32")
    )
    stochastic_rounding: bool = field(
        default=False,
        metadata=about("NeuronCores round to bfloat16 up or down by chance, in proportion"),
    )
    recompute: Literal["none", "selective", "full"] = field(
        default="none", metadata=about("computed again in backward: nothing, attention, layers")
    )
    log_every: int = field(default=1, metadata=about("report interval", "steps", COUNT))
    validate_every: int = field(
        default=0, metadata=about("validation interval; 0: never", "steps", NATURAL)
    )
    validate_each_epoch: bool = field(
        default=False, metadata=about("also validate when an epoch ends")
    )
    patience: int = field(
        default=0,
        metadata=about(
            "end when the validation loss has not fallen for so long; 0: never",
            "validations",
            NATURAL,
        ),
    )
    validate_batches: int = field(
        default=8, metadata=about("length of a validation", "global batches", COUNT)
    )
    compile_guard: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata=about("a program compiled after the first step: say so, end the run, or nothing"),
    )
    tensorboard: bool = field(default=False, metadata=about("also write TensorBoard events"))
    wandb: Literal["off", "offline", "online"] = field(
        default="off", metadata=about("also write to W&B; offline: into the run folder alone")
    )
    wandb_project: str = field(default="llamax", metadata=about("project of W&B"))
    profile_at: int = field(
        default=0, metadata=about("first step that rank 0 profiles; 0: none", "step", NATURAL)
    )
    profile_steps: int = field(
        default=3, metadata=about("length of the profiled window", "steps", COUNT)
    )
    progress: Literal["auto", "on", "off"] = field(
        default="auto", metadata=about("progress bar; auto: when stderr is a terminal")
    )
    timeout_s: int = field(
        default=600, metadata=about("a collective that takes longer has failed", "s", COUNT)
    )
    threads: int = field(
        default=0, metadata=about("CPU threads of a rank; 0: as torch finds", "threads", NATURAL)
    )

    @property
    def validates(self) -> bool:
        """Whether there is validation during the run."""
        return self.validate_every > 0 or self.validate_each_epoch


@dataclass(frozen=True)
class FinetuneConfig:
    """What of the model is trained: all of it, or low-rank adapters beside a frozen base."""

    method: Literal["full", "lora", "qlora"] = field(
        default="full",
        metadata=about("full: all weights; lora: adapters; qlora: adapters, quantised base"),
    )
    r: int = field(default=8, metadata=about("rank of the adapters", "", COUNT))
    alpha: float = field(
        default=16.0, metadata=about("adapters are scaled by alpha / r", "", POSITIVE)
    )
    dropout: float = field(
        default=0.0, metadata=about("share of an adapter's inputs dropped", "", FRACTION)
    )
    targets: str = field(
        default="all-linear",
        metadata=about("projections with adapters: q_proj,v_proj for example, or all-linear"),
    )
    rslora: bool = field(
        default=False, metadata=about("scale by alpha / sqrt(r) instead of alpha / r")
    )
    quant: Literal["nf4", "int8"] = field(
        default="nf4", metadata=about("how qlora stores the base: 4 bits in blocks, 8 by row")
    )
    double_quant: bool = field(
        default=True, metadata=about("store the scales of nf4 in 8 bits as well")
    )
    shard_base: bool = field(
        default=True,
        metadata=about("cut qlora's base over the data ranks, gathered when it is used"),
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: Model
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    run: RunConfig = RunConfig()


def sections(config: Config) -> Iterator[tuple[str, Any]]:
    """(prefix, dataclass) of every section, nested ones after their owner."""
    for part in fields(config):
        name, section = part.name, getattr(config, part.name)
        yield name, section
        if isinstance(section, Model) and section.rope_scaling:
            yield "model.rope_scaling", section.rope_scaling
