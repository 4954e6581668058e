"""Ranks of one training job as forks of one process, which has imported all that they need.

    python -m support.fork_ranks RANKS --config FILE --section.key=value ...
    python -m support.fork_ranks RANKS SCRIPT.py ARGUMENT ...

For tests of training, not of its launcher: an import takes longer than their steps.  The ranks have
the variables of torchrun; the exit code is the first one that is not 0.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

import llamax.train
from llamax.cli.train import main
from llamax.runtime.process import run_main


def start(rank: int, ranks: int, argv: list[str]) -> int:
    """Fork a rank; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        if argv[0].endswith(".py"):
            sys.argv[:] = argv
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        else:
            code = run_main(main, argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    assert llamax.train
    count, *words = sys.argv[1:]
    children = [start(rank, int(count), words) for rank in range(int(count))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(next(filter(None, codes), 0))
