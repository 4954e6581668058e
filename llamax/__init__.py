"""llamax: train Llama models on Trainium, GPUs and laptops, from code to read in an afternoon.

The commands as functions, imported at their first use::

    import llamax

    llamax.prepare("corpus/", "data", tokenizer="tokenizer.model")
    llamax.plan("llama2-7b", nodes=16).time.tokens_per_s
    llamax.evaluate("runs/demo", data="data")["loss"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamax.runtime.versions import LLAMAX as __version__

if TYPE_CHECKING:
    from typing import Any

    from llamax.checkpoint.consolidate import consolidate
    from llamax.checkpoint.formats.convert import import_checkpoint
    from llamax.checkpoint.formats.export import export
    from llamax.checkpoint.merge import merge
    from llamax.checkpoint.shard_hf import shard
    from llamax.config.load import load_config
    from llamax.config.schema import Config
    from llamax.data.prepare.pipeline import prepare
    from llamax.inference.evaluate import evaluate
    from llamax.inference.generate import GenerationSettings, compare, generate
    from llamax.tools.audit.auditor import audit
    from llamax.tools.inspect import describe
    from llamax.tools.plan.planner import plan


__all__ = [
    "Config",
    "GenerationSettings",
    "__version__",
    "audit",
    "compare",
    "consolidate",
    "describe",
    "evaluate",
    "export",
    "generate",
    "import_checkpoint",
    "load_config",
    "merge",
    "plan",
    "prepare",
    "shard",
]

_MODULES = {
    "Config": "config.schema",
    "GenerationSettings": "inference.generate",
    "audit": "tools.audit.auditor",
    "compare": "inference.generate",
    "consolidate": "checkpoint.consolidate",
    "describe": "tools.inspect",
    "evaluate": "inference.evaluate",
    "export": "checkpoint.formats.export",
    "generate": "inference.generate",
    "import_checkpoint": "checkpoint.formats.convert",
    "load_config": "config.load",
    "merge": "checkpoint.merge",
    "plan": "tools.plan.planner",
    "prepare": "data.prepare.pipeline",
    "shard": "checkpoint.shard_hf",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
