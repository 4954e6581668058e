"""From a base in files to the model that is tuned, or was.

``build_model`` gives training its model: whole (``finetune.method=full``), or a frozen base with
new adapters (``lora``; ``qlora`` quantises the base as it is loaded).  ``load_tuned`` gives
generation and evaluation a base with the adapters of a PEFT folder or a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.load import Whole, check_shapes, load_owned, load_weights
from llamax.checkpoint.merged import Merged
from llamax.checkpoint.peft import (
    ADAPTER_FIELDS,
    AdapterInfo,
    PeftFolder,
    adapter_info,
    check_base,
    find_base_folder,
    fingerprint,
    open_adapter,
)
from llamax.checkpoint.plain_llama import own_names
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig
from llamax.config.rules.pipeline import chunk_layers
from llamax.config.schema import Config, FinetuneConfig
from llamax.model import int8, lora
from llamax.model.int8 import Int8Linear
from llamax.model.llama import DTYPES, Llama
from llamax.model.qlora import Shapes, expected, store_weights, stores
from llamax.parallel.collectives import Axes, Axis, Solo
from llamax.parallel.fsdp import FsdpWeight, Store
from llamax.parallel.pipeline import layers_of
from llamax.parallel.placeholder import make_weights
from llamax.parallel.sharding import ShardedParameters
from llamax.parallel.tensor_parallel import ColumnLinear, RowLinear
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.hub_name import hub_name
from llamax.runtime.logging import logger
from llamax.runtime.units import show_bytes, show_number


def build_model(
    config: Config,
    first: Source | None,
    fresh: bool,
    axes: Axes,
    device: torch.device,
    model_class: type[Llama] = Llama,
) -> Llama:
    """The model of a run on this rank, with the weights it starts from.

    ``first``: where first weights, or the frozen base, are.  ``fresh``: without them, draw some.
    With neither, weights are whatever memory holds, or zeros.  ``model_class``: a subclass of Llama
    with modules of its own; they take the run's dtype and device.
    Weights that will be cut over the data ranks are placeholders, whose values are drawn or read
    when they are cut; not those of a class that builds or draws its weights itself.
    Raises ConfigError for a class that cannot be trained, saved and resumed as configured.
    """
    finetune, tp, seed = config.finetune, axes.tp, config.run.seed
    stage: dict[str, tuple[range, ...]] = {}  # a class of a program's own need not take it
    if axes.pp.size > 1:
        check_takes_stage(model_class, axes.pp.size)
        torch.manual_seed(seed + axes.pp.rank)  # own modules of two stages do not draw the same
        counts = chunk_layers(config.parallel, config.model.num_hidden_layers)
        stage["stage"] = layers_of(*axes.pp, counts)
    sharded = config.parallel.zero == 3
    as_llama = model_class.__init__ is Llama.__init__ and model_class.init is Llama.init
    unmade = finetune.method == "qlora" or (sharded and axes.shard.size > 1 and as_llama)
    like = torch.empty(0, dtype=DTYPES[config.run.dtype], device=device)
    options: dict[str, Any] = {
        "sequence_parallel": config.parallel.sequence,
        "dtype": like.dtype,
        "device": "meta" if unmade else device,
        "recompute": config.run.recompute,
        **stage,
    }
    check_made_so(model_class, options)
    model = model_class(config.model, tp, **options)
    if model_class is not Llama:
        check_model_class(model, config)
        if not unmade:
            model.to(device, like.dtype)
    if unmade and finetune.method == "full":
        make_weights(model, model.sharded_parameters().layers.keys(), like)
    if first is not None or finetune.method != "full":
        load_base(model, first, finetune, like, axes.shard, seed, sharded)
    elif fresh:
        model.init(seed)
    return model


def check_takes_stage(model_class: type[Llama], stages: int) -> None:
    """Raise ConfigError where a model class cannot be made for one stage of a pipeline."""
    options = inspect.signature(model_class).parameters.values()
    if not any(option.name == "stage" or option.kind is option.VAR_KEYWORD for option in options):
        raise ConfigError(
            f"parallel.pipeline={stages} makes {model_class.__qualname__} with stage=..., which it "
            "does not take; define __init__(self, *args, **options) and pass both on to Llama, or "
            "use parallel.pipeline=1"
        )


def check_made_so(model_class: type[Llama], options: Mapping[str, Any]) -> None:
    """Raise ConfigError where a model class does not take what a run makes it with."""
    try:
        inspect.signature(model_class).bind(None, None, **options)
    except TypeError as error:
        raise ConfigError(
            f"{model_class.__qualname__} cannot be made as a run makes it: {error}; define "
            "__init__(self, *args, **options) and pass both on to Llama"
        ) from None


def check_model_class(model: Llama, config: Config) -> None:
    """Raise ConfigError where a run could not train, keep or write all of such a model."""
    name = type(model).__qualname__
    own = own_names(model.sharded_parameters().hub_shapes(), config.model)
    if config.finetune.method != "full":
        raise ConfigError(
            f"finetune.method={config.finetune.method} freezes all of {name} but the adapters; use "
            "finetune.method=full with a model class of your own"
        )
    if config.checkpoint.also_hf and own:
        raise ConfigError(
            f"checkpoint.also_hf=true, but a Hugging Face folder cannot describe the parameters "
            f"that {name} adds to Llama; use checkpoint.also_hf=false"
        )
    kept = dict(model.named_parameters(remove_duplicate=False))
    for key in model.state_dict():
        if key not in kept:
            raise ConfigError(
                f"{key} of {name} is a buffer, and checkpoints keep parameters alone; register it "
                "with persistent=False if it follows from the settings, or make it a parameter"
            )


def load_first(source: Source, parameters: ShardedParameters, model: ModelConfig) -> None:
    """Load first weights; parameters of a program's own that a source lacks keep their values."""
    missing = {*own_names(parameters.hub_shapes(), model)} - {*source.names()}
    kept = [
        name
        for name in parameters
        if not missing.issuperset(part.name for part in parameters.parts(name))
    ]
    if missing:
        logger.info("%s keep their initial values: %s has none", ", ".join(missing), source.folder)
    load_weights(source, parameters.only(kept), convert=True)


