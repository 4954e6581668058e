"""Error of the time model of ``llamax plan`` against published runs.

    python benchmarks/plan.py [--fit]

Every row is somebody else's run: throughput as published, and the planner's figure for the same
model, mesh and batch on the same machine.  Rows marked "fitted" chose the machine's efficiencies
(``--fit`` searches for them again); the others were left out, and test them.  What a source does
not say (recomputation, how documents are packed) is assumed as noted: selective recomputation, and
sequences without document boundaries.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from llamax.config.flops import flops_per_token
from llamax.config.hardware import Machine, load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.roofline import time
from llamax.tools.plan.sizes import Share
from llamax.training.resolve import resolve

NEURON = "aws-neuron-sdk, benchmarks/trn1/training_data_decoder.csv"


@dataclass(frozen=True)
class Run:
    """A published run: ``tokens_per_s`` of the whole job."""

    name: str
    model: str
    machine: str
    nodes: int
    mesh: Mesh
    length: int
    batch: int
    tokens_per_s: float
    source: str
    fitted: bool = False
    micro_batch: int = 1
    recompute: str = "selective"
    zero: int = 1
    zero_ranks: int = 0
    shape: dict[str, int] = field(default_factory=dict)  # of a model that is no recipe

    @property
    def backend(self) -> str:
        """The backend of its machine, or for a pipeline on trn1 an eager one.

        llamax on xla allows recompute=full alone with a pipeline; AWS ran selective.
        """
        backend = load_machine(self.machine).backend
        return "neuron" if backend == "xla" and self.mesh.pp > 1 else backend

    def config(self) -> Config:
        """The recipe of its model, laid out as it was."""
        config = load_config(self.model)
        return replace(
            config,
            model=replace(
                config.model, max_position_embeddings=max(self.length, 2048), **self.shape
            ),
            parallel=replace(
                config.parallel,
                tensor=self.mesh.tp,
                context=self.mesh.cp,
                pipeline=self.mesh.pp,
                chunks=1,
                zero=self.zero,
                zero_ranks=self.zero_ranks,
            ),
            data=replace(
                config.data,
                sequence_length=self.length,
                global_batch=self.batch,
                micro_batch=self.micro_batch,
                separate_documents=False,
            ),
            run=replace(
                config.run,
                recompute=self.recompute,
                dtype="bfloat16",
                backend=self.backend,
            ),
        )


def neuron(
    name: str, model: str, nodes: int, mesh: Mesh, length: int, rates: str, fitted: bool = False
) -> Run:
    """A row of AWS's tables: sequences/s of one or several releases, compared by their mean."""
    found = [float(rate) for rate in rates.split("/")]
    mean = math.fsum(found) / len(found) * length
    return Run(
        f"{name} ({rates} seq/s)",
        model,
        "trn1.32xlarge",
        nodes,
        mesh,
        length,
        1024,
        mean,
        NEURON,
        fitted,
    )


PUBLISHED = (
    neuron(
        "Llama-2-7B, SDK 2.16 to 2.21",
        "llama2-7b",
        16,
        Mesh(tp=8, dp=64),
        4096,
        "93.3/94.7/92.93/101.3/95.14",
        fitted=True,
    ),
    neuron(
        "Llama-3.1-8B, SDK 2.20 to 2.24",
        "llama3.1-8b",
        32,
        Mesh(tp=32, dp=32),
        8192,
        "49.47/53.51/41.99/47.95",
        fitted=True,
    ),
    neuron(
        "Llama-2-13B, SDK 2.16 to 2.18",
        "llama2-13b",
        32,
        Mesh(tp=8, dp=32, pp=4),
        4096,
        "85.65/81.8/87.44",
    ),
    neuron(
        "Llama-2-13B, SDK 2.20 and 2.21",
        "llama2-13b",
        32,
        Mesh(tp=8, dp=16, pp=8),
        4096,
        "84.0/80.33",
    ),
    neuron(
        "Llama-2-70B, SDK 2.16 to 2.18",
        "llama2-70b",
        32,
        Mesh(tp=32, dp=8, pp=4),
        4096,
        "15.34/15.6/17.86",
    ),
    neuron(
        "Llama-2-70B, SDK 2.20 and 2.21",
        "llama2-70b",
        32,
        Mesh(tp=32, dp=4, pp=8),
        4096,
        "14.2/14.44",
    ),
    neuron(
        "Llama-3.1-70B, SDK 2.20 to 2.24",
        "llama3.1-70b",
        32,
        Mesh(tp=32, dp=4, pp=8),
        8192,
        "7.59/7.97/7.51/7.94",
    ),
)


