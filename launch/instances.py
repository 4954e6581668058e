"""What one instance gives a job: ranks, devices, network adapters, host memory.

The instances are those of ``llamax/planner/machines.toml``: what can be planned can be launched.
``local`` is the machine that the command is given on: no device, as many ranks as the job says.
"""

from __future__ import annotations

from typing import NamedTuple

from llamax.config.hardware import known_machines


class Instance(NamedTuple):
    """``devices`` are what Kubernetes counts: chips of Trainium, or GPUs."""

    backend: str
    cores: int
    devices: int
    efa: int
    memory_gib: float

    @property
    def neuron(self) -> bool:
        """Whether its devices are Trainium's."""
        return self.backend in ("xla", "neuron")

    @property
    def backends(self) -> tuple[str, ...]:
        """Values of run.backend that use the devices."""
        return ("xla", "neuron") if self.neuron else (self.backend,)

    @property
    def unit(self) -> str:
        """What a rank runs on, in the plural."""
        return {"cuda": "GPUs", "cpu": "cores"}.get(self.backend, "NeuronCores")

    @property
    def resource(self) -> str:
        """The name of its devices in Kubernetes."""
        return "aws.amazon.com/neuron" if self.neuron else "nvidia.com/gpu"

    @property
    def monitor(self) -> str:
        """The program that shows how much its devices do."""
        return {"cuda": "nvidia-smi dmon", "cpu": "top"}.get(self.backend, "neuron-top")


LOCAL = "local"
INSTANCES = {LOCAL: Instance("cpu", cores=0, devices=0, efa=0, memory_gib=0)} | {
    name: Instance(each.backend, each.ranks, each.devices, each.efa, each.host_memory_gib)
    for name, each in known_machines().items()
}
