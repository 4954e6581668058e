"""Writes the reference pages that follow from the code: modules, commands, settings, machines.

`docs/conf.py` calls ``generate`` before every build, so these pages cannot differ from the code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llamax.__main__ import COMMANDS
from llamax.config.hardware import known_machines
from llamax.config.load import find_config, help_text, recipes
from llamax.config.neuron_sdk import NeuronSdk, known_sdks, known_variables

ROOT = Path(__file__).resolve().parents[1]
# The rooms of the package from the bottom up, as CONTRIBUTING.md explains them.
ROOMS = ("runtime", "config", "ops", "launch", "parallel", "backends", "data", "optim", "model")
ROOMS += ("checkpoint", "training", "inference", "tools", "train", "cli")
OPTION = re.compile(r"  --(\S+?)=(INT\|\[INT, \.\.\]|\S+) (\S.*) \(([^()]*)\)")


def generate(out: Path) -> None:
    """Write all generated pages below ``out``, replacing what an earlier build left."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "modules").mkdir(parents=True)
    (out / "commands.md").write_text(commands())
    (out / "settings.md").write_text(settings())
    (out / "machines.md").write_text(machines())
    (out / "neuron-sdks.md").write_text(neuron_sdks())
    (out / "recipes.md").write_text(recipe_pages())
    for room in ROOMS:
        (out / "modules" / f"{room}.rst").write_text(module_page(room))


def modules(room: str) -> Iterator[str]:
    """The names of a room's modules, packages before what they hold."""
    place = ROOT / "llamax" / room
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for path in sorted(paths, key=lambda path: (len(path.parts), path.name != "__init__.py", path)):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__")


def module_page(room: str) -> str:
    """One page with the docstrings of all modules of a room (reStructuredText)."""
    title = f"llamax.{room}"
    lines = [title, "=" * len(title), ""]
    for name in modules(room):
        if name == title:
            lines += [f".. automodule:: {name}", ""]
            continue
        lines += [name, "-" * len(name), "", f".. automodule:: {name}", ""]
    return "\n".join(lines)


