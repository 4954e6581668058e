"""The phase serve on Kubernetes: a Deployment of one pod, and a Service in front of it.

::

    port-forward ──> Service ──> pod: the server of llamax.launch.serving, /model from the claim

A pod is ready when its /health answers.  A new version replaces the old one after it has ended:
a second one would wait for the same devices.

Sources: Kubernetes API apps/v1 and v1, "Configure Liveness, Readiness and Startup Probes"; those of
``llamax.launch.kubernetes`` and ``llamax.launch.serving``.
"""

from __future__ import annotations

import os.path
from shlex import quote
from typing import Any

from llamax.launch import kubernetes, serving
from llamax.launch.jobfile import JobFile

GRACE_S = 60  # requests in progress are answered when the pod is stopped
LOADING_S = 3600  # time to load the model, and on Trainium to compile its programs
PERIOD_S = 10


def render(job: JobFile) -> str:
    """The manifests of the Deployment and the Service, after how to send a request."""
    server, port = serving.server(job), job.serve.port
    name, namespace = kubernetes.name(job, "serve"), job.kubernetes.namespace
    forward = f"kubectl --namespace {quote(namespace)} port-forward service/{name} {port}:{port}"
    wait = f"kubectl --namespace {quote(namespace)} rollout status deployment/{name}"
    head = (
        f"# {job.name}: {serving.title(job, 'Kubernetes')}\n"
        f"# ready when its log has the words {server.ready!r}: {wait}\n"
        f"# to reach it from here: {forward}\n"
        f"# a request: {serving.request(job, f'http://127.0.0.1:{port}')}\n"
    )
    deployment, service = _deployment(job, server), _service(job)
    return head + kubernetes.dump(deployment) + "---\n" + kubernetes.dump(service)


def _labels(job: JobFile) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "llamax",
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/component": "serve",
    }


def _deployment(job: JobFile, server: serving.Server) -> dict[str, Any]:
    machine, health = job.server_machine, {"httpGet": {"path": "/health", "port": "http"}}
    count = serving.chips(job) if machine.devices else 0
    devices = {machine.resource: str(count)} if count else {}
    kind = machine.instance_type if machine.devices else ""
    model = os.path.relpath(serving.folder(job), job.storage.mount)
    variables = [
        {"name": name, "value": kubernetes.escape(value)}
        for name, value in server.environment.items()
    ]
    container: dict[str, Any] = {
        "image": server.image,
        "args": [kubernetes.escape(word) for word in server.arguments],
        "workingDir": "/",
        "env": variables + kubernetes.secrets(job, server.secrets),
        "ports": [{"name": "http", "containerPort": job.serve.port}],
        "startupProbe": health
        | {"periodSeconds": PERIOD_S, "failureThreshold": LOADING_S // PERIOD_S},
        "readinessProbe": health | {"periodSeconds": PERIOD_S},
        "volumeMounts": [
            {"name": "storage", "mountPath": serving.MODEL, "readOnly": True}
            | ({} if model == "." else {"subPath": model}),
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "nodeSelector": {"node.kubernetes.io/instance-type": kind} if kind else {},
        "terminationGracePeriodSeconds": GRACE_S,
    }
    resources = {"requests": devices, "limits": devices} if devices else {}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": kubernetes.metadata(job, "serve"),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": _labels(job)},
            "template": {
                "metadata": {"labels": _labels(job)},
                "spec": kubernetes.pod(job, list(server.command), resources, container, pod),
            },
        },
    }


def _service(job: JobFile) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": kubernetes.metadata(job, "serve"),
        "spec": {
            "selector": _labels(job),
            "ports": [{"name": "http", "port": job.serve.port, "targetPort": "http"}],
        },
    }
