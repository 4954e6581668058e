"""Cases for the rules of a model and its mesh."""

from __future__ import annotations

from support.rule_cases.case import Cases

CASES: Cases = {
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
}
