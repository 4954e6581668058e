"""Memory of ``llamax serve``: its peak beyond the imports, beside its weights and its cache.

    python benchmarks/serve_memory.py --slots 16 64 --length 2048

Each request fills its slot of the cache: a long prompt and a few new tokens, all requests at once.
The imports are the memory of a Python that has imported what the server imports, and no more; the
rest of the server's peak is compared with

    weights: bytes of every number      cache: 2 x layers x key/value heads x head size x length x
                                        slots x bytes of a number

"private" is memory of this process alone (RssAnon, looked at every few milliseconds), "resident"
(VmHWM) has the pages of mapped files too: code that torch maps when it computes, which is in the
page cache and shared with other processes.  Weights are read, not mapped, so they are private.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from generate import LARGE, SMALL
from serve import PRECISIONS, asker, llamax_server, write_model

IMPORTS = """
import torch, uvicorn, llamax.cli.serve, llamax.inference.serving.server
import llamax.inference.serving.app, llamax.inference.serving.connection
import llamax.inference.serving.metrics
print(open("/proc/self/status").read())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64], help="requests at once")
    parser.add_argument("--length", type=int, nargs="+", default=[2048], help="tokens of each")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens of every answer")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    config = SMALL if options.smallest else LARGE
    print(
        "| weights in | slots x length | weights | cache | private | / both | resident | / both |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        hub = Path(scratch, "hub")
        write_model(hub, config)
        for precision in options.precisions:
            for length in options.length:
                for slots in options.slots:
                    line(options, precision, hub, slots, length)


def line(options: argparse.Namespace, precision: str, hub: Path, slots: int, length: int) -> None:
    """Print the row of one server."""
    prompt_tokens = length - options.new_tokens
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 32000, (slots, prompt_tokens), generator=draw).tolist()
    command = [sys.executable, "-c", IMPORTS]
    bare = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    arguments = [f"--slots={slots}", f"--length={length}", f"--threads={options.threads}"]
    arguments += ["--max-body=64MiB", *PRECISIONS[precision][0]]
    with llamax_server(hub, *arguments) as (url, pid, shown), ThreadPoolExecutor(1) as pool:
        status = Path(f"/proc/{pid}/status")
        asked = pool.submit(asker(url, options.new_tokens), prompts, False)
        private = 0
        while not asked.done():
            private = max(private, kibibytes(status.read_text(), "RssAnon"))
            time.sleep(0.002)
        asked.result()
        resident = kibibytes(status.read_text(), "VmHWM")
    weights, cache = (mebibytes(shown, name) for name in ("weights", "cache"))
    private_mib, resident_mib = (
        (peak - kibibytes(bare, name)) / 1024
        for peak, name in ((private, "RssAnon"), (resident, "VmRSS"))
    )
    print(
        f"| {precision} | {slots} x {length:,} | {weights:.0f} MiB | {cache:.0f} MiB | "
        f"{private_mib:.0f} MiB | {private_mib / (weights + cache):.3f} | "
        f"{resident_mib:.0f} MiB | {resident_mib / (weights + cache):.3f} |",
        flush=True,
    )


def mebibytes(shown: str, name: str) -> float:
    """A size in the line with which the server says where it listens."""
    found = re.search(rf"{name} ([\d.]+) (KiB|MiB|GiB)", shown)
    assert found is not None, shown
    return float(found[1]) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[found[2]]


def kibibytes(status: str, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main()
