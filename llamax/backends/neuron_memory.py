"""Device memory in use on a NeuronCore, from the files of the Neuron driver.

::

    /sys/devices/virtual/neuron_device/neuron0/neuron_core1/stats/memory_usage/device_mem/total
                                       chip 0  its second core                       bytes now

``xm.get_memory_info`` of torch-xla asks the plugin of the device, which need not answer: that of
CPUs raises an error, and no public document says that Neuron's answers.  ``peak`` beside ``total``
is that of all jobs since the driver was loaded, so it is not read.

Source: AWS Neuron, "Neuron Sysfs User Guide"; ``neuron_sysfs_metrics.c`` of aws-neuron-driver, by
which everybody may read the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DEVICES = Path("/sys/devices/virtual/neuron_device")
VISIBLE = "NEURON_RT_VISIBLE_CORES"  # torch-xla's Neuron plugin sets it for each process


def core(environ: Mapping[str, str], local_rank: int) -> int:
    """The number of this process' NeuronCore on its machine."""
    first = re.match(r"\d+", environ.get(VISIBLE, ""))
    return int(first[0]) if first else local_rank


def used(core: int) -> int | None:
    """Bytes in use on a core; None where the driver does not show them."""
    of_a_chip = len([*DEVICES.glob("neuron0/neuron_core*")])
    if not of_a_chip:
        return None
    chip, place = divmod(core, of_a_chip)
    path = DEVICES / f"neuron{chip}/neuron_core{place}/stats/memory_usage/device_mem/total"
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
