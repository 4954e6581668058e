"""The container image: llamax on AWS's training container for Neuron, or for CUDA on GPUs.

The base has torch and what it needs for its devices in versions that belong together, so nothing of
those is installed again.  MPIJobs need an ssh server with keys for its host, an mpirun,
and pkill for the order to save.

Sources: AWS Deep Learning Containers, of Neuron and of PyTorch; Kubeflow MPI Operator, base image.
"""

from __future__ import annotations

from shlex import quote

from llamax.launch.jobfile import JobFile
from llamax.runtime.versions import IMAGE_SDK, OLDEST_TORCH, TORCH_XLA

NEURON = (
    "public.ecr.aws/neuron/pytorch-training-neuronx:"
    f"{TORCH_XLA}.0-neuronx-py312-sdk{IMAGE_SDK}.0-ubuntu24.04"
)
BASE_IMAGES = {
    "cuda": "public.ecr.aws/deep-learning-containers/pytorch-training:"
    f"{OLDEST_TORCH}.0-gpu-py312-cu130-ubuntu22.04-ec2"
}
PACKAGES = "openmpi-bin openssh-client openssh-server procps"


def dockerfile(job: JobFile) -> str:
    """The Dockerfile, to be built in llamax's folder."""
    return f"""# {job.name}: docker build --tag {quote(job.image)} --file - . <Dockerfile
FROM {job.base_image or BASE_IMAGES.get(job.machine.backend, NEURON)}

# what the MPI operator needs of an image; a base that has its own mpirun keeps it
RUN command -v mpirun >/dev/null && packages="openssh-client openssh-server procps" \\
        || packages="{PACKAGES}"; \\
    apt-get update && apt-get install --yes --no-install-recommends $packages \\
    && rm -rf /var/lib/apt/lists/* && mkdir -p /run/sshd && ssh-keygen -A

# the operator brings keys in a read-only folder, and pods have no known host
RUN printf 'StrictHostKeyChecking no\\nUserKnownHostsFile /dev/null\\nLogLevel ERROR\\n' \\
        >/etc/ssh/ssh_config.d/llamax.conf \\
    && printf 'StrictModes no\\n' >/etc/ssh/sshd_config.d/llamax.conf

# pip keeps every installed package that satisfies pyproject.toml, such as torch
COPY . /opt/llamax
RUN python3 -m pip install --no-cache-dir --editable /opt/llamax tensorboard
"""
