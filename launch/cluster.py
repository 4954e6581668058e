"""The phase cluster: makes what a job runs on, on AWS, and deletes it again.

::

    k8s         eksctl: nodes with EFA, FSx for Lustre, the MPI Operator; device plugins by eksctl
    slurm       AWS ParallelCluster: a queue with the job's nodes, FSx for Lustre
    torchrun    one EC2 instance, reached by ssh
    sagemaker   nothing to make: which quotas the job needs

Each start looks at quota and zones first, and prints the price before anything is made.  It is the
list price of the nodes in the table of machines, without storage, traffic and control planes.

Sources: eksctl, schema of ClusterConfig and "EFA"; Amazon EKS, "Use high-performance app storage
with Amazon FSx for Lustre"; Amazon FSx API, CreateFileSystem (sizes); Kubeflow MPI Operator 0.6,
README; AWS ParallelCluster 3, "Cluster configuration file"; AWS Neuron, "Neuron DLAMI"; AWS Deep
Learning AMIs, base GPU AMI; Service Quotas of Amazon EC2 and SageMaker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from shlex import quote
from typing import Any

from llamax.config.hardware import KNOWN
from llamax.launch import kubernetes
from llamax.launch.cluster_checks import FAMILIES
from llamax.launch.jobfile import JobFile
from llamax.launch.script import LITERAL, SHEBANG

OPERATOR = "https://raw.githubusercontent.com/kubeflow/mpi-operator/v0.6.0/deploy/v2beta1/mpi-operator.yaml"
SMALL = "m5.xlarge"  # of the head node of Slurm, and of the node for Kubernetes' own pods
GPU_AMI = (  # the SSM parameter with the newest image
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
)
# Names of images with the framework; each description has the SDK.  The newest of them all has no
# torch-xla: that ended with SDK 2.31.
NEURON_AMIS = {
    "xla": "Deep Learning AMI Neuron PyTorch 2.9 (Ubuntu 24.04)*",
    "neuron": "Deep Learning AMI Neuron torch-neuronx*",
}
TOOLS = {"k8s": "eksctl", "slurm": "pcluster", "torchrun": "aws", "sagemaker": "aws"}


def render(job: JobFile, launcher: str) -> str:
    """The script that makes the cluster of a launcher."""
    make = {"k8s": _eks, "slurm": _parallel_cluster, "torchrun": _instance, "sagemaker": _quotas}
    return make[launcher](job)


def price(job: JobFile) -> str:
    """What the nodes cost an hour, in words."""
    each = job.machine.dollars_per_hour
    return (
        f"{job.nodes} x {job.machine.name} cost ${job.nodes * each:,.2f} an hour at the list price "
        f"of June 2025 (${each:,.2f} each on demand, US East; {KNOWN.name} of llamax), besides "
        "storage, traffic, control plane and small instances; they cost until --action clean"
    )


def _head(job: JobFile, title: str) -> str:
    machine, cluster = job.machine, job.cluster
    family = next(name for key, name in FAMILIES.items() if machine.name.startswith(key))
    return f"""{SHEBANG}
# {job.name}: {title}
{LITERAL}
set -euo pipefail
export AWS_DEFAULT_REGION={cluster.region}
vcpus=$(aws ec2 describe-instance-types --instance-types {machine.name} \\
    --query 'InstanceTypes[0].VCpuInfo.DefaultVCpus' --output text)
need=$((vcpus * {job.nodes}))
have=$(aws service-quotas list-service-quotas --service-code ec2 --output json \\
    --query "Quotas[?QuotaName=='Running On-Demand {family} instances'].Value | [0]")
if ! [[ $have =~ ^[0-9] && ${{have%.*}} -ge $need ]]; then
    echo "quota 'Running On-Demand {family} instances' in {cluster.region} is $have vCPUs, but \
{job.nodes} x {machine.name} need $need; ask for them in Service Quotas" >&2
    exit 2
fi
zones=$(aws ec2 describe-instance-type-offerings --location-type availability-zone --output text \\
    --filters Name=instance-type,Values={machine.name} --query 'InstanceTypeOfferings[].Location' |
    tr '\\t\\n' '  ')
