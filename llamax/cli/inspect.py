"""``llamax inspect PATH``: describe a checkpoint, run, model or adapter folder or dataset.

``--verify`` reads everything and compares it with the hashes that are kept, if there are any.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llamax.runtime.process import summary
from llamax.runtime.text import print_text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("llamax inspect", description=summary(__doc__))
    p.add_argument("path", help="checkpoint, run, model or adapter folder, dataset or file")
    p.add_argument("--verify", action="store_true", help="read everything, check what can be")
    return p


def main(argv: Sequence[str]) -> int:
    """Print the description."""
    options = parser().parse_args(argv)

    from llamax.tools.inspect import describe, table

    print_text(table([*describe(options.path, options.verify)]))
    return 0
