"""Settings of other trainers, by the setting of llamax that does the same.

The names are those of transformers' TrainingArguments, TRL's SFTConfig, peft's LoraConfig, the
BitsAndBytesConfig of transformers, accelerate's FSDP file, optimum-neuron's
NeuronTrainingArguments and the settings of neuronx-nemo-megatron, which ``docs/how-to/from-trl.md``
and ``from-neuron.md`` explain, and usual ones of more trainers.  An unknown option of such a name
is answered with its entry here.
"""

from __future__ import annotations

SAME: dict[str, str] = {
    "model_id": "checkpoint.init_from",
    "model_name_or_path": "checkpoint.init_from",
    "dataset_path": "data.path",
    "output_dir": "run.folder",
    "overwrite_output_dir": "checkpoint.resume=never",
    "resume_from_checkpoint": "checkpoint.resume",
    # length and batch
    "num_train_epochs": "run.epochs",
    "max_steps": "run.steps",
    "per_device_train_batch_size": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch, in samples of a step on all ranks",
    "max_seq_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "max_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "packing": "data.packing",
    "completion_only_loss": "data.labels=answers",
    "assistant_only_loss": "data.labels=answers",
    # optimizer
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    # precision and memory
    "bf16": "run.dtype=bfloat16",
    "fp16": "run.dtype=float16",
    "torch_dtype": "run.dtype",
    "gradient_checkpointing": "run.recompute=full",
    "activation_checkpointing": "run.recompute=full",
    "fsdp": "parallel.zero=3",
    "load_in_4bit": "finetune.method=qlora",
    "load_in_8bit": "finetune.method=qlora with finetune.quant=int8",
    "bnb_4bit_quant_type": "finetune.quant",
    "bnb_4bit_use_double_quant": "finetune.double_quant",
    "bnb_4bit_compute_dtype": "run.dtype",
    # adapters
    "use_peft": "finetune.method=lora",
    "lora_r": "finetune.r",
    "lora_alpha": "finetune.alpha",
    "lora_dropout": "finetune.dropout",
    "target_modules": "finetune.targets",
    "lora_target_modules": "finetune.targets",
    "use_rslora": "finetune.rslora",
    # saving, validation, logs
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "save_strategy": "checkpoint.each_epoch or checkpoint.every",
    "eval_steps": "run.validate_every",
    "eval_strategy": "run.validate_each_epoch or run.validate_every",
    "evaluation_strategy": "run.validate_each_epoch or run.validate_every",
    "early_stopping_patience": "run.patience",
    "logging_steps": "run.log_every",
    "report_to": "run.tensorboard, run.wandb and run.trackio",
    "disable_tqdm": "run.progress=off",
    # parallelism
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    # optimum-neuron
    "disable_sequence_parallel": "parallel.sequence=false",
    "zero_1": "parallel.zero=1",
    # neuronx-nemo-megatron
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "sequence_parallel": "parallel.sequence",
    "micro_batch_size": "data.micro_batch",
    "global_batch_size": "data.global_batch",
    "encoder_seq_length": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "data_prefix": "data.path",
    "ffn_hidden_size": "model.intermediate_size",
    "num_layers": "model.num_hidden_layers",
    "layernorm_epsilon": "model.rms_norm_eps",
    "init_method_std": "model.initializer_range",
    "gradient_clip_val": "optim.max_grad_norm",
    "log_every_n_steps": "run.log_every",
    "val_check_interval": "run.validate_every",
    "activations_checkpoint_granularity": "run.recompute",
    "create_tensorboard_logger": "run.tensorboard",
    "train_time_interval": "checkpoint.every_minutes",
    # Megatron-LM, Lightning, torchtitan, litgpt
    "precision": "run.dtype",
    "mixed_precision": "run.dtype",
    "batch_size": "data.global_batch, in samples of a step on all ranks",
    "seq_len": "data.sequence_length",
    "context_length": "data.sequence_length",
    "max_epochs": "run.epochs",
    "num_epochs": "run.epochs",
    "train_iters": "run.steps",
    "clip_grad": "optim.max_grad_norm",
    "max_norm": "optim.max_grad_norm",
    "log_interval": "run.log_every",
    "save_interval": "checkpoint.every",
    "eval_interval": "run.validate_every",
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "cp": "parallel.context",
}
# An option whose own name is that of a section: --optim paged_adamw_32bit.
OPTIMIZERS = "the optimizer is AdamW; paged_* is optim.offload, *_8bit is optim.state_bits=8"


def same_setting(key: str) -> str:
    """``; ...`` with what an unknown option of another trainer is in llamax; empty if unknown."""
    name = key.rpartition(".")[2].replace("-", "_").lower()
    if name == "optim":
        return f"; {OPTIMIZERS}"
    return f"; in llamax it is {SAME[name]}" if SAME.get(name, key) != key else ""
