"""Packed samples: labels, ranks, and the loss of separate sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.instruction import llama2_tokenizer, prepare, sums, write_rows
from support.models import tiny
from support.token_files import write_token_file

from llamax.config.schema import DataConfig
from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import open_dataset
from llamax.data.header import Header
from llamax.data.loader import Batch, Loader
from llamax.data.packed_loader import PackedLoader
from llamax.data.packing import Packs
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.model.llama import Llama
from llamax.ops import IGNORE_INDEX
from llamax.parallel.collectives import Solo
from llamax.parallel.sharding import Replica

MODEL = tiny(vocab_size=600, initializer_range=0.2, max_position_embeddings=2048)


def rows_of(batch: Batch, row: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, labels, positions) of each document of a row."""
    assert batch.documents is not None
    numbers = batch.documents[row].tolist()
    assert numbers == sorted(numbers)
    return [
        tuple(
            part[row][batch.documents[row] == n].tolist()
            for part in (batch.ids, batch.labels, batch.positions)
        )
        for n in sorted(set(numbers))
    ]


def test_a_sample_holds_its_documents_and_their_answers(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "f.tokens", [5, 7, 4, 12, 3])
    loader = PackedLoader(Packs(file, 8), BatchPlan(0, 8, 3, 3), shuffle=False)
    seen = []
    for (batch,) in loader.epoch():
        for row in range(len(batch.ids)):
            for ids, labels, positions in rows_of(batch, row):
                assert positions == list(range(len(ids)))
                if set(ids) == {2}:
                    assert set(labels) == {IGNORE_INDEX}
                    continue
                seen.append((ids, labels))
    expected = []
    for start, stop in zip(file.documents[:-1].tolist(), file.documents[1:].tolist(), strict=True):
        tokens = file.tokens[start:stop].tolist()
        labels = [IGNORE_INDEX] * (len(tokens) - 3) + tokens[-2:]
        if len(tokens) <= 9:
            expected.append((tokens[:-1], labels))
    assert sorted(seen) == sorted(expected), "the document of 12 has its answer beyond 9 tokens"


def test_a_document_stays_where_its_first_answer_is_the_last_label(tmp_path: Path) -> None:
    """Of 9 tokens in a sample of 4: the first token is no label, and the fifth the last one."""
    with TokenWriter(tmp_path / "f.tokens", Header("f", 64)) as writer:
        for answer in range(9):
            counted = np.arange(9) == answer
            writer.add(10 * np.ones(9) + np.arange(9), np.array([9]), 9, counted)
    packs = Packs(TokenFile(tmp_path / "f.tokens"), 4)
    assert packs.answerless == 5
    loader = PackedLoader(packs, BatchPlan(0, 4, 4, 4), shuffle=False)
    (batch,) = loader.step()
    assert sorted(batch.labels[batch.labels != IGNORE_INDEX].tolist()) == [11, 12, 13, 14]


