"""`modelpack k8s`: its objects satisfy the schemas of Kubernetes and depend on the model."""

from __future__ import annotations

import copy
import io
import itertools
import json
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import requests
import yaml
from hypothesis import given
from hypothesis import strategies as st

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.deploy.kubernetes import GIB, Demands, default_name
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.models import FIXTURES, package, tiny_gguf, tiny_safetensors

VERSIONS = ("1.35", "1.37")
GPU = "nvidia.com/gpu"
COMPONENT = "app.kubernetes.io/component"
IMAGE = "registry.example/team/tiny-image@sha256:" + "a" * 64


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A model in a registry: its reference and digest."""
    root = tmp_path_factory.mktemp("k8s")
    with registry() as server:
        name = f"{server.host}/team/Tiny_Model:v1".lower()
        made = package(name, tiny_safetensors(root), LayoutStore(root / "store"), push=True)
        yield name, str(made.digest)


def objects(*arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = list(yaml.safe_load_all(succeed("k8s", *arguments).out))
    return found


def pod(found: list[dict[str, Any]]) -> dict[str, Any]:
    [made] = [item for item in found if item["kind"] == "Deployment"]
    spec: dict[str, Any] = made["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--gpus", "4", "--pull-secret", "login", "--namespace", "models", "--replicas", "2"),
        ("--model-image", IMAGE, "--pull-secret", "login"),
        ("--engine", "modelpack"),
        ("--engine", "modelpack", "--gpus", "2", "--plain-http", "--cpus", "2.5", "--user", "0"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40] or "plain",
)
def test_the_schemas_of_kubernetes_allow_it(
    published: tuple[str, str], arguments: tuple[str, ...], version: str
) -> None:
    found = objects(published[0], *arguments)
    budget = ["PodDisruptionBudget"] if "--replicas" in arguments else []
    assert [item["kind"] for item in found] == ["Deployment", "Service", *budget]
    for item in found:
        kubernetes_validate.validate(item, version, strict=True)


def test_pods_satisfy_the_restricted_policy(published: tuple[str, str]) -> None:
    """Pod Security Standards, "Restricted": what it demands of a pod and its containers."""
    shapes = [
        pod(objects(published[0], *options))
        for options in ((), ("--engine", "modelpack"), ("--model-image", IMAGE))
    ]
    shapes += [item["spec"]["template"]["spec"] for item in objects(published[0], "--gateway")
               if item["kind"] == "Deployment"]  # fmt: skip
    for spec in shapes:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        for container in containers:
            locked = container["securityContext"]
            assert locked["allowPrivilegeEscalation"] is False
            assert locked["capabilities"] == {"drop": ["ALL"]}
            assert locked["seccompProfile"] == {"type": "RuntimeDefault"}
            assert locked["readOnlyRootFilesystem"] is True
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
        assert {"name": "tmp", "emptyDir": {}} in spec["volumes"]
    as_root = pod(objects(published[0], "--user", "0"))
    assert "securityContext" not in as_root


def test_a_pod_drains_before_it_stops(published: tuple[str, str]) -> None:
    """Requests that arrive after the stop are answered, and streams may run for five minutes."""
    ours = pod(objects(published[0], "--engine", "modelpack"))
    [server] = ours["containers"]
    command = server["command"]
    drain, timeout = (
        int(command[command.index(option) + 1]) for option in ("--drain", "--stop-timeout")
    )
    assert (drain, timeout) == (15, 300)
    assert ours["terminationGracePeriodSeconds"] > drain + timeout
    assert "lifecycle" not in server
    theirs = pod(objects(published[0]))
    [server] = theirs["containers"]
    assert server["lifecycle"] == {"preStop": {"sleep": {"seconds": 15}}}
    assert server["command"][server["command"].index("--shutdown-timeout") + 1] == "300"
    assert theirs["terminationGracePeriodSeconds"] > 315


def test_a_server_that_does_not_answer_is_restarted_within_a_minute(
    published: tuple[str, str],
) -> None:
    [server] = pod(objects(published[0]))["containers"]
    probe = server["livenessProbe"]
    assert probe["httpGet"] == {"path": "/health", "port": "http"}
    assert probe["failureThreshold"] * probe["periodSeconds"] + probe["timeoutSeconds"] <= 60


@pytest.mark.parametrize("version", VERSIONS)
def test_an_autoscaler_owns_the_number_of_pods(published: tuple[str, str], version: str) -> None:
    """It scales by vLLM's metrics, with `_` for `:`, as the rule for the adapter in docs/ does."""
    found = objects(published[0], "--replicas", "2", "--max-replicas", "5", "--name", "tiny")
    kinds = {item["kind"]: item for item in found}
    assert "replicas" not in kinds["Deployment"]["spec"]
    scaler = kinds["HorizontalPodAutoscaler"]
    kubernetes_validate.validate(scaler, version, strict=True)
    spec = scaler["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 5)
    target = spec["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "tiny")
    named = {item["pods"]["metric"]["name"] for item in spec["metrics"]}
    assert named == {"vllm_num_requests_waiting", "vllm_kv_cache_usage_perc"}


def test_nodes_drain_one_of_several_pods_at_a_time(published: tuple[str, str]) -> None:
    deployment, _, budget = objects(published[0], "--replicas", "2")
    assert budget["kind"] == "PodDisruptionBudget"
    assert budget["spec"]["maxUnavailable"] == 1
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    scaled = objects(published[0], "--max-replicas", "2")
    assert "PodDisruptionBudget" in [item["kind"] for item in scaled]


def test_pods_of_a_deployment_are_on_different_nodes_where_possible(
    published: tuple[str, str],
) -> None:
    found = objects(published[0], "--replicas", "2", "--gateway")
    deployments = [item for item in found if item["kind"] == "Deployment"]
    assert len(deployments) == 2
    for deployment in deployments:
        template = deployment["spec"]["template"]
        [constraint] = template["spec"]["topologySpreadConstraints"]
        assert constraint["topologyKey"] == "kubernetes.io/hostname"
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway", "one node may run them all"
        assert constraint["labelSelector"] == deployment["spec"]["selector"]


@pytest.mark.parametrize(("engine", "nodes"), [("vllm", 1), ("vllm", 2), ("modelpack", 1)])
@pytest.mark.parametrize(
    "scale", [("--replicas", "1"), ("--replicas", "2"), ("--max-replicas", "2")]
)
@pytest.mark.parametrize("gateway", [(), ("--gateway",)])
def test_a_pod_has_one_budget(
    published: tuple[str, str],
    engine: str,
    nodes: int,
    scale: tuple[str, str],
    gateway: tuple[str, ...],
) -> None:
    """The API refuses to evict a pod that two budgets select."""
    options = ("--engine", engine, "--nodes", str(nodes), *scale, *gateway)
    found = objects(published[0], *options)
    selectors = [one["spec"]["selector"] for one in found if one["kind"] == "PodDisruptionBudget"]
    pods = 0
    for item in found:
        group = item["spec"].get("leaderWorkerTemplate", item["spec"])
        for name in ("template", "leaderTemplate", "workerTemplate"):
            if name in group:
                labels = group[name]["metadata"]["labels"]
                is_alone = scale == ("--replicas", "1") and labels[COMPONENT] != "gateway"
                assert sum(selects(one, labels) for one in selectors) == (0 if is_alone else 1)
                pods += 1
    assert pods == nodes + len(gateway)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes, with the operator In, selects labels."""
    expressions = selector.get("matchExpressions", [])
    assert {one["operator"] for one in expressions} <= {"In"}
    return selector["matchLabels"].items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in expressions
    )


def test_prometheus_finds_the_port_of_the_service(published: tuple[str, str]) -> None:
    """A server without keys refuses /metrics to other machines unless it is told to."""
    options = ("--engine", "modelpack")
    found = objects(published[0], *options, "--monitor")
    kinds = {item["kind"]: item for item in found}
    service, monitor = kinds["Service"], kinds["ServiceMonitor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    selected = monitor["spec"]["selector"]["matchLabels"]
    assert selected.items() <= service["metadata"]["labels"].items()
    assert "--allow-remote-metrics" in pod(found)["containers"][0]["command"]
    for other in (options, ("--monitor",)):
        [server] = pod(objects(published[0], *other))["containers"]
        assert "--allow-remote-metrics" not in server["command"]


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        (("--engine", "modelpack", "--replicas", "2"), {"type": "RollingUpdate"}),
        (("--gpus", "1"), {"type": "Recreate"}),
        (("--gpus", "1", "--replicas", "0"), {"type": "Recreate"}),
        (("--gpus", "1", "--max-replicas", "2"),
         {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),
    ],
)  # fmt: skip
def test_an_update_needs_no_more_gpus(
    published: tuple[str, str], options: tuple[str, ...], strategy: dict[str, Any]
) -> None:
    assert objects(published[0], *options)[0]["spec"]["strategy"] == strategy


@pytest.mark.parametrize(("engine", "port"), [("vllm", 8000), ("modelpack", 12434)])
def test_a_gateway_stands_between_the_service_and_the_pods(
    published: tuple[str, str], engine: str, port: int
) -> None:
    options = ("--engine", engine, "--replicas", "2", "--monitor", "--name", "tiny")
    found = objects(published[0], *options, "--gateway", "--allow-host", "ai.example")
    named = {(item["kind"], item["metadata"]["name"]): item for item in found}
    assert {*named} == {
        ("Deployment", "tiny"), ("Service", "tiny-servers"), ("PodDisruptionBudget", "tiny"),
        ("ServiceMonitor", "tiny"), ("Deployment", "tiny-gateway"), ("Service", "tiny"),
        ("PodDisruptionBudget", "tiny-gateway"), ("ServiceMonitor", "tiny-gateway"),
    }  # fmt: skip
    for service, workload in (("tiny", "tiny-gateway"), ("tiny-servers", "tiny")):
        template = named["Deployment", workload]["spec"]["template"]
        labels = template["metadata"]["labels"]
        others = named["Deployment", {"tiny": "tiny-gateway"}.get(workload, "tiny")]
        for kind, name in (("Service", service), ("PodDisruptionBudget", workload)):
            selector = named[kind, name]["spec"]["selector"]
            selected = selector.get("matchLabels", selector).items()
            assert selected <= labels.items()
            assert not selected <= others["spec"]["template"]["metadata"]["labels"].items()
        # Prometheus finds the Service by its labels.
        selected = named["ServiceMonitor", workload]["spec"]["selector"]["matchLabels"].items()
        assert selected <= named["Service", service]["metadata"]["labels"].items()
    headless = named["Service", "tiny-servers"]["spec"]
    assert headless["clusterIP"] == "None"
    assert "publishNotReadyAddresses" not in headless
    spec = named["Deployment", "tiny-gateway"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    command = container["command"]
    values = dict(itertools.pairwise(command))
    # A name without a port: DNS has none, so the port is that of the container.
    assert values["--upstream"] == f"dns+http://tiny-servers:{port}"
    server = named["Deployment", "tiny"]["spec"]["template"]["spec"]["containers"][0]
    assert server["ports"] == [{"name": "http", "containerPort": port}]
    assert values["--balance"] == "prefix"
    assert values["--port"] == str(container["ports"][0]["containerPort"])
    assert {"tiny", "ai.example"} <= {w for _, w in itertools.pairwise(command)}
    assert spec["terminationGracePeriodSeconds"] > 315
    assert run(*command[1:2], "--help").code == 0


def test_the_gateways_command_is_ours(published: tuple[str, str]) -> None:
    """Up to the address, which is taken: the options are parsed before."""
    spec = objects(published[0], "--gateway", "--name", "tiny")[2]["spec"]["template"]["spec"]
    command = spec["containers"][0]["command"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host, port = taken.getsockname()
        words = [{"0.0.0.0": host, "12435": str(port)}.get(word, word) for word in command[1:]]
        done = run(*words)
    assert done.code != 0
    assert f"{host}:{port}" in done.err


def test_a_gateway_requires_the_keys_in_a_secret(published: tuple[str, str]) -> None:
    options = ("--gateway", "--keys-secret", "team-keys", "--monitor", "--name", "tiny")
    found = objects(published[0], *options)
    named = {(item["kind"], item["metadata"]["name"]): item["spec"] for item in found}
    spec = named["Deployment", "tiny-gateway"]["template"]["spec"]
    [container] = spec["containers"]
    command = container["command"]
    file = Path(command[command.index("--keys") + 1])
    assert "--allow-anonymous" not in command
    [mount] = [one for one in container["volumeMounts"] if one["mountPath"] == str(file.parent)]
    assert mount["readOnly"]
    [volume] = [one for one in spec["volumes"] if one["name"] == mount["name"]]
    items = [{"key": "keys.toml", "path": file.name}]
    assert volume["secret"] == {"secretName": "team-keys", "items": items}
    # The gateway's metrics name its keys, so Prometheus needs one; those of the pods need none.
    gateways, pods = (named["ServiceMonitor", n]["endpoints"][0] for n in ("tiny-gateway", "tiny"))
    credentials = {"name": "team-keys", "key": "metrics"}
    assert gateways["authorization"] == {"credentials": credentials}
    assert "authorization" not in pods


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        (("--gpus", "1"), True),  # vLLM may run its worker as a process, also a single one
        (("--gpus", "2"), True),
        (("--engine", "modelpack"), False),
        (("--engine", "modelpack", "--gpus", "2"), True),
    ],
)
def test_processes_share_more_memory_than_a_container_has(
    published: tuple[str, str], options: tuple[str, ...], shared: bool
) -> None:
    spec = pod(objects(published[0], *options))
    mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert ("/dev/shm" in mounts) == shared
    if shared:
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_vllm_can_be_stopped_while_it_starts(published: tuple[str, str]) -> None:
    """It has no handler of SIGTERM then, and the first process of a namespace ignores it."""
    assert pod(objects(published[0]))["shareProcessNamespace"] is True
    assert "shareProcessNamespace" not in pod(objects(published[0], "--engine", "modelpack"))


def leader_worker_set(found: list[dict[str, Any]]) -> dict[str, Any]:
    [made] = [item for item in found if item["kind"] == "LeaderWorkerSet"]
    return made


def test_a_model_is_divided_among_nodes(published: tuple[str, str]) -> None:
    """The leader is node 0 and has the API; workers get their rank from the controller."""
    found = objects(published[0], "--nodes", "3", "--gpus", "4", "--name", "tiny")
    assert [item["kind"] for item in found] == ["LeaderWorkerSet", "Service"]
    made, service = found
    # The controller makes a headless Service of the set's own name.
    assert made["metadata"]["name"] == "tiny-nodes"
    assert service["metadata"]["name"] == "tiny"
    group = made["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 3
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    leader, worker = group["leaderTemplate"], group["workerTemplate"]
    selected = service["spec"]["selector"].items()
    assert selected <= leader["metadata"]["labels"].items()
    assert not selected <= worker["metadata"]["labels"].items()
    commands = []
    for template in (leader, worker):
        spec = template["spec"]
        [pull], [server] = spec["initContainers"], spec["containers"]
        assert pull["command"][4] == f"{published[0].rpartition(':')[0]}@{published[1]}"
        assert server["resources"]["limits"]["nvidia.com/gpu"] == "4"
        assert {"name": "shm", "mountPath": "/dev/shm"} in server["volumeMounts"]
        commands.append(server["command"])
    assert "readinessProbe" in leader["spec"]["containers"][0]
    assert not {"ports", "readinessProbe", "livenessProbe", "startupProbe", "lifecycle"} & {
        *worker["spec"]["containers"][0]
    }
    # An update stops the leader first, so a worker that stops has no requests to finish.
    assert leader["spec"]["terminationGracePeriodSeconds"] == 330
    assert worker["spec"]["terminationGracePeriodSeconds"] == 30
    first, other = commands
    assert other == [*(w if w != "0" else "$(LWS_WORKER_INDEX)" for w in first), "--headless"]
    options = dict(itertools.pairwise(first))
    assert options["--node-rank"] == "0"
    assert options["--master-addr"] == "$(LWS_LEADER_ADDRESS)"
    assert options["--nnodes"] == options["--pipeline-parallel-size"] == "3"
    assert options["--tensor-parallel-size"] == "4"


def test_groups_of_nodes_scale_and_drain(published: tuple[str, str]) -> None:
    options = ("--nodes", "2", "--replicas", "2", "--max-replicas", "3", "--name", "tiny")
    kinds = {item["kind"]: item for item in objects(published[0], *options)}
    made = kinds["LeaderWorkerSet"]
    assert "replicas" not in made["spec"]
    target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": made["apiVersion"], "kind": made["kind"],
                      "name": made["metadata"]["name"]}  # fmt: skip
    plain = objects(published[0], "--nodes", "2")
    assert leader_worker_set(plain)["spec"]["replicas"] == 1


@pytest.mark.parametrize(("nodes", "gpus"), [(2, "2"), (3, "1")])
def test_each_node_has_gpus_for_its_share(
    published: tuple[str, str], nodes: int, gpus: str
) -> None:
    """On one node these weights, 172 bytes, would need four of such GPUs."""
    size = ("--gpu-memory", "100")
    assert pod(objects(published[0], *size))["containers"][0]["resources"]["limits"][GPU] == "4"
    made = leader_worker_set(objects(published[0], "--nodes", str(nodes), *size))
    template = made["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    assert template["spec"]["containers"][0]["resources"]["limits"][GPU] == gpus


@pytest.mark.parametrize(
    ("options", "cpus"), [((), "1"), (("--cpus", "4"), "4"), (("--cpus", "0.25"), "250m")]
)
def test_the_request_for_cpus(
    published: tuple[str, str], options: tuple[str, ...], cpus: str
) -> None:
    [server] = pod(objects(published[0], *options))["containers"]
    assert server["resources"]["requests"]["cpu"] == cpus
    assert "cpu" not in server["resources"]["limits"]


def test_pods_trust_the_authority_that_the_command_trusts(
    published: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    options = ["--ca-file", str(tmp_path / "ca.pem"), "--insecure", "registry.example:5000"]
    deployment, _, trusted = objects(published[0], *options, "--name", "tiny")
    assert trusted["kind"] == "ConfigMap"
    assert trusted["metadata"]["name"] == "tiny-registry-ca"
    assert trusted["data"] == {"ca.crt": (tmp_path / "ca.pem").read_text()}
    kubernetes_validate.validate(trusted, "1.37", strict=True)
    spec = pod([deployment])
    [pull] = spec["initContainers"]
    assert pull["command"][-4:] == [
        "--insecure", "registry.example:5000", "--ca-file", "/var/run/modelpack/ca/ca.crt"
    ]  # fmt: skip
    mount = {"name": "registry-ca", "mountPath": "/var/run/modelpack/ca", "readOnly": True}
    assert mount in pull["volumeMounts"]
    volume = {"name": "registry-ca", "configMap": {"name": "tiny-registry-ca"}}
    assert volume in spec["volumes"]
    assert objects(published[0], *options, "--kserve")[1]["kind"] == "ConfigMap"


def test_a_gguf_model_is_not_for_vllm(tmp_path: Path) -> None:
    with registry() as server:
        name = f"{server.host}/team/tiny:v1"
        package(name, tiny_gguf(tmp_path), LayoutStore(tmp_path / "store"), push=True)
        refused = run("k8s", name, "--engine", "vllm")
        assert refused.code == 2
        assert "it is a GGUF file" in refused.err
        assert "--engine modelpack" in refused.err
        for option, value in (("--nodes", "2"), ("--model-image", IMAGE)):
            refused = run("k8s", name, option, value)
            assert refused.code == 2
            assert "is a GGUF file, which only --engine modelpack serves" in refused.err
            assert refused.err.endswith(f"hint: leave out {option}\n")
        assert objects(name) == objects(name, "--engine", "modelpack")


def test_a_model_of_images_is_not_served(tmp_path: Path) -> None:
    with registry() as server:
        name, path = f"{server.host}/team/images:v1", FIXTURES / "models/tiny-dduf/tiny.dduf"
        request = modelpack.PackageRequest(dduf=path)
        modelpack.package(name, request, push=True, store=LayoutStore(tmp_path / "store"))
        refused = run("k8s", name)
        assert refused.code == 2
        assert "a model that generates images" in refused.err


def test_a_model_is_no_image_to_mount(published: tuple[str, str]) -> None:
    refused = run("k8s", published[0], "--model-image", published[0])
    assert refused.code == 1
    assert "is not a container image" in refused.err
    assert "convert --to image" in refused.err
    missing = run("k8s", published[0], "--model-image", f"{published[0]}-absent")
    assert missing.code == 3


def test_an_image_that_cannot_be_reached_is_noted(published: tuple[str, str]) -> None:
    found = succeed("k8s", published[0], "--model-image", IMAGE)
    assert f"warning: {IMAGE} was not checked" in found.err


def test_the_schemas_would_refuse_what_is_wrong(published: tuple[str, str]) -> None:
    good = objects(published[0])[0]
    for path, value in (("replicas", "two"), ("replica", 1)):
        wrong = copy.deepcopy(good)
        wrong["spec"][path] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_the_pod_pulls_by_digest_and_serves_what_it_pulled(published: tuple[str, str]) -> None:
    name, digest = published
    spec = pod(objects(name, "--pull-secret", "login", "--plain-http"))
    pinned = f"{name.rpartition(':')[0]}@{digest}"
    [pull] = spec["initContainers"]
    assert pull["command"] == [
        "modelpack", "bundle", "--pull", "--force", pinned, "/model/bundle", "--plain-http"
    ]  # fmt: skip
    [login] = [volume for volume in spec["volumes"] if volume["name"] == "login"]
    assert login["secret"]["items"] == [{"key": ".dockerconfigjson", "path": "config.json"}]
    assert {"name": "DOCKER_CONFIG", "value": "/var/run/modelpack/docker"} in pull["env"]
    [server] = spec["containers"]
    assert server["command"][:4] == ["vllm", "serve", "/model/bundle/model", "--served-model-name"]
    assert server["command"][4] == name
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(("kserve", "service"), [(False, "tiny"), (True, "tiny-predictor")])
def test_modelpack_answers_to_the_names_of_the_service(
    published: tuple[str, str], kserve: bool, service: str
) -> None:
    options = ["--engine", "modelpack", "--name", "tiny", "--allow-host", ".example.com"]
    made = objects(published[0], *options, *(["--kserve"] if kserve else []))
    spec = made[0]["spec"]["predictor"] if kserve else pod(made)
    [server] = spec["containers"]
    command = server["command"]
    assert [name for word, name in itertools.pairwise(command) if word == "--allow-host"] == [
        service, f"{service}.$(POD_NAMESPACE)", f"{service}.$(POD_NAMESPACE).svc",
        f"{service}.$(POD_NAMESPACE).svc.cluster.local", ".example.com",
    ]  # fmt: skip
    field = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert {"name": "POD_NAMESPACE", "valueFrom": field} in server["env"]


def test_the_commands_in_the_pod_are_ours(published: tuple[str, str], tmp_path: Path) -> None:
    """Run the commands of the init containers here, with a directory as the volume."""
    for engine in ("vllm", "modelpack"):
        spec = pod(objects(published[0], "--engine", engine))
        command = [
            word.replace("/model/", f"{tmp_path}/{engine}/")
            for word in spec["initContainers"][0]["command"]
        ]
        assert command[0] == "modelpack"
        (tmp_path / engine).mkdir()
        succeed(*command[1:], "--store", str(tmp_path / engine / "store"))
        succeed(*command[1:], "--store", str(tmp_path / engine / "store"))  # the pod restarts
    assert (tmp_path / "vllm" / "bundle" / "model" / "config.json").is_file()
    store = LayoutStore(tmp_path / "modelpack" / "store")
    served = pod(objects(published[0], "--engine", "modelpack"))["containers"][0]["command"]
    assert modelpack.inspect(served[2], store=store).digest
    assert run(*served[1:3], "--help").code == 0


def test_an_image_is_mounted_and_nothing_is_pulled(published: tuple[str, str]) -> None:
    spec = pod(objects(published[0], "--model-image", IMAGE))
    assert "initContainers" not in spec
    image = {"reference": IMAGE, "pullPolicy": "IfNotPresent"}
    assert {"name": "model", "image": image} in spec["volumes"]
    assert spec["containers"][0]["command"][2] == "/model/models"


def test_an_image_that_convert_makes_has_its_files_where_the_pod_looks(
    published: tuple[str, str],
) -> None:
    image = f"{published[0].rpartition(':')[0]}:image"
    digest = succeed("convert", published[0], image, "--to", "image", "--push").out
    pinned = f"{image.rpartition(':')[0]}@{digest}"
    spec = pod(objects(published[0], "--model-image", pinned))
    [mounted] = [volume["image"] for volume in spec["volumes"] if "image" in volume]
    assert mounted["reference"] == pinned
    [server] = spec["containers"]
    below = Path(server["command"][2]).relative_to(server["volumeMounts"][0]["mountPath"])
    files = {name for name in names_in(pinned) if not name.endswith("/")}
    assert f"{below}/config.json" in files
    assert f"{below}/model.safetensors" in files


def names_in(image: str) -> set[str]:
    """Return the paths in the layers of an image for this architecture, read from its registry."""
    host, _, rest = image.partition("/")
    repository, _, digest = rest.partition("@")
    address = f"http://{host}/v2/{repository}"
    accept = {"Accept": "application/vnd.oci.image.index.v1+json, "
              "application/vnd.oci.image.manifest.v1+json"}  # fmt: skip
    manifest = requests.get(f"{address}/manifests/{digest}", headers=accept, timeout=10).json()
    if "manifests" in manifest:
        child = manifest["manifests"][0]["digest"]
        manifest = requests.get(f"{address}/manifests/{child}", headers=accept, timeout=10).json()
    found: set[str] = set()
    for layer in manifest["layers"]:
        blob = requests.get(f"{address}/blobs/{layer['digest']}", timeout=10).content
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            found |= {entry.name for entry in tar}
    return found


def test_what_an_inference_service_says(published: tuple[str, str]) -> None:
    [mounted] = objects(published[0], "--kserve", "--model-image", IMAGE)
    assert mounted["spec"]["predictor"]["model"]["storageUri"] == f"oci+native://{IMAGE}"
    [pulled] = objects(published[0], "--kserve", "--engine", "modelpack")
    predictor = pulled["spec"]["predictor"]
    assert predictor["containers"][0]["name"] == "kserve-container"
    assert predictor["initContainers"][0]["command"][1] == "pull"


def test_kserve_does_not_limit_cpus(published: tuple[str, str]) -> None:
    """By default, it limits a container without a limit of CPU to one core, and --cpus may be 2."""
    options = ("--kserve", "--cpus", "2")
    for more in (
        ("--engine", "modelpack"), ("--model-image", IMAGE),
        ("--model-image", IMAGE, "--serving-runtime"),
    ):  # fmt: skip
        predictor = objects(published[0], *options, *more)[-1]["spec"]["predictor"]
        server = predictor["model"] if "model" in predictor else predictor["containers"][0]
        assert server["resources"]["requests"]["cpu"] == "2"
        assert server["resources"]["limits"]["cpu"] == "1024"
    assert "cpu" not in pod(objects(published[0]))["containers"][0]["resources"]["limits"]


def test_an_update_of_an_inference_service_needs_no_free_gpu(published: tuple[str, str]) -> None:
    [one] = objects(published[0], "--kserve", "--model-image", IMAGE)
    assert one["spec"]["predictor"]["deploymentStrategy"] == {"type": "Recreate"}
    [two] = objects(published[0], "--kserve", "--model-image", IMAGE, "--replicas", "2")
    strategy = two["spec"]["predictor"]["deploymentStrategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    [plain] = objects(published[0], "--kserve", "--engine", "modelpack")
    assert "deploymentStrategy" not in plain["spec"]["predictor"]


def test_a_serving_runtime_runs_the_image_on_the_mounted_model(published: tuple[str, str]) -> None:
    """KServe mounts the model, and merges the pod of the runtime with that of the service."""
    options = ("--model-image", IMAGE, "--name", "tiny", "--image", "registry.example/vllm:v1")
    runtime, service = objects(
        published[0], "--kserve", "--serving-runtime", *options, "--namespace", "models"
    )
    assert runtime["kind"] == "ClusterServingRuntime"
    assert "namespace" not in runtime["metadata"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"] == "models.tiny-runtime"
    assert model["storageUri"] == f"oci+native://{IMAGE}"
    assert model["modelFormat"] in runtime["spec"]["supportedModelFormats"]
    [server] = runtime["spec"]["containers"]
    [deployed] = pod(objects(published[0], *options))["containers"]
    assert server["name"] == "kserve-container"
    assert server["image"] == "registry.example/vllm:v1"
    assert server["command"][:3] == ["vllm", "serve", "/mnt/models"]
    assert server["command"][3:] == deployed["command"][3:]
    mounted = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert {*mounted.values()} == {"/dev/shm", "/tmp"}
    assert {*mounted} == {volume["name"] for volume in runtime["spec"]["volumes"]}
    assert service["spec"]["predictor"]["securityContext"]["runAsUser"] == 10001


def test_a_serving_runtime_serves_names_that_contain_the_path(published: tuple[str, str]) -> None:
    """Only the path of the model changes, and that of its chat template."""
    name = "registry.example/model/models:v1"
    options = ("--model-image", IMAGE, "--name", "tiny", "--served-model-name", name)
    runtime, _ = objects(published[0], "--kserve", "--serving-runtime", *options)
    assert runtime["metadata"]["name"] == "tiny-runtime"
    [server] = runtime["spec"]["containers"]
    assert server["command"][2:5] == ["/mnt/models", "--served-model-name", name]


def test_json_is_a_list(published: tuple[str, str]) -> None:
    value = json.loads(succeed("k8s", published[0], "--json").stdout)
    assert value["kind"] == "List"
    assert value["items"] == objects(published[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--name", "Tiny"), "'Tiny' is not a valid Kubernetes name"),
        (("--namespace", "a_b"), "'a_b' is not a valid Kubernetes name"),
        (
            ("--engine", "modelpack", "--model-image", IMAGE),
            "cannot be combined with --model-image",
        ),
        (("--gpus", "0"), "requires a GPU"),
        (("--nodes", "2", "--gpus", "0"), "requires a GPU"),
        (("--nodes", "0"), "--nodes"),
        (("--gateway", "--name", "x" * 56), "too long for --gateway"),
        (("--gateway", "--kserve"), "--gateway cannot be combined with --kserve"),
        (("--keys-secret", "keys"), "--keys-secret requires --gateway"),
        (("--gateway", "--keys-secret", ""), "--keys-secret '' is not a valid name of a Secret"),
        (("--gateway", "--keys-secret", "Bad Name"), "'Bad Name' is not a valid name of a Secret"),
        (("--gateway", "--keys-secret", "a..b"), "'a..b' is not a valid name of a Secret"),
        (("--pull-secret", "a\n"), "is not a valid name of a Secret"),
        (("--serving-runtime",), "--serving-runtime requires --kserve"),
        (("--kserve", "--serving-runtime"), "--serving-runtime requires --model-image"),
        (("--nodes", "2", "--engine", "modelpack"), "cannot be combined with --nodes"),
        (("--nodes", "2", "--kserve"), "--nodes cannot be combined with --kserve"),
        (("--nodes", "2", "--name", "x" * 41), "up to 39 of a-z"),
        (("--cpus", "0"), "--cpus"),
        (("--replicas", "3", "--max-replicas", "2"), "--max-replicas 2 with --replicas 3"),
        (("--replicas", "0", "--max-replicas", "2"), "at least 1 replica"),
        (("--kserve", "--monitor"), "--kserve cannot be combined"),
        (("--helm", "one", "--kustomize", "two"), "--helm cannot be combined with --kustomize"),
        (("--ca-file", "/dev/null/none"), "--ca-file"),
        (("--client-cert", __file__), "--client-cert cannot be used"),
        (("--gpu-memory", "many"), "many"),
    ],
)
def test_what_makes_no_sense_is_refused(
    published: tuple[str, str], arguments: tuple[str, ...], words: str
) -> None:
    result = run("k8s", published[0], *arguments)
    assert result.code == 2
    assert words in result.err


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("ai/smollm2:135M-Q4", "smollm2"),
        ("registry.example/a/b_c.d", "b-c-d"),
        ("registry.example/a/7b", "m-7b"),
        ("registry.example/a/" + "x" * 90, "x" * 63),
    ],
)
def test_names(reference: str, name: str) -> None:
    assert default_name(Reference.parse(reference)) == name


@pytest.mark.parametrize(
    ("weights", "gpus"), [(16 * 10**9, 1), (70 * 10**9, 2), (140 * 10**9, 4), (800 * 10**9, 16)]
)
def test_gpus_follow_the_size(weights: int, gpus: int) -> None:
    assert Demands(weights).gpus(80 * 10**9) == gpus


@given(st.integers(1, 10**13))
def test_demands_hold_the_weights(weights: int) -> None:
    demands = Demands(weights)
    assert demands.memory * GIB > weights
    assert demands.disk * GIB > weights
    assert demands.start_seconds > 300
    assert demands.gpus(80 * 10**9) * 80 * 10**9 > weights
