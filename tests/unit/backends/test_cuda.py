"""What the cuda backend knows of a GPU: no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamax.backends.torch_distributed import Cuda
from llamax.backends.transfer import sent


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


def test_what_a_step_sends_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def pin(x: Tensor) -> Tensor:
        done.append("pinned")
        return x

    def to(x: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        done.append((torch.device(device).type, non_blocking))
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    sent(torch.zeros(2), torch.device("cuda", 0))
    sent(torch.zeros(2), "cpu")
    sent(torch.zeros(2, device="meta"), "cuda")
    assert done == ["pinned", ("cuda", True), ("cpu", True), ("cuda", True)]
