"""What `modelpack k8s` prints, in a real Kubernetes: one node, our registry, our image.

`make test-cluster` runs these tests; it needs root. A first run builds Kubernetes and containerd
from their Go modules, which takes a quarter of an hour of a processor.
"""

from __future__ import annotations

import hashlib
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import REGISTRY, Cluster, ClusterError, until
from tests.cluster.node import ADDRESS
from tests.cluster.workloads import (
    IMAGE,
    SMOLLM2,
    TINY,
    address,
    apply,
    ask,
    asking,
    delete,
    manifests,
    modelpack,
    notes,
    package,
    pod_names,
    pods,
    traces,
    until_gateways_know,
    until_ready,
    until_replaced,
)
from tests.deployment.schemas import CUSTOM, custom_definition
from tests.interop.test_vllm_cpu import PROMPT, environment, expected, files  # noqa: F401
from tests.peers import require

pytestmark = pytest.mark.cluster


def test_a_chat_through_the_service(cluster: Cluster) -> None:
    text = manifests(cluster, SMOLLM2, "smollm2")
    apply(cluster, text, "smollm2", 300)
    try:
        answer = ask(cluster, "smollm2", SMOLLM2, "What is the capital of France? One word.")
        assert "Paris" in answer["choices"][0]["message"]["content"]
        [pod] = pods(cluster, "smollm2")
        digest = modelpack(cluster, "manifest", SMOLLM2)
        assert digest  # the store has it, so the digest below is that of the package
        assert "@sha256:" in pod["spec"]["initContainers"][0]["command"][2]
    finally:
        delete(cluster, text)


def test_a_rolling_update_fails_no_request(cluster: Cluster) -> None:
    """3,000 requests, while both pods are replaced by pods of another version of the model."""
    before, after = (
        manifests(cluster, f"{REGISTRY}/team/tiny:{version}", "tiny", "--replicas", "2",
                  "--served-model-name", "tiny")
        for version in ("v1", "v2")
    )  # fmt: skip
    apply(cluster, before, "tiny")
    old = {pod["metadata"]["name"] for pod in pods(cluster, "tiny")}
    with asking(cluster, "tiny") as found:
        apply(cluster, after, "tiny", 280)
        until_replaced(cluster, "tiny", "model", old)
    assert found["failures"] == []
    assert found["answers"] >= 3000
    assert len(pods(cluster, "tiny")) == 2
    delete(cluster, after)


def test_a_rolling_update_behind_a_gateway_fails_no_request(cluster: Cluster) -> None:
    """3,000 requests, while the pods of the model and then those of the gateway are replaced."""
    before, after = (
        manifests(cluster, f"{REGISTRY}/team/tiny:{version}", "behind", "--replicas", "2",
                  "--served-model-name", "behind", "--gateway")
        for version in ("v1", "v2")
    )  # fmt: skip
    apply(cluster, before, "behind")
    until_ready(cluster, "behind-gateway")
    servers, gateways = (pod_names(cluster, "behind", part) for part in ("model", "gateway"))
    assert (len(servers), len(gateways)) == (2, 2)
    with asking(cluster, "behind") as found:
        apply(cluster, after, "behind", 280)
        until_replaced(cluster, "behind", "model", servers)
        cluster.kubectl("rollout", "restart", "deployment/behind-gateway")
        until_ready(cluster, "behind-gateway")
        until_replaced(cluster, "behind", "gateway", gateways)
    delete(cluster, after)
    print(f"{found['answers']} answers, {len(found['failures'])} failures")
    assert found["failures"] == []
    assert found["answers"] >= 3000