if [[ " $zones " != *" {cluster.zone} "* ]]; then
    echo "{machine.name} is not offered in {cluster.zone}, but in: ${{zones:-no zone of \
{cluster.region}}}" >&2
    exit 2
fi
echo {quote(price(job))}
"""


# ---- EKS


def eksctl_file(job: JobFile) -> dict[str, Any]:
    """The configuration of eksctl, which adds the device plugins of Neuron, NVIDIA and EFA."""
    cluster, machine = job.cluster, job.machine
    return {
        "apiVersion": "eksctl.io/v1alpha5",
        "kind": "ClusterConfig",
        "metadata": {"name": job.name, "region": cluster.region},
        "availabilityZones": [cluster.zone, cluster.second_zone],
        "iam": {"withOIDC": True},
        "addons": [
            {
                "name": "aws-fsx-csi-driver",
                "attachPolicyARNs": ["arn:aws:iam::aws:policy/AmazonFSxFullAccess"],
            }
        ],
        "managedNodeGroups": [
            {"name": "small", "instanceType": SMALL, "desiredCapacity": 1},
            {
                "name": "nodes",
                "instanceType": machine.name,
                "minSize": 0,
                "maxSize": job.nodes,
                "desiredCapacity": job.nodes,
                "availabilityZones": [cluster.zone],
                "privateNetworking": True,
                "volumeSize": cluster.disk_gib,
                **({"efaEnabled": True} if machine.efa else {}),
            },
        ],
    }


def storage(job: JobFile) -> list[dict[str, Any]]:
    """The StorageClass and the claim of the file system; the script fills in two ids."""
    return [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": job.storage.claim},
            "provisioner": "fsx.csi.aws.com",
            "parameters": {
                "subnetId": "SUBNET",
                "securityGroupIds": "GROUP",
                "deploymentType": "SCRATCH_2",
            },
            "mountOptions": ["flock"],
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": job.storage.claim, "namespace": job.kubernetes.namespace},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": job.storage.claim,
                "resources": {"requests": {"storage": f"{job.cluster.storage_gib}Gi"}},
            },
        },
    ]


def _eks(job: JobFile) -> str:
    name, namespace = job.name, quote(job.kubernetes.namespace)
    manifests = "---\n".join(kubernetes.dump(each) for each in storage(job))
    return f"""{_head(job, f"an EKS cluster of {job.nodes} x {job.machine.name}, by eksctl")}\
eksctl create cluster --config-file - <<'END'
{kubernetes.dump(eksctl_file(job))}END
kubectl apply --server-side --filename {OPERATOR}
kubectl create namespace {namespace} --dry-run=client --output yaml | kubectl apply --filename -
group=$(aws eks describe-cluster --name {name} \\
    --query cluster.resourcesVpcConfig.clusterSecurityGroupId --output text)
vpc=$(aws eks describe-cluster --name {name} \\
    --query cluster.resourcesVpcConfig.vpcId --output text)
subnet=$(aws ec2 describe-subnets --output text --query 'Subnets[0].SubnetId' --filters \\
    Name=vpc-id,Values="$vpc" Name=availability-zone,Values={job.cluster.zone} \\
    Name=tag-key,Values=kubernetes.io/role/internal-elb)
