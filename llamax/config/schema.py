"""The configuration of a run: one frozen dataclass for each section of the TOML file.

::

    Config ── model       shape of the network, spelled as in config.json on the Hugging Face Hub
           ├─ parallel    division of the model and of the work over the ranks
           ├─ optim       AdamW and its schedule
           ├─ data        tokens, and how many of them make a step
           ├─ checkpoint  which checkpoints are kept, and where the run starts from
           ├─ finetune    which weights are trained: all, or adapters
           └─ run         folder, length, device, precision, reports

A field is a line with its type, range and default, and a sentence that ends in its unit.
``llamax.config.load`` reads and writes configurations; rules between fields are in
``llamax.config.rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llamax.config.model import ModelConfig as Model
from llamax.config.model import RopeScaling as RopeScaling
from llamax.config.types import (
    ContextBy,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    SpikeWindow,
    StateBits,
    ZeroRanks,
    ZeroStage,
    walk,
)

BackendName = Literal["cpu", "cuda", "xla", "neuron"]
NEURON_BACKENDS: tuple[BackendName, ...] = ("xla", "neuron")  # those of Trainium


@dataclass(frozen=True)
class ParallelConfig:
    """Division of the model and of the work over the ranks."""

    tensor: Count = 1
    """Tensor-parallel degree [ranks]."""
    data: Natural = 0
    """Data-parallel degree; 0: all ranks that the other degrees leave [ranks]."""
    context: Count = 1
    """Context-parallel degree: ranks that share each sequence, for long ones [ranks]."""
    context_by: ContextBy = "gather"
    """Exchange of keys and values between context ranks: all gathered, or, for less memory, passed
    around a ring."""
    pipeline: Count = 1
    """Pipeline-parallel degree: stages that the layers are cut into [stages]."""
    chunks: Count = 1
    """Runs of layers that a stage holds, which divide a pipeline's wait [chunks]."""
    layers_per_stage: str = ""
    """Layers of each stage, and of each chunk, in the model's order, as in 9,8,8,7; empty: equally
    many [layers]."""
    sequence: bool = True
    """Cut activations between layers over the tensor ranks."""
    zero: ZeroStage = 1
    """ZeRO stage, what is cut over the data ranks: 1 optimizer state, 2 also gradients, 3 also
    weights; 0: nothing."""
    zero_ranks: ZeroRanks = 0
    """Data and context neighbours that ZeRO cuts over, a node's say, with the same again in every
    such group; 0: all of them [ranks]."""
    bucket_bytes: Count = 16 * 2**20
    """Size of the gradients reduced in one collective [bytes]."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, clipping and the learning rate over the run."""

    lr: Positive = 3e-4
    """Highest learning rate."""
    min_lr: NonNegative = 3e-5
    """Learning rate at the end of the schedule."""
    beta1: Fraction = 0.9
    """Decay of the mean of gradients [per step]."""
    beta2: Fraction = 0.95
    """Decay of the mean of squared gradients [per step]."""
    eps: Positive = 1e-8
    """Term added to the root of the mean of squares."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices [per lr and step]."""
    max_grad_norm: NonNegative = 1.0
    """Limit of the global gradient norm; 0: no clipping."""
    most_skipped: Natural = 8
    """Steps skipped in a row, for a loss or gradient that is not finite or an outlier, before the
    run ends [steps]."""
    state_bits: StateBits = 32
    """Size of each of AdamW's two moments: 32, or 8 in blocks with a scale each [bits]."""
    offload: bool = False
    """Keep moments and masters in host memory; the update streams them through the device."""
    loss_scale: Positive = 65536.0
    """First factor of the loss, which keeps the gradients of run.dtype=float16 in range."""
    loss_scale_interval: Count = 2000
    """Updates in a row after which the loss scale is doubled; a skipped one halves it [steps]."""
    skip_spikes: Literal["off", "loss", "norm", "both"] = "off"
    """Skip the update of a step whose loss, gradient norm, or either of both is an outlier."""
    spike_window: SpikeWindow = 128
    """Steps before it that a step is compared with; judged from half as many on [steps]."""
    spike_sigma: Positive = 6.0
    """Distance above the window's mean that makes an outlier [standard deviations]."""
    rewind: Natural = 0
    """Steps skipped in a row before the run goes back to the last checkpoint before them, and on
    with the samples after them; 0: never [steps]."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; wsd: warmup, stable, decay."""
    warmup_steps: Natural = 0
    """Length of the rise from 0 to lr at the start [steps]."""
    warmup_ratio: Fraction = 0.0
    """The same as a share of the run [of all steps]."""
    decay_steps: Natural = 0
    """Length of the fall to min_lr at the end; schedule wsd only [steps]."""


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how many of them make a step."""

    path: str = "data"
    """Dataset folder of llamax prepare, prefix of Megatron's .bin and .idx, a blend (weight,
    dataset, weight, dataset), or random: random tokens, to measure speed without data."""
    validation: str = ""
    """Dataset to validate on; empty: the part of data.path that was held out."""
    sequence_length: Count = 2048
    """Length of a sample [tokens]."""
    global_batch: Count = 1
    """Samples in one optimizer step [sequences]."""
    micro_batch: Count = 1
    """Samples that a rank computes at once [sequences]."""
    separate_documents: bool = True
    """No attention or positions across documents in a sample."""
    packing: Literal["auto", "best-fit", "concat", "padded"] = "auto"
    """Whole documents tightly, the stream cut, or one document each; auto: best-fit for
    instruction data, concat for text."""
    labels: Literal["answers", "all"] = "answers"
    """Part of instruction data that is learnt."""
    too_long: Literal["truncate", "drop", "refuse"] = "truncate"
    """Treatment of documents longer than a sample, unless packing is concat."""
    verify: Literal["start", "read", "off"] = "start"
    """When checksums of the token file are checked."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept, and where the run starts from."""

    every: Natural = 0
    """Save interval; 0: only at the end [steps]."""
    every_minutes: NonNegative = 0.0
    """Longest time between two saves, by the clock of rank 0; 0: no limit [minutes]."""
    each_epoch: bool = False
    """Also save when an epoch ends."""
    keep: Natural = 2
    """Newest checkpoints kept; 0: all [checkpoints]."""
    keep_every: Natural = 0
    """Interval of checkpoints that are kept for good; 0: none [steps]."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss."""
    resume: str = "auto"
    """auto: newest of this run; intact: newest whose hashes match; never; or a checkpoint folder;
    later ones are renamed to .past once the run saves."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What training does when a checkpoint cannot be written."""
    also_hf: bool = False
    """Leave a Hugging Face folder hub/ in every checkpoint."""
    background: bool = True
    """Write the files of a checkpoint in the background while training continues."""
    init_from: str = ""
    """Hugging Face or llamax folder to start from, or org/name@REVISION on the Hub; empty: random
    weights."""