def load_base(
    model: Llama,
    source: Source | None,
    finetune: FinetuneConfig,
    like: Tensor,
    shard: Axis,
    seed: int = 0,
    sharded: bool = False,
) -> None:
    """Load a model's first weights, or its frozen base beside which new adapters are drawn.

    ``like`` has the dtype and device of the model.  The base of qlora goes from the files into its
    quantised form a tensor at a time.  With ``sharded`` the projections of a dense base are cut
    over the ranks of ``shard`` as well.  Both take a model that was built on the meta device, and
    others.  Without a ``source`` all is there but the base's values.
    """
    parameters = model.sharded_parameters()
    quantised, sharded = finetune.method == "qlora", sharded and shard.size > 1
    if finetune.method != "full":
        cut = quantised or sharded
        make_weights(model, [n for n in parameters.layers if cut and ".layers." in n], like)
    if source is not None:
        load_first(source, parameters, model.config)
    if finetune.method == "full":
        return
    weights = source or Shapes(parameters)
    codes_like = like if source is not None else like.to("meta")

    def keep(name: str, layer: lora.Linear) -> nn.Parameter | Store:
        if quantised:
            return store_weights(name, layer, weights, finetune, codes_like, shard)
        return FsdpWeight(layer.weight, shard) if sharded else layer.weight

    lora.adapt(model, finetune, like, seed, keep)
    lora.init(model, seed)
    if source is None:
        for store in stores(model):
            store.to(like.device)


def finetune_info(
    finetune: FinetuneConfig, first: Source | None, named: str = ""
) -> AdapterInfo | None:
    """What the checkpoints of a run say of its adapters; None where it trains a whole model.

    ``named``: the base as the configuration names it; a name on the Hub is kept.
    Raises CheckpointError where the base is an adapter itself.
    """
    if first is not None and adapter_info(first) is not None:
        raise CheckpointError(
            f"{first.folder} holds adapters, not a model; merge them with llamax merge first"
        )
    if finetune.method == "full":
        return None
    assert first is not None, "rules.finetune.adapters_have_a_base"
    on_hub = bool(named) and hub_name(named) is not None
    base = named if on_hub else str(first.folder.absolute())
    return AdapterInfo(finetune, base, fingerprint(first))


def describe_finetune(config: Config, tensor: int, data: int) -> str:
    """What is trained beside what, and what the base takes on a rank, in a line."""
    finetune, width = config.finetune, DTYPES[config.run.dtype].itemsize
    count, whole = lora.num_parameters(config.model, finetune), config.model.num_parameters()
    text = (
        f"{finetune.method}: {show_number(count)} parameters ({count / whole:.2%}) of rank "
        f"{finetune.r} on {finetune.targets} beside {config.checkpoint.init_from}"
    )
    if finetune.method == "qlora":
        held = expected(config.model, finetune, tensor, data, width)
        text += (
            f"; a rank holds {show_bytes(held.quantised)} of it in {finetune.quant}, "
            f"{show_bytes(held.plain)} as it is, and {show_bytes(held.dense)} while a layer is used"
        )
    return text


