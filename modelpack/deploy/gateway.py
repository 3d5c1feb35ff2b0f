"""Build the objects of `modelpack gateway` in front of a workload's pods, in Kubernetes."""

from __future__ import annotations

from typing import Any

from modelpack.deploy.kubernetes import (
    CONTAINER_SECURITY,
    DRAIN,
    HOME,
    NAMESPACE,
    PORTS,
    STOP_TIMEOUT,
    TEMPORARY,
    Workload,
    deployment,
    host_options,
    manifest,
    pod_basis,
)
from modelpack.errors import UsageError

#: Pods of a gateway: one may restart, or its node drain, while the other one forwards requests.
_REPLICAS = 2
_PORT = 12435
#: Names of Services have 63 characters at most, and those here end with "-gateway" or "-servers".
_LONGEST_NAME = 55
#: A gateway holds the bodies of requests, of 256 MiB at most.
_RESOURCES = {"requests": {"cpu": "250m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}


def behind_gateway(workload: Workload) -> list[dict[str, Any]]:
    """Return the objects of the workload, and those of a gateway that its Service then selects.

    The pods of the model get a headless Service, whose name has the address of each: the gateway
    sends prompts that begin alike to the same pod, and leaves pods that stop.

    Raises `UsageError` if the names of its objects would be too long.
    """
    if len(workload.name) > _LONGEST_NAME:
        raise UsageError(
            f"name {workload.name!r} is too long for --gateway: expected at most {_LONGEST_NAME} "
            "characters"
        )
    found = []
    for item in deployment(workload):
        if item["kind"] == "Service":
            item["metadata"]["name"] = _servers(workload)
            # Without an address of its own, so that its name has the addresses of the ready pods.
            item["spec"] = {"clusterIP": "None", **item["spec"]}
        found.append(item)
    labels = {**workload.labels, "app.kubernetes.io/component": "gateway"}
    selector = {"matchLabels": labels}
    spec = {
        "replicas": _REPLICAS,
        "selector": selector,
        "template": {"metadata": {"labels": labels}, "spec": _pod(workload)},
    }
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    made = [
        manifest("apps/v1", "Deployment", workload, spec),
        manifest("v1", "Service", workload, {"selector": labels, "ports": ports}),
        manifest(
            "policy/v1", "PodDisruptionBudget", workload,
            {"maxUnavailable": 1, "selector": selector},
        ),
    ]  # fmt: skip
    if workload.monitored:
        endpoints = [{"port": "http", "path": "/metrics", "interval": "15s"}]
        spec = {"selector": selector, "endpoints": endpoints}
        made.append(manifest("monitoring.coreos.com/v1", "ServiceMonitor", workload, spec))
    for item in made:
        item["metadata"]["labels"] = labels
        if item["kind"] != "Service":
            item["metadata"]["name"] = f"{workload.name}-gateway"
    return [*found, *made]


def _servers(workload: Workload) -> str:
    return f"{workload.name}-servers"


def _pod(workload: Workload) -> dict[str, Any]:
    upstream = f"dns+http://{_servers(workload)}:{PORTS[workload.engine]}"
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5}
    command = ["modelpack", "gateway", "--upstream", upstream, "--balance", "prefix",
               "--host", "0.0.0.0", "--port", str(_PORT), "--allow-anonymous",  # noqa: S104
               "--drain", str(DRAIN), "--stop-timeout", str(STOP_TIMEOUT)]  # fmt: skip
    if workload.monitored:
        command.append("--allow-remote-metrics")
    container = {
        "name": "gateway",
        "image": workload.tool_image,
        "command": [*command, *host_options(workload, workload.name)],
        "env": [NAMESPACE, HOME],
        "ports": [{"name": "http", "containerPort": _PORT}],
        "resources": _RESOURCES,
        "volumeMounts": [{"name": TEMPORARY, "mountPath": "/tmp"}],  # noqa: S108 - the pod's own
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "readinessProbe": {**health, "timeoutSeconds": 5},
        # Its health is that of the pods of the model, for which no restart of a gateway helps.
        "livenessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 10},
    }
    return {
        **pod_basis(workload),
        "containers": [container],
        "volumes": [{"name": TEMPORARY, "emptyDir": {}}],
    }
