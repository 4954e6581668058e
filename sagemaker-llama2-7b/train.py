"""The training program of one rank, started by SageMaker."""

import sys

from llamax.runtime.process import run_main
from llamax.train import main

sys.exit(run_main(main))
