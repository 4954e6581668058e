"""For each rule of a configuration: changes that trip it alone, and changes on its edge."""

from __future__ import annotations

from typing import Any

LORA = {"finetune.method": "lora", "checkpoint.init_from": "base"}

BLOCKS = {
    "optim.state_bits": 8,
    "parallel.tensor": 2,
    "model.hidden_size": 64,
    "model.intermediate_size": 512,
    "model.num_attention_heads": 8,
    "model.num_key_value_heads": 2,
    "model.head_dim": 64,
}

THIN = {
    "model.num_attention_heads": 64,
    "model.num_key_value_heads": 64,
    "model.head_dim": 2,
    "model.intermediate_size": 64,
    "parallel.tensor": 64,
}

# rule: (changes, world, problem) that trips it; then (changes, world) on the edge that keeps it
# (world: ranks, or ranks and those of a node)
Worlds = int | tuple[int, int] | None
CASES: dict[str, tuple[list[tuple[dict[str, Any], Worlds, str]], list[dict[str, Any]]]] = {
    "heads_divide_hidden": (
        [
            (
                {"model.hidden_size": 66},
                None,
                "model.num_attention_heads=8 does not divide model.hidden_size=66; "
                "use a divisor, or a model.head_dim other than 8",
            )
        ],
        [{"model.hidden_size": 66, "model.head_dim": 16}],
    ),
    "heads_turn_pairs": (
        [
            (
                {"model.head_dim": 7},
                None,
                "model.head_dim=7 is odd, and rotary positions turn pairs of features; use 8",
            )
        ],
        [{"model.head_dim": 6}],
    ),
    "queries_share_keys": (
        [
            (
                {"model.num_key_value_heads": 3, "parallel.tensor": 1},
                None,
                "model.num_key_value_heads=3 does not divide model.num_attention_heads=8; "
                "use 1, 2, 4 or 8",
            )
        ],
        [{"model.num_key_value_heads": n} for n in (1, 2, 4, 8)],
    ),
    "special_tokens_exist": (
        [
            (
                {"model.bos_token_id": 101},
                None,
                "model.bos_token_id=101 is outside model.vocab_size=101; use 0 to 100",
            ),
            (
                {"model.eos_token_id": (2, 101)},
                None,
                "model.eos_token_id=101 is outside model.vocab_size=101; use 0 to 100",
            ),
        ],
        [{"model.bos_token_id": 100}, {"model.eos_token_id": 100}, {"model.eos_token_id": (0, 1)}],
    ),
    "rope_bands_in_order": (
        [
            (
                {"model.rope_scaling.low_freq_factor": 4.0},
                None,
                "model.rope_scaling.low_freq_factor=4.0 is not below "
                "model.rope_scaling.high_freq_factor=4.0; Llama 3 has 1.0 and 4.0",
            )
        ],
        [{"model.rope_scaling.low_freq_factor": 3.9}],
    ),
    "rope_stretches": (
        [
            (
                {"model.rope_scaling.factor": 0.5},
                None,
                "model.rope_scaling.factor=0.5 would shrink the context; "
                "use 1.0 or more (Llama 3.1 has 8.0, Llama 3.2 has 32.0)",
            )
        ],
        [{"model.rope_scaling.factor": 1.0}],
    ),
    "tensor_divides_heads": (
        [
            (
                {"parallel.tensor": 3, "model.num_key_value_heads": 1, "data.sequence_length": 12},
                None,
                "parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2 or 4",
            )
        ],
        [{"parallel.tensor": 8}],
    ),
    "tensor_fits_kv_heads": (
        [
            (
                {
                    "parallel.tensor": 4,
                    "model.num_attention_heads": 12,
                    "model.num_key_value_heads": 6,
                },
                None,
                "parallel.tensor=4 is neither a divisor nor a multiple of "
                "model.num_key_value_heads=6; use 1 or 2",
            )
        ],
        [{"parallel.tensor": 8, "model.num_key_value_heads": n} for n in (1, 2, 4, 8)],
    ),
    "tensor_divides_feed_forward": (
        [
            (
                {"model.intermediate_size": 105},
                None,
                "parallel.tensor=2 does not divide model.intermediate_size=105; use 1",
            )
        ],
        [{"model.intermediate_size": 98}],
    ),
    "tensor_divides_sequence": (
        [
            (
                {"data.sequence_length": 101},
                None,
                "parallel.tensor=2 does not divide data.sequence_length=101, which "
                "parallel.sequence=true cuts; use data.sequence_length=100 or 102, or "
                "parallel.sequence=false",
            )
        ],
        [
            {"data.sequence_length": 102},
            {"data.sequence_length": 101, "parallel.sequence": False},
            {"data.sequence_length": 101, "parallel.tensor": 1},
        ],
    ),
    "context_divides_sequence": (
        [
            (
                {"parallel.context": 2, "data.sequence_length": 126, "parallel.sequence": False},
                None,
                "parallel.context=2 gives each rank 2 of 4 equal chunks of a sequence, but "
                "data.sequence_length=126 is not a multiple of 4; "
                "use data.sequence_length=124 or 128",
            ),
            (
                {"parallel.context": 3, "data.sequence_length": 15},
                None,
                "parallel.context=3 gives each rank 2 of 6 equal chunks of a sequence, cut over 2 "
                "tensor ranks (parallel.sequence=true), but data.sequence_length=15 is not a "
                "multiple of 6; use data.sequence_length=12 or 18",
            ),
            (
                {"parallel.context": 2, "parallel.tensor": 8, "data.sequence_length": 120},
                None,
                "parallel.context=2 gives each rank 2 of 4 equal chunks of a sequence, cut over 8 "
                "tensor ranks (parallel.sequence=true), but data.sequence_length=120 is not a "
                "multiple of 16; use data.sequence_length=112 or 128",
            ),
        ],
        [
            {"parallel.context": 2, "data.sequence_length": 124},
            {"parallel.context": 2, "parallel.tensor": 8, "data.sequence_length": 112},
            {
                "parallel.context": 2,
                "parallel.tensor": 8,
                "data.sequence_length": 120,
                "parallel.sequence": False,
            },
        ],
    ),
    "ring_has_ranks": (
        [
            (
                {"parallel.context_by": "ring"},
                None,
                "parallel.context_by=ring passes keys and values around context ranks, but "
                "parallel.context=1; use parallel.context_by=gather, or parallel.context=2, 4 or 8",
            )
        ],
        [{"parallel.context_by": "ring", "parallel.context": 2}],
    ),
    "mesh_fills_world": (
        [
            (
                {"parallel.pipeline": 2, "data.global_batch": 6},
                6,
                "parallel.tensor=2 x parallel.pipeline=2 does not divide the world of 6 ranks; "
                "start a multiple of 4 ranks, or use parallel.pipeline=1",
            ),
            (  # with one stage, three data ranks would not divide the batch
                {"parallel.pipeline": 2, "data.global_batch": 2},
                6,
                "parallel.tensor=2 x parallel.pipeline=2 does not divide the world of 6 ranks; "
                "start a multiple of 4 ranks",
            ),
            (
                {"parallel.context": 2, "parallel.pipeline": 2, "data.global_batch": 18},
                9,
                "parallel.tensor=2 x parallel.context=2 x parallel.pipeline=2 does not divide the "
                "world of 9 ranks; start a multiple of 8 ranks, or use parallel.tensor=1 and "
                "parallel.context=1 and parallel.pipeline=1",
            ),
            (
                {"parallel.context": 2, "parallel.pipeline": 2, "data.global_batch": 6},
                6,
                "parallel.tensor=2 x parallel.context=2 x parallel.pipeline=2 does not divide the "
                "world of 6 ranks; start a multiple of 8 ranks, or use parallel.context=1 and "
                "parallel.pipeline=1",
            ),
            (
                {"parallel.pipeline": 2, "parallel.data": 4},
                8,
                "parallel.tensor=2 x parallel.pipeline=2 x parallel.data=4 is 16 ranks, but the "
                "world has 8; use parallel.data=2 or 0, for all ranks that are left",
            ),
            (
                {"parallel.context": 3, "data.sequence_length": 126, "data.global_batch": 8},
                8,
                "parallel.tensor=2 x parallel.context=3 does not divide the world of 8 ranks; "
                "start a multiple of 6 ranks, or use parallel.context=1",
            ),
            (
                {"parallel.context": 2, "data.global_batch": 10},
                5,
                "parallel.tensor=2 x parallel.context=2 does not divide the world of 5 ranks; "
                "start a multiple of 4 ranks, or use parallel.tensor=1 and parallel.context=1",
            ),
            (
                {"parallel.context": 2, "parallel.data": 4},
                8,
                "parallel.tensor=2 x parallel.context=2 x parallel.data=4 is 16 ranks, but the "
                "world has 8; use parallel.data=2 or 0, for all ranks that are left",
            ),
            (
                {},
                1,
                "parallel.tensor=2 does not divide the world of 1 rank; start a multiple of "
                "2 ranks (llamax train --ranks 2, or torchrun), or use parallel.tensor=1",
            ),
            (
                {"data.global_batch": 6},
                3,
                "parallel.tensor=2 does not divide the world of 3 ranks; "
                "start a multiple of 2 ranks, or use parallel.tensor=1",
            ),
            (
                {"parallel.data": 4},
                4,
                "parallel.tensor=2 x parallel.data=4 is 8 ranks, but the world has 4; "
                "use parallel.data=2 or 0, for all ranks that are left",
            ),
        ],
        [{"parallel.data": 2}, {"parallel.data": 0}],
    ),
    "group_shares_node": (
        [
            (
                {"parallel.tensor": 8},
                (8, 4),
                "parallel.tensor=8 does not divide a node of 4 ranks, and tensor ranks share one; "
                "use parallel.tensor=2 or 4",
            ),
            (
                {"parallel.tensor": 4, "data.global_batch": 6},
                (12, 6),
                "parallel.tensor=4 does not divide a node of 6 ranks, and tensor ranks share one; "
                "use parallel.tensor=1 or 2",
            ),
            (
                {"parallel.context": 4, "data.global_batch": 2},
                (8, 4),
                "parallel.tensor=2 x parallel.context=4 does not divide a node of 4 ranks, "
                "and tensor and context ranks share one; use parallel.context=1 or 2",
            ),
            (
                {"parallel.context": 2, "data.global_batch": 2},
                (4, 1),
                "parallel.tensor=2 x parallel.context=2 does not divide a node of 1 rank, "
                "and tensor and context ranks share one; "
                "use parallel.tensor=1 and parallel.context=1",
            ),
        ],
        [{"parallel.tensor": 8}, {"parallel.tensor": 4, "parallel.context": 4}],
    ),
    "batch_divides_over_mesh": (
        [
            (
                {"data.global_batch": 10},
                4,
                "data.global_batch=10 is not a multiple of data.micro_batch=2 x 2 data ranks = 4; "
                "use 8 or 12",
            ),
            (
                {"data.global_batch": 3},
                None,
                "data.global_batch=3 is not a multiple of data.micro_batch=2 x 1 data rank = 2; "
                "use 2 or 4",
            ),
            (
                {"data.global_batch": 4, "parallel.data": 3},
                None,
                "data.global_batch=4 is not a multiple of data.micro_batch=2 x 3 data ranks = 6; "
                "use 6",
            ),
        ],
        [{"data.global_batch": 4}, {"data.global_batch": 12}],
    ),
    "stages_hold_layers": (
        [
            (
                {"parallel.pipeline": 3, "model.num_hidden_layers": 8},
                None,
                "parallel.pipeline=3 does not divide model.num_hidden_layers=8; "
                "use 1, 2, 4 or 8, or parallel.layers_per_stage=3,3,2",
            ),
            (
                {
                    "parallel.pipeline": 4,
                    "parallel.layers_per_stage": "1,1",
                    "model.num_hidden_layers": 2,
                },
                None,
                "parallel.pipeline=4 leaves stages without a layer: model.num_hidden_layers=2; "
                "use 2",
            ),
        ],
        [
            {"parallel.pipeline": 8, "model.num_hidden_layers": 8},
            {
                "parallel.pipeline": 3,
                "parallel.layers_per_stage": "2,3,3",
                "model.num_hidden_layers": 8,
            },
        ],
    ),
    "chunks_hold_layers": (
        [
            (
                {
                    "parallel.pipeline": 2,
                    "parallel.chunks": 5,
                    "model.num_hidden_layers": 8,
                    "data.global_batch": 2,
                },
                None,
                "parallel.pipeline=2 x parallel.chunks=5 leaves chunks without a layer: "
                "model.num_hidden_layers=8; use parallel.chunks=1, 2 or 4",
            ),
            (
                {
                    "parallel.pipeline": 2,
                    "parallel.chunks": 3,
                    "model.num_hidden_layers": 8,
                    "data.global_batch": 2,
                },
                None,
                "parallel.chunks=3 does not divide the 4 layers of a stage; use 1, 2 or 4, or "
                "parallel.layers_per_stage=2,2,1,1,1,1",
            ),
        ],
        [
            {"parallel.pipeline": 2, "parallel.chunks": 4, "model.num_hidden_layers": 8},
            {
                "parallel.pipeline": 2,
                "parallel.chunks": 3,
                "parallel.layers_per_stage": "1,1,2,2,1,1",
                "model.num_hidden_layers": 8,
            },
        ],
    ),
    "chunks_are_of_stages": (
        [
            (
                {"parallel.chunks": 2, "model.num_hidden_layers": 8},
                None,
                "parallel.chunks=2 divides the stages of a pipeline, and parallel.pipeline=1 has "
                "one; use parallel.chunks=1, or parallel.pipeline=2 or 4",
            ),
        ],
        [{"parallel.pipeline": 2, "parallel.chunks": 2, "model.num_hidden_layers": 8}],
    ),
    "microsteps_fill_chunks": (
        [
            (
                {
                    "parallel.pipeline": 4,
                    "parallel.chunks": 2,
                    "model.num_hidden_layers": 8,
                    "data.global_batch": 12,
                },
                16,
                "parallel.chunks=2 sends groups of parallel.pipeline=4 microbatches through each "
                "chunk, but a step has 3; use data.global_batch=16, or parallel.chunks=1",
            ),
        ],
        [
            {
                "parallel.pipeline": 4,
                "parallel.chunks": 2,
                "model.num_hidden_layers": 8,
                "data.global_batch": 16,
            },
            {
                "parallel.pipeline": 4,
                "model.num_hidden_layers": 8,
                "data.global_batch": 12,
            },
        ],
    ),
    "stages_are_listed": (
        [
            (
                {
                    "parallel.pipeline": 2,
                    "parallel.layers_per_stage": "4,x",
                    "model.num_hidden_layers": 8,
                },
                None,
                "parallel.layers_per_stage='4,x' is not a list of numbers from 1 on; "
                "use 4,4 for example",
            ),
            (
                {
                    "parallel.pipeline": 2,
                    "parallel.layers_per_stage": "8,0",
                    "model.num_hidden_layers": 8,
                },
                None,
                "parallel.layers_per_stage='8,0' is not a list of numbers from 1 on; "
                "use 4,4 for example",
            ),
            (
                {
                    "parallel.pipeline": 2,
                    "parallel.layers_per_stage": "4,2,2",
                    "model.num_hidden_layers": 8,
                },
                None,
                "parallel.layers_per_stage=4,2,2 gives 8 layers to 3 stages, but "
                "model.num_hidden_layers=8 and parallel.pipeline=2; use 4,4 for example",
            ),
            (
                {"parallel.layers_per_stage": "4,4", "model.num_hidden_layers": 8},
                None,
                "parallel.layers_per_stage=4,4 gives 8 layers to 2 stages, but "
                "model.num_hidden_layers=8 and parallel.pipeline=1; use 8 for example",
            ),
        ],
        [
            {
                "parallel.pipeline": 2,
                "parallel.layers_per_stage": " 5, 3",
                "model.num_hidden_layers": 8,
            },
            {"parallel.layers_per_stage": "8", "model.num_hidden_layers": 8},
        ],
    ),
    "traced_stages_recompute": (
        [
            (
                {
                    "parallel.pipeline": 2,
                    "run.backend": "xla",
                    "run.recompute": mode,
                    "model.num_hidden_layers": 8,
                },
                None,
                f"run.recompute={mode} with parallel.pipeline=2 on run.backend=xla keeps copies of "
                "weights for each microbatch in flight; use run.recompute=full",
            )
            for mode in ("none", "selective")
        ],
        [
            {
                "parallel.pipeline": 2,
                "run.backend": "xla",
                "run.recompute": "full",
                "model.num_hidden_layers": 8,
            },
            {"parallel.pipeline": 2, "model.num_hidden_layers": 8},
            {"run.backend": "xla"},
        ],
    ),
    "traced_stages_pair": (
        [
            (
                {
                    "parallel.pipeline": 3,
                    "parallel.tensor": 1,
                    "run.backend": "xla",
                    "run.recompute": "full",
                    "model.num_hidden_layers": 9,
                    "data.global_batch": 2,
                },
                3,
                "parallel.pipeline=3 on run.backend=xla pairs all ranks in its swaps, and the "
                "world of 3 ranks is odd; start an even number of ranks, 6",
            )
        ],
        [
            {
                "parallel.pipeline": 2,
                "parallel.tensor": 2,
                "run.backend": "xla",
                "run.recompute": "full",
                "model.num_hidden_layers": 8,
            }
        ],
    ),
    "zero_fits_pipeline": (
        [
            (
                {"parallel.zero": 2, "parallel.pipeline": 2, "model.num_hidden_layers": 8},
                None,
                "parallel.zero=2 sums gradients over the data ranks after each of a pipeline's "
                "many microbatches, and parallel.pipeline=2 divides them already; "
                "use parallel.zero=1",
            )
        ],
        [
            {"parallel.zero": 1, "parallel.pipeline": 2, "model.num_hidden_layers": 8},
            {"parallel.zero": 2},
        ],
    ),
    "zero_ranks_have_a_stage": (
        [
            (
                {"parallel.zero": 0, "parallel.zero_ranks": 2},
                4,
                "parallel.zero_ranks=2 is how many ranks ZeRO cuts over, and parallel.zero=0 cuts "
                "nothing; use parallel.zero_ranks=0, or parallel.zero=1, 2 or 3",
            )
        ],
        [{"parallel.zero": 0}, {"parallel.zero_ranks": 2}],
    ),
    "zero_ranks_divide_data_ranks": (
        [
            (
                {"parallel.zero_ranks": 3},
                8,
                "parallel.zero_ranks=3 does not divide the 4 data ranks; use 0, 2 or 4",
            ),
            (
                {
                    "parallel.zero_ranks": 4,
                    "parallel.context": 2,
                    "parallel.data": 3,
                    "data.global_batch": 12,
                },
                None,
                "parallel.zero_ranks=4 does not divide the 6 data and context ranks; use 0, 2, 3 "
                "or 6",
            ),
        ],
        [{"parallel.zero_ranks": 3}, {"parallel.zero_ranks": 2, "parallel.data": 2}],
    ),
    "zero_ranks_share_nodes": (
        [
            (
                {"parallel.zero_ranks": 6, "data.global_batch": 24},
                (24, 8),
                "parallel.zero_ranks=6 x parallel.tensor=2 is 12 ranks, which neither divide a "
                "node of 8 ranks nor fill whole ones; use 0, 2, 4 or 12",
            )
        ],
        [{"parallel.zero_ranks": 4}],
    ),
    "gathered_weights_are_dropped": (
        [
            (
                {"parallel.zero": 3, "run.recompute": "selective", "run.backend": "xla"},
                None,
                "parallel.zero=3 gathers the weights of a layer when it is used, but with "
                "run.backend=xla and run.recompute=selective a program would keep them all for "
                "backward; use run.recompute=full, or parallel.zero=2",
            )
        ],
        [
            {"parallel.zero": 3, "run.recompute": "none"},
            {"parallel.zero": 2},
            {"parallel.zero": 3, **LORA},
        ],
    ),
    "state_blocks_are_whole": (
        [
            (
                {**BLOCKS, "model.intermediate_size": 768},
                None,
                "optim.state_bits=8 keeps moments in blocks of 256, and parallel.tensor=2 cuts "
                "down_proj into pieces of 384; use optim.state_bits=32, or fewer tensor ranks",
            ),
            (
                {**BLOCKS, "model.vocab_size": 1001 * 4},
                None,
                "optim.state_bits=8 keeps moments in blocks of 256, and parallel.tensor=2 cuts "
                "embed_tokens into pieces of 128128; use optim.state_bits=32, or fewer tensor "
                "ranks",
            ),
            (
                {**BLOCKS, **LORA, "model.intermediate_size": 768, "finetune.targets": "down_proj"},
                None,
                "optim.state_bits=8 keeps moments in blocks of 256, and parallel.tensor=2 cuts "
                "down_proj.lora_A into pieces of 384; use optim.state_bits=32, or fewer tensor "
                "ranks",
            ),
        ],
        [
            BLOCKS,
            {**BLOCKS, "model.intermediate_size": 768, "parallel.tensor": 1},
            {**BLOCKS, "model.intermediate_size": 768, "optim.state_bits": 32},
            {**BLOCKS, "model.vocab_size": 101},  # not made of blocks: it keeps 32 bits
            {**BLOCKS, **LORA, "model.intermediate_size": 768, "finetune.targets": "up_proj"},
        ],
    ),
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
