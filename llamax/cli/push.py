"""``llamax push FOLDER org/name``: upload an exported model or adapters to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence

from llamax.cli.options import Parser, command
from llamax.runtime.logging import setup_logging
from llamax.runtime.text import print_text
from llamax.runtime.units import count, show_bytes


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax push",
        description="Upload an exported model, or adapters as a PEFT repository, to the Hugging "
        "Face Hub in one commit, with a model card that describes the run.",
    )
    p.add_argument("folder", help="what llamax consolidate, merge or export wrote")
    p.add_argument("repository", metavar="org/name", help="repository, made if it does not exist")
    p.add_argument("--private", action="store_true", help="a new repository only for its owners")
    p.add_argument("--revision", default="", metavar="BRANCH", help="default: the main branch")
    p.add_argument(
        "--run", metavar="FOLDER", help="run of the model card; default: the one around the folder"
    )
    p.add_argument(
        "--base-model", default="", metavar="org/name", help="default: the base of the run"
    )
    p.add_argument("--license", default="", metavar="ID", help="licence, such as apache-2.0")
    p.add_argument(
        "--dry-run", action="store_true", help="print the files and the card, upload nothing"
    )
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Upload the folder and print what went up."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.tools.push import push

    done = push(
        options.folder,
        options.repository,
        private=options.private,
        revision=options.revision,
        run=options.run,
        base_model=options.base_model,
        license=options.license,
        dry_run=options.dry_run,
    )
    width = max(map(len, done.files))
    lines = [f"{name:<{width}}  {show_bytes(size):>10}" for name, size in done.files.items()]
    total = f"{count(len(done.files), 'file')}, {show_bytes(sum(done.files.values()))}"
    if options.dry_run:
        print_text("\n".join([*lines, "", "README.md:", "", done.card]))
        print_text(f"would upload {total} to {options.repository}; nothing was sent")
    else:
        print_text("\n".join([*lines, f"uploaded {total}: {done.url}"]))
    if not done.own_card and not options.license:
        print_text("the card names no licence: give --license, or fill it in on the Hub")
    if done.run is None and not done.own_card:
        print_text("the card describes no run: give --run with the folder of the training")
    return 0
