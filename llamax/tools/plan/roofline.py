"""Seconds of a step by a roofline model: each part of the work against the resource that bounds it.

::

    microstep   matmuls       FLOPs of the whole tiles that they take / (peak x efficiency), or
                              their bytes / memory bandwidth
                attention     FLOPs of the causal half, with scores computed again in backward; on
                              trn1 the cycles of llamax's NKI kernels (nki_time); without a
                              flash kernel all pairs of tokens, and their bytes
                element-wise  bytes / memory bandwidth: norms, rope, SwiGLU, residuals; logits,
                              or on trn1 the cycles of the kernels that make and use them (nki_loss)
                dequantise    bytes / memory bandwidth: a base of QLoRA made dense, layer by layer
                tensor        bytes / link bandwidth + steps x latency: gathers and scatters
                context       the same for keys and values of whole sequences
                pipeline      activations and their gradients change places with the stages beside
                accumulate    gradients: bytes / memory bandwidth
    pipeline    the bubble: a microstep of every stage but the slowest, which sets the pace, less
                the gradients of weights where they are put off
    step        AdamW: bytes / memory bandwidth; data: gradients out, weights in; replica: reduced
                gradients over the groups that own the same

The parts are added up.  One thing is assumed to overlap: on GPUs, what ZeRO-2 and 3 send in a
microstep goes on while it computes, and only what takes longer is counted.  Bytes of collectives
are those of rings (parallel/collectives.py).  The fitted efficiencies of a machine absorb what
runs do better.

Sources: Williams et al. 2009 (roofline); Korthikanti et al. 2022 (bytes of sequence parallelism);
Dao 2023, FlashAttention-2, section 4.1 (FLOPs of backward).
"""

from __future__ import annotations

from dataclasses import dataclass

from llamax.config.flops import flops_per_token, mfu
from llamax.config.hardware import Machine
from llamax.runtime.units import (
    count,
    show_bytes,
    show_fine_time,
    show_flops,
    show_number,
    show_rate,
)
from llamax.tools.plan import context
from llamax.tools.plan.context import pairs
from llamax.tools.plan.line import Line, total
from llamax.tools.plan.memory import by_nki, plain_attention
from llamax.tools.plan.nki_loss import loss_by_nki, loss_seconds
from llamax.tools.plan.nki_time import attention_seconds
from llamax.tools.plan.products import attention_flops, filled, forward_flops, weight_flops
from llamax.tools.plan.sizes import Share, adapter_elements, stages_of
from llamax.tools.plan.state import compiled, on_host
from llamax.training.resolve import ResolvedRun

# Of a score without a flash kernel, and of a logit: float32, written and read 3 times.
ROUNDED_BYTES = 72  # traffic of an element while its moments become wide and are rounded again
SCORE_TRAFFIC_BYTES = LOGIT_TRAFFIC_BYTES = 24
BEHIND = "behind products"
# What collectives go on behind.
COMPUTED = ("matmuls", "attention", "element-wise", "dequantise", "logits")


@dataclass(frozen=True)
class Time:
    """Seconds of a step by purpose, with throughput, MFU and cost."""

    lines: tuple[Line, ...]
    step_tokens: int
    steps: int
    mfu: float
    dollars_per_hour: float

    @property
    def step_s(self) -> float:
        return total(self.lines)

    @property
    def tokens_per_s(self) -> float:
        return self.step_tokens / self.step_s

    @property
    def total_s(self) -> float:
        return self.steps * self.step_s

    @property
    def dollars(self) -> float:
        return self.total_s / 3600 * self.dollars_per_hour


@dataclass(frozen=True)
class Wire:
    """The connection of an axis: bytes/s of a rank one way, latency of a ring step in s."""

    size: int
    bytes_per_s: float
    latency_s: float
    name: str

    def ring(self, whole_bytes: float, passes: int = 1) -> float:
        """Seconds to gather or scatter ``whole_bytes`` in a ring (all-reduce: two passes)."""
        if self.size == 1:
            return 0.0
        step_s = whole_bytes / self.size / self.bytes_per_s + self.latency_s
        return passes * (self.size - 1) * step_s


