"""Cases for the rules of ZeRO and the state of the optimizer."""

from __future__ import annotations

from support.rule_cases.case import BLOCKS, LORA, Cases

CASES: Cases = {
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
}
