"""Cases for the rules of pipelines."""

from __future__ import annotations

from support.rule_cases.case import Cases

CASES: Cases = {
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
}
