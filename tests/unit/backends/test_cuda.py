"""What the cuda backend knows of a GPU: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from llamax.backends.torch_distributed import Cuda


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67e12),
        ("Some GPU", torch.float32, None),
    ],
)
def test_a_run_is_rated_against_the_peak_of_its_type(
    monkeypatch: pytest.MonkeyPatch, gpu: str, dtype: torch.dtype, peak: float | None
) -> None:
    backend = object.__new__(Cuda)
    backend.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert backend.peak_flops(dtype) == peak
