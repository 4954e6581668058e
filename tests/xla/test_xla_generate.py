"""Generation by compiled programs: the tokens of the CPU, and each program compiled once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import adapters, ranks
from support.models import LLAMA2, TIED, WIDE, tiny

from llamax.backends import choose
from llamax.checkpoint.build_model import load_base
from llamax.checkpoint.hf_folder import open_source
from llamax.config.model import ModelConfig, RopeScaling
from llamax.config.schema import FinetuneConfig
from llamax.inference.sampling import Sampling, generate_tokens, join_steps
from llamax.inference.static_decoding import StaticDecoder, static_tokens
from llamax.model.llama import Llama
from llamax.model.lora_linear import Factor
from llamax.model.placement import move_model
from llamax.parallel.collectives import Axis, Solo
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.parallel.sharding import Shard

NEW, LENGTH, BATCH = 9, 100, 3
STOPS = frozenset(range(0, 50, 7))
LORA = FinetuneConfig(method="lora", r=4, alpha=6.0, targets="q_proj,v_proj,down_proj")


class Case(NamedTuple):
    name: str
    model: ModelConfig
    sampling: Sampling = Sampling()
    finetune: FinetuneConfig = FinetuneConfig()


def decided(model: ModelConfig) -> ModelConfig:
    """A model for which no two logits are close."""
    return replace(model, initializer_range=0.4, max_position_embeddings=128)


LLAMA31 = tiny(rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
CASES = [
    Case("Llama 2", decided(LLAMA2)),
    Case("grouped queries, Llama 3.1", decided(LLAMA31)),
    Case("tied", decided(TIED)),
    Case("drawn", decided(LLAMA2), Sampling(1.5, top_k=20, top_p=0.9, seed=5)),
    Case("lora", decided(LLAMA31), finetune=LORA),
    Case("nf4", decided(WIDE), finetune=replace(LORA, method="qlora")),
]


def cases_of(size: int) -> list[Case]:
    """All cases on two ranks, which do more, and the two ways to choose a token on one."""
    return CASES if size > 1 else [case for case in CASES if case.model == decided(LLAMA2)]


def batches(model: ModelConfig) -> list[list[list[int]]]:
    """Batches of two buckets, the last one not full."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((1, 7, 23), (64, 70, 3), (60, 8))
    ]


def build(case: Case, folder: Path, tp: Axis) -> Llama:
    """The model of a case on the host, its adapters not zero."""
    source, cpu = open_source(folder), torch.empty(0)
    at = "meta" if case.finetune.method == "qlora" else "cpu"
    model = Llama(case.model, tp, device=at)
    load_base(model, source, case.finetune, cpu, Solo("data", "cpu"))
    for name, module in model.named_modules():
        if isinstance(module, Factor) and "lora_B" in name:
            rows = module.weight.shape[0]
            parts = tp.size if isinstance(module.shard, Shard) else 1
            whole = torch.linspace(-0.3, 0.3, rows * parts)
            part = whole[tp.rank * rows :][:rows] if parts > 1 else whole
            module.weight.data.copy_(part[:, None].expand_as(module.weight))
    return model


def generated(rank: int, size: int, folders: list[Path]) -> list[tuple[list[list[int]], int]]:
    """The new tokens of all prompts of each case on ``xla``, and the programs it compiled."""
    backend, found = choose("xla", Rendezvous(rank, size, rank, size)), []
    with backend.joined(Mesh(tp=size), 60.0) as axes:
        for case, folder in zip(cases_of(size), folders, strict=True):
            model = build(case, folder, axes.tp)
            move_model(model, backend.device)
            before = backend.compilations()
            decoder = StaticDecoder(
                model, backend, BATCH, LENGTH, case.sampling.temperature == 0, 50
            )
            made = [
                row
                for prompts in batches(case.model)
                for row in join_steps(static_tokens(decoder, prompts, NEW, case.sampling, STOPS))
            ]
            found.append((made, backend.compilations() - before))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_the_tokens_are_those_of_the_cpu_and_no_program_is_compiled_twice(
    tmp_path: Path, size: int
) -> None:
    folders = [
        adapters.base_folder(tmp_path / str(number), case.model)
        for number, case in enumerate(cases_of(size))
    ]
    for rank, results in enumerate(ranks.run(size, generated, size, folders)):
        for case, folder, (found, programs) in zip(cases_of(size), folders, results, strict=True):
            model = build(case, folder, Solo("tp"))
            expected = [
                row
                for prompts in batches(case.model)
                for row in join_steps(
                    generate_tokens(
                        model,
                        prompts,
                        max_new_tokens=NEW,
                        sampling=case.sampling,
                        stop_ids=STOPS,
                        vocab_size=50,
                    )
                )
            ]
            assert found == expected, (case.name, rank)
            assert len({token for row in found for token in row}) > 8, case.name
            assert len({len(row) for row in found}) > 2, f"{case.name}: some stop early"
            if rank == 0:
                assert programs == 3, f"{case.name}: two buckets and a step"
