"""How every program ends: the one place where an error becomes a line on stderr and an exit code.

``llamax: message``, no traceback; ``llamax.errors`` lists the codes.  Whatever else escapes is a
defect of llamax and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from llamax.errors import LlamaxError

Main = Callable[[Sequence[str]], int]


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """The exit code of ``main(argv)``; ``argv`` is the command line where it is None."""
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except LlamaxError as error:
        print(f"llamax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llamax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
