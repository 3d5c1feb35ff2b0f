"""Prometheus' operator, Prometheus and its adapter, with what `modelpack k8s` prints for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, program_image, until
from tests.cluster.node import ADDRESS
from tests.cluster.operators import Operator, define, module_objects
from tests.cluster.workloads import TINY, apply, ask, asking, delete, manifests, pods
from tests.interop.compose import ROOT

pytestmark = pytest.mark.cluster
PROMETHEUS, RELOADER = (
    f"docker.io/modelpack-test/{name}:here" for name in ("prometheus", "reloader")
)
KINDS = ("alertmanagerconfigs", "alertmanagers", "podmonitors", "probes", "prometheusagents",
         "prometheuses", "prometheusrules", "scrapeconfigs", "servicemonitors",
         "thanosrulers")  # fmt: skip
_GROUP, _VERSION = "custom.metrics.k8s.io", "v1beta2"
_ADAPTER_PORT = 6444


@pytest.fixture(scope="module")
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


@pytest.fixture
def adapter(cluster: Cluster, prometheus: str) -> Iterator[None]:
    """Prometheus' adapter with the rule of docs/kubernetes.md, as an API of the cluster."""
    config, kubeconfig = (cluster.directory / name for name in ("adapter.yaml", "kubeconfig"))
    config.write_text(documented_rule())
    program = Operator("adapter", "cmd/adapter", [
        f"--prometheus-url=http://{prometheus}:9090/", f"--config={config}",
        f"--lister-kubeconfig={kubeconfig}", f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}", f"--bind-address={ADDRESS}",
        f"--secure-port={_ADAPTER_PORT}", "--tls-cert-file={directory}/certificates/tls.crt",
        "--tls-private-key-file={directory}/certificates/tls.key",
        "--metrics-relist-interval=5s", "--metrics-max-age=1m",
    ])  # fmt: skip
    name = {"name": "adapter", "namespace": "default"}
    port = {"port": 443, "targetPort": _ADAPTER_PORT}
    items = [
        {"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": {"ports": [port]}},
        {"apiVersion": "v1", "kind": "Endpoints", "metadata": name,
         "subsets": [{"addresses": [{"ip": ADDRESS}], "ports": [{"port": _ADAPTER_PORT}]}]},
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
         "metadata": {"name": f"{_VERSION}.{_GROUP}"},
         "spec": {"group": _GROUP, "version": _VERSION, "service": {**name, "port": 443},
                  "insecureSkipTLSVerify": True, "groupPriorityMinimum": 100,
                  "versionPriority": 100}},
    ]  # fmt: skip
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    with program.running(cluster) as log:
        cluster.kubectl("apply", "-f", "-", input=text)
        try:
            until(
                "the API of metrics is available",
                lambda: "True" in cluster.kubectl(
                    "get", "apiservice", f"{_VERSION}.{_GROUP}", "-o",
                    'jsonpath={.status.conditions[?(@.type=="Available")].status}'),
                60, lambda: cluster.kubectl("get", "apiservice", f"{_VERSION}.{_GROUP}", "-o",
                                            "yaml") + log.read_text()[-3000:],
            )  # fmt: skip
            yield
        finally:
            cluster.kubectl("delete", "--ignore-not-found", "-f", "-", input=text)


def documented_rule() -> str:
    """Return the adapter's configuration in docs/kubernetes.md."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    [rule] = re.findall(r"^```yaml\n(rules:.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(rule)


def query(cluster: Cluster, address: str, text: str) -> list[Any]:
    """Return the series of a query of Prometheus."""
    told = cluster.run("curl", "-sS", "-G", f"http://{address}:9090/api/v1/query",
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


def pod_values(cluster: Cluster, metric: str) -> dict[str, str]:
    """Return the values of a metric by pod, as the autoscaler gets them from the adapter."""
    path = f"/apis/{_GROUP}/{_VERSION}/namespaces/default/pods/*/{metric}"
    told = cluster.kubectl("get", "--raw", path, check=False)
    items = json.loads(told)["items"] if told else ()
    return {each["describedObject"]["name"]: each["value"] for each in items}


def test_waiting_requests_add_a_pod(cluster: Cluster, prometheus: str, adapter: None) -> None:
    """The autoscaler at work: 100 clients for 64 sequences of a pod, and then none."""
    printed = manifests(cluster, TINY, "scaled", "--max-replicas", "2",
                        "--monitor", "--served-model-name", "scaled")  # fmt: skip
    [window] = re.findall(r"stabilizationWindowSeconds: \d+", printed)
    text = printed.replace(window, "stabilizationWindowSeconds: 10")
    apply(cluster, text, "scaled")

    def ready() -> int:
        return int(cluster.get("deployment", "scaled")["status"].get("readyReplicas", 0))

    def shown() -> str:
        log = (cluster.directory / "beside.log").read_text()[-3000:]
        return cluster.kubectl("describe", "hpa", "scaled") + log

    try:
        metrics = [each["pods"]["metric"]["name"]
                   for each in cluster.get("hpa", "scaled")["spec"]["metrics"]]  # fmt: skip
        [pod] = pods(cluster, "scaled")
        # As in the other test, the kubelet renews Prometheus' configuration first.
        until("the adapter has the pod's metrics",
              lambda: all(pod["metadata"]["name"] in pod_values(cluster, metric)
                          for metric in metrics),
              300, lambda: shown() + str(query(cluster, prometheus, "up")))  # fmt: skip
        with asking(cluster, "scaled", 200, 100, 64) as found:
            until("a second pod is ready", lambda: ready() == 2, 240, shown)
        print(f"{found['answers']} answers, {len(found['failures'])} failures")
        assert found["failures"] == []
        until("the second pod is gone", lambda: len(pods(cluster, "scaled")) == 1, 240, shown)
        reasons = cluster.kubectl("describe", "hpa", "scaled")
        assert "above target" in reasons, reasons
        assert "All metrics below target" in reasons, reasons
    finally:
        delete(cluster, text)
