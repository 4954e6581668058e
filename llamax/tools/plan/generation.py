"""Memory and time of generating text on Trainium with ``llamax generate --backend xla``.

Every token reads all weights but the embedding's, and the cache of all sequences: a step is as long
as that takes, plus the latencies of two sums a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from llamax.config.constants import DTYPE_BYTES
from llamax.config.flops import flops_per_token
from llamax.config.hardware import GIB, Machine, default_machine, load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config, DataConfig, ParallelConfig
from llamax.config.validate import check
from llamax.runtime.errors import ConfigError
from llamax.runtime.units import count, show_bytes, show_fine_time, show_number, show_rate
from llamax.tools.plan.line import Line, total
from llamax.tools.plan.report import rows
from llamax.tools.plan.roofline import wire

CACHE_PASSES = 3  # a step reads the cache, writes it with the new tokens, and attends to it


@dataclass(frozen=True)
class GenerationPlan:
    """Bytes and seconds of one rank of ``ranks`` that share the model."""

    headline: str
    memory: tuple[Line, ...]
    available: float
    step: tuple[Line, ...]
    prefill_s: float
    batch: int

    @property
    def peak(self) -> float:
        """Bytes that are needed."""
        return total(self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    @property
    def step_s(self) -> float:
        """Seconds of one token of every sequence."""
        return total(self.step)


def plan_generation(
    config: Config | str,
    batch: int,
    length: int,
    instance: Machine | str = "",
    *,
    overrides: Sequence[str] = (),
) -> GenerationPlan:
    """Memory and time of generating with ``batch`` prompts at once.

    Args:
        config: A configuration, a recipe's name or a TOML file: model, dtype, tensor ranks.
        batch: Number of prompts computed at once.
        length: Tokens of a prompt and its answer.
        instance: A machine, its name, or a TOML file; by default that of the backend.
        overrides: Changes of the configuration, as "--section.key=value".

    Raises:
        ConfigError: For a parameter out of range, an unknown machine, or a model that does not fit.
    """
    written = config if isinstance(config, Config) else load_config(config, overrides)
    machine = instance
    if not isinstance(machine, Machine):
        machine = load_machine(machine or default_machine(written.run.backend))
    check_generation(written, batch, length)
    model, tp = written.model, written.parallel.tensor
    width, layers = DTYPE_BYTES[written.run.dtype], model.num_hidden_layers
    D, F, V, E = model.hidden_size, model.intermediate_size, model.vocab_size, model.head_dim
    heads, key = model.num_attention_heads // tp, max(1, model.num_key_value_heads // tp)
    layer = D * E * (2 * heads + 2 * key) + 3 * D * F // tp
    table = -(-V // tp) * D
    read = width * (layers * (layer + 2 * D) + table + D)
    weights = read + (0 if model.tie_word_embeddings else width * table)
    cache = 2 * width * layers * batch * key * length * E
    bandwidth = machine.memory_rate()
    memory = show_rate(bandwidth)
    tensor, sums = wire(machine, tp, 1), 2 * layers + 1
    peak = machine.peak_flops(written.run.dtype) * machine.matmul_efficiency
    flops = batch * length * (flops_per_token(model, length) / 3 - 2 * V * D) / tp
    hidden = batch * length * D * width
    return GenerationPlan(
        f"{show_number(model.num_parameters())} parameters in {written.run.dtype} on "
        f"{count(tp, 'rank')} of {machine.name}: generating {batch} x {length} tokens",
        (
            Line("weights", weights, f"{width} B x {show_number(weights / width)} elements"),
            Line(
                "keys and values",
                cache,
                f"2 x {layers} layers x {batch} x {length} tokens x {key * E} x {width} B",
            ),
            Line(
                "prefill",
                prefill_bytes(batch, length, heads, D, F // tp, width),
                "a layer's scores or feed-forward, without a kernel",
            ),
            Line("reserve", machine.reserve_gib * GIB, "for the runtime and programs"),
        ),
        machine.memory_bytes(),
        (
            Line("reading the weights", read / bandwidth, f"{show_bytes(read)} / {memory}"),
            Line(
                "the cache",
                CACHE_PASSES * cache / bandwidth,
                f"{CACHE_PASSES} x {show_bytes(cache)} / {memory}",
            ),
            Line(
                "sums over ranks",
                sums * tensor.ring(batch * D * width, 2),
                f"{sums} of {show_bytes(batch * D * width)} over {tensor.name}",
            ),
        ),
        flops / peak + sums * tensor.ring(hidden, 2),
        batch,
    )


def prefill_bytes(batch: int, length: int, heads: int, D: int, f: int, width: int) -> int:
    """Bytes of the largest moment of a prefill: a layer's scores in fp32, or its feed-forward."""
    tokens = batch * length
    scores = batch * heads * length * length * (2 * 4 + width)
    return tokens * D * width * 2 + max(scores, 3 * tokens * f * width)


def check_generation(config: Config, batch: int, length: int) -> None:
    """Raise ConfigError for a batch, a length or tensor ranks that do not fit a model."""
    longest, tp = config.model.max_position_embeddings, config.parallel.tensor
    if batch < 1:
        raise ConfigError(f"`generate`: a batch of {batch} is out of range; use 1 or more")
    if not 2 <= length <= longest:
        raise ConfigError(
            f"`generate`: a length of {length} tokens is out of range; use 2 to "
            f"max_position_embeddings={longest}"
        )
    check(Config(config.model, ParallelConfig(tensor=tp), data=DataConfig(sequence_length=tp)), tp)


def show_generation(plan: GenerationPlan) -> Iterator[str]:
    """The plan as lines of text."""
    yield plan.headline
    yield ""
    fits = "fits" if plan.fits else "DOES NOT FIT"
    yield f"memory of a rank: {show_bytes(plan.peak)} of {show_bytes(plan.available)}, {fits}"
    yield from rows(plan.memory, show_bytes)
    yield ""
    yield f"time of a token: {show_fine_time(plan.step_s)} for {count(plan.batch, 'sequence')}"
    yield from rows(plan.step, show_fine_time)
    yield ""
    yield f"{show_number(plan.batch / plan.step_s)} tokens/s"
    yield f"a prefill of full length: {show_fine_time(plan.prefill_s)}"


def generation_as_json(plan: GenerationPlan) -> dict[str, object]:
    """The plan for programs, in bytes and seconds."""
    return {
        **asdict(plan),
        "fits": plan.fits,
        "peak": plan.peak,
        "step_s": plan.step_s,
        "tokens_per_s": plan.batch / plan.step_s,
    }
