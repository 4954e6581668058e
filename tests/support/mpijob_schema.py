"""Kubeflow's MPIJob v2beta1 as a JSON schema that refuses every field it does not know.

Written from the API's documentation: https://www.kubeflow.org/docs/components/trainer/legacy-v1/
user-guides/mpi/.  Pod templates are checked by Kubernetes' own schemas.
"""

from __future__ import annotations

from typing import Any


def strict(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


COUNT = {"type": "integer", "minimum": 0}
LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
REPLICAS = strict(
    {
        "replicas": {"type": "integer", "minimum": 1},
        "restartPolicy": {"enum": ["Never", "OnFailure"]},
        "template": strict({"metadata": {"type": "object"}, "spec": {"type": "object"}}, ("spec",)),
    },
    ("replicas", "restartPolicy", "template"),
)
MPIJOB = strict(
    {
        "apiVersion": {"const": "kubeflow.org/v2beta1"},
        "kind": {"const": "MPIJob"},
        "metadata": strict(
            {
                "name": LABEL,
                "namespace": LABEL,
                "labels": {"additionalProperties": {"type": "string", "maxLength": 63}},
                "annotations": {"additionalProperties": {"type": "string"}},
            },
            ("name",),
        ),
        "spec": strict(
            {
                "slotsPerWorker": COUNT,
                "runLauncherAsWorker": {"type": "boolean"},
                "launcherCreationPolicy": {"enum": ["AtStartup", "WaitForWorkersReady"]},
                "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]},
                "sshAuthMountPath": {"type": "string"},
                "runPolicy": strict(
                    {
                        "cleanPodPolicy": {"enum": ["None", "Running", "All"]},
                        "ttlSecondsAfterFinished": COUNT,
                        "activeDeadlineSeconds": COUNT,
                        "backoffLimit": COUNT,
                        "suspend": {"type": "boolean"},
                        "managedBy": {"type": "string"},
                        "schedulingPolicy": {"type": "object"},
                    }
                ),
                "mpiReplicaSpecs": strict(
                    {"Launcher": REPLICAS, "Worker": REPLICAS}, ("Launcher",)
                ),
            },
            ("mpiReplicaSpecs",),
        ),
    },
    ("apiVersion", "kind", "metadata", "spec"),
)