def gpu(
    name: str, model: str, machine: str, length: int, micro_batch: int, mfu: float, source: str
) -> Run:
    """Eight GPUs of one node, data parallel, at a published share of their peak."""
    config = load_config(model)
    peak = load_machine(machine).peak_flops("bfloat16")
    tokens_per_s = 8 * peak * mfu / flops_per_token(config.model, length)
    return Run(
        f"{name} ({mfu:.0%} MFU)",
        model,
        machine,
        1,
        Mesh(dp=8),
        length,
        64,
        tokens_per_s,
        source,
        fitted=True,
        micro_batch=micro_batch,
        recompute="selective" if length > 4096 else "none",
        zero=3 if "FSDP" in name else 1,
    )


GPUS = (
    gpu("Llama-3.1-8B, FSDP", "llama3.1-8b", "p5.48xlarge", 8192, 2, 0.35, "torchtitan"),
    gpu("TinyLlama 1.1B", "tinyllama-1.1b", "p4d.24xlarge", 2048, 8, 0.52, "litgpt"),
)


def per_gpu(
    name: str,
    model: str,
    machine: str,
    gpus: int,
    length: int,
    micro_batch: int,
    rate: float,
    source: str,
    recompute: str = "none",
) -> Run:
    """GPUs in data parallel at a published rate of each, without accumulation of gradients."""
    return Run(
        f"{name} ({rate:,.0f} tokens/s a GPU)",
        model,
        machine,
        gpus // 8,
        Mesh(dp=gpus),
        length,
        gpus * micro_batch,
        gpus * rate,
        source,
        micro_batch=micro_batch,
        recompute=recompute,
        zero=3,
        zero_ranks=8 if "HSDP" in name else 0,
    )


TITAN, FMS = "torchtitan, docs/performance.md", "fms-fsdp, README.md"
# Found after the model was made: they test it, and nothing was fitted to them.  All cut weights
# too (FSDP), HSDP within each node.
UNSEEN = (
    per_gpu("Llama-2-7B, HSDP", "llama2-7b", "p4de.24xlarge", 128, 4096, 2, 3760, FMS),
    per_gpu("Llama-2-13B, HSDP", "llama2-13b", "p4de.24xlarge", 128, 4096, 1, 1700, FMS),
    per_gpu("Llama-2-13B, FSDP", "llama2-13b", "p4de.24xlarge", 64, 4096, 2, 2162, TITAN),
    per_gpu(
        "Llama-3-8B, FSDP", "llama3-8b", "p4de.24xlarge", 64, 8192, 1, 2973, TITAN, "selective"
    ),
    per_gpu(
        "Llama-3.1-8B, FSDP, December 2024",
        "llama3.1-8b",
        "p5.48xlarge",
        8,
        8192,
        2,
        5762,
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md",
        "selective",
    ),
    per_gpu(
        "Llama-3.1-8B, FSDP, December 2024",
        "llama3.1-8b",
        "p5.48xlarge",
        128,
        8192,
        2,
        5605,
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md",
        "selective",
    ),
)


MPT = {"1B": (2048, 24, 16), "3B": (2560, 32, 20), "7B": (4096, 32, 32), "13B": (5120, 40, 40)}
MPT |= {"30B": (7168, 48, 56), "70B": (8192, 80, 64)}


