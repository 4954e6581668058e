"""How a global batch is dealt over data ranks: the drawing of the module, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from llamax.config.schema import DataConfig
from llamax.data.batch_plan import BatchPlan


def test_microsteps_are_outermost() -> None:
    data = DataConfig(sequence_length=16, global_batch=8, micro_batch=2)
    plans = [BatchPlan.of(data, 3, rank, 2) for rank in range(2)]
    assert plans[0] == BatchPlan(3, 16, 8, 2, 0, 2)
    assert plans[0].places().tolist() == [[0, 1], [4, 5]]
    assert plans[1].places().tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_ranks_share_every_sample_of_a_step(degree: int) -> None:
    dealt = [BatchPlan(0, 1, 16, 2, rank, degree).places() for rank in range(degree)]
    by_microstep = np.concatenate(dealt, axis=1)
    assert by_microstep.ravel().tolist() == list(range(16))


def test_a_batch_that_does_not_divide_is_a_mistake_of_the_program() -> None:
    with pytest.raises(AssertionError):
        BatchPlan(0, 1, 6, 2, 0, 2)
