"""What AWS or its tools would refuse of the section ``cluster`` of a job file.

Sources: Amazon EC2, "Regions and Zones"; Amazon FSx API, CreateFileSystem (sizes); AWS
ParallelCluster 3, "Cluster configuration file".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Network

from llamax.launch.jobfile import JobFile

FAMILIES = {"trn": "Trn", "inf": "Inf", "p": "P", "g": "G and VT"}  # of quotas, by instance type
REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
ZONE = re.compile(r"[a-z]{2}(-[a-z]+)+-\d[a-z]")
SUBNET = re.compile(r"subnet-(?:[0-9a-f]{8}|[0-9a-f]{17})")
DISK_GIB = 16384  # most of a gp3 volume
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,254}")
STACK = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{0,59}")


def problems(job: JobFile, launcher: str) -> Iterator[str]:
    """What AWS or its tools would refuse, one line each."""
    cluster, machine = job.cluster, job.machine
    if not REGION.fullmatch(cluster.region):
        yield f"cluster.region={cluster.region!r} is no region; use one such as us-west-2"
    if not machine.instance_type or not machine.name.startswith(tuple(FAMILIES)):
        yield f"instance={job.instance!r} is no instance type of AWS with accelerators; use one"
    if launcher == "sagemaker":
        return
    if not STACK.fullmatch(job.name):
        yield f"name={job.name!r} cannot name a cluster; use letters, digits and -, at most 60"
    region = cluster.region if REGION.fullmatch(cluster.region) else ""
    place = region or "a region"
    if not _is_zone(cluster.zone, region):
        yield (
            f"cluster.zone={cluster.zone!r} is no zone of {place}; use one such as "
            f"{region or 'us-west-2'}d"
        )
    if cluster.storage_gib != 1200 and cluster.storage_gib % 2400 and launcher != "torchrun":
        yield (
            f"cluster.storage_gib={cluster.storage_gib} is no size of FSx for Lustre; use 1200 or "
            "a multiple of 2400"
        )
    if cluster.disk_gib > DISK_GIB:
        yield (
            f"cluster.disk_gib={cluster.disk_gib} is above the limit of EBS; use {DISK_GIB} or less"
        )
    if launcher == "k8s":
        if not _is_zone(cluster.second_zone, region) or cluster.second_zone == cluster.zone:
            yield (
                f"cluster.second_zone={cluster.second_zone!r} is no other zone of {place}; EKS "
                "needs two, the nodes are in the first"
            )
        return
    if launcher == "torchrun" and job.nodes > 1:
        yield f"nodes={job.nodes} but --on torchrun makes one instance; use --on slurm or k8s"
    needs_private = launcher == "slurm" and (machine.efa > 1 or cluster.nodes_subnet != "")
    private = SUBNET.fullmatch(cluster.nodes_subnet) and cluster.nodes_subnet != cluster.subnet
    if needs_private and not private:
        yield (
            f"cluster.nodes_subnet={cluster.nodes_subnet!r} is no other subnet; use a private one "
            "in the zone: machines with several network interfaces get no public address"
        )
    if not SUBNET.fullmatch(cluster.subnet):
        yield (
            f"cluster.subnet={cluster.subnet!r} is no subnet; use one in the zone, such as "
            "subnet-0123456789abcdef0"
        )
    if not WORD.fullmatch(cluster.key):
        yield f"cluster.key={cluster.key!r} is no name of an EC2 key pair, which ssh needs"
    if not _is_range(cluster.ssh_from):
        yield (
            f"cluster.ssh_from={cluster.ssh_from!r} is no range of addresses; use yours, such as "
            "203.0.113.7/32"
        )


def _is_range(text: str) -> bool:
    """Whether a text is a range of IPv4 addresses, and not all of them."""
    try:
        return "/" in text and IPv4Network(text, strict=False).prefixlen > 0
    except ValueError:
        return False


def _is_zone(name: str, region: str) -> bool:
    """Whether a name can be that of an availability zone in a region; "": in any."""
    return bool(ZONE.fullmatch(name)) and name.startswith(region)