def test_gateways_send_a_prompt_to_the_same_pod(cluster: Cluster) -> None:
    """Both gateways, each asked over connections that the Service spreads, with an API key."""
    keys = cluster.directory / "keys.toml"
    key = modelpack(cluster, "gateway", "key", "alice", "--keys", str(keys)).strip()
    cluster.kubectl("create", "secret", "generic", "alike-keys", f"--from-file={keys}")
    text = manifests(cluster, TINY, "alike", "--replicas", "2",
                     "--served-model-name", "alike", "--gateway", "--keys-secret",
                     "alike-keys")  # fmt: skip
    apply(cluster, text, "alike")
    until_ready(cluster, "alike-gateway")
    until_gateways_know(cluster, "alike", 2)
    try:
        for wrong, code in (("", "missing_api_key"), ("sk-wrong", "invalid_api_key")):
            refused = ask(cluster, "alike", "alike", "Hello", 2, key=wrong)
            assert refused["error"]["code"] == code, refused
        for prompt in range(8):
            for _ in range(6):
                asked = ask(
                    cluster, "alike", "alike", f"Hello {prompt}", 2, f"prompt-{prompt}", key
                )
                assert asked["usage"]["completion_tokens"] == 2
        gateways = pod_names(cluster, "alike", "gateway")
        found = {pod: traces(cluster, pod, "prompt-") for pod in gateways}
        assert len(found) == 2
        assert all(found.values()), "the Service spreads connections"
        chosen = [(each["caller"], each["upstream"]) for of in found.values() for each in of]
        assert len(chosen) == 48
        why = "\n".join(notes(cluster, pod) for pod in gateways)
        assert len(set(chosen)) == 8, f"a prompt has two upstreams:\n{chosen}\n{why}"
        assert len({upstream for _, upstream in chosen}) == 2
    finally:
        delete(cluster, text)


#: A stand-in for vLLM that says what it finds in the directory of the model, and is healthy.
STAND_IN = """
import hashlib, http.server, os, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*")):
    if path.is_file():
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name, flush=True)
print("read-only:", bool(os.statvfs(sys.argv[1]).f_flag & os.ST_RDONLY), flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("", 8000), Healthy).serve_forever()
"""


def test_an_image_volume_has_the_files_of_the_model(cluster: Cluster) -> None:
    """The pod that is printed for vLLM, with a stand-in for vLLM, which needs a GPU."""
    image = f"{REGISTRY}/team/tiny-image"
    digest = modelpack(cluster, "convert", TINY, f"{image}:v1", "--to",
                       "image", "--push", "--plain-http").strip()  # fmt: skip
    text = modelpack(
        cluster, "k8s", TINY, "--image", IMAGE, "--plain-http", "--name",
        "mounted", "--model-image", f"{image}@{digest}", "--cpus", "0.2", "--json",
    )  # fmt: skip
    listed = json.loads(text)
    [server] = listed["items"][0]["spec"]["template"]["spec"]["containers"]
    where = server["command"][2]
    server["command"] = ["python3", "-c", STAND_IN, where]
    del server["resources"]["limits"]["nvidia.com/gpu"]
    server["resources"]["requests"]["memory"] = server["resources"]["limits"]["memory"] = "256Mi"
    text = json.dumps(listed)
    apply(cluster, text, "mounted")
    try:
        told = cluster.kubectl("logs", "deployment/mounted").splitlines()
        found = dict(line.split(maxsplit=1)[::-1] for line in told[:-1])
        files = cluster.directory / "v1"
        for name in ("model.safetensors", "config.json"):
            assert found[name] == hashlib.sha256((files / name).read_bytes()).hexdigest()
        assert told[-1] == "read-only: True", told
    finally:
        delete(cluster, text)


def on_a_cpu(text: str, vllm: Path) -> str:
    """Return the objects with the node's vLLM for CPUs in the place of vLLM's image and its GPU."""
    listed = json.loads(text)
    pod = listed["items"][0]["spec"]["template"]["spec"]
    [server] = pod["containers"]
    server["command"] = [str(vllm / "bin" / "python"), str(vllm / "bin" / "vllm"),
                         *server["command"][1:], "--max-model-len", "256", "--enforce-eager",
                         "--dtype", "float32"]  # fmt: skip
    server["resources"] = {"requests": {"cpu": "200m"}, "limits": {"memory": "6Gi"}}
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    server["env"] += [{"name": name, "value": value} for name, value in own.items()]
    python = (vllm / "bin" / "python").resolve().parents[1]
    libraries = Path("/usr/lib", f"{platform.machine()}-linux-gnu")
    lscpu = require("lscpu")  # vLLM for CPUs runs it
    for index, where in enumerate((vllm, python, libraries, lscpu)):
        pod["volumes"].append({"name": f"host-{index}", "hostPath": {"path": str(where)}})
        server["volumeMounts"].append(
            {"name": f"host-{index}", "mountPath": str(where), "readOnly": True}
        )
    return json.dumps(listed)