def mosaic(
    size: str,
    machine: str,
    gpus: int,
    length: int,
    micro_batch: int,
    accumulation: int,
    rate: float,
    recompute: str = "none",
) -> Run:
    """An MPT of Databricks' table, as the Llama whose matrices have as many elements."""
    D, layers, heads = MPT[size]
    each = per_gpu(
        f"MPT-{size}, FSDP",
        "llama2-7b",
        machine,
        gpus,
        length,
        micro_batch,
        rate,
        "llm-foundry, scripts/train/benchmarking/README.md",
        recompute,
    )
    shape = {
        "hidden_size": D,
        "intermediate_size": D * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 50432,
    }
    return replace(each, batch=each.batch * accumulation, shape=shape)


MOSAIC = (
    mosaic("1B", "p4de.24xlarge", 8, 4096, 7, 4, 17807),
    mosaic("3B", "p4de.24xlarge", 8, 2048, 10, 2, 10811),
    mosaic("7B", "p4de.24xlarge", 8, 2048, 6, 2, 4641),
    mosaic("13B", "p4de.24xlarge", 8, 2048, 2, 3, 2262),
    mosaic("30B", "p4de.24xlarge", 8, 2048, 3, 21, 916, "full"),
    mosaic("70B", "p4de.24xlarge", 64, 2048, 8, 4, 410, "full"),
    mosaic("1B", "p5.48xlarge", 8, 4096, 7, 4, 38535),
    mosaic("3B", "p5.48xlarge", 64, 2048, 6, 3, 22525),
    mosaic("7B", "p5.48xlarge", 8, 2048, 6, 1, 10643),
    mosaic("13B", "p5.48xlarge", 64, 2048, 2, 1, 4800),
    mosaic("30B", "p5.48xlarge", 32, 2048, 14, 3, 2308, "full"),
    mosaic("70B", "p5.48xlarge", 64, 2048, 8, 4, 1039, "full"),
)


def planned(run: Run, machine: Machine) -> float:
    """The planner's tokens/s for a published run, which had the NKI kernels of llamax nowhere."""
    resolved = resolve(run.config(), run.mesh.world_size)
    if machine.backend == "xla":
        machine = replace(machine, backend="neuron")
    return time(Share(resolved), machine, run.nodes).tokens_per_s


def error(run: Run, machine: Machine) -> float:
    """The planner's figure over the published one, minus 1."""
    return planned(run, machine) / run.tokens_per_s - 1


def fit(name: str) -> Iterator[str]:
    """The efficiencies of matmuls and links that meet the fitted runs best, on a grid."""
    machine = load_machine(name)
    runs = [run for run in PUBLISHED if run.machine == name and run.fitted]
    grid = [k / 100 for k in range(30, 100, 2)]
    best = []
    for matmul, link in itertools.product(grid, grid):
        each = replace(
            machine,
            matmul_efficiency=matmul,
            link_efficiency=link,
        )
        worst = max(abs(math.log1p(error(run, each))) for run in runs)
        best.append((worst, matmul, link))
    for worst, matmul, link in sorted(best)[:8]:
        yield f"matmul {matmul:.2f}  link {link:.2f}  worst error {math.expm1(worst):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fit", metavar="MACHINE", help="search for a machine's efficiencies")
    options = parser.parse_args()
    if options.fit:
        print("\n".join(fit(options.fit)))
        return
    print("| run | mesh | published tokens/s | planned | error | |")
    print("|---|---|---|---|---|---|")
    for run in (*PUBLISHED, *GPUS, *UNSEEN, *MOSAIC):
        machine = load_machine(run.machine)
        mesh = " ".join(f"{axis}{run.mesh.degree(axis)}" for axis in ("tp", "pp", "dp"))
        print(
            f"| {run.name} | {run.nodes} x {run.machine}, {mesh} | {run.tokens_per_s:,.0f} "
            f"| {planned(run, machine):,.0f} | {error(run, machine):+.0%} "
            f"| {'fitted' if run.fitted else 'found later' if run in (*UNSEEN, *MOSAIC) else ''} |"
        )


if __name__ == "__main__":
    main()
