"""Configuration classes: defaults and derived values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.configs import MODEL, changed

from llamax.config.schema import (
    Config,
    RunConfig,
)
from llamax.config.validate import accumulation, problems
from llamax.runtime.errors import ConfigError


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_accumulation_divides_exactly_or_is_refused(batch: int, micro: int, degree: int) -> None:
    config = changed({"data.global_batch": batch, "data.micro_batch": micro})
    if batch % (micro * degree):
        with pytest.raises(ConfigError, match=f"data.global_batch={batch} is not a multiple"):
            accumulation(config, degree)
    else:
        assert accumulation(config, degree) * micro * degree == batch


def test_a_run_has_sensible_defaults() -> None:
    assert problems(Config(MODEL), 1) == []
    assert RunConfig().backend == "cpu"
