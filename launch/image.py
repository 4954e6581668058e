"""The Dockerfile of a job: llamax on the training container of AWS for Neuron or for CUDA.

The base image has torch and the packages for its devices in matching versions, which are kept.
MPIJobs need an ssh server, mpirun, and pkill to tell the ranks to save.

Sources: AWS Deep Learning Containers, of Neuron and of PyTorch; Kubeflow MPI Operator, base image.
"""

from __future__ import annotations

from shlex import quote

from llamax.config.neuron_sdk import NONE, UNKNOWN, NeuronSdk, known_sdks
from llamax.launch.jobfile import JobFile
from llamax.runtime.errors import ConfigError, join_or
from llamax.runtime.versions import OLDEST_TORCH

NEURON = "public.ecr.aws/neuron/pytorch-training-neuronx"
BASE_IMAGES = {
    "cuda": "public.ecr.aws/deep-learning-containers/pytorch-training:"
    f"{OLDEST_TORCH}.0-gpu-py312-cu130-ubuntu22.04-ec2"
}
ENDPOINT = "/opt/ml/model --host 0.0.0.0 --port 8080"
PACKAGES = "openmpi-bin openssh-client openssh-server procps"


def base_image(job: JobFile) -> str:
    """The image that the job's is built upon; raises ConfigError where AWS has none."""
    if known := job.base_image or BASE_IMAGES.get(job.machine.backend, ""):
        return known
    sdk = job.sdk.sdk
    if job.machine.backend == "neuron":  # the known images have torch-xla
        raise ConfigError(
            f"base_image is missing: no image of AWS with TorchNeuron for {job.machine.name} is "
            "known to llamax; name one"
        )
    if not _has_image(sdk):
        others = join_or([each.name for each in known_sdks().values() if _has_image(each)])
        raise ConfigError(
            f"neuron_sdk={sdk.name}: AWS has no training image of it with torch-xla; use {others}, "
            "or set base_image"
        )
    return f"{NEURON}:{sdk.image}"


def _has_image(sdk: NeuronSdk) -> bool:
    return sdk.image not in (NONE, UNKNOWN)


def dockerfile(job: JobFile) -> str:
    """The Dockerfile; its context is the folder of the llamax repository."""
    return f"""# {job.name}: docker build --tag {quote(job.image)} --file - . <Dockerfile
FROM {base_image(job)}

# packages for the MPI operator; a base image that has mpirun keeps it.  Host keys are made by each
# worker when it starts: who can pull the image must not have them
RUN command -v mpirun >/dev/null && packages="openssh-client openssh-server procps" \\
        || packages="{PACKAGES}"; \\
    apt-get update && apt-get install --yes --no-install-recommends $packages \\
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && mkdir -p /run/sshd

# the operator mounts keys in a read-only folder, and pods have no known hosts
RUN printf 'StrictHostKeyChecking no\\nUserKnownHostsFile /dev/null\\nLogLevel ERROR\\n' \\
        >/etc/ssh/ssh_config.d/llamax.conf \\
    && printf 'StrictModes no\\n' >/etc/ssh/sshd_config.d/llamax.conf

# packages of the base image that pyproject.toml allows, such as torch, stay as they are; what is
# missing is installed at the versions and hashes of uv.lock, and nothing else is downloaded
COPY . /opt/llamax
RUN cd /opt/llamax && pip="python3 -m pip install --no-cache-dir" \\
    && extras=cache,hub,parquet,serve,tensorboard,zstd \\
    && locked="--no-deps --require-hashes --only-binary :all:" \\
    && python3 launch/image_pins.py >/tmp/needed.txt \\
    && python3 launch/image_pins.py setuptools >/tmp/build.txt \\
    && $pip $locked --requirement /tmp/needed.txt \\
    && $pip $locked --requirement /tmp/build.txt --target /tmp/build \\
    && PYTHONPATH=/tmp/build $pip --no-index --no-build-isolation --editable ".[$extras]" \\
    && rm -rf /tmp/build /tmp/needed.txt /tmp/build.txt

# SageMaker starts the server of an endpoint as `serve`; LLAMAX_SERVE has its options
RUN printf '#!/bin/sh\\nexec python3 -m llamax serve {ENDPOINT} $LLAMAX_SERVE\\n' \\
        >/usr/local/bin/serve && chmod 755 /usr/local/bin/serve
"""