@dataclass(frozen=True)
class RunConfig:
    """Folder, length, device, precision and reports."""

    folder: str = "run"
    """Folder that the run writes everything into."""
    steps: Count = 1000
    """Length of the run [steps]."""
    epochs: Natural = 0
    """Length of the run instead of steps; 0: steps [epochs]."""
    seed: Natural = 0
    """Seed of initial weights and of the order of samples."""
    backend: BackendName = "cpu"
    """Device and its collectives."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and activations; masters are float32, and float16 has a loss scale."""
    stochastic_rounding: bool = False
    """NeuronCores round to bfloat16 up or down by chance, in proportion."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Computed again in backward: nothing, attention, or layers."""
    log_every: Count = 1
    """Report interval [steps]."""
    validate_every: Natural = 0
    """Validation interval; 0: never [steps]."""
    validate_each_epoch: bool = False
    """Also validate when an epoch ends."""
    patience: Natural = 0
    """Validations without a lower loss before the run ends; 0: no limit [validations]."""
    validate_batches: Count = 8
    """Length of a validation [global batches]."""
    compile_guard: Literal["warn", "stop", "off"] = "warn"
    """Response to a program compiled after the first step: a warning, the end, or nothing."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also write to W&B; offline: into the run folder only."""
    wandb_project: str = "llamax"
    """Project of W&B."""
    trackio: str = ""
    """Project of trackio to write to as well; empty: none."""
    profile_at: Natural = 0
    """First step that rank 0 profiles; 0: none [step]."""
    profile_steps: Count = 3
    """Length of the profiled window [steps]."""
    progress: Literal["auto", "on", "off"] = "auto"
    """Progress bars; auto: when stderr is a terminal; off: lines of the log alone."""
    timeout_s: Count = 600
    """Longest duration of a collective, after which it has failed [s]."""
    threads: Natural = 0
    """CPU threads of a rank; 0: OMP_NUM_THREADS, or an equal share of the cores [threads]."""

    @property
    def validates(self) -> bool:
        """Whether there is validation during the run."""
        return self.validate_every > 0 or self.validate_each_epoch


@dataclass(frozen=True)
class FinetuneConfig:
    """Which weights are trained: all, or low-rank adapters beside a frozen base."""

    method: Literal["full", "lora", "qlora"] = "full"
    """full: all weights; lora: adapters; qlora: adapters, quantised base."""
    r: Count = 8
    """Rank of the adapters."""
    alpha: Positive = 16.0
    """Numerator of the scale alpha / r of adapters."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that is dropped."""
    targets: str = "all-linear"
    """Projections with adapters: q_proj,v_proj for example, or all-linear."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    quant: Literal["nf4", "int8"] = "nf4"
    """Storage of qlora's base: 4 bits in blocks, or 8 bits by row."""
    double_quant: bool = True
    """Store the scales of nf4 in 8 bits as well."""
    shard_base: bool = True
    """Cut qlora's base over the data ranks and gather it where it is used."""


@dataclass(frozen=True)
class Config:
    """The configuration of a run, as written."""

    model: Model
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    run: RunConfig = RunConfig()


def sections(config: Config) -> Iterator[tuple[str, Any]]:
    """(prefix, dataclass) of every section; a section inside another follows it."""
    return ((prefix, section) for prefix, section in walk(config) if prefix)
