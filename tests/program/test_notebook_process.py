"""The process of a notebook: torch's modes, an event loop, threads, Ctrl-C, what is shown."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import DECIDED
from support.tiny_run import STEPS, config, make_dataset

import llamax
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.runtime.errors import ConfigError, Interrupted, LlamaxError
from llamax.runtime.logging import logger


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def modes() -> Iterator[None]:
    """Other defaults of torch than usual, as a program may have set them."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)


def test_the_programs_modes_of_torch_change_nothing(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    usual = llamax.train(config(data, tmp_path / "usual"))
    request.getfixturevalue("modes")
    run = llamax.train(config(data, tmp_path / "run"))
    assert [r["loss"] for r in run.metrics] == [r["loss"] for r in usual.metrics]
    assert [r["grad_norm"] for r in run.metrics] == [r["grad_norm"] for r in usual.metrics]
    assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_device().type == "meta"
    assert not torch.is_grad_enabled()
    with torch.inference_mode():
        again = llamax.train(config(data, tmp_path / "again"))
        assert torch.is_inference_mode_enabled()
    assert again.loss == usual.loss


def test_it_trains_in_a_running_event_loop_and_in_a_thread(data: Path, tmp_path: Path) -> None:
    async def cell(name: str) -> float:
        return llamax.train(config(data, tmp_path / name)).loss

    async def other(name: str) -> float:
        run = await asyncio.to_thread(llamax.train, config(data, tmp_path / name))
        return run.loss

    expected = llamax.train(config(data, tmp_path / "plain")).loss
    assert asyncio.run(cell("loop")) == expected
    assert asyncio.run(other("thread")) == expected


def test_a_second_run_at_the_same_time_is_refused(data: Path, tmp_path: Path) -> None:
    """Also from within the first, and the next one after it trains."""
    refused: list[str] = []

    def nested(step: int) -> float:
        if step == 2:
            for call in (lambda: llamax.train(config(data, tmp_path / "inner")), in_a_thread):
                with pytest.raises(ConfigError) as caught:
                    call()
                refused.append(str(caught.value))
        return 1e-3

    def in_a_thread() -> None:
        errors: list[LlamaxError] = []

        def body() -> None:
            try:
                llamax.train(config(data, tmp_path / "inner"))
            except LlamaxError as error:
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        raise errors[0]

    before = [*logger.handlers]
    run = llamax.train(config(data, tmp_path / "outer"), learning_rate=nested)
    assert run.step == STEPS
    words = "another run is training in this process; wait for it, or give `ranks`"
    assert len(refused) >= 2
    assert all(line.startswith(words) for line in refused)
    assert logger.handlers == before
    assert not (tmp_path / "inner").exists()
    assert llamax.train(config(data, tmp_path / "inner")).step == STEPS


def test_ctrl_c_is_answered_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    presses = [3]

    def press(step: int) -> float:  # also asked for the record of the step
        if step in presses:
            presses.remove(step)
            signal.raise_signal(signal.SIGINT)
        return 1e-3

    run = llamax.train(config(data, tmp_path / "run"), learning_rate=press)
    assert run.stopped
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("llamax: stopped after step ")
    assert last.endswith(f"by SIGINT: {run.checkpoint} is saved; start again to go on")


def test_lines_go_where_stderr_is_now(data: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown):
            llamax.train(config(data, tmp_path / name))
        lines = [line.split()[0] for line in shown.getvalue().splitlines()]
        assert lines.count("step") == STEPS
        assert lines.count("llamax:") >= 4
        shown.close()


def test_an_error_of_the_users_code_comes_through_and_leaves_nothing(
    data: Path, tmp_path: Path
) -> None:
    def broken(step: int) -> float:
        return 1 // abs(step - 2)

    before, handlers = {*threading.enumerate()}, list(logger.handlers)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            llamax.train(config(data, tmp_path / "run"), learning_rate=broken)
    assert {*threading.enumerate()} <= before
    assert logger.handlers == handlers
    assert llamax.train(config(data, tmp_path / "run")).step == STEPS


def open_files() -> set[tuple[str, str]]:
    """Number and target of each file that this process holds open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def test_started_ranks_leave_no_open_files(data: Path, tmp_path: Path) -> None:
    llamax.train(config(data, tmp_path / "first"))
    before = open_files()
    llamax.train(config(data, tmp_path / "run"), ranks=2)
    assert open_files() <= before


def test_a_mistake_is_shown_as_a_line() -> None:
    """IPython calls the method of an exception that has one, and shows its lines."""
    with pytest.raises(LlamaxError) as caught:
        llamax.train("dem")
    assert caught.value._render_traceback_() == [
        "ConfigError: no recipe is named 'dem'; did you mean demo?"
    ]
    assert Interrupted("x")._render_traceback_() == ["Interrupted: x"]


def test_a_plan_is_shown_in_a_line() -> None:
    shown = repr(llamax.plan("llama2-7b", nodes=4))
    assert shown.startswith("<llamax plan: 6.74B parameters on 4 x trn1.32xlarge, ")
    assert "(fits), " in shown
    assert "DOES NOT FIT" in repr(llamax.plan("llama2-7b", overrides=["--data.micro_batch=16"]))


def test_models_load_from_every_kind_of_folder_in_a_type(tmp_path: Path) -> None:
    lines = ["def main(argv):", "    return value + 1"] * 40
    pieces = train_sentencepiece(lines, 320, tmp_path / "tokenizer.model")
    (tmp_path / "a.txt").write_text("\n".join(lines))
    llamax.prepare(tmp_path / "a.txt", tmp_path / "data", tokenizer=pieces, validation=0.0)
    model = replace(DECIDED, vocab_size=320)
    shape = {name: value for name, value in vars(model).items() if value is not None}
    settings: dict[str, Any] = {
        "data": {"path": tmp_path / "data", "sequence_length": 16, "global_batch": 2},
        "run": {"steps": 2, "threads": 1, "progress": "off"},
    }
    run = llamax.train(settings, model=shape, run={"folder": tmp_path / "run"})
    hub = llamax.consolidate(run.folder, tmp_path / "hub")
    tuned = llamax.train(
        settings,
        checkpoint={"init_from": hub},
        finetune={"method": "lora", "r": 2},
        run={"folder": tmp_path / "tuned"},
    )
    assert tuned.config.model == model, "the folder alone describes the base"
    peft = llamax.consolidate(tuned.folder, tmp_path / "peft")
    assert run.checkpoint is not None
    for folder in (run.folder, run.checkpoint, hub, tuned.folder, peft):
        for dtype in (torch.bfloat16, "bfloat16", torch.float16, "float32", ""):
            loaded = llamax.load(folder, dtype=dtype)
            wanted = str(dtype).removeprefix("torch.") or "float32"
            shown = repr(loaded)
            assert shown.startswith(f"<llamax model {folder}: ")
            assert shown.endswith(f", {wanted} on cpu>")
            assert isinstance(loaded.generate("def", max_new_tokens=3), str)
    with pytest.raises(ConfigError, match=r"`dtype=float64` is not known; use float32, bfloat16"):
        llamax.load(hub, dtype=torch.float64)