@pytest.mark.parametrize("delivery", ["pulled", "mounted"])
def test_vllm_serves_the_model_of_a_pod(
    cluster: Cluster,
    environment: Path,  # noqa: F811
    files: Path,  # noqa: F811
    expected: list[int],  # noqa: F811
    delivery: str,
) -> None:
    """The pods that are printed for vLLM, but for the GPU; tokens are those of mlx-lm."""
    model, name = f"{REGISTRY}/team/llama-{delivery}", f"vllm-{delivery}"
    package(cluster, f"{model}:v1", "--safetensors-dir", str(files))
    options = ["--image", IMAGE, "--tool-image", IMAGE, "--plain-http", "--name", name, "--json"]
    if delivery == "mounted":
        digest = modelpack(cluster, "convert", f"{model}:v1", f"{model}-image:v1", "--to",
                           "image", "--push", "--plain-http").strip()  # fmt: skip
        options += ["--model-image", f"{model}-image@{digest}"]
    text = on_a_cpu(
        modelpack(cluster, "k8s", f"{model}:v1", *options), environment.parent.absolute()
    )
    apply(cluster, text, name, 560)
    try:
        body = {"model": f"{model}:v1", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True,
                "temperature": 0, "return_token_ids": True}  # fmt: skip
        told = cluster.run(
            "curl",
            "-s",
            "-m",
            "120",
            "-H",
            "Content-Type: application/json",
            "-d",
            json.dumps(body),
            f"http://{address(cluster, name)}/v1/completions",
        )
        [choice] = json.loads(told)["choices"]
        assert choice["token_ids"] == expected
    finally:
        delete(cluster, text)


def is_known(cluster: Cluster, definition: dict[str, Any]) -> bool:
    found = cluster.get("crd", definition["metadata"]["name"])["status"].get("conditions") or ()
    return ("Established", "True") in [(each["type"], each["status"]) for each in found]


def test_the_server_takes_the_objects_of_operators(cluster: Cluster) -> None:
    """With the definitions of LeaderWorkerSet, KServe and Prometheus' operator, by dry run."""
    for kind in CUSTOM:
        definition = custom_definition(kind)
        cluster.kubectl("create", "-f", "-", input=json.dumps(definition))
        until(f"{kind} is known", partial(is_known, cluster, definition), 60, lambda: "")
    tiny = TINY
    # Nothing is mounted, and this host does not answer.
    image = f"{ADDRESS}:9/team/tiny-image@sha256:{'a' * 64}"
    vllm = ("--engine", "vllm", "--model-image", image)
    for options, kinds in (
        (("--monitor", "--gateway"), {"deployment", "service", "poddisruptionbudget",
                                      "servicemonitor"}),
        (("--engine", "vllm", "--nodes", "2", "--max-replicas", "2"),
         {"leaderworkerset", "service", "horizontalpodautoscaler", "poddisruptionbudget"}),
        (("--kserve",), {"inferenceservice"}),
        ((*vllm, "--kserve"), {"inferenceservice"}),
        ((*vllm, "--kserve", "--serving-runtime"), {"inferenceservice", "clusterservingruntime"}),
    ):  # fmt: skip
        text = modelpack(cluster, "k8s", tiny, "--engine", "modelpack", "--plain-http",
                         "--name", "dry", *options)  # fmt: skip
        told = cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=text)
        assert {line.partition(".")[0].partition("/")[0] for line in told.splitlines()} == kinds
        wrong = text.replace("\nspec:\n", "\nspec:\n  unheardOf: 1\n", 1)
        assert wrong != text
        refused = cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=wrong, check=False)
        assert len(refused.splitlines()) < len(told.splitlines())


def test_a_killed_server_is_restarted(cluster: Cluster) -> None:
    """A server that the node kills, as for too much memory, comes back with the files it has."""
    text = manifests(cluster, TINY, "killed", "--served-model-name", "tiny")
    apply(cluster, text, "killed")
    try:
        [pod] = pods(cluster, "killed")
        uid = pod["metadata"]["uid"]
        for process in cluster.run("pgrep", "-f", "modelpack serve").split():
            if uid in cluster.run("cat", f"/proc/{process}/cgroup", check=False):
                cluster.run("kill", "-9", process)

        def is_back() -> bool:
            [status] = pods(cluster, "killed")[0]["status"]["containerStatuses"]
            return bool(status["restartCount"] == 1 and status["ready"])

        until("the server is restarted", is_back, 90, lambda: cluster.kubectl("get", "pods"))
        [again] = pods(cluster, "killed")
        assert again["metadata"]["uid"] == uid
        assert ask(cluster, "killed", "tiny", "Hello")["usage"]["completion_tokens"] > 0
    finally:
        delete(cluster, text)


