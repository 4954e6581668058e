"""Steps and answers on a stand-in for a GPU: no values, but devices, and what the host waits for.

    python -m support.accelerator '[{"mesh": {"tp": 2, "dp": 2}, "zero": 3}]'

torch's fake tensors have shapes, dtypes and devices alone, and refuse operations on tensors of two
devices as a GPU does.  Autograd needs a device that this build of torch knows, so the stand-in is
torch's device for plug-ins, under the name of one of llamax's eager backends.  A process has one
such device for good, so this runs in a process of its own.

Prints, as JSON, what each case sent, where a step waited for the device, and which tensors nccl
would refuse, by the line of llamax; or the error that ended it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import bias
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from llamax import ops
from llamax.backends import torch_axes
from llamax.checkpoint.build_model import load_base
from llamax.config.rules.pipeline import evenly
from llamax.config.schema import (
    Config,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from llamax.data.loader import Batch
from llamax.inference.kv_cache import KVCache
from llamax.inference.kv_pool import KVPool
from llamax.inference.one_token import one_token
from llamax.inference.sampling import Sampling
from llamax.inference.serving.adapters import Adapters, ServedLinear
from llamax.model import lora, quantize
from llamax.model.llama import DTYPES, Llama
from llamax.model.lora_linear import FrozenLinear
from llamax.optim import blockwise
from llamax.parallel import pipeline
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.mesh import Groups, Mesh
from llamax.parallel.placeholder import Placeholder
from llamax.training import step
from llamax.training.resolve import resolve
from llamax.training.step import TrainState
from support.models import WIDE

NAME = "neuron"  # the eager backend of llamax whose device is a plug-in of torch
DEVICE = torch.device("privateuseone", 0)  # its name until it gets that one
SEQUENCE, MICRO, MICROSTEPS = 16, 2, 2
# What nccl sends, as torch's ProcessGroupNCCL maps dtypes.
SENT = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
}
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


def here() -> str:
    """The innermost line of llamax that runs now."""
    frames = traceback.extract_stack()
    place = next(frame for frame in reversed(frames) if "/llamax/" in frame.filename)
    return f"{place.filename.rpartition('/llamax/')[2]}: {place.line}"


class Waits(TorchDispatchMode):
    """Notes operations at which the host waits for a GPU.

    Of copies between host and device these are all that are not ``non_blocking``, and those of
    indices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        devices = {x.device.type for x in args if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        if name in ("to", "_to_copy", "copy_"):
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            waits = len({*devices, result.device.type}) > 1 and not given.get("non_blocking")
        elif name in ("index", "index_put", "index_put_"):
            by = [x for x in args[1] if x is not None]
            sent = any(x.device.type != NAME or x.dtype == torch.bool for x in by)
            waits = NAME in devices and sent
        else:
            waits = NAME in devices and name in WAITS
        if waits:
            self.found.append(f"{name} in {here()}")
        return result


class Nccl:
    """What ``llamax.backends.torch_axes`` calls of torch.distributed, with nccl's conditions."""

    ReduceOp = torch.distributed.ReduceOp
    isend, irecv = "isend", "irecv"

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.refused: list[str] = []
        self.sent: list[str] = []

    def get_rank(self) -> int:
        return self.rank

    def check(self, verb: str, *tensors: Tensor) -> Any:
        self.sent.append(verb)
        for x in tensors:
            if x.device.type != NAME:
                self.refused.append(f"{verb} of a tensor on {x.device} in {here()}")
            if x.dtype not in SENT:
                self.refused.append(f"{verb} of {x.dtype} in {here()}")
            if not x.is_contiguous():
                self.refused.append(f"{verb} of a tensor that is not contiguous in {here()}")
        if len({x.dtype for x in tensors}) > 1:
            self.refused.append(f"{verb} of several dtypes in {here()}")
        return SimpleNamespace(wait=lambda: True)

    def all_reduce(self, x: Tensor, op: Any, group: Any) -> Any:
        return self.check("all_reduce", x)

    def all_gather(self, whole: Tensor, x: Tensor, group: Any, async_op: bool = False) -> Any:
        assert whole.numel() % x.numel() == 0
        return self.check("all_gather", whole, x)

    def reduce_scatter(self, part: Tensor, x: Tensor, group: Any, async_op: bool = False) -> Any:
        assert x.numel() % part.numel() == 0
        return self.check("reduce_scatter", part, x)

    def P2POp(self, verb: str, x: Tensor, peer: int, group: Any) -> tuple[str, Tensor]:
        assert peer != self.rank
        return verb, x

    def batch_isend_irecv(self, moves: Sequence[tuple[str, Tensor]]) -> list[Any]:
        return [self.check(verb, x) for verb, x in moves]


def axes_of(mesh: Mesh, rank: int) -> Axes:
    """The axes of a rank, as the cuda backend makes them."""
    if mesh.world_size == 1:
        return Axes.solo(DEVICE)

    def axis(name: str, groups: Groups) -> Any:
        ranks = next((group for group in groups if rank in group), ())
        if len(ranks) < 2:
            return Solo(name, DEVICE)
        return torch_axes.TorchAxis(name, ranks, DEVICE, None)  # type: ignore[arg-type]

    return Axes.of(mesh, rank, axis)


def batch(parts: int, documents: bool) -> Batch:
    """A microbatch on the host, of rows that so many context ranks share."""
    ids, whole = (torch.zeros(MICRO, SEQUENCE * n, dtype=torch.int64) for n in (1, parts))
    return Batch(ids, ids, ids, whole.int() if documents else None)


def train(case: dict[str, Any], axes: Axes, mesh: Mesh) -> None:
    """Two steps and a validation of a tiny model on one rank."""
    model, dtype = WIDE, case.get("dtype", "float32")
    finetune = FinetuneConfig(**case.get("finetune", {}))
    config = Config(
        model,
        ParallelConfig(tensor=mesh.tp, context=mesh.cp, pipeline=mesh.pp, zero=case.get("zero", 1)),
        OptimConfig(**case.get("optim", {})),
        DataConfig(
            sequence_length=SEQUENCE * mesh.cp,
            micro_batch=MICRO,
            global_batch=MICRO * MICROSTEPS * mesh.dp,
        ),
        run=RunConfig(dtype=dtype, backend="cuda", recompute=case.get("recompute", "none")),
    )
    llama = Llama(
        model,
        axes.tp,
        sequence_parallel=mesh.tp > 1 and case.get("sequence", True),
        dtype=DTYPES[dtype],
        device=DEVICE,
        recompute=config.run.recompute,
        stage=pipeline.layers_of(*axes.pp, evenly(model.num_hidden_layers, mesh.pp)),
    )
    if finetune.method != "full":
        like = torch.empty(0, dtype=DTYPES[dtype], device=DEVICE)
        load_base(llama, None, finetune, like, axes.shard)
    state = TrainState.build(resolve(config, mesh.world_size), llama, axes)
    if mesh.cp > 1:
        state = replaced(state, case.get("context_by", "gather"))
    micros = [batch(mesh.cp, case.get("documents", False)) for _ in range(MICROSTEPS)]
    with Waits() as waits:
        for number in (1, 2):
            state.step(micros, number)
        state.validate([micros])
    case["waits"] = waits.found


def replaced(state: TrainState, context_by: Any) -> TrainState:
    """The state with another exchange of keys and values."""
    object.__setattr__(state, "context_by", context_by)
    return state


@torch.inference_mode()
def answer(case: dict[str, Any], axes: Axes) -> None:
    """A prompt and a token after it, by the cache of a call and by that of a server.

    Tokens go to the host, so that it waits.
    """
    model = Llama(WIDE, axes.tp, dtype=DTYPES[case["dtype"]], device=DEVICE)
    ids = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    last = torch.full((2,), 3, device=DEVICE)
    places, sampling = last[:, None] + 1, Sampling(0.8, top_k=5)
    with Waits() as waits:
        cache, pool = KVCache(8), KVPool(model, 3, 8)
    logits = model(ids, attend=cache.prefill, last_B=last)
    tokens = sampling.pick(logits[:, 0], sampling.streams(2))
    model(ids, attend=pool.prefill([0, 2]), last_B=last)
    model(ids[:1], torch.arange(4, 8, device=DEVICE)[None], attend=pool.prefill([0], 4))
    pool.move(2, 1, 4)
    for attention in (cache, pool):
        logits = one_token(model)(tokens[:, None], places, attention, 5)
        assert Sampling().pick(logits[:, 0], []).device == DEVICE
    case["waits"] = waits.found + (served(model) if axes.tp.size == 1 else [])


def served(model: Llama) -> list[str]:
    """Where a server's step waits that has adapters for one of two requests."""
    adapters, shell = Adapters(DEVICE), Llama(WIDE, Solo("tp", DEVICE), device="meta")
    lora.adapt(shell, FinetuneConfig(method="lora"), torch.empty(0, device=DEVICE))
    for path, layer in [*shell.named_modules()]:
        if isinstance(layer, FrozenLinear):
            owner, _, own = path.rpartition(".")
            beside: Any = ServedLinear(model.get_submodule(path), {"a": layer.adapters}, adapters)  # type: ignore[arg-type]
            setattr(model.get_submodule(owner), own, beside)
    ids = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    adapters.choose(["", "a"])
    with Waits() as waits:
        model(ids)
    return waits.found


def tensor(values: Any, *, device: Any = None, make: Any = torch.tensor, **settings: Any) -> Tensor:
    """``torch.tensor``, which copies from the host.

    Without the values that a fake tensor of few would keep: torch would compute with these.
    """
    like = make(values, **settings)
    made = torch.empty(like.shape, dtype=like.dtype)
    return made if device is None else made.to(device)


def lower_right(queries: int, keys: int) -> Tensor:
    """A mask in the place of torch's, a kind of tensor that cannot be a fake one as well."""
    return torch.zeros(queries, keys, device=DEVICE)


def reduced_on_the_host(axis: torch_axes.TorchAxis, x: Tensor, op: str = "sum") -> Tensor:
    """A defect: an all-reduce of a copy on the host."""
    y = x.cpu()
    torch_axes.dist.all_reduce(y, op, group=axis.group)
    return y.to(x.device)


def sent_unless_floats(x: Tensor, device: torch.device) -> Tensor:
    """A defect: floats stay on the host."""
    return x if x.is_floating_point() else x.to(device, non_blocking=True)


# Defects that must be found.
PLANTED: dict[str, tuple[Any, str, Any]] = {
    "": (step, "partial", partial),
    "waits": (step, "sent", lambda x, device: x.to(device)),
    "stays on the host": (step, "sent", sent_unless_floats),
    "sends from the host": (torch_axes.TorchAxis, "all_reduce", reduced_on_the_host),
}


@contextmanager
def stand_in(nccl: Nccl, planted: str) -> Iterator[None]:
    """Fake tensors on the stand-in, and nccl's conditions."""

    def on_gpu(x: Tensor, *_: Any) -> bool:
        return x.device.type == NAME

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        replace: Callable[..., Any] = mock.patch.object
        for patch in (
            replace(torch, "tensor", tensor),
            replace(Placeholder, "replace"),  # exchanges tensors, but not fake ones
            replace(bias, "causal_lower_right", lower_right),
            replace(ops, "_on_cuda", on_gpu),
            replace(torch_axes, "dist", nccl),
            replace(torch_axes, "_all_gather", nccl.all_gather),
            replace(torch_axes, "_reduce_scatter", nccl.reduce_scatter),
            replace(step, "check_equal"),  # reads values, once
            replace(
                blockwise, "dynamic_map", lambda signed, device: torch.empty(256, device=device)
            ),
            replace(*PLANTED[planted]),
        ):
            stack.enter_context(patch)
        for table in (quantize.levels, quantize.pairs, quantize.dynamic):  # made at the first use
            table.cache_clear()
            table(DEVICE)
        yield


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What the first and the last rank of a case have sent, waited for and tried to send."""
    mesh = Mesh(**case.get("mesh", {}))
    found: dict[str, list[str]] = {"waits": [], "refused": [], "sent": [], "error": []}
    for rank in sorted({0, mesh.world_size - 1}):
        nccl = Nccl(rank)
        try:
            with stand_in(nccl, case.get("planted", "")):
                axes = axes_of(mesh, rank)
                answer(case, axes) if case.get("answers") else train(case, axes, mesh)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.line for frame in frames if "/llamax/" in frame.filename]
            found["error"].append(f"{type(error).__name__}: {str(error)[:500]} in {lines[-1:]}")
            break
        found["waits"] += case["waits"]
        found["refused"] += nccl.refused
        found["sent"] += nccl.sent
    return {name: sorted(set(values)) for name, values in found.items()}


if __name__ == "__main__":
    plug_in = backend_registration._DummyBackendModule()
    plug_in.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    backend_registration._setup_privateuseone_for_python_backend(NAME, plug_in)
    print(json.dumps([run(case) for case in json.loads(sys.argv[1])], indent=1), flush=True)
    os._exit(0)  # autograd's thread for the device has no end
