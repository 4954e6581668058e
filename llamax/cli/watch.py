"""``llamax watch RUN``: the state of a run, refreshed every few seconds.

::

    llama2-7b  6.74B bfloat16, tensor 8 x data 16 on xla  running              15:10:52
    ━━━━━━━━━━━━━━━━━━━━━─────────  70%  step 420/600  left 1h57m  $399.26 spent, $168.42 remaining

    loss             2.1051  █▅▄▃▂▂▁▁▁▁  validation 2.1159, perplexity 8.3
    tokens/s           104K  ▆▇█▇▇▇▆▁▆▇  813 a rank
    step time           39s  median of 50 reports, p90 40s, p99 41s
    ranks           128/128  alive, on 4 hosts; steps 420 to 420

It reads only the run's folder, so it works from any machine that sees the folder, on a run that is
training, finished or dead; where none has begun yet, it waits for one.  The key q, or Ctrl-C, ends
it.  Into a pipe, on a dumb terminal or with ``--once``, it writes the same lines once, without
colours; NO_COLOR takes the colours away.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser, command
from llamax.config.hardware import load_machine
from llamax.runtime.errors import ConfigError
from llamax.runtime.json_writer import to_json
from llamax.runtime.logging import shows_bars
from llamax.runtime.process import run_main
from llamax.runtime.terminal import full_screen
from llamax.runtime.text import encodable, print_text
from llamax.tools.monitor.run_folder import Cache, is_empty, read_run
from llamax.tools.monitor.watch import as_json, clip, render


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax watch",
        description="Show a run: loss, speed, time and dollars left, ranks, devices, checkpoints. "
        "The key q ends it.",
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    p.add_argument("--once", action="store_true", help="print one view, without colours")
    p.add_argument("--json", action="store_true", help="print one view as JSON, for programs")
    p.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="seconds between views (default 2)"
    )
    p.add_argument("--instance", help="machine, for its price, if the run does not name one")
    p.add_argument(
        "--dollars-per-hour", type=float, default=0.0, help="price of all nodes together"
    )
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Show the run until it is over, or once."""
    options = parser().parse_args(list(argv))
    if options.every <= 0:
        raise ConfigError(f"--every={options.every:g} is not above 0; give seconds")
    cache, price = Cache(options.run), options.dollars_per_hour
    live = not options.once and not options.json and shows_bars(sys.stdout)
    if live and is_empty(options.run) and not awaited(options.run, options.every):
        return 0
    run = read_run(options.run, cache=cache)
    if options.instance:
        machine = load_machine(options.instance)
        nodes = -(-int(run.environment.get("ranks", 1)) // machine.ranks)
        price = price or machine.dollars_per_hour * nodes
    if options.json:
        print_text(to_json(as_json(run, price)))
        return 0
    if not live:
        print_lines(render(run, price=price))
        return 0
    colour = not os.environ.get("NO_COLOR")
    try:
        with full_screen() as keys:
            while True:
                size = shutil.get_terminal_size()
                # the last column stays free: erasing after a line would clear it
                lines = render(run, size.columns - 1, colour, price)[: size.lines - 1]
                text = "".join(f"{encodable(line, sys.stdout)}\x1b[K\n" for line in lines)
                sys.stdout.write(f"\x1b[H{text}\x1b[J")
                sys.stdout.flush()
                if run.state in ("finished", "stopped") or "q" in keys(options.every).lower():
                    break
                run = read_run(options.run, cache=cache)
    except KeyboardInterrupt:
        pass  # ends the view, not the run
    print_lines(render(run, shutil.get_terminal_size().columns, colour, price))
    return 0


def awaited(folder: Path, every_s: float) -> bool:
    """Wait until a run has begun in an empty or absent folder; false if q or Ctrl-C came before."""
    texts = ("waiting for a run to begin; q or Ctrl-C ends this", f"nothing is there yet: {folder}")
    try:
        with full_screen() as keys:
            while is_empty(folder):
                width = shutil.get_terminal_size().columns - 1
                lines = [f"{encodable(clip(text, width), sys.stdout)}\x1b[K\n" for text in texts]
                sys.stdout.write(f"\x1b[H{''.join(lines)}\x1b[J")
                sys.stdout.flush()
                if "q" in keys(every_s).lower():
                    return False
    except KeyboardInterrupt:
        return False
    return True


def print_lines(lines: Sequence[str]) -> None:
    """Print lines that may have colours; their texts went through printable."""
    print(encodable("\n".join(lines), sys.stdout))


if __name__ == "__main__":
    sys.exit(run_main(main))
