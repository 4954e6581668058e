"""``llamax demo``: packages that llamax itself does not need, and what the demos say at the end."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from llamax.cli import finetune_demo
from llamax.cli.demo import main, outcome
from llamax.runtime.errors import BackendError


@pytest.mark.parametrize(
    ("package", "extra"), [("tensorboard", "tensorboard"), ("matplotlib", "plot")]
)
def test_a_missing_package_is_named_before_anything_is_made(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BackendError, match=rf"the package {package}, .*pip install 'llamax\[{extra}\]'"
    ):
        main(["--folder", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (4.5, "the model has learnt more than which words are frequent."),
        (6.0, "the model has not learnt more yet than which words are frequent."),
        (7.9, "the model has not learnt more yet than which words are frequent."),
        (math.nan, "the model has not learnt more yet than which words are frequent."),
    ],
)
def test_the_demo_claims_what_its_loss_shows(loss: float, says: str) -> None:
    said = outcome(loss, 6.0)
    assert said.startswith(f"Validation loss {loss:.3f} nats a token")
    assert "against a unigram entropy of 6.000 (perplexity 403)" in said
    assert said.endswith(says)


def test_the_demo_claims_nothing_without_validation() -> None:
    assert "model" not in outcome(None, 6.0)
    assert outcome(None, 6.0).startswith("Nothing was validated")


def test_the_finetune_demo_names_the_steps_of_its_losses() -> None:
    both = finetune_demo.outcome([(12, 2.5), (24, 2.0), (36, 2.25)])
    assert both.endswith(": 2.500 nats a token at step 12,\n2.250 at step 36.")
    assert finetune_demo.outcome([(12, 2.5)]).endswith(": 2.500 nats a token at step 12.")
    assert finetune_demo.outcome([]) == "Nothing was validated."