sed "s/SUBNET/$subnet/; s/GROUP/$group/" <<'END' | kubectl apply --filename -
{manifests}END
echo "the file system takes some minutes more: kubectl get pvc says when it is bound"
"""


# ---- AWS ParallelCluster


def parallel_cluster_file(job: JobFile) -> dict[str, Any]:
    """The configuration of AWS ParallelCluster."""
    cluster, machine = job.cluster, job.machine
    node: dict[str, Any] = {"Name": "nodes", "InstanceType": machine.name}
    node |= {"MinCount": 0, "MaxCount": job.nodes}
    placed: dict[str, Any] = {"SubnetIds": [cluster.nodes_subnet or cluster.subnet]}
    if machine.efa:
        node["Efa"] = {"Enabled": True}
        placed["PlacementGroup"] = {"Enabled": True}
    return {
        "Region": cluster.region,
        "Image": {"Os": "ubuntu2204"},
        "HeadNode": {
            "InstanceType": SMALL,
            "Networking": {"SubnetId": cluster.subnet},
            "Ssh": {"KeyName": cluster.key, "AllowedIps": cluster.ssh_from},
        },
        "Scheduling": {
            "Scheduler": "slurm",
            "SlurmQueues": [
                {
                    "Name": job.slurm.partition or "nodes",
                    "ComputeResources": [node],
                    "ComputeSettings": {"LocalStorage": {"RootVolume": {"Size": cluster.disk_gib}}},
                    "Networking": placed,
                }
            ],
        },
        "SharedStorage": [
            {
                "MountDir": job.storage.mount,
                "Name": "fsx",
                "StorageType": "FsxLustre",
                "FsxLustreSettings": {
                    "StorageCapacity": cluster.storage_gib,
                    "DeploymentType": "SCRATCH_2",
                },
            }
        ],
    }


def _parallel_cluster(job: JobFile) -> str:
    title = f"a Slurm cluster of {job.nodes} x {job.machine.name}, by AWS ParallelCluster"
    return f"""{_head(job, title)}\
file=$(mktemp)
trap 'rm -f -- "$file"' EXIT
cat >"$file" <<'END'
{kubernetes.dump(parallel_cluster_file(job))}END
pcluster create-cluster --cluster-name {job.name} --cluster-configuration "$file"
echo "nodes start with the first job; the head node: pcluster ssh --cluster-name {job.name}"
"""


# ---- one instance


def _instance(job: JobFile) -> str:
    cluster, name = job.cluster, job.name
    tags = f"Tags=[{{Key=Name,Value={name}}},{{Key=llamax,Value={name}}}]"
    disk = [
        {
            "DeviceName": "/dev/sda1",
            "Ebs": {"VolumeSize": cluster.disk_gib, "VolumeType": "gp3"},
        }
    ]
    return f"""{_head(job, f"one {job.machine.name}")}\
{_find_instance(name)}\
if [[ $id ]]; then
    echo "$id of this job exists already; --action status shows it, --action clean deletes it" >&2
    exit 2
fi
{_find_image(job)}vpc=$(aws ec2 describe-subnets --subnet-ids {cluster.subnet} \\
    --query 'Subnets[0].VpcId' --output text)
group=$(aws ec2 describe-security-groups --output text --query 'SecurityGroups[0].GroupId' \\
    --filters Name=tag:llamax,Values={name} Name=vpc-id,Values="$vpc")
if [[ $group == None ]]; then
    group=$(aws ec2 create-security-group --group-name {name} --description {name} \\
        --vpc-id "$vpc" --query GroupId --output text \\
        --tag-specifications {quote(f"ResourceType=security-group,{tags}")})
    aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 22 \\
        --cidr {cluster.ssh_from} >/dev/null
fi
id=$(aws ec2 run-instances --image-id "$image" --instance-type {job.machine.name} \\
    --key-name {quote(cluster.key)} --subnet-id {cluster.subnet} --security-group-ids "$group" \\
    --block-device-mappings {quote(json.dumps(disk))} \\
    --tag-specifications {quote(f"ResourceType=instance,{tags}")} \\
    --query 'Instances[0].InstanceId' --output text)
aws ec2 wait instance-running --instance-ids "$id"
host=$(aws ec2 describe-instances --instance-ids "$id" --output text \\
    --query 'Reservations[0].Instances[0].PublicDnsName')
echo "$id runs; TensorBoard and notebooks through the tunnel:"
echo "ssh -L 6006:127.0.0.1:6006 -L 8888:127.0.0.1:8888 ubuntu@$host"
"""


def _find_image(job: JobFile) -> str:
    """Lines that set ``image``: the newest with GPU drivers, or the one with the job's SDK."""
    if not job.machine.neuron:
        return f"""image=$(aws ssm get-parameter --name {GPU_AMI} \\
    --query Parameter.Value --output text)
"""
    sdk = job.sdk.sdk.name
    named = f"Name=name,Values={NEURON_AMIS[job.machine.backend]}"
    return f"""image=$(aws ec2 describe-images --owners amazon --include-deprecated --output json \\
    --filters {quote(named)} 'Name=description,Values=*Neuron SDK {sdk}.*' \\
    --query 'sort_by(Images, &CreationDate)[-1].ImageId' | tr -d '"')
if [[ $image == null ]]; then
    echo "AWS has no AMI with Neuron SDK {sdk} for {job.machine.name} in {job.cluster.region}; set \
neuron_sdk to another one that trains there" >&2
    exit 2
fi
"""


