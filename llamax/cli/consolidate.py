"""``llamax consolidate CHECKPOINT --out DIR``: join a checkpoint to a Hugging Face folder.

Processes stream tensors from the ranks' files to ``model.safetensors`` (or numbered files and an
index), so memory does not grow with the model.  What is read is checked against its hashes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser, command
from llamax.config.choices import WEIGHT_DTYPES
from llamax.runtime.cores import workers
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import summary
from llamax.runtime.progress import Progress
from llamax.runtime.text import print_text
from llamax.runtime.units import show_bytes, show_number, show_time


def parser() -> Parser:
    """The command line."""
    p = Parser("llamax consolidate", description=summary(__doc__))
    p.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--dtype", choices=WEIGHT_DTYPES, help="default: that of the weights")
    p.add_argument("--max-shard-size", default="5GB", help="bytes per file (default 5GB)")
    p.add_argument("--tokenizer", help="tokenizer file or folder; default: the dataset's")
    p.add_argument(
        "--processes",
        type=int,
        default=workers(),
        help="default: OMP_NUM_THREADS, or one per core",
    )
    p.add_argument("--no-verify", action="store_true", help="do not check what is read")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Write the folder."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.checkpoint import hf_writer
    from llamax.checkpoint.consolidate import consolidate, dtype_of
    from llamax.checkpoint.listing import find_checkpoint
    from llamax.checkpoint.peft import adapter_info
    from llamax.checkpoint.reader import Checkpoint

    began = time.perf_counter()
    source = Checkpoint(find_checkpoint(Path(options.checkpoint)), verify=False)
    adapters = adapter_info(source) is not None
    planned = [] if adapters else hf_writer.plan_files(source, dtype_of(options.dtype))
    total = sum(tensor.size_bytes for tensor in planned)
    with Progress("consolidate", total) as bar:
        out = consolidate(
            source.folder,
            options.out,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            tokenizer=options.tokenizer,
            verify=not options.no_verify,
            processes=options.processes,
            progress=bar.update,
        )
    if adapters:
        print_text(
            f"{out}: the adapters of step {source.step}, as PEFT loads them; see llamax merge"
        )
        return 0
    parameters = sum(math.prod(source.shape(name)) for name in source.names())
    print_text(
        f"{out}: {show_number(parameters)} parameters of step {source.step}, {show_bytes(total)}, "
        f"in {show_time(time.perf_counter() - began)}"
    )
    if (out / "tokenizer.model").is_file() and not (out / "tokenizer.json").is_file():
        print_text(
            "its tokenizer.model has no exact tokenizer.json: in transformers ids may differ"
        )
    elif not (out / "tokenizer.json").is_file():
        print_text("no tokenizer was found for it; --tokenizer adds one")
    return 0
