"""Collectives and programs of a step, beside those of neuronx-distributed's Llama example.

    .venv-xla/bin/python benchmarks/graphs.py

Tensor 2, data 2, two layers, sequence parallelism, ZeRO-1: the case whose traced collectives are
known of neuronx-distributed (NxD 0.18, its example as shipped: parallel state, padded ZeRO-1
optimizer, norm gradients reduced one by one, state made in the first step).  Ours are traced here
and counted from the HLO text; widths are the demo's, whose gradients fit one bucket.  The second
table is of tracing itself, for layers alike: what is between 2 and 4 layers, halved.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec

from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.runtime.units import show_bytes
from llamax.tools.audit.auditor import audit_run
from llamax.tools.audit.report import AuditReport, Kind
from llamax.training.resolve import resolve

MESH = Mesh(tp=2, dp=2)
NXD = {  # collectives traced from NxD's example at this mesh
    "microstep": {"all-gather": 15, "reduce-scatter": 10, "all-reduce": 3},
    "update": {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 7},
}
NXD_PROGRAMS = 6  # compiled before the steady state


def traced(layers: int) -> AuditReport:
    """The demo of so many layers, in bfloat16, two microsteps."""
    config: Config = load_config("demo")
    config = replace(
        config,
        model=replace(config.model, num_hidden_layers=layers),
        parallel=replace(config.parallel, tensor=MESH.tp),
        run=replace(config.run, dtype="bfloat16"),
        data=replace(config.data, micro_batch=4),
    )
    return audit_run(resolve(config, MESH.world_size), load_machine("trn1.32xlarge"))


def count(kind: Kind, verb: str) -> int:
    return sum(each.count for each in kind.collectives if each.kind == verb)


def sent(kind: Kind, verb: str) -> int:
    return sum(each.sent_bytes for each in kind.collectives if each.kind == verb)


def main() -> None:
    if find_spec("torch_xla") is None:
        sys.exit("benchmarks/graphs.py: torch-xla is not installed, and nothing is traced without")
    two, four = traced(2), traced(4)
    print("| program | collective | NxD | llamax | sent by a rank |\n|---|---|---|---|---|")
    for kind in two.kinds:
        for verb, theirs in NXD.get(kind.name, {}).items():
            print(
                f"| {kind.name} | {verb} | {theirs} | {count(kind, verb)} "
                f"| {show_bytes(sent(kind, verb))} |"
            )
    ours = sum(each.count for kind in two.kinds[:2] for each in kind.collectives)
    theirs = sum(sum(counts.values()) for counts in NXD.values())
    print(f"| both | all | {theirs} | {ours} | |")
    training = [kind for kind in two.kinds if kind.name in NXD]
    print(
        f"\nPrograms compiled before the steady state: NxD {NXD_PROGRAMS}, llamax "
        f"{len(training)}; distinct programs of {MESH.world_size} ranks: "
        f"{'1 of each kind' if two.passes else 'ranks differ'}."
    )
    print("\n| program | instructions, 2 layers | a layer | trace s |\n|---|---|---|---|")
    for small, large in zip(two.kinds, four.kinds, strict=True):
        less, more = (len(each.program.instructions) for each in (small, large))
        print(f"| {small.name} | {less:,} | {(more - less) // 2:,} | {small.trace_s:.2f} |")


if __name__ == "__main__":
    main()