def wire(machine: Machine, size: int, stride: int) -> Wire:
    """The ring of an axis whose neighbours are ``stride`` ranks apart.

    Within a node it runs over the node's links.  Across nodes each of the ``stride`` rings leaves
    the node once, so the rings share the node's network equally.
    """
    if size * stride <= machine.ranks or size == 1:
        return Wire(
            size,
            1e9 * machine.link_gbps * machine.link_efficiency or float("inf"),
            1e-6 * machine.link_latency_us,
            "links",
        )
    rings = min(stride, machine.ranks)
    network = 1e9 * machine.network_gbps * machine.network_efficiency / rings
    return Wire(size, network or 1e-9, 1e-6 * machine.network_latency_us, "network")


def element_bytes(share: Share, rotates: bool = True) -> float:
    """Bytes that the element-wise operations of one layer read and write in forward.

    Without ``rotates`` the attention kernels apply the rotary embedding.
    """
    between = share.tokens_between * share.model.hidden_size
    inside = 2 * (share.query + share.key) * rotates + 3 * share.feed_forward
    return float((2 * 2 + 2 * 3) * between + share.tokens * inside) * share.width


def dequantise_bytes(share: Share, machine: Machine) -> float:
    """Bytes read and written to make a weight of a QLoRA base dense; 0 for any other run.

    The operations of ``llamax.model.quantize``: one after another, or fused but for a look-up.
    """
    finetune, w = share.config.finetune, share.width
    if finetune.method != "qlora":
        return 0.0
    nf4 = finetune.quant == "nf4"
    if compiled(machine):
        return (0.5 + 2 * 4 if nf4 else 1) + w
    rounded = 4 + w if w < 4 else 0
    if nf4:  # two weights are an index of 4 bytes; found, scaled in place, rounded, joined
        return (0.5 + 2 * 2 + 4) + 2 * 4 + rounded + 2 * w
    return (1 + 4) + 2 * 4 + rounded


def turns(share: Share) -> int:
    """The number of times a whole hidden state goes around the tensor ring in a microbatch.

    With sequence parallelism a layer gathers and scatters twice in forward and twice in backward,
    and gathers its two inputs once more for the gradients of weights; the embedding adds two, and
    the head three.  Without it, each of four all-reduces goes around twice.  A recomputed layer
    leaves out its last product and the sum of it, which backward does not need.
    """
    again = share.config.run.recompute == "full"
    if share.sequence:
        return (10 + 3 * again) * share.layers + 2 * share.embeds + 3 * share.projects
    return 2 * ((4 + again) * share.layers + share.embeds + share.projects)


def data_collectives(share: Share, data: Wire, behind_s: float) -> Line:
    """Gradients and weights over the owners, in a step.

    Of what a microstep sends, ``behind_s`` go on while it computes.
    """
    zero, w, n = share.config.parallel.zero, share.width, share.accumulation
    elements = share.elements
    count, hidden_s = f"{show_number(elements)} elements", 0.0
    scattered_s, gathered_s = data.ring(4 * elements), data.ring(w * elements)
    if zero == 0:
        seconds, sent = data.ring(4 * elements, passes=2), f"2 x 4 B x {count}"
    elif zero == 1 or share.tuned:
        seconds, sent = scattered_s + gathered_s, f"4 B + {w} B x {count}"
    elif zero == 2:
        hidden_s = n * min(scattered_s, behind_s)
        seconds = n * scattered_s + gathered_s - hidden_s
        sent = f"({n} microsteps x 4 B + {w} B) x {count}"
    else:
        micro_s = scattered_s + data.ring(w * share.gathered)
        hidden_s = n * min(micro_s, behind_s)
        seconds = n * micro_s - hidden_s
        gathered = show_number(share.gathered)
        sent = f"{n} microsteps x (4 B x {count} + {w} B x {gathered} gathered)"
    formula = f"{sent} over {data.name} at {show_rate(data.bytes_per_s)}"
    if hidden_s:
        formula += f", {show_fine_time(hidden_s)} of it {BEHIND}"
    return Line("data collectives", seconds, formula)