def test_ranks_share_every_step_alike(tmp_path: Path) -> None:
    file = write_token_file(
        tmp_path / "f.tokens", np.random.default_rng(0).integers(3, 30, 90).tolist()
    )
    packs = Packs(file, 32)
    whole = PackedLoader(packs, BatchPlan(7, packs.length, 8, 8))
    for _ in range(len(packs) // 8 + 2):
        at, (one,) = whole.consumed, whole.step()
        for degree, micro in ((2, 2), (4, 1)):
            plans = [BatchPlan(7, packs.length, 8, micro, r, degree) for r in range(degree)]
            parts = [PackedLoader(packs, plan, at).step() for plan in plans]
            ids = torch.cat(
                [parts[r][m].ids for m in range(8 // micro // degree) for r in range(degree)]
            )
            assert torch.equal(ids, one.ids)
    assert whole.ended_epoch == (whole.consumed % len(packs) < 8)


def test_padded_and_concat_see_the_same_answers(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "f.tokens", [5, 9, 4, 6])
    data = DataConfig(sequence_length=8, global_batch=4)
    told = {}
    for way in ("best-fit", "padded", "concat"):
        feed = Samples(file, replace(data, packing=way), 0)
        labels = [
            batch.labels[batch.labels != IGNORE_INDEX].tolist()
            for step in feed.loader(Solo("data"), 0, False).epoch()
            for batch in step
        ]
        told[way] = sorted(i for part in labels for i in part)
        assert way in str(feed)
    assert told["best-fit"] == told["padded"] == told["concat"]
    assert len(told["concat"]) == 8
    assert Samples(file, data, 0).packs is not None, "auto packs what has answers"
    plain = write_token_file(tmp_path / "p.tokens", [5, 9, 4, 6], answers=None)
    assert Samples(plain, data, 0).packs is None, "and cuts what is text"
    asked = Samples(file, DataConfig(sequence_length=8, labels="all"), 0).loader(
        Solo("data"), 0, False
    )
    assert sum(int((b.labels != IGNORE_INDEX).sum()) for s in asked.epoch() for b in s) == 24 - 4


def test_concat_counts_only_answers_of_its_own_document(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "f.tokens", [5, 6], answers=6)
    (batch,) = Loader(file, BatchPlan(0, 10, 1, 1), shuffle=False).step()
    assert (batch.labels[0] != IGNORE_INDEX).tolist() == [True] * 4 + [False] + [True] * 5


# ---- against transformers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instruct")
    rows = write_rows(folder / "rows.jsonl", sums(60))
    tokenizer = llama2_tokenizer(folder)
    return prepare(folder / "data", rows, "--template", "dolly", "--tokenizer", tokenizer,
                   "--validation", "0.1")  # fmt: skip


def test_loss_is_that_of_separate_sequences(dataset: Path) -> None:
    """Packed with block-diagonal attention = each document alone = padded, token by token."""
    model = Llama(MODEL).init(0)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL.to_hub("float32")))
    state = {}
    for name, parameter in model.named_parameters():
        for part in model.sharded_parameters().parts(name):
            whole = parameter.detach()
            if not isinstance(part.how, Replica):
                whole = whole.narrow(part.how.dim, part.start, part.length)
            state[part.name] = whole
    reference.load_state_dict(state)
    file = open_dataset(dataset).train
    sums_, counts = [], []
    for way in ("best-fit", "padded"):
        (batch,) = PackedLoader(
            Packs(file, 128, way=way), BatchPlan(0, 128, 64, 64), shuffle=False
        ).step()
        total, count = model.loss(
            batch.ids, batch.labels, batch.positions, documents_BS=batch.documents
        )
        sums_.append(total.item())
        counts.append(count.item())
        assert batch.documents is not None
        same = (batch.documents[:, None] == batch.documents[:, :, None]).tril()[:, None]
        logits = reference(batch.ids, position_ids=batch.positions, attention_mask=same).logits
        theirs = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
        )
        assert total.item() == pytest.approx(theirs.item(), rel=1e-5)
    alone, tokens = 0.0, 0
    for start, stop in zip(file.documents[:-1].tolist(), file.documents[1:].tolist(), strict=True):
        ids = torch.from_numpy(file.tokens[start:stop].astype(np.int64))[None]
        labels = ids.masked_fill(
            ~torch.from_numpy(file.counted(np.arange(start, stop))), IGNORE_INDEX
        )
        count = int((labels[0, 1:] != IGNORE_INDEX).sum())
        alone += reference(ids, labels=labels).loss.item() * count
        tokens += count
    assert counts == [tokens, tokens]
    assert sums_ == pytest.approx([alone, alone], rel=1e-5)


def test_a_document_sees_no_other(dataset: Path) -> None:
    """Changing one document of a pack changes no logit of another, and its own it does."""
    model = Llama(MODEL).init(0)
    packs = Packs(open_dataset(dataset).train, 128)
    (batch,) = PackedLoader(packs, BatchPlan(0, packs.length, 4, 4)).step()
    assert batch.documents is not None
    before = model(batch.ids, batch.positions, documents_BS=batch.documents)
    for number in range(int(batch.documents.max())):
        mine = batch.documents == number
        changed = torch.where(mine, (batch.ids + 1) % 600, batch.ids)
        after = model(changed, batch.positions, documents_BS=batch.documents)
        assert torch.equal(after[~mine], before[~mine])
        assert not torch.equal(after[mine], before[mine])