def _find_instance(name: str) -> str:
    """Lines that set ``id`` to the ids of the instances of a job, which may be none."""
    return f"""id=$(aws ec2 describe-instances --output text \\
    --filters Name=tag:llamax,Values={name} \\
    Name=instance-state-name,Values=pending,running,stopping,stopped \\
    --query 'Reservations[].Instances[].InstanceId')
"""


# ---- SageMaker


def quota_names(job: JobFile) -> Iterator[tuple[str, int]]:
    """(name of a quota, instances) that the phases of the job need."""
    yield f"ml.{job.machine.name} for training job usage", job.nodes
    yield f"ml.{job.sagemaker.prepare_instance} for processing job usage", 1
    if job.serve.instance:
        yield f"ml.{job.server_machine.name} for endpoint usage", 1


def _quotas(job: JobFile) -> str:
    checks = "".join(f"quota {quote(name)} {count}\n" for name, count in quota_names(job))
    return f"""{SHEBANG}
# {job.name}: the quotas of SageMaker that the job needs
set -euo pipefail
export AWS_DEFAULT_REGION={job.cluster.region}
missing=0
quota() {{  # name, instances
    local have
    have=$(aws service-quotas list-service-quotas --service-code sagemaker --output json \\
        --query "Quotas[?QuotaName=='$1'].Value | [0]")
    echo "$1: $have, needed: $2"
    [[ $have =~ ^[0-9] && ${{have%.*}} -ge $2 ]] || missing=2
}}
{checks}if ((missing)); then
    echo "ask for what is missing in Service Quotas, in {job.cluster.region}" >&2
fi
exit $missing
"""


def actions(launcher: str) -> tuple[str, ...]:
    """The actions of the phase."""
    return ("start",) if launcher == "sagemaker" else ("start", "status", "clean")


def action(job: JobFile, launcher: str, what: str) -> str:
    """The script of an action: status, or clean, which deletes the cluster."""
    name, region = job.name, job.cluster.region
    find = f"""export AWS_DEFAULT_REGION={region}
{_find_instance(name)}[[ $id ]] || echo "EC2 has no instance {name} in {region}"
"""
    claim = f"--namespace {quote(job.kubernetes.namespace)} {quote(job.storage.claim)}"
    status = {
        "k8s": f"eksctl get cluster --name {name} --region {region}\nkubectl get nodes,pvc\n",
        "slurm": f"pcluster describe-cluster --cluster-name {name} --region {region}\n",
        "torchrun": f"{find}[[ -z $id ]] || aws ec2 describe-instances --instance-ids $id \\\n"
        "    --output table --query 'Reservations[].Instances[]."
        "{id: InstanceId, state: State.Name, host: PublicDnsName}'\n",
    }
    delete = {
        "k8s": "# the file system is deleted with its claim, the files on it too\n"
        f"kubectl delete pvc --ignore-not-found {claim}\n"
        f"eksctl delete cluster --name {name} --region {region} --wait\n",
        "slurm": f"pcluster delete-cluster --cluster-name {name} --region {region}\n",
        "torchrun": f"{find}"
        "[[ -z $id ]] || aws ec2 terminate-instances --instance-ids $id >/dev/null\n"
        "[[ -z $id ]] || aws ec2 wait instance-terminated --instance-ids $id\n"
        "for group in $(aws ec2 describe-security-groups --output text \\\n"
        f"    --filters Name=tag:llamax,Values={name} --query 'SecurityGroups[].GroupId'); do\n"
        '    aws ec2 delete-security-group --group-id "$group"\ndone\n',
    }
    body = status[launcher] if what == "status" else delete[launcher]
    lint = "# shellcheck disable=SC2086  # several ids\n" if launcher == "torchrun" else ""
    return f"{SHEBANG}\n{lint}set -euo pipefail\n{body}"
