"""Where the time of a step goes: torch's profiler over a window of steps.

``--run.profile_at=10 --run.profile_steps=3`` records steps 10, 11 and 12 on rank 0 and leaves in
the run's folder::

    profile/rank-00000-steps-10-12.json   a trace: chrome://tracing or ui.perfetto.dev show it
    profile/rank-00000-steps-10-12.txt    operations by their own time, longest first

The steps before are the warm-up.  A lazy device (XLA) computes where the profiler cannot see: there
the trace shows the host, and Neuron's own inspector shows the device.  Start the job with
NEURON_RT_INSPECT_ENABLE=1 and NEURON_RT_INSPECT_OUTPUT_DIR=FOLDER in its environment, and look at
it with the profiler of the Neuron SDK; where one is installed, the log names it.
"""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from llamax.config.neuron_sdk import installed_sdk
from llamax.config.schema import RunConfig
from llamax.runtime.files import make_folder, refuse_link, write_atomic
from llamax.runtime.logging import logger
from llamax.runtime.versions import installed

LONGEST = 40  # operations in the table


class Profiler:
    """Records the configured window of steps; call ``at`` when a step begins, ``stop`` at last."""

    def __init__(self, run: RunConfig, folder: Path, rank: int) -> None:
        self.first, self.last = run.profile_at, run.profile_at + run.profile_steps - 1
        self.folder, self.rank = folder / "profile", rank
        self.lazy = run.backend == "xla"
        self.on = bool(run.profile_at) and rank == 0
        self.profiler: profile | None = None

    def at(self, step: int) -> None:
        """Step ``step`` begins: the window opens or closes with it."""
        if self.on and step == self.first:
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self.profiler = profile(activities=sorted(wanted, key=str), profile_memory=True)
            self.profiler.__enter__()
        elif step == self.last + 1:
            self.stop()

    def stop(self) -> None:
        """Close the window, if it is open, and write what was seen."""
        found, self.profiler = self.profiler, None
        if found is None:
            return
        found.__exit__(None, None, None)
        make_folder(self.folder)
        name = f"rank-{self.rank:05d}-steps-{self.first}-{self.last}"
        refuse_link(self.folder / f"{name}.json")
        found.export_chrome_trace(str(self.folder / f"{name}.json"))
        device = "cuda" if ProfilerActivity.CUDA in found.activities else "cpu"
        table = found.key_averages().table(f"self_{device}_time_total", row_limit=LONGEST)
        write_atomic(self.folder / f"{name}.txt", f"{table}\n".encode())
        logger.info("profiled steps %d to %d: %s", self.first, self.last, self.folder / name)
        if self.lazy and (hint := device_hint()):
            logger.info("%s", hint)


def device_hint() -> str:
    """How to see the device itself, with the installed Neuron SDK; empty without one."""
    match = installed_sdk(installed)
    if match is None:
        return ""
    return (
        "the profile shows the host; for the NeuronCores start the job with "
        "NEURON_RT_INSPECT_ENABLE=1 and NEURON_RT_INSPECT_OUTPUT_DIR=FOLDER, then run "
        f"{match.sdk.profiler} view -d FOLDER (Neuron SDK {match.sdk.name})"
    )
