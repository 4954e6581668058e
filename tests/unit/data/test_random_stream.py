"""Random tokens in place of a dataset: the same everywhere, and training takes them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_run import config, log_of, make_dataset

from llamax.data.dataset import Dataset, open_dataset
from llamax.data.random_stream import RandomStream
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train


@pytest.fixture(autouse=True)
def propagates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_every_rank_makes_the_same_tokens() -> None:
    """Held as numbers: ranks on other machines make them by themselves."""
    stream = RandomStream(2**16, 32_000, 0)
    assert stream.tokens.dtype == np.uint16
    assert stream.tokens[:6].tolist() == [15535, 22465, 28110, 3053, 11978, 22618]
    assert stream.documents[:4].tolist() == [0, 543, 2535, 2805]
    other = RandomStream(2**16, 32_000, 1)
    assert (stream.tokens != other.tokens).mean() > 0.99


def test_tokens_are_uniform_and_documents_are_like_web_pages() -> None:
    stream = RandomStream(2**20, 1000, 0)
    counts = np.bincount(stream.tokens, minlength=1000)
    assert len(counts) == 1000
    assert abs(counts - 2**20 / 1000).max() < 6 * (2**20 / 1000) ** 0.5
    lengths = np.diff(stream.documents.astype(np.int64))
    assert lengths.sum() == len(stream) == 2**20
    assert lengths.min() >= 1
    assert 900 < lengths.mean() < 1150
    assert np.quantile(lengths, 0.9) > 2 * lengths.mean(), "as of a geometric distribution"


def test_documents_are_found_in_windows() -> None:
    stream = RandomStream(2**14, 100, 0)
    starts = np.arange(0, 2**14, 512)
    windows, begins = stream.begins(starts, starts + 512)
    pairs = [
        (window, int(place))
        for window, start in enumerate(starts)
        for place in stream.documents
        if start < place < start + 512
    ]
    assert list(zip(windows.tolist(), begins.tolist(), strict=True)) == pairs
    first, stop = stream.bounds(np.arange(stream.num_documents))
    assert np.array_equal(np.append(first, stop[-1]), stream.documents)
    assert stream.counted(starts).all()


def test_a_folder_of_this_name_is_not_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    found = open_dataset("random", vocab_size=300)
    assert isinstance(found, Dataset)
    assert isinstance(found.train, RandomStream)
    assert found.train.header.vocab_size == 300
    found.check_vocabulary(300)
    found.verify()


def test_training_takes_them_and_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss stays near that of guessing, and nothing is warned of."""
    runs = {}
    for name, steps in (("whole", (4,)), ("stopped", (2, 4))):
        cfg = config(Path("random"), tmp_path / name)
        for last in steps:
            model = replace(cfg.model, bos_token_id=1)
            run = replace(cfg.run, steps=last, validate_every=2)
            train(replace(cfg, model=model, run=run), Rendezvous())
        runs[name] = log_of(tmp_path / name)
    assert [each["loss"] for each in runs["stopped"]] == [each["loss"] for each in runs["whole"]]
    guessing = np.log(cfg.model.vocab_size)
    assert all(abs(each["loss"] - guessing) < 0.1 * guessing for each in runs["whole"])
    assert "validation_loss" in runs["whole"][1]
    assert warnings(caplog) == []


def test_nothing_is_said_of_how_documents_of_a_blend_with_them_begin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    data = make_dataset(tmp_path / "data")
    cfg = config(Path(f"0.5 random 0.5 {data}"), tmp_path / "run")
    model, run = replace(cfg.model, bos_token_id=1), replace(cfg.run, steps=1, validate_every=1)
    train(replace(cfg, model=model, run=run), Rendezvous())
    assert warnings(caplog) == []