def check_resumed(finetune: FinetuneConfig, resumed: Checkpoint, first: Source | None) -> None:
    """Refuse to go on from a checkpoint of another method, other adapters or another base."""
    found = adapter_info(resumed)
    if (found is None) != (finetune.method == "full"):
        theirs = "full" if found is None else found.finetune.method
        raise ConfigError(
            f"finetune.method={finetune.method} but {resumed.folder} was trained with {theirs}; "
            "use that, or another run.folder"
        )
    if found is None:
        return
    for name in ADAPTER_FIELDS:
        mine, theirs = getattr(finetune, name), getattr(found.finetune, name)
        if mine != theirs:
            raise ConfigError(
                f"finetune.{name}={mine} but {resumed.folder} was trained with {theirs}; "
                "use that, or another run.folder"
            )
    assert first is not None, "rules.finetune.adapters_have_a_base"
    check_base(found, resumed.folder, first)


def default_dtype(source: Source, device: torch.device | str) -> torch.dtype:
    """The type that a model is loaded in unless another is chosen: that of its files.

    float16 is taken on GPUs alone; elsewhere it becomes float32, which holds the same numbers: CPUs
    compute it slowly, NeuronCores not at all.  Other types become float32 as well.
    """
    stored = source.dtype("model.embed_tokens.weight")
    on_gpu = torch.device(device).type == "cuda"
    as_stored = stored == torch.bfloat16 or (stored == torch.float16 and on_gpu)
    return stored if as_stored else torch.float32


def load_int8(model: Llama, source: Source, device: torch.device) -> None:
    """Load a model that was built on the meta device, its linear layers in 8 bits.

    A few rows are dense at a time.
    """
    parameters, modules = model.sharded_parameters(), dict(model.named_modules())
    check_shapes(source, parameters)

    def rows_of(name: str, start: int, stop: int) -> Tensor:
        whole = parameters[name].tensor
        rows = torch.empty(stop - start, *whole.shape[1:], dtype=whole.dtype, device=device)
        run = Whole(name, rows.view(-1), start=start * whole.shape[1:].numel())
        load_owned(source, [run], parameters, convert=True)
        return rows

    for name, (weight, _) in parameters.items():
        path = name.rpartition(".")[0]
        layer, (above, _, leaf) = modules[path], path.rpartition(".")
        if type(layer) in (ColumnLinear, RowLinear):
            reduces = isinstance(layer, RowLinear)
            small = Int8Linear(weight, model.tp, reduces, partial(rows_of, name))
            setattr(model.get_submodule(above), leaf, small)
        else:
            layer.weight = nn.Parameter(rows_of(name, 0, len(weight)), requires_grad=False)
    int8.quantize(model)  # a tied output projection


def load_tuned(
    adapter: Path | str,
    base_folder: Path | str | None = None,
    tp: Axis | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama:
    """A base with adapters beside it, for generation and evaluation.

    ``adapter``: a PEFT folder, or a run or checkpoint of adapters.  ``base_folder``: where the
    adapter says, unless given.  ``dtype``: ``default_dtype`` of the base unless given.  The base is
    quantised as it was in training.  Adapters that differ from layer to layer, or that change more
    than projections, are merged into the base as it is loaded.
    Raises CheckpointError where they do not belong together.
    """
    source, found = open_adapter(adapter)
    frozen = open_source(base_folder or find_base_folder(source.folder, found))
    finetune_info(FinetuneConfig(), frozen)
    check_base(found, source.folder, frozen)
    kind = dtype or default_dtype(frozen, device)
    tp = tp or Solo("tp", device)
    layers = ModelConfig.from_hub(frozen.model).num_hidden_layers
    if isinstance(source, PeftFolder) and not source.is_uniform(layers):
        merged = Merged(frozen, source, found)
        model = Llama(ModelConfig.from_hub(merged.model), tp, dtype=kind, device=device)
        load_weights(merged, model.sharded_parameters(), convert=True)
        return model
    at = "meta" if found.finetune.method == "qlora" else device
    model = Llama(ModelConfig.from_hub(frozen.model), tp, dtype=kind, device=at)
    like = torch.empty(0, dtype=kind, device=device)
    load_base(model, frozen, found.finetune, like, Solo("shard", device))
    load_weights(source, model.sharded_parameters().trained(), convert=True)
    return model
