"""What `modelpack k8s` prints for operators, by their controllers in a real Kubernetes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import REGISTRY, Cluster, ClusterError, until
from tests.cluster.operators import Operator, define, module_objects
from tests.cluster.workloads import (
    IMAGE,
    TINY,
    address,
    ask,
    delete,
    manifests,
    modelpack,
    pods,
    until_connected,
)
from tests.deployment.schemas import custom_definition

pytestmark = pytest.mark.cluster


@pytest.fixture
def leader_worker_sets(cluster: Cluster) -> Iterator[None]:
    """LeaderWorkerSet's controller, which sets the pods' variables in a webhook."""
    directory = cluster.directory / "operators" / "lws-cmd"
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "apiVersion": "config.lws.x-k8s.io/v1alpha1", "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:9441"}, "metrics": {"bindAddress": "0"},
        "webhook": {"port": 9440, "certDir": str(directory / "certificates")},
        "internalCertManagement": {"enable": False}, "leaderElection": {"leaderElect": False},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    define(cluster, [custom_definition("LeaderWorkerSet")])
    operator = Operator(
        "operators", "lws/cmd", ["--config", "{directory}/config.json"],
        module_objects("LeaderWorkerSet", "config/webhook/manifests.yaml"), 9440,
    )  # fmt: skip
    with operator.running(cluster):
        yield


def is_ready(pod: Any) -> bool:
    conditions = pod["status"].get("conditions", ())
    return ("Ready", "True") in [(each["type"], each["status"]) for each in conditions]


def uids(cluster: Cluster, name: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods(cluster, name)}


def until_group(cluster: Cluster, name: str, old: set[str], seconds: float) -> list[Any]:
    """Return the leader and the workers of a new group, when all are ready."""

    def is_there() -> bool:
        found = pods(cluster, name)
        return (len(found) == 2 and old.isdisjoint(uids(cluster, name))
                and all(map(is_ready, found)))  # fmt: skip

    def shown() -> str:
        logs = cluster.kubectl("logs", "--all-containers", "--tail=40", "-l",
                               f"app.kubernetes.io/name={name}", check=False)  # fmt: skip
        return cluster.kubectl("describe", "pods")[-4000:] + logs

    until("a group of two pods is ready", is_there, seconds, shown)
    until_connected(cluster, name)
    return sorted(pods(cluster, name), key=lambda pod: str(pod["metadata"]["name"]))


def variables(pod: Any) -> dict[str, str]:
    [server] = pod["spec"]["containers"]
    return {each["name"]: each.get("value", "") for each in server["env"]}


def addresses(cluster: Cluster, service: str) -> list[str]:
    """Return the addresses of a Service's pods."""
    found = cluster.get("endpointslices", "-l", f"kubernetes.io/service-name={service}")["items"]
    return [ip for each in found for one in each["endpoints"] for ip in one["addresses"]]


def stand_in(pod: dict[str, Any]) -> None:
    """Change a pod's spec: the stand-in for vLLM in the place of its image and GPUs."""
    [server] = pod["containers"]
    source = Path(__file__).with_name("stand_in.py").read_text()
    server["command"] = ["python3", "-c", source, *server["command"][1:]]
    server["resources"] = {"requests": {"cpu": "100m"}, "limits": {"memory": "256Mi"}}


def about(cluster: Cluster, service: str) -> Any:
    """Return what the stand-in behind a Service says about itself."""
    return json.loads(cluster.run("curl", "-sS", f"http://{address(cluster, service)}/about"))


def kill_server(cluster: Cluster, pod: Any) -> None:
    """Kill the server of a pod, as a node without memory does."""
    for process in cluster.run("pgrep", "-f", "--", "--node-rank").split():
        if pod["metadata"]["uid"] in cluster.run("cat", f"/proc/{process}/cgroup", check=False):
            cluster.run("kill", "-9", process, check=False)


