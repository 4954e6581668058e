"""What one instance gives a job: cores, devices, network adapters, host memory.

Sources: AWS's instance pages (Trn1, Trn1n, Trn2) and the Neuron architecture pages; a NeuronCore of
trn2 is a logical one, two physical cores (LNC 2, the default).  ``local`` is the machine that the
command is given on: no Neuron device, as many ranks as the job says.
"""

from __future__ import annotations

from typing import NamedTuple


class Instance(NamedTuple):
    """``devices`` are what Kubernetes counts as aws.amazon.com/neuron: chips."""

    cores: int
    devices: int
    efa: int
    vcpus: int
    memory_gib: int


LOCAL = "local"
INSTANCES = {
    LOCAL: Instance(cores=0, devices=0, efa=0, vcpus=0, memory_gib=0),
    "trn1.2xlarge": Instance(cores=2, devices=1, efa=0, vcpus=8, memory_gib=32),
    "trn1.32xlarge": Instance(cores=32, devices=16, efa=8, vcpus=128, memory_gib=512),
    "trn1n.32xlarge": Instance(cores=32, devices=16, efa=16, vcpus=128, memory_gib=512),
    "trn2.48xlarge": Instance(cores=64, devices=16, efa=16, vcpus=192, memory_gib=2048),
}
