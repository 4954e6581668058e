"""Writing for neuronx-distributed: the folder of a tag, as its ``load_checkpoint`` reads it.

The inverse of ``nxd``.  The file of each rank has its share of every tensor in the order of NxD's
Llama, with queries next to the key/value heads they read; the file of each data rank has its rows
of every optimizer state.  Memory holds the state dict of one rank at a time.  ``scheduler.pt`` and
``user_content.pt`` have what both training programs of NxD's Llama example go on from: the step of
the learning-rate schedule, and the epoch, step and batch.

::

    ``qkv``     parameters                      NxD's options
    stacked     qkv_proj.weight                 fuse_qkv, as many key/value heads as queries
    gqa         qkv_proj.weight_q, _k, _v       qkv_linear
    gqa-fused   qkv_proj.weight_qkv             qkv_linear and fuse_qkv
    separate    q_proj.weight, ...              neither

Source: neuronx_distributed 0.17, ``trainer/checkpoint.py`` and its Llama example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint.formats.nxd import MOMENTS
from llamax.checkpoint.formats.rank_grid import replicated_query_order
from llamax.checkpoint.formats.torch_save import save_text, save_torch, save_xser
from llamax.checkpoint.safetensors_io import Progress, no_progress
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig
from llamax.config.rules import divisors
from llamax.config.schema import OptimConfig
from llamax.model.llama import Llama
from llamax.parallel.sharding import Replica, Shard
from llamax.runtime.errors import CheckpointError, ConfigError, join_or


@dataclass(frozen=True)
class NxdTarget:
    """The mesh that will load a checkpoint, its layout of attention, and its optimizer state.

    Raises ConfigError if NxD could not hold the model in this way.
    """

    model: ModelConfig
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    qkv: str = "stacked"
    kv_multiplier: int = 1
    moments: bool = False
    masters: bool = False
    xser: bool = False

    def __post_init__(self) -> None:
        model, heads = self.model, self.model.num_key_value_heads * self.kv_multiplier
        if min(self.tensor, self.pipeline, self.data, self.kv_multiplier) < 1:
            raise ConfigError("`tensor`, `pipeline`, `data` and `kv_multiplier` are 1 or more")
        sizes = {
            "num_attention_heads": model.num_attention_heads,
            f"num_key_value_heads x `kv_multiplier={self.kv_multiplier}`": heads,
            "intermediate_size": model.intermediate_size,
            "vocab_size": model.vocab_size,
        }
        for what, size in sizes.items():
            if size % self.tensor:
                kv, common = model.num_key_value_heads, divisors(gcd(*sizes.values()))
                fits = [degree for degree in common if kv % degree == 0 or degree % kv == 0]
                raise ConfigError(
                    f"`tensor={self.tensor}` does not divide {what}={size}, which NxD needs; use "
                    f"{join_or(fits)}"
                )
        if model.num_attention_heads % heads:
            raise ConfigError(
                f"`kv_multiplier={self.kv_multiplier}` makes {heads} key/value heads, which do not "
                f"divide num_attention_heads={model.num_attention_heads}; use a divisor of "
                f"{model.num_attention_heads // model.num_key_value_heads}"
            )
        if model.num_hidden_layers % self.pipeline:
            raise ConfigError(
                f"`pipeline={self.pipeline}` does not divide num_hidden_layers="
                f"{model.num_hidden_layers}; use {join_or(divisors(model.num_hidden_layers))}"
            )
        if self.qkv == "stacked" and model.num_attention_heads != model.num_key_value_heads:
            raise ConfigError("`qkv=stacked` is for models with as many key/value heads; use gqa")
        if self.kv_multiplier > 1 and not self.qkv.startswith("gqa"):
            raise ConfigError(
                f"`kv_multiplier={self.kv_multiplier}` (by default what `tensor` needs) needs "
                f"`qkv=gqa` or gqa-fused, not {self.qkv}"
            )

    def stage_parameters(self, stage: int) -> Iterator[tuple[str, list[str]]]:
        """The parameters of a stage in NxD's order, each with the Hub tensors it stacks."""
        each = self.model.num_hidden_layers // self.pipeline
        if stage == 0:
            yield "model.embed_tokens.weight", ["model.embed_tokens.weight"]
        for layer in range(stage * each, (stage + 1) * each):
            home = f"model.layers.{layer}."
            q, k, v = (f"{home}self_attn.{part}_proj.weight" for part in "qkv")
            fused = f"{home}self_attn.qkv_proj.weight"
            if self.qkv == "stacked":
                yield fused, [q, k, v]
            elif self.qkv == "gqa-fused":
                yield f"{fused}_qkv", [q, k, v]
            else:
                for part, name in zip("qkv", (q, k, v), strict=True):
                    yield (f"{fused}_{part}" if self.qkv == "gqa" else name), [name]
            yield f"{home}self_attn.o_proj.weight", [f"{home}self_attn.o_proj.weight"]
            gate_up = [f"{home}mlp.{part}_proj.weight" for part in ("gate", "up")]
            yield f"{home}mlp.gate_up_proj.weight", gate_up
            for leaf in ("mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
                yield f"{home}{leaf}.weight", [f"{home}{leaf}.weight"]
        if stage == self.pipeline - 1:
            yield "model.norm.weight", ["model.norm.weight"]
            tied = self.model.tie_word_embeddings
            yield "lm_head.weight", ["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def shares(self, name: str, rank: int) -> list[tuple[int, int]]:
        """A rank's share of a Hub tensor: ranges [start, stop) along its cut dim, in order."""
        model, E = self.model, self.model.head_dim
        leaf = name.rpartition("self_attn.")[2]
        if leaf.startswith(("q_", "o_")):
            heads = replicated_query_order(
                model.num_attention_heads, model.num_key_value_heads, self.kv_multiplier
            )
        elif leaf.startswith(("k_", "v_")):
            heads = [*range(model.num_key_value_heads)] * self.kv_multiplier
        else:
            size = (model.intermediate_size if ".mlp." in name else model.vocab_size) // self.tensor
            return [(rank * size, (rank + 1) * size)]
        each = len(heads) // self.tensor
        return [(head * E, (head + 1) * E) for head in heads[rank * each : (rank + 1) * each]]


class NxdWriter:
    """Writes a source for one target; ``lr`` is the learning rate of the step after ``step``.

    Raises CheckpointError if the target wants optimizer state that the source does not have.
    """

    def __init__(
        self, source: Source, target: NxdTarget, optim: OptimConfig, lr: float, step: int
    ) -> None:
        self.source, self.target, self.optim, self.lr, self.step = source, target, optim, lr, step
        llama = Llama(target.model, device="meta")
        self.cuts = llama.sharded_parameters().hub_cuts()
        self.progress: Progress = no_progress
        if target.moments and not all({*MOMENTS} <= {*source.kinds(n)} for n in source.names()):
            raise CheckpointError(
                f"{source.folder} does not hold the optimizer state of all weights; use "
                "`optimizer=none`"
            )

    @property
    def shares(self) -> int:
        """The number of shares of parameters and of their states that ``write`` reads."""
        target, kinds = self.target, 0
        if target.moments:
            kinds = len(MOMENTS) + target.masters
        weights, states = 0, 0
        for stage in range(target.pipeline):
            weights += len([*target.stage_parameters(stage)])
            states += len(self._optimized(stage))
        return target.tensor * (weights + states * kinds * target.data)

    def write(self, folder: Path, progress: Progress = no_progress) -> None:
        """Write the folder of a tag, ``done`` last; ``progress`` is called for each share."""
        target, self.progress = self.target, progress
        save = save_xser if target.xser else save_torch
        save_text(folder / "checkpoint", "1")
        for stage in range(target.pipeline):
            for rank in range(target.tensor):
                at = f"tp_rank_{rank:02d}_pp_rank_{stage:02d}.pt"
                state = {
                    name: self._share(hub, rank, "weight")
                    for name, hub in target.stage_parameters(stage)
                }
                save(folder / "model" / f"dp_rank_00_{at}", state)
                for data in range(target.data if target.moments else 0):
                    state = self._optimizer_state(stage, rank, data)
                    save(folder / "optim" / f"dp_rank_{data:02d}_{at}", state)
        save_torch(folder / "scheduler.pt", self._scheduler_state())
        save_torch(folder / "user_content.pt", self._user_content())
        save_text(folder / "done", "1")

    def _scheduler_state(self) -> dict[str, Any]:
        """The state of a scheduler of torch after ``step`` steps, with two groups of parameters.

        It has no length or warm-up: those are arguments of the program that loads it.
        """
        return {
            "base_lrs": [self.optim.lr] * 2,
            "last_epoch": self.step,
            "_step_count": self.step + 1,
            "_get_lr_called_within_step": False,
            "_last_lr": [self.lr] * 2,
            "lr_lambdas": [None] * 2,
        }

    def _user_content(self) -> dict[str, int]:
        """The progress under the names of both programs: every step is a batch of one epoch."""
        return {
            "epoch": 0,
            "global_step": self.step,
            "total_steps": self.step,
            "batch_idx": self.step - 1,
        }

    def _share(self, hub: Sequence[str], rank: int, kind: str) -> Tensor:
        """One kind of a rank's share of a parameter: the parts of all its Hub tensors, stacked."""
        share = torch.cat([self._part(name, rank, kind) for name in hub])
        self.progress(1)
        return share

    def _part(self, name: str, rank: int, kind: str) -> Tensor:
        how = self.cuts[name]
        if kind == "master" and "master" not in self.source.kinds(name):
            return self._part(name, rank, "weight").float()
        if isinstance(how, Replica):
            return self.source.read(name, kind)
        assert isinstance(how, Shard)
        runs = [
            self.source.read(name, kind, how.dim, start, stop)
            for start, stop in self.target.shares(name, rank)
        ]
        return torch.cat(runs, how.dim)

    def _optimized(self, stage: int) -> list[tuple[str, list[str]]]:
        """The parameters of a stage that have a state."""
        names = self.target.stage_parameters(stage)
        if not self.target.model.tie_word_embeddings:
            return [*names]
        # one parameter, counted at its first place
        return [(name, hub) for name, hub in names if name != "lm_head.weight"]

    def _optimizer_state(self, stage: int, rank: int, data: int) -> dict[str, Any]:
        """The ZeRO-1 state of a data rank: first parameters with weight decay, then norms."""
        target, names = self.target, self._optimized(stage)
        decayed = [one for one in names if "norm" not in one[0]]
        names = decayed + [one for one in names if "norm" in one[0]]
        state: dict[str, Any] = {
            "state": {},
            "param_groups": [],
            "base_state": {},
            "shape_info": {},
        }
        for numbers, decay in (
            (range(len(decayed)), self.optim.weight_decay),
            (range(len(decayed), len(names)), 0.0),
        ):
            state["param_groups"].append(
                {
                    "lr": self.lr,
                    "initial_lr": self.optim.lr,
                    "betas": (self.optim.beta1, self.optim.beta2),
                    "eps": self.optim.eps,
                    "weight_decay": decay,
                    "amsgrad": False,
                    "correct_bias": True,
                    "capturable": False,
                    "params": [*numbers],
                }
            )
        masters: dict[int, Tensor] = {}
        for number, (_, hub) in enumerate(names):
            moments = {kind: self._share(hub, rank, kind) for kind in MOMENTS}
            state["shape_info"][number] = moments["exp_avg"].shape
            state["base_state"][number] = {
                "step": torch.tensor(float(self.step)),
                **{
                    kind: rows_of_data_rank(whole, data, target.data)
                    for kind, whole in moments.items()
                },
            }
            if target.masters:
                masters[number] = rows_of_data_rank(
                    self._share(hub, rank, "master"), data, target.data
                )
        return state | ({"sharded_master_weights": masters} if target.masters else {})


def rows_of_data_rank(whole: Tensor, rank: int, degree: int) -> Tensor:
    """A data rank's equal share of the rows of a state, padded with rows of zeros."""
    pad = -len(whole) % degree
    padded = torch.cat([whole, whole.new_zeros(pad, *whole.shape[1:])]) if pad else whole
    return padded.chunk(degree)[rank].clone()