def test_a_group_of_pods_serves_a_model(cluster: Cluster, leader_worker_sets: None) -> None:
    """A leader and a worker with a stand-in for vLLM; the worker fails, and then the leader."""
    name = "divided"
    listed = json.loads(
        modelpack(cluster, "k8s", TINY, "--nodes", "2", "--engine", "vllm", "--image", IMAGE,
                  "--tool-image", IMAGE, "--plain-http", "--name", name, "--json")
    )  # fmt: skip
    templates = listed["items"][0]["spec"]["leaderWorkerTemplate"]
    for which in ("leaderTemplate", "workerTemplate"):
        stand_in(templates[which]["spec"])
    text = json.dumps(listed)
    cluster.kubectl("apply", "-f", "-", input=text)
    try:
        group = until_group(cluster, name, set(), 120)
        leader, worker = group
        assert variables(leader)["LWS_WORKER_INDEX"] == "0"
        assert variables(worker)["LWS_WORKER_INDEX"] == "1"
        for pod in group:
            assert variables(pod)["LWS_LEADER_ADDRESS"] == "divided-nodes-0.divided-nodes.default"
        assert addresses(cluster, name) == [leader["status"]["podIP"]], "only the leader has an API"
        selector = cluster.get("leaderworkerset", f"{name}-nodes")["status"]["hpaPodSelector"]
        [scaled] = cluster.get("pods", "-l", selector)["items"]
        assert scaled["metadata"]["uid"] == leader["metadata"]["uid"], "for an autoscaler"
        assert about(cluster, name)["joined"] == [1]
        for index in (1, 0):
            kill_server(cluster, group[index])
            old = {pod["metadata"]["uid"] for pod in group}
            group = until_group(cluster, name, old, 120)
            assert about(cluster, name)["joined"] == [1]
    finally:
        delete(cluster, text)


@pytest.fixture
def kserve(cluster: Cluster) -> Iterator[None]:
    """KServe's controller, with the configuration and webhooks of an installation."""
    definitions = "config/crd/full"
    names = ("inferenceservices", "clusterservingruntimes", "servingruntimes", "inferencegraphs",
             "trainedmodels", "clusterstoragecontainers")  # fmt: skip
    for name in names:
        where = f"{definitions}/clusterstoragecontainer" if "storage" in name else definitions
        path = f"{where}/serving.kserve.io_{name}.yaml"
        define(cluster, module_objects("InferenceService", path))
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kserve"}}
    cluster.kubectl("apply", "-f", "-", input=json.dumps(namespace))
    for path in ("configmap/inferenceservice.yaml", "runtimes/kserve-huggingfaceserver.yaml"):
        for item in module_objects("InferenceService", f"config/{path}"):
            cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-",
                            input=json.dumps(item))  # fmt: skip
    operator = Operator(
        "operators", "kserve/cmd/manager",
        ["--metrics-addr=0", "--health-probe-addr=127.0.0.1:9443", "--webhook-port=9442"],
        module_objects("InferenceService", "config/webhook/manifests.yaml"), 9442,
        "k8s-webhook-server/serving-certs", {"TMPDIR": "{directory}"},
    )  # fmt: skip
    with operator.running(cluster):
        yield


def serve(cluster: Cluster, text: str, name: str, seconds: int) -> None:
    """Apply the objects of an InferenceService; return when it is ready."""
    cluster.kubectl("apply", "-f", "-", input=text)
    try:
        cluster.kubectl("wait", "--for=condition=Ready", f"inferenceservice/{name}",
                        f"--timeout={seconds}s")  # fmt: skip
    except ClusterError as error:
        shown = [cluster.kubectl("describe", what)[-3000:] for what in ("isvc", "deploy", "pods")]
        logs = (cluster.directory / "beside.log").read_text()[-3000:]
        raise ClusterError("\n".join([str(error), *shown, logs])) from None
    until_connected(cluster, f"{name}-predictor")


def servers(cluster: Cluster, name: str) -> list[Any]:
    """Return the pods of an InferenceService."""
    label = f"serving.kserve.io/inferenceservice={name}"
    found: list[Any] = cluster.get("pods", "-l", label)["items"]
    return found


