"""Cases for the rules of a run: data, schedule, checkpoints, adapters."""

from __future__ import annotations

from support.rule_cases.case import BLOCKS, LORA, Cases

THIN = {
    "model.num_attention_heads": 64,
    "model.num_key_value_heads": 64,
    "model.head_dim": 2,
    "model.intermediate_size": 64,
    "parallel.tensor": 64,
}

CASES: Cases = {
    "sequence_fits_model": (
        [
            (
                {"model.max_position_embeddings": 126},
                None,
                "data.sequence_length=128 is above model.max_position_embeddings=126; "
                "use 126, or raise the model's",
            )
        ],
        [{"model.max_position_embeddings": 128}],
    ),
    "learning_rate_falls": (
        [
            (
                {"optim.min_lr": 1e-3},
                None,
                "optim.min_lr=0.001 is above optim.lr=0.0003; use 0.0003 or less",
            )
        ],
        [{"optim.min_lr": 3e-4}, {"optim.min_lr": 1e-3, "optim.schedule": "constant"}],
    ),
    "warmup_is_given_once": (
        [
            (
                {"optim.warmup_ratio": 0.1},
                None,
                "optim.warmup_steps=10 and optim.warmup_ratio=0.1 both set the length of warm-up; "
                "use one of them",
            )
        ],
        [{"optim.warmup_ratio": 0.1, "optim.warmup_steps": 0}],
    ),
    "rewind_needs_skipping": (
        [
            (
                {"optim.rewind": 4, "checkpoint.every": 5},
                None,
                "optim.rewind=4 counts skipped steps, but optim.skip_spikes=off; set "
                "optim.skip_spikes=both, loss or norm",
            )
        ],
        [{"optim.rewind": 4, "checkpoint.every": 5, "optim.skip_spikes": "norm"}],
    ),
    "rewind_needs_checkpoints": (
        [
            (
                {"optim.rewind": 4, "optim.skip_spikes": "both", "checkpoint.every": 0},
                None,
                "optim.rewind=4 goes back to a checkpoint, but none is saved before the end; set "
                "checkpoint.every, checkpoint.every_minutes or checkpoint.each_epoch=true",
            )
        ],
        [
            {"optim.rewind": 4, "optim.skip_spikes": "both"} | saving
            for saving in (
                {"checkpoint.every": 5},
                {"checkpoint.every": 0, "checkpoint.every_minutes": 0.5},
                {"checkpoint.every": 0, "checkpoint.each_epoch": True},
            )
        ],
    ),
    "rewind_comes_before_the_end": (
        [
            (
                {"optim.rewind": 9, "optim.skip_spikes": "both", "checkpoint.every": 5},
                None,
                "optim.rewind=9 is above optim.most_skipped=8, after which the run ends; use 8 or "
                "less, or raise optim.most_skipped",
            )
        ],
        [{"optim.rewind": 8, "optim.skip_spikes": "loss", "checkpoint.every": 5}],
    ),
    "neuron_cores_round": (
        [
            (
                {"run.stochastic_rounding": True, "run.dtype": "bfloat16"},
                None,
                "run.stochastic_rounding is for bfloat16 on NeuronCores, but run.backend=cpu "
                "and run.dtype=bfloat16; leave it off, or use run.backend=xla and "
                "run.dtype=bfloat16",
            ),
            (
                {"run.stochastic_rounding": True, "run.backend": "xla"},
                None,
                "run.stochastic_rounding is for bfloat16 on NeuronCores, but run.backend=xla "
                "and run.dtype=float32; leave it off, or use run.backend=xla and "
                "run.dtype=bfloat16",
            ),
        ],
        [
            {
                "run.stochastic_rounding": True,
                "run.backend": "xla",
                "run.dtype": "bfloat16",
            }
        ],
    ),
    "float16_is_for_others": (
        [
            (
                {"run.dtype": "float16", "run.backend": backend},
                None,
                f"run.dtype=float16 with run.backend={backend}: NeuronCores multiply bfloat16 as "
                "fast and flush the small numbers that float16 needs; use run.dtype=bfloat16",
            )
            for backend in ("xla", "neuron")
        ],
        [{"run.dtype": "float16"}, {"run.dtype": "float16", "run.backend": "cuda"}],
    ),
    "state_is_whole_on_neuron_cores": (
        [
            (
                {key: value, "run.backend": backend, "parallel.tensor": 1},
                None,
                f"{key}={str(value).lower()} with run.backend={backend}: NeuronCores keep the "
                "state of AdamW in their own memory, in 32 bits; leave it out, and cut it over "
                "more data ranks",
            )
            for backend in ("xla", "neuron")
            for key, value in (("optim.state_bits", 8), ("optim.offload", True))
        ],
        [
            {"optim.state_bits": 8, "optim.offload": True, "parallel.tensor": 1},
            {**BLOCKS, "optim.offload": True, "run.backend": "cuda"},
            {"run.backend": "xla"},
        ],
    ),
    "patience_needs_validation": (
        [
            (
                {"run.patience": 2},
                None,
                "run.patience=2 but nothing is validated; set run.validate_every or "
                "run.validate_each_epoch=true",
            )
        ],
        [
            {"run.patience": 2, "run.validate_every": 5},
            {"run.patience": 2, "run.validate_each_epoch": True},
        ],
    ),
    "best_needs_validation": (
        [
            (
                {"checkpoint.keep_best": True},
                None,
                "checkpoint.keep_best=true but nothing is validated; set run.validate_every or "
                "run.validate_each_epoch=true",
            )
        ],
        [
            {"checkpoint.keep_best": True, "run.validate_every": 5},
            {"checkpoint.keep_best": True, "run.validate_each_epoch": True},
        ],
    ),
    "decay_belongs_to_wsd": (
        [
            (
                {"optim.schedule": "wsd"},
                None,
                "optim.decay_steps=0 with optim.schedule=wsd; "
                "use 1 to 1000, the last fifth of the run for example",
            ),
            (
                {"optim.decay_steps": 5},
                None,
                "optim.decay_steps=5 has no effect with optim.schedule=cosine; "
                "use 0, or optim.schedule=wsd",
            ),
        ],
        [{"optim.schedule": "wsd", "optim.decay_steps": 990}],
    ),
    "folders_are_named": (
        [
            (
                {"data.path": ""},
                None,
                "data.path is empty; use the folder that llamax prepare wrote",
            ),
            ({"run.folder": " "}, None, "run.folder is empty; use a folder for this run"),
            (
                {"checkpoint.resume": ""},
                None,
                "checkpoint.resume is empty; use auto, never or a checkpoint folder",
            ),
        ],
        [{"checkpoint.init_from": ""}],
    ),
    "folders_are_paths": (
        [
            (
                {key: address},
                None,
                f"{key}={address} is an address of {kind}, not a path; copy it or mount it "
                f"here, and use {use}",
            )
            for key, address, kind, use in (
                ("data.path", "s3://bucket/tokens", "s3", "llamax prepare's folder"),
                ("data.path", "0.5 data 0.5 s3://b/x", "s3", "llamax prepare's folder"),
                ("data.validation", "gs://bucket/x", "gs", "llamax prepare's folder"),
                ("run.folder", "file:///run", "file", "a folder for this run"),
                ("checkpoint.resume", "s3:/bucket/run", "s3", "a checkpoint folder"),
                ("checkpoint.init_from", "s3://b/x", "s3", "a folder, or org/name on the Hub"),
            )
        ],
        [{"checkpoint.init_from": "hf://org/name"}, {"data.path": "c:/x"}, {"run.folder": "a:b"}],
    ),
    "targets_match_modules": (
        [
            (
                {"finetune.targets": targets, **LORA},
                None,
                f"finetune.targets={targets!r}: {unknown!r} matches no module; use all-linear or "
                "some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
            )
            for targets, unknown in (("q_proj,query", "query"), ("", ""), ("lm_head", "lm_head"))
        ],
        [{"finetune.targets": "nothing"}, {"finetune.targets": "q_proj, down_proj", **LORA}],
    ),
    "adapters_have_a_base": (
        [
            (
                {"finetune.method": "lora"},
                None,
                "finetune.method=lora trains adapters of a model, and checkpoint.init_from is "
                "empty; use the folder of the base",
            )
        ],
        [LORA],
    ),
    "blocks_fit_shares": (
        [
            (
                {**LORA, "finetune.method": "qlora"},
                None,
                "model.intermediate_size=96 is not a multiple of 64, the block of "
                "finetune.quant=nf4; use finetune.quant=int8 or finetune.method=lora",
            ),
            (
                {**LORA, **THIN, "finetune.method": "qlora"},
                None,
                "parallel.tensor=64 leaves an odd share of model.intermediate_size=64, and "
                "finetune.quant=nf4 packs weights in pairs; use finetune.quant=int8",
            ),
        ],
        [
            {**LORA, "finetune.method": "qlora", "finetune.quant": "int8"},
            {**LORA, "finetune.method": "qlora", "model.intermediate_size": 128},
        ],
    ),
    "adapters_are_no_model": (
        [
            (
                {**LORA, "checkpoint.also_hf": True},
                None,
                "checkpoint.also_hf=true with finetune.method=lora: a checkpoint of adapters is no "
                "whole model; use checkpoint.also_hf=false, and llamax merge afterwards",
            )
        ],
        [LORA, {"checkpoint.also_hf": True}],
    ),
}