def why_pulls_failed(cluster: Cluster, name: str) -> str:
    """Return the termination messages of the pods' init containers."""
    found = [pod["status"].get("initContainerStatuses", ()) for pod in pods(cluster, name)]
    states = [
        s.get(which, {}) for of_pod in found for s in of_pod for which in ("state", "lastState")
    ]
    return "\n".join(state.get("terminated", {}).get("message", "") for state in states)


def test_a_wrong_digest_leaves_the_old_pod_serving(cluster: Cluster) -> None:
    text = manifests(cluster, TINY, "wrong", "--served-model-name", "tiny")
    apply(cluster, text, "wrong")
    try:
        [old] = pods(cluster, "wrong")
        digest = old["spec"]["initContainers"][0]["command"][2].partition("@")[2]
        cluster.kubectl("apply", "-f", "-", input=text.replace(digest, f"sha256:{'0' * 64}"))

        def is_refused() -> bool:
            return "no such manifest" in why_pulls_failed(cluster, "wrong")

        until("the new pod says why", is_refused, 60, lambda: cluster.kubectl("describe", "pods"))
        assert ask(cluster, "wrong", "tiny", "Hello")["usage"]["completion_tokens"] > 0
    finally:
        delete(cluster, text)


def test_a_model_that_somebody_else_signed_does_not_reach_the_cluster(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--verify-key` verifies before it prints; pods pull the digest that was verified."""
    monkeypatch.setenv("COSIGN_PASSWORD", "secret")
    directory = cluster.directory / "keys"
    directory.mkdir()
    reference = f"{REGISTRY}/team/signed:v1"
    package(cluster, reference, "--safetensors-dir", str(cluster.directory / "v1"))
    for name in ("ours", "theirs"):
        modelpack(cluster, "keygen", str(directory / name))
    ours, theirs = (directory / f"{name}.pub" for name in ("ours", "theirs"))
    modelpack(cluster, "sign", reference, "--plain-http", "--key", str(ours.with_suffix(".key")))
    with pytest.raises(ClusterError, match="signature"):
        manifests(cluster, reference, "signed", "--verify-key", str(theirs))
    text = manifests(cluster, reference, "signed", "--verify-key", str(ours))
    apply(cluster, text, "signed")
    delete(cluster, text)


def test_the_restricted_policy_admits_the_pods(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "strict")
    cluster.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    text = manifests(cluster, TINY, "tiny", "--namespace", "strict")
    cluster.kubectl("apply", "-f", "-", input=text)
    try:
        until_ready(cluster, "tiny", namespace="strict")
    finally:
        delete(cluster, text)
    refused = manifests(cluster, TINY, "root", "--namespace", "strict", "--user", "0")
    cluster.kubectl("apply", "-f", "-", input=refused)
    try:

        def is_refused() -> bool:
            return "violates PodSecurity" in cluster.kubectl("describe", "rs", "-n", "strict")

        until("root is refused", is_refused, 60, lambda: cluster.kubectl("get", "rs", "-A"))
    finally:
        delete(cluster, refused)


def test_a_node_that_drains_evicts_one_pod_at_a_time(cluster: Cluster) -> None:
    """By the PodDisruptionBudget: the second of two pods stays until the first is replaced."""
    text = manifests(cluster, TINY, "evicted", "--replicas", "2")
    apply(cluster, text, "evicted")
    first, second = (pod["metadata"]["name"] for pod in pods(cluster, "evicted"))

    def evict(name: str) -> str:
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        try:
            return cluster.kubectl(
                "create", "--raw", f"/api/v1/namespaces/default/pods/{name}/eviction", "-f", "-",
                input=json.dumps(eviction),
            )  # fmt: skip
        except ClusterError as error:
            return str(error)

    def budget() -> int:
        return int(cluster.get("pdb", "evicted")["status"]["disruptionsAllowed"])

    try:
        until("a pod may be evicted", lambda: budget() == 1, 30, lambda: "")
        assert "Success" in evict(first)
        assert "would violate the pod's disruption budget" in evict(second)
        until("another pod takes its place", lambda: budget() == 1, 120, lambda: "")
        assert "Success" in evict(second)
    finally:
        delete(cluster, text)


def test_the_server_takes_the_autoscaler(cluster: Cluster) -> None:
    text = manifests(cluster, TINY, "taken", "--replicas", "2", "--max-replicas", "4")
    told = cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=text)
    for kind in ("deployment.apps", "service", "horizontalpodautoscaler.autoscaling",
                 "poddisruptionbudget.policy"):  # fmt: skip
        assert f"{kind}/taken created (server dry run)" in told