def microstep(share: Share, machine: Machine) -> list[Line]:
    """The seconds of a microstep on a stage, by purpose."""
    config, mesh, mode, w = share.config, share.mesh, share.config.run.recompute, share.width
    peak = machine.peak_flops(config.run.dtype)
    bandwidth = machine.memory_rate()

    half = forward_flops(share)[2]
    again = 1 if mode == "full" else 0
    on_chip = loss_by_nki(share, machine)
    projected = 0 if on_chip or not share.projects else share.head_weights
    passes = 2 if share.tuned else 3  # a frozen weight needs no gradient
    matmul, tiles = weight_flops(share, machine, on_chip)
    weights = (passes + again) * (share.layers * share.layer_weights + projected) * w
    matmul_s = max(tiles / (peak * machine.matmul_efficiency), weights / bandwidth)
    multiplied = show_flops(matmul)
    if tiles > matmul:
        multiplied += f" ({show_flops(tiles)} in whole tiles)"
    plain = plain_attention(share, machine)
    forward, backward = attention_flops(share, machine)
    rounds = 1 + backward / forward
    attention_s = (forward + backward) / (peak * machine.attention_efficiency)
    attended = f"{rounds:g} x {show_flops(half)} / ({machine.attention_efficiency:.0%} of it)"
    kernels = by_nki(share, machine) and not plain
    if kernels:
        attention_s = attention_seconds(share, int(mode != "none"), bandwidth)
        attended = f"{show_fine_time(attention_s)} by the NKI kernels' tally of cycles"
    if plain:  # both halves are computed, and scores go through memory
        scores = rounds * SCORE_TRAFFIC_BYTES * pairs(share) * share.layers
        attention_s += scores / bandwidth
        attended += f", twice, + {show_bytes(scores)} of scores / {show_rate(bandwidth)}"
    element_traffic = (3 + again) * share.layers * element_bytes(share, not kernels)
    logits = LOGIT_TRAFFIC_BYTES * share.tokens * share.vocabulary if share.projects else 0
    logits_s, moved = logits / bandwidth, f"{show_bytes(logits)} / {show_rate(bandwidth)}"
    if on_chip:
        logits_s = loss_seconds(share, bandwidth)
        moved = (
            f"{show_fine_time(logits_s)} with their products, by the NKI kernels' tally of cycles"
        )

    base, dense = share.layers * share.layer_weights, 2 + again  # times that it is made dense
    dense_bytes = dense * dequantise_bytes(share, machine)

    tp = wire(machine, mesh.tp, 1)
    hidden = share.tokens * share.model.hidden_size * w
    rings = turns(share)

    cp = wire(machine, mesh.cp, mesh.tp)
    times, keys = context.turns(share)

    pp = wire(machine, min(mesh.pp, 2), mesh.tp * mesh.cp * mesh.dp)
    activation = share.tokens_between * share.model.hidden_size * w
    swaps = 2 * config.parallel.chunks - share.embeds - share.projects

    elements = share.elements
    owners = mesh.owners
    data = wire(machine, owners, mesh.tp)
    whole = share.base[1] * owners if share.shards_base else 0.0

    rate = f"{machine.matmul_efficiency:.0%} of {show_flops(peak)}/s"
    memory = show_rate(bandwidth)
    return [
        Line("matmuls", matmul_s, f"{multiplied} / ({rate})"),
        Line(
            "attention",
            attention_s,
            attended,
        ),
        Line(
            "element-wise",
            element_traffic / bandwidth,
            f"{show_bytes(element_traffic)} / {memory}",
        ),
        Line(
            "dequantise",
            dense_bytes * base / bandwidth,
            f"{dense_bytes:g} B x {show_number(base)} elements of the base / {memory}",
        ),
        Line("logits", logits_s, moved),
        Line(
            "tensor collectives",
            rings * tp.ring(hidden),
            f"{rings} turns of {show_bytes(hidden)} over {tp.name} at {show_rate(tp.bytes_per_s)}",
        ),
        Line(
            "context collectives",
            times * cp.ring(keys),
            f"{times} turns of {show_bytes(keys)} keys and values over {cp.name} at "
            f"{show_rate(cp.bytes_per_s)}",
        ),
        Line(
            "pipeline swaps",
            swaps * pp.ring(2 * activation),
            f"{swaps} x {show_bytes(activation)} over {pp.name} at {show_rate(pp.bytes_per_s)}",
        ),
        Line(
            "accumulate gradients",
            (8 + w) * elements / bandwidth,
            f"{8 + w} B x {show_number(elements)} elements / {memory}",
        ),
        Line(
            "base gathered",
            dense * data.ring(whole) if whole else 0.0,
            f"{dense} x {show_bytes(whole)} over {data.name} at {show_rate(data.bytes_per_s)}",
        ),
    ]


