"""The plan of one run on one kind of machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llamax.config.hardware import Machine, default_machine, load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.runtime.errors import ConfigError, check_whole
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.plan.length import GivenLength, Length, length_of
from llamax.tools.plan.memory import Memory, fullest
from llamax.tools.plan.program import largest_program
from llamax.tools.plan.roofline import Time, time
from llamax.tools.plan.sizes import Share
from llamax.training.resolve import ResolvedRun, resolve


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run on ``nodes`` machines; ``length``: where its length comes from."""

    run: ResolvedRun
    machine: Machine
    nodes: int
    memory: Memory
    time: Time
    length: str = ""

    @cached_property
    def program(self) -> float:
        """Instructions for products in the largest program, at least."""
        return largest_program(self.run, self.machine)

    @property
    def large(self) -> bool:
        """Whether the compiler of the machine is known to refuse programs of that size."""
        return not self.machine.compiles(self.program)

    @property
    def risks(self) -> tuple[str, ...]:
        """Why a layout that fits may still fail: "tight" in memory, "large" for the compiler."""
        return ("tight",) * self.memory.tight + ("large",) * self.large

    def __repr__(self) -> str:
        held, available = show_bytes(self.memory.peak), show_bytes(self.memory.available)
        return (
            f"<llamax plan: {show_number(self.run.config.model.num_parameters())} parameters on "
            f"{self.nodes} x {self.machine.name}, {held} of {available} on a rank "
            f"({'fits' if self.memory.fits else 'DOES NOT FIT'}), "
            f"{show_number(self.time.tokens_per_s)} tokens/s>"
        )


def plan(
    config: Config | str,
    instance: Machine | str = "",
    nodes: int = 1,
    *,
    ranks: int | None = None,
    dollars_per_hour: float | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    tokens: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
) -> Plan:
    """The memory, time and cost of a run by arithmetic, with the data set if it is there.

    Args:
        config: A configuration, a recipe's name or a TOML file.
        instance: A machine, its name, or a TOML file that describes it; by default one for the
            configuration's backend.
        nodes: Number of machines.
        ranks: Ranks per node; by default one for each device.
        dollars_per_hour: Price of a node; by default that of the table of machines.
        overrides: Changes of the configuration, as "--section.key=value".
        steps: Length of the run in optimizer steps, instead of the configuration's.
        tokens: The same in tokens, rounded up to a whole step.
        epochs: The same in passes over the data set.
        samples: Samples in an epoch, where the data set is not there; without epochs, one epoch.

    Raises:
        ConfigError: For a parameter out of range, an unknown machine, a length that is given twice,
            or a configuration that is not valid for that number of ranks.
    """
    given = GivenLength(steps, tokens, epochs, samples)
    given.check(overrides)
    config, machine = place(
        config,
        instance,
        nodes,
        ranks=ranks,
        dollars_per_hour=dollars_per_hour,
        overrides=overrides,
    )
    return plan_length(length_of(config, given), machine, nodes, machine.node_limit)


def plan_length(
    length: Length, machine: Machine, nodes: int, node_ranks: int | None = None
) -> Plan:
    """The plan of a run of a known length; ``node_ranks`` as of ``resolve``."""
    world_size = nodes * machine.ranks
    run = resolve(length.config, world_size, length.samples, length.reason, node_ranks=node_ranks)
    return replace(plan_run(run, machine, nodes), length=length.origin)


def check_count(name: str, value: object) -> None:
    """Raise ConfigError unless parameter ``name`` is a whole number of 1 or more."""
    if check_whole(name, value, "use 1 or more") < 1:
        raise ConfigError(f"`{name}={value}` is out of range; use 1 or more")


def place(
    config: Config | str,
    instance: Machine | str = "",
    nodes: int = 1,
    *,
    ranks: int | None = None,
    dollars_per_hour: float | None = None,
    overrides: Sequence[str] = (),
    any_layout: bool = False,
) -> tuple[Config, Machine]:
    """The configuration and the machine that the parameters of ``plan`` name.

    Raises what ``plan`` raises; with ``any_layout`` the configuration need not be valid for that
    number of ranks.
    """
    for name, value in (("nodes", nodes), ("ranks", ranks)):
        if value is not None:
            check_count(name, value)
    if dollars_per_hour is not None and not 0 <= dollars_per_hour < math.inf:
        raise ConfigError(f"`dollars_per_hour={dollars_per_hour:g}` is out of range; use 0 or more")
    written = config if isinstance(config, Config) else _load(config, overrides)
    machine = instance
    if not isinstance(machine, Machine):
        machine = load_machine(machine or default_machine(written.run.backend))
    if ranks:
        machine = machine.with_ranks(ranks)
    if dollars_per_hour is not None:
        machine = replace(machine, dollars_per_hour=dollars_per_hour)
    if not isinstance(config, Config):
        world = (None, None) if any_layout else (nodes * machine.ranks, machine.node_limit)
        try:
            written = _load(config, overrides, *world)
        except ConfigError as error:
            if instance:
                raise
            default = f"planned for {machine.name}; choose another machine with `instance`"
            default += ", or more ranks with `ranks`" if machine.ranks == 1 else ""
            raise ConfigError(f"{error} ({default})") from None
    return written, machine


def _load(
    name: str,
    overrides: Sequence[str],
    world_size: int | None = None,
    node_ranks: int | None = None,
) -> Config:
    """Load a configuration; ConfigError in one line, with the first problem and their number."""
    try:
        return load_config(name, overrides, world_size, node_ranks=node_ranks)
    except ConfigError as error:
        head, *problems = str(error).split("\n  ")
        if not problems:
            raise
        file = head.rpartition(":")[0]
        raise ConfigError(f"{file}: {problems[0]}; and {len(problems) - 1} more") from None


def plan_run(run: ResolvedRun, machine: Machine, nodes: int) -> Plan:
    """The plan of a run on ``nodes`` machines."""
    return Plan(run, machine, nodes, fullest(run, machine), time(Share(run), machine, nodes))
