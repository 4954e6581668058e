"""A base with adapters as a source of the merged weights, in the dtype of the base.

::

    W + s B A                    LoRA; of an embedding, with the transposed factors
    m (W + s B A) / |W + s B A|  DoRA (Liu et al. 2024), |.| of each row
    W'                           a module that was trained whole
    W with some rows of T        trained tokens

Whatever reads a model from files can read it.  Sums are taken in fp32 and rounded once.  Where
adapters change embedding and head of a tied model differently, the merged model is not tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint import hf_folder
from llamax.checkpoint.hf_folder import EMBEDDING, HEAD
from llamax.checkpoint.peft import AdapterInfo, PeftFolder, check_base
from llamax.checkpoint.peft_settings import PeftSettings
from llamax.checkpoint.runs import Box, Run, boxes, row_width
from llamax.checkpoint.safetensors_io import SLAB_BYTES
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig
from llamax.config.rules.finetune import LINEAR
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.model import lora
from llamax.runtime.errors import CheckpointError
from llamax.runtime.logging import logger


@dataclass(frozen=True)
class Change:
    """How adapters change a weight; texts are names of their tensors, "" where there is none.

    ``replaced``: in place of the base's; ``a``, ``b``: factors, of an embedding transposed;
    ``magnitude``: lengths of rows; ``tokens``: values of the rows ``rows``.
    """

    replaced: str = ""
    a: str = ""
    b: str = ""
    transposed: bool = False
    scale: float = 1.0
    magnitude: str = ""
    tokens: str = ""
    rows: tuple[int, ...] = ()


class _Loaded(NamedTuple):
    """The tensors of a change: A [r, in], s B [out, r], lengths over norms [out], rows [n, in]."""

    name: str
    a: Tensor | None
    b: Tensor | None
    stretch: Tensor | None
    tokens: Tensor | None


class Merged(Source):
    """A base plus its adapters; ``info`` describes the adapters.

    Raises CheckpointError if they do not belong together, or if tensors of the adapters are
    missing or have no meaning.
    """

    def __init__(self, base: Source, adapter: Source, info: AdapterInfo) -> None:
        check_base(info, adapter.folder, base)
        model = ModelConfig.from_hub(base.model)  # refuses models that llamax cannot compute
        self.base, self.adapter = base, adapter
        self.folder, self.model = base.folder, dict(base.model)
        self._loaded: _Loaded | None = None
        if isinstance(adapter, PeftFolder):
            changes, used = _Reader(adapter, base, model.tie_word_embeddings).changes()
        else:
            changes, used = _factors_alone(adapter.names(), lora.scale(info.finetune))
        for name in adapter.names():
            if name not in used:
                raise self._unused(name)
        self.changes = {name: change for name, change in changes.items() if change != Change()}
        self._names = base.names()
        if model.tie_word_embeddings:
            head, embedding = (self.changes.get(name) for name in (HEAD, EMBEDDING))
            if head == embedding:
                self.changes.pop(HEAD, None)
            else:
                self._names = [*self._names, HEAD]
                self.model["tie_word_embeddings"] = False
        for name, change in self.changes.items():
            self._check_shapes(name, change)

    @property
    def state(self) -> dict[str, Any]:
        return self.base.state

    @property
    def last_trained(self) -> Source:
        return self.adapter

    @property
    def untrained(self) -> Source:
        return self.base

    @property
    def generation(self) -> dict[str, Any]:
        found = dict(self.base.generation)
        if hf_folder.has_tokenizer(self.adapter.folder):
            end = load_tokenizer(self.adapter.folder).eos_id
            ends = found.get("eos_token_id", self.model.get("eos_token_id", 2))
            ends = ends if isinstance(ends, list) else [ends]
            found["eos_token_id"] = [i for i in dict.fromkeys([*ends, end]) if i is not None]
        return found

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._stored(name))

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self.base.dtype(self._stored(name), kind)

    def fill(self, name: str, kind: str, run: Run, into: Tensor, convert: bool = False) -> None:
        """Write a run of a merged weight, rounded to the type of ``into``."""
        change = self.changes.get(name)
        if change is None:
            self.base.fill(self._stored(name), kind, run, into, convert)
            return
        if self._loaded is None or self._loaded.name != name:
            self._loaded = self._load(name, change)
        flat, loaded = into.detach().view(-1), self._loaded
        columns = row_width(self.shape(name))
        for box in boxes(run):
            step = max(1, SLAB_BYTES // (4 * max(1, box.right - box.left)))
            at = box.offset
            for top in range(box.top, box.bottom, step):
                part = box._replace(top=top, bottom=min(top + step, box.bottom))
                values = self._box(name, change, part, columns, loaded)
                flat[at : at + values.numel()].copy_(values.view(-1))
                at += values.numel()

    def _unused(self, name: str) -> CheckpointError:
        """The error for a tensor of the adapters that changes nothing in the base."""
        module = name.partition(".lora_")[0]
        target, adapter = f"{module}.weight", self.adapter
        missing = target not in self.base.names() and module.split(".")[-1] in LINEAR
        if missing and isinstance(adapter, PeftFolder) and adapter.settings.adapts(module):
            return self._misfit(name, target, None)
        return CheckpointError(
            f"{adapter.folder} has {name[:80]}, which is not a LoRA factor of a Llama projection "
            "that its settings name, nor a weight that replaces one of the base; llamax adapts "
            f"{', '.join(LINEAR)}, embed_tokens and lm_head"
        )

    def _misfit(self, name: str, target: str, whole: tuple[int, ...] | None) -> CheckpointError:
        """The error for a tensor of the adapters whose shape does not fit the base."""
        return CheckpointError(
            f"{self.adapter.folder}: {name} is {list(self.adapter.shape(name))}, but {target} of "
            f"{self.base.folder} is {list(whole) if whole else 'missing'}; use the base it was "
            "trained on"
        )

    def _stored(self, name: str) -> str:
        """The name of the base's tensor: of a head that was tied, the embedding."""
        return EMBEDDING if name == HEAD and self._ties_head else name

    @property
    def _ties_head(self) -> bool:
        return HEAD not in self.base.names()

    def _load(self, name: str, change: Change) -> _Loaded:
        def read(tensor: str) -> Tensor | None:
            if not tensor:
                return None
            values = self.adapter.read(tensor).float()
            if not values.isfinite().all():
                raise CheckpointError(
                    f"{self.adapter.folder}: {tensor} holds numbers that are not finite: its "
                    "training diverged or its file is damaged; use an earlier checkpoint"
                )
            return values

        a, b = read(change.a), read(change.b)
        if a is not None and b is not None:
            a, b = (b.T.contiguous(), a.T) if change.transposed else (a, b)
            b = b * change.scale
        loaded = _Loaded(name, a, b, None, read(change.tokens))
        if (lengths := read(change.magnitude)) is not None:
            rows, columns = self.shape(name)
            step = max(1, SLAB_BYTES // (4 * columns))
            norms = [
                self._sum(name, change, Box(top, min(top + step, rows), 0, columns, 0), loaded)
                for top in range(0, rows, step)
            ]
            norm = torch.cat([part.norm(dim=1) for part in norms])
            loaded = loaded._replace(stretch=lengths.view(-1) / norm)
        return loaded

    def _box(self, name: str, change: Change, box: Box, columns: int, loaded: _Loaded) -> Tensor:
        """The merged values of a box: [rows, columns] in fp32."""
        values = self._sum(name, change, box, loaded)
        if loaded.stretch is not None:
            values *= loaded.stretch[box.top : box.bottom, None]
        if loaded.tokens is not None:
            for number, row in enumerate(change.rows):
                if box.top <= row < box.bottom:
                    values[row - box.top] = loaded.tokens[number, box.left : box.right]
        return values

    def _sum(self, name: str, change: Change, box: Box, loaded: _Loaded) -> Tensor:
        """W + s B A in a box."""
        rows, width = box.bottom - box.top, box.right - box.left
        values = torch.empty(rows, width)
        source, stored = self.base, self._stored(name)
        if change.replaced:
            source, stored = self.adapter, change.replaced
        source.fill(stored, "weight", Run(box.left, width, box.top * width, rows * width), values)
        if loaded.a is not None and loaded.b is not None:
            a = loaded.a[:, box.left : box.right]
            values.addmm_(loaded.b[box.top : box.bottom], a)
        return values

    def _check_shapes(self, name: str, change: Change) -> None:
        stored, names = self._stored(name), self.base.names()
        whole = self.base.shape(stored) if stored in names else None
        rows, columns = whole if whole and len(whole) == 2 else (0, 0)
        r = self.adapter.shape(change.a)[0] if change.a else 0
        wanted: dict[str, tuple[int, ...] | None] = {
            change.replaced: whole,
            change.a: (r, rows if change.transposed else columns),
            change.b: (columns if change.transposed else rows, r),
            change.magnitude: (rows,),
            change.tokens: (len(change.rows), columns),
        }
        for tensor, shape in wanted.items():
            if not tensor:
                continue
            if whole is None or self.adapter.shape(tensor) != shape:
                raise self._misfit(tensor, stored, whole)
        if change.rows and max(change.rows) >= rows:
            raise CheckpointError(
                f"{self.adapter.folder}: trainable_token_indices names token {max(change.rows)}, "
                f"but {stored} of {self.base.folder} has {rows} rows; use the base it was trained "
                "on"
            )


def _factors_alone(names: Sequence[str], scale: float) -> tuple[dict[str, Change], set[str]]:
    """The changes of adapters that training made, and the tensors that they use: all factors."""
    modules = dict.fromkeys(name.split(".lora_")[0] for name in names if ".lora_" in name)
    factors = {m: [f"{m}.lora_{factor}.weight" for factor in "AB"] for m in modules}
    used = {name for pair in factors.values() for name in pair}
    return {
        f"{m}.weight": Change(a=a, b=b, scale=scale) for m, (a, b) in factors.items()
    }, used & set(names)


@cache
def _warn_of_patterns(folder: Path, weight: str) -> None:
    """Warn, once for each folder, of a scale that may not be that of the training."""
    logger.warning(
        "%s: keys of alpha_pattern with different values match %s; the first counts, but PEFT "
        "sorts keys when it saves: training may have had another first; leave the right one alone",
        folder,
        weight,
    )


class _Reader:
    """Finds the changes of a PEFT folder's adapters to a base, tensor by tensor."""

    def __init__(self, adapter: PeftFolder, base: Source, tied: bool) -> None:
        self.adapter, self.base, self.tied = adapter, base, tied
        self.settings: PeftSettings = adapter.settings
        self.names, self.used = set(adapter.names()), set[str]()

    def changes(self) -> tuple[Mapping[str, Change], set[str]]:
        """The change of each weight, and the names of the tensors that they use."""
        found = {name: self._of(name) for name in self._weights()}
        for name, change in found.items():
            if change.a and self.settings.scale_is_doubtful(name.removesuffix(".weight")):
                _warn_of_patterns(self.adapter.folder, name)
                break
        if self.tied:
            self._tie(found)
        return found, self.used

    def _weights(self) -> Iterator[str]:
        yield from self.base.names()
        if self.tied:
            yield HEAD

    def _of(self, name: str) -> Change:
        module, settings = name.removesuffix(".weight"), self.settings
        if self._either(settings.saves, module):
            return Change(replaced=self._needed(name, f"modules_to_save {settings.saved}"))
        change = Change(replaced=self._stored_base(module))
        if self._either(settings.adapts, module) and len(self._shape(name)) == 2:
            change = self._with_factors(module, change)
        if rows := self._token_rows(module):
            tokens = f"{module}.token_adapter.trainable_tokens_delta"
            if change.a:
                raise CheckpointError(
                    f"{self.adapter.folder}: trainable_token_indices together with LoRA factors of "
                    f"{module} is not supported; merge it with PEFT's merge_and_unload"
                )
            tokens = self._needed(tokens, "trainable_token_indices")
            change = replace(change, tokens=tokens, rows=tuple(rows))
        return change

    def _either(self, holds: Callable[[str], bool], module: str) -> bool:
        """Whether something holds of a module or, with ensure_weight_tying, of one tied to it."""
        pair = [name.removesuffix(".weight") for name in (EMBEDDING, HEAD)]
        together = self.tied and self.settings.tying and module in pair
        return any(map(holds, pair)) if together else holds(module)

    def _token_rows(self, module: str) -> Sequence[int]:
        """The rows of trained tokens; none of a tied head with the rows of the embedding."""
        rows = self.settings.token_rows(module)
        head, embedding = (name.removesuffix(".weight") for name in (HEAD, EMBEDDING))
        same = self.tied and rows == self.settings.token_rows(embedding)
        return () if module == head and same else rows

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(EMBEDDING if name == HEAD and self.tied else name)

    def _with_factors(self, module: str, change: Change) -> Change:
        embedding, why = module == EMBEDDING.removesuffix(".weight"), "target_modules"
        names = (
            [f"{module}.lora_embedding_{factor}" for factor in "AB"]
            if embedding
            else [f"{module}.lora_{factor}.weight" for factor in "AB"]
        )
        if not self.settings.stated and self.names.isdisjoint(names):
            return change
        a, b = (self._needed(name, why) for name in names)
        if (r := self.adapter.shape(a)[0]) != self.settings.rank(module):
            raise CheckpointError(
                f"{self.adapter.folder}: {a} has rank {r}, but r and rank_pattern state "
                f"{self.settings.rank(module)}; save the adapter again"
            )
        change = replace(change, a=a, b=b, transposed=embedding, scale=self.settings.scale(module))
        if self.settings.dora:
            if embedding:
                raise CheckpointError(
                    f"{self.adapter.folder}: use_dora=True on {module} is not supported; llamax "
                    "computes DoRA of projections and lm_head: merge it with PEFT's "
                    "merge_and_unload"
                )
            magnitude = self._needed(f"{module}.lora_magnitude_vector", "use_dora")
            change = replace(change, magnitude=magnitude)
        return change

    def _stored_base(self, module: str) -> str:
        """The weight that the folder keeps of a module's base, as PEFT does of embeddings."""
        inside = ("base_layer.weight", "token_adapter.base_layer.weight", "weight")
        names = [f"{module}.{leaf}" for leaf in inside if f"{module}.{leaf}" in self.names]
        self.used.update(names)
        return names[0] if names else ""

    def _needed(self, name: str, why: str) -> str:
        if name not in self.names:
            raise CheckpointError(
                f"{self.adapter.folder} has no {name}, which {why} of its adapter_config.json asks "
                "for; save the adapter again"
            )
        self.used.add(name)
        return name

    def _tie(self, changes: dict[str, Change]) -> None:
        """Give a tied head what PEFT gives it: the base and the tokens of the embedding.

        Where the tokens of the two differ, each has its own.
        """
        embedding, head = changes[EMBEDDING], changes[HEAD]
        if self.settings.tying and (embedding != Change() or head != Change()):
            changes[HEAD] = embedding
            return
        if embedding.replaced and not (head.replaced or self._saves(EMBEDDING)):
            head = replace(head, replaced=embedding.replaced)
        if head.replaced and not (embedding.replaced or self._saves(HEAD)):
            changes[EMBEDDING] = replace(embedding, replaced=head.replaced)
        if embedding.tokens and not head.tokens:
            head = replace(head, tokens=embedding.tokens, rows=embedding.rows)
        changes[HEAD] = head

    def _saves(self, name: str) -> bool:
        return self.settings.saves(name.removesuffix(".weight"))
