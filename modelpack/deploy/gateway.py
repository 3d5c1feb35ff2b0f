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
    check_secret,
    deployment,
    host_options,
    manifest,
    pod_basis,
    spread,
)
from modelpack.errors import UsageError

#: Pods of a gateway: one may restart, or its node drain, while the other one forwards requests.
_REPLICAS = 2
_PORT = 12435
#: Names of Services have 63 characters at most, and those here end with "-gateway" or "-servers".
_LONGEST_NAME = 55
#: The entries of a Secret with API keys: the gateway's key file, and a key for Prometheus.
_KEYS_FILE, _METRICS_KEY = "keys.toml", "metrics"
_KEYS, _KEYS_MOUNT = "keys", "/var/run/modelpack/keys"
#: A gateway holds the bodies of requests, of 256 MiB at most.
_RESOURCES = {"requests": {"cpu": "250m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}


def behind_gateway(workload: Workload, keys_secret: str | None = None) -> list[dict[str, Any]]:
    """Return the objects of the workload, and those of a gateway that its Service then selects.

    The pods of the model get a headless Service, whose name has the address of each: the gateway
    sends prompts that begin alike to the same pod, and leaves pods that stop. `keys_secret` names
    a Secret with the API keys that the gateway requires.

    Raises `UsageError` if the names of its objects would be too long, and for an invalid name of a
    Secret.
    """
    if keys_secret is not None:
        check_secret("--keys-secret", keys_secret)
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
    pod = {**_pod(workload, keys_secret), "topologySpreadConstraints": spread(labels)}
    spec = {
        "replicas": _REPLICAS,
        "selector": selector,
        "template": {"metadata": {"labels": labels}, "spec": pod},
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
        endpoint: dict[str, Any] = {"port": "http", "path": "/metrics", "interval": "15s"}
        if keys_secret is not None:
            credentials = {"name": keys_secret, "key": _METRICS_KEY}
            endpoint["authorization"] = {"credentials": credentials}
        spec = {"selector": selector, "endpoints": [endpoint]}
        made.append(manifest("monitoring.coreos.com/v1", "ServiceMonitor", workload, spec))
    for item in made:
        item["metadata"]["labels"] = labels
        if item["kind"] != "Service":
            item["metadata"]["name"] = f"{workload.name}-gateway"
    return [*found, *made]


def _servers(workload: Workload) -> str:
    return f"{workload.name}-servers"


def _pod(workload: Workload, keys_secret: str | None) -> dict[str, Any]:
    upstream = f"dns+http://{_servers(workload)}:{PORTS[workload.engine]}"
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5}
    command = ["modelpack", "gateway", "--upstream", upstream, "--balance", "prefix",
               "--host", "0.0.0.0", "--port", str(_PORT),  # noqa: S104
               "--drain", str(DRAIN), "--stop-timeout", str(STOP_TIMEOUT)]  # fmt: skip
    mounts: list[dict[str, Any]] = [
        {"name": TEMPORARY, "mountPath": "/tmp"},  # noqa: S108 - the pod's own
    ]
    volumes: list[dict[str, Any]] = [{"name": TEMPORARY, "emptyDir": {}}]
    if keys_secret is None:
        command.append("--allow-anonymous")
    else:
        command += ["--keys", f"{_KEYS_MOUNT}/{_KEYS_FILE}"]
        # A directory: a file that is mounted by itself would not follow changes of the Secret.
        mounts.append({"name": _KEYS, "mountPath": _KEYS_MOUNT, "readOnly": True})
        items = [{"key": _KEYS_FILE, "path": _KEYS_FILE}]
        volumes.append({"name": _KEYS, "secret": {"secretName": keys_secret, "items": items}})
    if workload.monitored:
        command.append("--allow-remote-metrics")
    container = {
        "name": "gateway",
        "image": workload.tool_image,
        "command": [*command, *host_options(workload, workload.name)],
        "env": [NAMESPACE, HOME],
        "ports": [{"name": "http", "containerPort": _PORT}],
        "resources": _RESOURCES,
        "volumeMounts": mounts,
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "readinessProbe": {**health, "timeoutSeconds": 5},
        # Its health is that of the pods of the model, for which no restart of a gateway helps.
        "livenessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 10},
    }
    return {**pod_basis(workload), "containers": [container], "volumes": volumes}
