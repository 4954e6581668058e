"""llamax: train Llama models on Trainium, GPUs and laptops, from code to read in an afternoon.

The commands as functions, imported at their first use::

    import llamax

    llamax.prepare("corpus/", "data", tokenizer="tokenizer.model")
    llamax.plan("llama2-7b", nodes=16).time.tokens_per_s
    llamax.train("demo", run={"steps": 100}, ranks=2).loss
    llamax.load("demo/run").generate("def ", max_new_tokens=50)
    llamax.evaluate("demo/run", data="demo/data")["loss"]
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
    from llamax.inference.language_model import load
    from llamax.inference.serving.server import ServeSettings, serve
    from llamax.runtime.errors import LlamaxError
    from llamax.tools.audit.auditor import audit
    from llamax.tools.inspect.description import describe
    from llamax.tools.plan.planner import plan
    from llamax.tools.push.push import push
    from llamax.train import start as train

__all__ = [
    "Config",
    "GenerationSettings",
    "LlamaxError",
    "ServeSettings",
    "__version__",
    "audit",
    "compare",
    "consolidate",
    "describe",
    "evaluate",
    "export",
    "generate",
    "import_checkpoint",
    "load",
    "load_config",
    "merge",
    "plan",
    "prepare",
    "push",
    "serve",
    "shard",
    "train",
]

_MODULES = {
    "Config": "config.schema",
    "GenerationSettings": "inference.generate",
    "LlamaxError": "runtime.errors",
    "ServeSettings": "inference.serving.server",
    "audit": "tools.audit.auditor",
    "compare": "inference.generate",
    "consolidate": "checkpoint.consolidate",
    "describe": "tools.inspect.description",
    "evaluate": "inference.evaluate",
    "export": "checkpoint.formats.export",
    "generate": "inference.generate",
    "import_checkpoint": "checkpoint.formats.convert",
    "load": "inference.language_model",
    "load_config": "config.load",
    "merge": "checkpoint.merge",
    "plan": "tools.plan.planner",
    "prepare": "data.prepare.pipeline",
    "push": "tools.push.push",
    "serve": "inference.serving.server",
    "shard": "checkpoint.shard_hf",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = module if _MODULES[name] == name else getattr(module, name)  # llamax.train is callable
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