def test_an_inference_service_answers(cluster: Cluster, kserve: None) -> None:
    """Modelpack's engine, which pulls the model."""
    text = manifests(cluster, TINY, "inferred", "--kserve", "--served-model-name", "tiny")
    serve(cluster, text, "inferred", 180)
    try:
        found = cluster.get("inferenceservice", "inferred")
        assert found["status"]["address"]["url"].startswith("http://inferred-predictor.default.svc")
        asked = ask(cluster, "inferred-predictor", "tiny", "Hello")
        assert asked["usage"]["completion_tokens"] > 0, asked
        [pod] = servers(cluster, "inferred")
        [server] = pod["spec"]["containers"]
        assert server["resources"]["requests"]["cpu"] == "200m"
        assert server["resources"]["limits"]["cpu"] != "1", "KServe's own limit"
        assert pod["spec"]["terminationGracePeriodSeconds"] > 300
    finally:
        delete(cluster, text)


def test_a_serving_runtime_serves_a_mounted_model(cluster: Cluster, kserve: None) -> None:
    """The printed ClusterServingRuntime with a stand-in for vLLM; KServe mounts the image."""
    image, name = f"{REGISTRY}/team/tiny-image", "runtime"
    digest = modelpack(cluster, "convert", TINY, f"{image}:v1", "--to", "image", "--push",
                       "--plain-http").strip()  # fmt: skip
    listed = json.loads(
        modelpack(cluster, "k8s", TINY, "--kserve", "--serving-runtime", "--model-image",
                  f"{image}@{digest}", "--engine", "vllm", "--image", IMAGE, "--plain-http",
                  "--name", name, "--json")
    )  # fmt: skip
    runtime, service = listed["items"]
    stand_in(runtime["spec"])
    printed = service["spec"]["predictor"]["model"]["resources"]
    del printed["limits"]["nvidia.com/gpu"]
    printed["requests"]["cpu"] = "100m"
    printed["requests"]["memory"] = printed["limits"]["memory"] = "256Mi"
    text = json.dumps(listed)
    serve(cluster, text, name, 120)
    try:
        found = about(cluster, f"{name}-predictor")
        for file in ("model.safetensors", "config.json"):
            content = (cluster.directory / "v1" / file).read_bytes()
            assert found["files"][file] == hashlib.sha256(content).hexdigest()
        assert found["read_only"]
        [pod] = servers(cluster, name)
        [server] = pod["spec"]["containers"]
        assert server["resources"]["limits"]["cpu"] == "1024"
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    finally:
        delete(cluster, text)


def test_kserve_selects_its_own_runtime(cluster: Cluster, kserve: None) -> None:
    """That for Hugging Face models, with our arguments; a stand-in takes its server's place."""
    image, name = f"{REGISTRY}/team/tiny-image", "chosen"
    digest = modelpack(cluster, "convert", TINY, f"{image}:v1", "--to", "image", "--push",
                       "--plain-http").strip()  # fmt: skip
    source = Path(__file__).with_name("stand_in.py").read_text()
    command = ["python3", "-c", source, "serve", "/mnt/models"]
    patch = [
        {"op": "replace", "path": "/spec/containers/0/image", "value": IMAGE},
        {"op": "add", "path": "/spec/containers/0/command", "value": command},
        {"op": "add", "path": "/spec/containers/0/ports",
         "value": [{"containerPort": 8000, "protocol": "TCP"}]},
        {"op": "add", "path": "/spec/containers/0/securityContext/runAsUser", "value": 10001},
    ]  # fmt: skip
    cluster.kubectl("patch", "clusterservingruntime", "kserve-huggingfaceserver", "--type=json",
                    "-p", json.dumps(patch))  # fmt: skip
    listed = json.loads(
        modelpack(cluster, "k8s", TINY, "--kserve", "--model-image", f"{image}@{digest}",
                  "--engine", "vllm", "--plain-http", "--name", name, "--json")
    )  # fmt: skip
    printed = listed["items"][0]["spec"]["predictor"]["model"]
    del printed["resources"]["limits"]["nvidia.com/gpu"]
    printed["resources"]["requests"] = {"cpu": "100m", "memory": "256Mi"}
    text = json.dumps(listed)
    serve(cluster, text, name, 120)
    try:
        assert "model.safetensors" in about(cluster, f"{name}-predictor")["files"]
        [pod] = servers(cluster, name)
        assert pod["spec"]["containers"][0]["args"][-len(printed["args"]) :] == printed["args"]
    finally:
        delete(cluster, text)