def help_of(command: str) -> str:
    """What ``llamax COMMAND --help`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "llamax", command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "96"},
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout


def commands() -> str:
    """A page with the help of every command; that of train without its settings."""
    lines = ["# Commands", "", "Made from what each command answers to `--help`.", ""]
    for name in COMMANDS:
        text = help_of(name)
        if name == "train":
            text = text.partition("\nmodel:\n")[0].rstrip()
            text += "\n\n  --section.key=value   a setting; they are in the reference of settings\n"
        lines += [f"## llamax {name}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def settings() -> str:
    """A page with a table for every section of a configuration."""
    lines = ["# Settings", ""]
    lines += ["Every key of a configuration, as `llamax train --help` lists them. In a TOML file"]
    lines += ["`optim.lr = 1e-4`; on the command line `--optim.lr=1e-4`.", ""]
    for line in re.sub(r"\n {6}(?=\S)", " ", help_text()).splitlines():
        if found := OPTION.fullmatch(line):
            key, kind, text, rest = found.groups()
            unit, _, default = rest.rpartition("; ")
            default = default.removeprefix("default ")
            cells = (f"`{key}`", f"`{kind}`", text, unit, f"`{default}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        elif line and not line.startswith(" "):
            section = line.partition(":")[0]
            lines += [f"## {section}", "", "| key | values | meaning | unit | default |"]
            lines += ["|---|---|---|---|---|"]
        elif line:
            raise ValueError(f"a line of the help that is no option: {line!r}")
        else:
            lines.append("")
    return "\n".join(lines) + "\n"


def machines() -> str:
    """A page with the table of machines that plan, launch and doctor know."""
    columns = {
        "backend": "backend",
        "ranks": "ranks",
        "memory_gib": "GiB a rank",
        "bfloat16_tflops": "bf16 TFLOP/s a rank",
        "link_gbps": "links, GB/s a rank",
        "network_gbps": "network, GB/s",
        "dollars_per_hour": "dollars an hour",
    }
    lines = ["# Machines", "", "The table in `llamax/config/hardware.toml`, which `llamax plan`,"]
    lines += ["`audit`, `launch` and `doctor` read; its comments give the sources. Links are"]
    lines += ["within a machine, the network is between machines; both one way.", ""]
    lines.append(f"| machine | {' | '.join(columns.values())} |")
    lines.append("|---|" + "---|" * len(columns))
    for name, machine in known_machines().items():
        cells = (str(getattr(machine, column)) for column in columns)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def neuron_sdks() -> str:
    """A page with the table of Neuron SDKs, and of their variables."""
    rows: dict[str, Callable[[NeuronSdk], object]] = {
        "released": lambda sdk: sdk.released,
        "trains with torch-xla on trn1": lambda sdk: "yes" if sdk.trains_trn1 else "no",
        "torch for torch-xla": lambda sdk: ", ".join(sdk.torch) or "none",
        "torch for the public TorchNeuron (trn2, trn3)": lambda sdk: (
            ", ".join(sdk.torchneuron) or "none"
        ),
        "`torch-neuronx` for torch-xla": lambda sdk: sdk.torch_neuronx,
        "`neuronx-cc`": lambda sdk: sdk.neuronx_cc,
        "`neuronx-distributed` (NxD)": lambda sdk: sdk.nxd,
        "`nki`": lambda sdk: sdk.nki,
        "`nki` compiles for trn1": lambda sdk: "yes" if sdk.nki_for_trn1 else "no",
        "`aws-neuronx-runtime-lib`": lambda sdk: sdk.runtime,
        "`aws-neuronx-collectives`": lambda sdk: sdk.collectives,
        "`aws-neuronx-tools`": lambda sdk: sdk.tools,
        "driver": lambda sdk: (
            f"{sdk.driver} to {sdk.newest_driver}" if sdk.newest_driver else sdk.driver
        ),
        "profiler": lambda sdk: f"`{sdk.profiler}`",
        "communicators of a program": lambda sdk: sdk.communicators,
        "tag of `pytorch-training-neuronx`": lambda sdk: sdk.image,
        "tag of `pytorch-inference-vllm-neuronx`": lambda sdk: sdk.vllm_image,
        "dropped": lambda sdk: "; ".join(sdk.dropped),
        "sources": lambda sdk: "; ".join(sdk.sources),
    }
    sdks = known_sdks().values()
    lines = ["# Neuron SDKs", "", "The table in `llamax/config/neuron_sdks.toml`; its head names"]
    lines += ["the documents behind the sources. `llamax doctor` compares what is installed with"]
    lines += ["it, `llamax launch` takes the base image and the variables of a job from it"]
    lines += ["(`neuron_sdk` in the job file), `llamax audit` the limit on communicators and the"]
    lines += ["profiler its hint. A version is the beginning that the patches of an SDK share;"]
    lines += ["*none*: the SDK has no such part; *unknown*: no source that was read states it. For"]
    lines += ["an SDK that is not here the nearest older one is taken, with a note.", ""]
    lines += [f"| | {' | '.join(sdk.name for sdk in sdks)} |", "|---|" + "---|" * len(sdks)]
    for title, cell in rows.items():
        lines.append(f"| {title} | {' | '.join(str(cell(sdk)) for sdk in sdks)} |")
    lines += ["", "## Environment variables", "", "| variable | purpose | SDKs | source |"]
    lines.append("|---|---|---|---|")
    for row in known_variables().values():
        has = f"from {row.since}" if row.since else f"up to {row.until}" if row.until else "all"
        lines.append(f"| `{row.name}` | {row.purpose} | {has} | {row.source} |")
    return "\n".join(lines) + "\n"


def recipe_pages() -> str:
    """A page with every recipe as it lies in the package."""
    lines = ["# Recipes, in full", ""]
    for name in recipes():
        text = find_config(name).read_text()
        lines += [f"## {name}", "", "```toml", text.rstrip(), "```", ""]
    return "\n".join(lines)
