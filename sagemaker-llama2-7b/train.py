"""The training program of one rank, started by SageMaker."""

import runpy

runpy.run_module("llamax.train", run_name="__main__")  # as python -m llamax.train
