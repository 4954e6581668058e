"""``llamax serve MODEL``: answer requests over HTTP, as OpenAI's interface and TGI do.

``--adapter NAME=FOLDER`` serves adapters beside the model; requests choose them by ``model``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser, add_computing, command, pairs, size
from llamax.data.chat.templates import BUILT_IN
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import run_main


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax serve",
        description="Serve a model over HTTP: /v1/chat/completions and /v1/completions (OpenAI), "
        "/generate and /generate_stream (TGI), /invocations and /ping (SageMaker), /metrics.",
        allow_abbrev=False,
    )
    p.add_argument("model", type=Path, help="Hugging Face folder, run, checkpoint or adapters")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    p.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: a free one (%(default)s)"
    )
    p.add_argument("--name", default="", help="name in requests (default: that of the folder)")
    p.add_argument(
        "--adapter",
        action="append",
        type=_named,
        default=[],
        metavar="NAME=FOLDER",
        help="adapters beside the model, chosen by name; may be repeated",
    )
    p.add_argument(
        "--slots", type=int, default=16, metavar="N", help="requests computed at once (%(default)s)"
    )
    p.add_argument(
        "--queue", type=int, default=256, metavar="N", help="requests that may wait (%(default)s)"
    )
    p.add_argument(
        "--connections", type=int, default=512, metavar="N", help="open connections (%(default)s)"
    )
    p.add_argument(
        "--length",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a prompt and its answer (default: the model's context, at most 4096)",
    )
    p.add_argument(
        "--max-new-tokens", type=int, default=0, metavar="N", help="limit of a request (0: none)"
    )
    p.add_argument(
        "--max-body", type=size, default=1 << 20, metavar="SIZE", help="limit of a body (1MiB)"
    )
    p.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help=f"format of conversations: {', '.join(BUILT_IN)}, a file or a folder with one "
        "(default: that of training, else the folder's)",
    )
    p.add_argument(
        "--api-key-file", default="", metavar="FILE", help="keys of clients, one per line"
    )
    p.add_argument("--tokenizer", default="", metavar="PATH", help="default: the model's own")
    p.add_argument("--base", default="", metavar="PATH", help="base of adapters")
    add_computing(p)
    return p


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


@command
def main(argv: Sequence[str]) -> int:
    """Serve until a signal."""
    options = parser().parse_args(argv)
    setup_logging("serve")

    from llamax.inference.serving.server import ServeSettings, serve

    settings = ServeSettings(
        host=options.host,
        port=options.port,
        name=options.name,
        slots=options.slots,
        queue=options.queue,
        connections=options.connections,
        length=options.length,
        max_new_tokens=options.max_new_tokens,
        max_body=options.max_body,
        template=options.template,
        api_key_file=options.api_key_file,
        dtype=options.dtype,
        backend=options.backend,
        threads=options.threads,
        quantize=options.quantize,
    )
    serve(
        options.model,
        settings,
        adapters=pairs("--adapter", options.adapter),
        tokenizer=options.tokenizer,
        base=options.base,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
