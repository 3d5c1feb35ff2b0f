"""Workloads of the cluster: their manifests, their pods, and requests to their Services."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.cluster.cluster import REGISTRY, Cluster, ClusterError, until

IMAGE = "modelpack-test/engine:here"
MODELPACK = str(Path(sys.executable).with_name("modelpack"))
SMOLLM2 = f"{REGISTRY}/team/smollm2:v1"
TINY = f"{REGISTRY}/team/tiny:v1"


def modelpack(cluster: Cluster, *arguments: str) -> str:
    """Run modelpack in the cluster's network."""
    return cluster.run(MODELPACK, "--store", str(cluster.directory / "store"), *arguments)


def package(cluster: Cluster, reference: str, *arguments: str) -> None:
    modelpack(cluster, "package", *arguments, reference, "--push", "--plain-http")


def manifests(cluster: Cluster, reference: str, name: str, *arguments: str) -> str:
    return modelpack(
        cluster, "k8s", reference, "--engine", "modelpack", "--image", IMAGE, "--tool-image", IMAGE,
        "--plain-http", "--cpus", "0.2", "--name", name, *arguments,
    )  # fmt: skip


def apply(cluster: Cluster, text: str, name: str, seconds: int = 120) -> None:
    """Apply manifests; return when their pods are ready."""
    cluster.kubectl("apply", "-f", "-", input=text)
    until_ready(cluster, name, seconds)


def until_ready(
    cluster: Cluster, name: str, seconds: int = 120, namespace: str = "default"
) -> None:
    """Return when all pods of a Deployment are ready."""
    where = ("--namespace", namespace)
    try:
        cluster.kubectl("rollout", "status", f"deployment/{name}", f"--timeout={seconds}s", *where)
    except ClusterError as error:
        described = cluster.kubectl("describe", "pods", *where)
        raise ClusterError(f"{error}\n{described[-4000:]}") from None


def until_connected(cluster: Cluster, name: str) -> None:
    """Return when a Service has a server: kube-proxy adds a pod a moment after it is ready."""
    url = f"http://{address(cluster, name)}/"
    told = partial(cluster.run, "curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}",
                   url, check=False)  # fmt: skip
    until(f"the Service {name} has a server", lambda: told() != "000", 30,
          lambda: cluster.kubectl("get", "endpointslices"))  # fmt: skip


def delete(cluster: Cluster, text: str) -> None:
    cluster.kubectl("delete", "--grace-period=1", "-f", "-", input=text)


def pods(cluster: Cluster, name: str, namespace: str = "default") -> list[Any]:
    label = f"app.kubernetes.io/name={name}"
    found: list[Any] = cluster.get("pods", "-l", label, "--namespace", namespace)["items"]
    return found


def address(cluster: Cluster, name: str, namespace: str = "default") -> str:
    return str(cluster.get("service", name, "--namespace", namespace)["spec"]["clusterIP"])


def ask(
    cluster: Cluster, name: str, model: str, content: str, max_tokens: int = 16, caller: str = "",
    key: str = "", namespace: str = "default",
) -> Any:  # fmt: skip
    """Send a chat request through the Service, with a caller's name for traces."""
    body = {
        "model": model, "max_tokens": max_tokens, "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    return json.loads(
        cluster.run("curl", "-sS", "-m", "120", "-H", f"Host: {name}", "-H",
                    "Content-Type: application/json", "-H", f"X-Modelpack-Caller: {caller}",
                    "-H", f"Authorization: Bearer {key}",
                    "-d", json.dumps(body),
                    f"http://{address(cluster, name, namespace)}/v1/chat/completions")
    )  # fmt: skip


@contextmanager
def asking(
    cluster: Cluster, name: str, count: int = 3000, *more: int, at: str | None = None,
    namespace: str = "default",
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Send `count` requests through a Service, and more as long as the block runs.

    Yields a dictionary, which has the number of answers and the first failures after the block.
    `at` is an address in place of the Service's.
    """
    done = cluster.directory / f"{name}-done"
    done.unlink(missing_ok=True)
    command = cluster.command(
        sys.executable, str(Path(__file__).with_name("ask.py")),
        at or address(cluster, name, namespace), name, name, str(count), str(done), *map(str, more),
    )  # fmt: skip
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield found
        finally:
            done.touch()
        told, _ = process.communicate(timeout=600)
    found |= json.loads(told)


def until_replaced(cluster: Cluster, name: str, component: str, old: set[str]) -> None:
    until(
        f"the old pods of {name} ({component}) are gone",
        lambda: not old & pod_names(cluster, name, component),
        120, lambda: cluster.kubectl("get", "pods"),
    )  # fmt: skip


def pod_names(cluster: Cluster, name: str, component: str, namespace: str = "default") -> set[str]:
    return {
        pod["metadata"]["name"]
        for pod in pods(cluster, name, namespace)
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component
    }


def until_gateways_know(cluster: Cluster, name: str, count: int) -> None:
    """Return when each gateway of a workload has `count` healthy upstreams.

    Each looks up the pods by itself, every five seconds, so one may know them later.
    """
    gateways = {
        pod["metadata"]["name"]: pod["status"]["podIP"]
        for pod in pods(cluster, name)
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
    }

    def know() -> bool:
        told = [
            json.loads(cluster.run("curl", "-s", f"http://{address}:12435/health", check=False))
            for address in gateways.values()
        ]
        return all(each["upstreams"] == {"healthy": count, "total": count} for each in told)

    until(f"the gateways of {name} know {count} pods", know, 60,
          lambda: "\n".join(notes(cluster, pod) for pod in gateways))  # fmt: skip


def traces(cluster: Cluster, pod: str, caller: str) -> list[dict[str, Any]]:
    """Return what a pod's log says of the requests of callers whose names begin like this."""
    found = [json.loads(line) for line in _log(cluster, pod) if line.startswith("{")]
    return [each for each in found if (each.get("caller") or "").startswith(caller)]


def notes(cluster: Cluster, pod: str) -> str:
    """Return a pod's log without its requests."""
    return "\n".join(line for line in _log(cluster, pod) if '"path"' not in line)


def _log(cluster: Cluster, pod: str) -> list[str]:
    return cluster.kubectl("logs", pod).splitlines()
