"""Prometheus' operator, Prometheus and its adapter, with what `modelpack k8s` prints for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, program_image, until
from tests.cluster.operators import Operator, define, module_objects
from tests.cluster.workloads import TINY, apply, ask, delete, manifests, pods

pytestmark = pytest.mark.cluster
PROMETHEUS, RELOADER = (
    f"docker.io/modelpack-test/{name}:here" for name in ("prometheus", "reloader")
)
KINDS = ("alertmanagerconfigs", "alertmanagers", "podmonitors", "probes", "prometheusagents",
         "prometheuses", "prometheusrules", "scrapeconfigs", "servicemonitors",
         "thanosrulers")  # fmt: skip


@pytest.fixture
def prometheus(cluster: Cluster) -> Iterator[str]:
    """Prometheus' operator, and a Prometheus that reads all ServiceMonitors; yields its address."""
    for name in KINDS:
        define(cluster, module_objects(
            "ServiceMonitor",
            f"example/prometheus-operator-crd/monitoring.coreos.com_{name}.yaml"))  # fmt: skip
    for image, tool in (
        (PROMETHEUS, "cmd/prometheus"),
        (RELOADER, "cmd/prometheus-config-reloader"),
    ):
        program = Operator("monitoring", tool, ()).build()
        archive = cluster.directory / f"{tool.replace('/', '-')}.tar"
        program_image(image, program, archive, f"bin/{tool.rpartition('/')[2]}")
        cluster.import_image(archive)
    account = {"kind": "ServiceAccount", "name": "prometheus", "namespace": "default"}
    metadata = {"name": "prometheus", "namespace": "default"}
    items = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
         "metadata": {"name": "prometheus"}, "subjects": [account],
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                     "name": "view"}},
        {"apiVersion": "monitoring.coreos.com/v1", "kind": "Prometheus", "metadata": metadata,
         "spec": {"image": PROMETHEUS, "version": "v3.11.3", "replicas": 1,
                  "serviceAccountName": "prometheus", "serviceMonitorSelector": {},
                  "resources": {"requests": {"memory": "128Mi"}}}},
    ]  # fmt: skip
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    operator = Operator("monitoring", "cmd/operator", [
        f"--prometheus-config-reloader={RELOADER}", "--namespaces=default",
        "--web.listen-address=127.0.0.1:9445", "--kubelet-endpoints=false",
    ])  # fmt: skip
    with operator.running(cluster) as log:
        cluster.kubectl("apply", "-f", "-", input=text)
        try:
            until(
                "Prometheus is ready",
                lambda: "True" in cluster.kubectl(
                    "get", "pod", "prometheus-prometheus-0", "--ignore-not-found", "-o",
                    'jsonpath={.status.conditions[?(@.type=="Ready")].status}'),
                180, lambda: cluster.kubectl("describe", "pods")[-4000:] + log.read_text()[-3000:],
            )  # fmt: skip
            yield cluster.get("pod", "prometheus-prometheus-0")["status"]["podIP"]
        finally:
            cluster.kubectl("delete", "--ignore-not-found", "-f", "-", input=text)


def query(cluster: Cluster, address: str, text: str) -> list[Any]:
    """Return the series of a query of Prometheus."""
    told = cluster.run("curl", "-s", "-G", f"http://{address}:9090/api/v1/query",
                       "--data-urlencode", f"query={text}")  # fmt: skip
    found: list[Any] = json.loads(told)["data"]["result"]
    return found


def test_prometheus_scrapes_the_pods(cluster: Cluster, prometheus: str) -> None:
    """Both pods of the model, by the operator's translation of the ServiceMonitor."""
    text = manifests(cluster, TINY, "scraped", "--monitor", "--replicas", "2",
                     "--served-model-name", "tiny")  # fmt: skip
    apply(cluster, text, "scraped")
    try:
        assert ask(cluster, "scraped", "tiny", "Hello")["usage"]["completion_tokens"] > 0
        names = {pod["metadata"]["name"] for pod in pods(cluster, "scraped")}

        def scraped() -> set[str]:
            found = query(cluster, prometheus, "vllm:num_requests_waiting")
            return {series["metric"].get("pod", "") for series in found
                    if series["metric"].get("namespace") == "default"}  # fmt: skip

        # The kubelet takes a minute or two to renew the Secret of the configuration.
        until("both pods are scraped", lambda: names <= scraped(), 300,
              lambda: str(query(cluster, prometheus, "up")))  # fmt: skip
        [total] = query(cluster, prometheus, "sum(vllm:request_success_total)")
        assert float(total["value"][1]) >= 0
    finally:
        delete(cluster, text)