def weights_put_off(share: Share, machine: Machine) -> float:
    """The seconds in a microstep of a stage for the gradients of weights that it puts off."""
    if not share.splits(machine.backend, share.config.run.recompute):
        return 0.0
    peak = machine.peak_flops(share.config.run.dtype)
    forward = forward_flops(share)[0] * filled(share, machine)
    return forward / (peak * machine.matmul_efficiency)


def waiting(run: ResolvedRun, slowest_s: float, all_s: float, put_off_s: float) -> Line:
    """The bubble: what the slowest stage waits while the pipeline fills and drains.

    The first microbatch comes through all stages before it, and the last one goes back through
    them.  With chunks all stages begin their rounds together.  What the other stages put off is not
    waited for, and fills the rest of the time once more.
    """
    stages, chunks = run.mesh.pp, run.config.parallel.chunks
    if chunks == 1:
        seconds, formula = all_s - slowest_s, f"a microstep of {stages - 1} stages"
        if put_off_s:
            formula += f" - 2 x {put_off_s:.3g} s of gradients of weights"
        return Line("pipeline bubble", max(0.0, seconds - 2 * put_off_s), formula)
    return Line(
        "pipeline bubble",
        (stages - 1) * slowest_s / chunks,
        f"{stages - 1} microsteps / {chunks} chunks",
    )


def time(share: Share, machine: Machine, nodes: int) -> Time:
    """The time of a step of the run of ``share`` on ``nodes`` machines.

    The slowest stage sets the pace, and its parts are those that are listed.
    """
    stages = [(each, number, microstep(each, machine)) for each, number in stages_of(share.run)]
    seconds = [total(lines) for _, _, lines in stages]
    slowest_s = max(seconds)
    share, _, parts = stages[seconds.index(slowest_s)]
    all_s = sum(number * each for (_, number, _), each in zip(stages, seconds, strict=True))
    put_off = [number * weights_put_off(each, machine) for each, number, _ in stages]
    put_off_s = sum(put_off) - weights_put_off(share, machine)

    config, mesh, n, w = share.config, share.mesh, share.accumulation, share.width
    peak = machine.peak_flops(config.run.dtype)
    bandwidth = machine.memory_rate()
    elements, owners = share.elements, mesh.owners
    run = elements / owners
    updated = run if config.parallel.zero else elements
    element = 32 + w if config.optim.state_bits == 32 else 16 + w + ROUNDED_BYTES
    adamw = element * updated
    away = on_host(share, machine).value
    data = wire(machine, owners, mesh.tp)
    behind_s = total(line for line in parts if line.name in COMPUTED)
    replica = wire(machine, mesh.copies, mesh.tp * owners)
    times = count(n, "microstep")
    lines = (
        *(Line(line.name, n * line.value, f"{times} x {line.formula}") for line in parts),
        waiting(share.run, slowest_s, all_s, put_off_s),
        Line(
            "AdamW",
            adamw / bandwidth,
            f"{element} B x {show_number(updated)} elements / {show_rate(bandwidth)}",
        ),
        Line(
            "state from and to the host",
            2 * away / (1e9 * machine.host_gbps),
            f"2 x {show_bytes(away)} / {show_rate(1e9 * machine.host_gbps)}, not at the same time",
        ),
        data_collectives(share, data, behind_s if machine.backend == "cuda" else 0.0),
        Line(
            "replica collectives",
            replica.ring(4 * run, passes=2),
            f"2 x 4 B x {show_number(run)} elements over {replica.name} at "
            f"{show_rate(replica.bytes_per_s)}",
        ),
    )
    trained = adapter_elements(config) if share.tuned else 0
    step_tokens = share.run.step_tokens
    step_s = total(lines)
    return Time(
        lines=tuple(line for line in lines if line.value or BEHIND in line.formula),
        step_tokens=step_tokens,
        steps=share.run.steps,
        mfu=mfu(
            step_tokens / step_s,
            flops_per_token(share.model, config.data.sequence_length, trained),
            peak * mesh.world_size,
        ),
        dollars_per_hour=machine.dollars_per_hour * nodes,
    )
