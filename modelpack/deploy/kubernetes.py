"""Build the Kubernetes objects that serve a model, sized by its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from modelpack.artifacts.model import CHAT_TEMPLATE, Model
from modelpack.artifacts.reference import Reference
from modelpack.deploy.local_server import PORT
from modelpack.deploy.vllm import VllmSettings
from modelpack.errors import UnsupportedError, UsageError

GIB = 2**30
#: Memory in addition to the weights: KV cache and activations as a share of the weights, and the
#: process in bytes.
_CACHE_SHARE = 0.2
_PROCESS = 2 * GIB
#: The assumed rate of reading weights from a volume, in bytes per second, and the seconds for the
#: rest of the start.
_LOAD_RATE = 100 * 10**6
_START_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Demands:
    """The resources that a server of a model needs; `weights` is in bytes, other sizes in GiB."""

    weights: int

    @property
    def memory(self) -> int:
        """Memory to run on a CPU: weights, KV cache and the process."""
        return _gib(self.weights * (1 + _CACHE_SHARE) + _PROCESS)

    @property
    def host_memory(self) -> int:
        """Host memory to run on GPUs; loading fills the page cache, which counts towards limits."""
        return _gib(self.weights / 2 + 4 * _PROCESS)

    @property
    def disk(self) -> int:
        """Disk for a copy of the model and some free space."""
        return _gib(self.weights * 1.05 + GIB)

    @property
    def start_seconds(self) -> int:
        """The maximum time until the server responds: loading, compiling and warm-up."""
        return _START_SECONDS + math.ceil(self.weights / _LOAD_RATE)

    def gpus(self, memory: int) -> int:
        """Return the number of GPUs of `memory` bytes, a power of two so that it divides heads."""
        needed = math.ceil(self.weights * (1 + _CACHE_SHARE) / (memory * 0.9))
        return 1 << (needed - 1).bit_length() if needed > 1 else 1


def demands_of(model: Model) -> Demands:
    """Return the resources for `model`; raise `UnsupportedError` if it has no weights."""
    weights = sum(file.descriptor.size for file in model.files() if file.format)
    if not weights:
        raise UnsupportedError(f"{model.reference or model.short_id} has no weights to serve")
    return Demands(weights)


def _gib(size: float) -> int:
    return math.ceil(size / GIB)


Engine = Literal["vllm", "modelpack"]
#: The mount path of the volume with the model.
MODEL_MOUNT = "/model"
_SECRET = "/var/run/modelpack/docker"  # noqa: S105 - a directory
PORTS: dict[Engine, int] = {"vllm": 8000, "modelpack": PORT}
_NAMESPACE = "POD_NAMESPACE"
#: The variable of a container for its namespace, which the kubelet fills in.
NAMESPACE = {
    "name": _NAMESPACE,
    "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}},
}
MODEL_VOLUME, _SHARED, _LOGIN, TEMPORARY, _TRUSTED = "model", "shm", "login", "tmp", "registry-ca"
_CA_DIRECTORY, _CA_FILE = "/var/run/modelpack/ca", "ca.crt"
HOME = {"name": "HOME", "value": "/tmp"}  # noqa: S108 - the pod's own
#: Seconds in which a pod that stops still accepts requests, until no node sends it any, and seconds
#: for running requests after that; the kubelet kills the pod some time later.
DRAIN, STOP_TIMEOUT, _KILL = 15, 300, 15
#: Seconds for a worker of a group. It has no requests of its own, and its group cannot start again
#: before it has ended.
_STOP_WORKER = 30
#: Replicas are added above these averages of a pod: waiting requests, and the share of the KV cache
#: in use. Prometheus' adapter serves vLLM's metrics under these names, since `:` is not allowed.
SCALED_BY = {"vllm_num_requests_waiting": "4", "vllm_kv_cache_usage_perc": "800m"}
#: Seconds of lower load before a pod is removed, since a new one takes minutes to load.
_SCALE_DOWN = 600
_COMPONENT = "app.kubernetes.io/component"
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?\Z")
_LONGEST_NAME = 63
_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_SECRET_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\Z")
_LONGEST_SECRET_NAME = 253
#: A LeaderWorkerSet has a headless Service of its own name, so the workload's Service cannot have
#: that name. The names of its StatefulSets and their revisions are longer, and limited too.
_NODES, LONGEST_NODES_NAME = "nodes", 40
#: Variables that LeaderWorkerSet's controller sets in each container. (LWS 0.8, "LWS_WORKER_INDEX")
_LEADER, _RANK = "$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)"
#: The fields of the leader's container that need its API, or that drain it.
_LEADER_ONLY = frozenset(("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle"))
#: What the Pod Security Standard "restricted" demands of containers, and a file system to read.
CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
#: The user of Modelpack's image.
USER = 10001


@dataclass(frozen=True, slots=True)
class Access:
    """How pods reach the registry: http, hosts with unchecked certificates, an authority (PEM)."""

    plain_http: bool = False
    insecure: tuple[str, ...] = ()
    authority: str | None = None

    @property
    def options(self) -> list[str]:
        """The options of a command that pulls in a pod."""
        made = ["--plain-http"] if self.plain_http else []
        for host in self.insecure:
            made += ["--insecure", host]
        return made + (["--ca-file", f"{_CA_DIRECTORY}/{_CA_FILE}"] if self.authority else [])


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, and how a cluster serves it.

    `engine_image` contains the server. `tool_image` contains modelpack, which pulls the model into
    the pod, unless `model_image` is set: an OCI image with the model's files under /models, which
    is mounted. `pull_secret` names a secret of type kubernetes.io/dockerconfigjson. With `gpus` 0,
    the server runs on a CPU. `cpus` are requested for the server, which may use more. `user` is the
    user id of all containers; 0 is root. `served_name` is the model name in API requests. `hosts`
    are host names that clients use in addition to those of the Service. With `max_replicas`, the
    number of pods follows the load, from `replicas` up. With `monitored`, Prometheus' operator
    scrapes the pods. With several `nodes`, a replica is a group of that many pods with `gpus` each:
    the layers are divided among the pods, and each layer among the GPUs of a pod.
    """

    model: Model
    reference: Reference
    name: str
    engine: Engine
    engine_image: str
    tool_image: str
    gpus: int
    served_name: str
    model_image: str | None = None
    namespace: str | None = None
    replicas: int = 1
    pull_secret: str | None = None
    access: Access = Access()
    cpus: Decimal = Decimal(1)
    user: int = USER
    hosts: tuple[str, ...] = ()
    max_replicas: int | None = None
    monitored: bool = False
    nodes: int = 1

    def __post_init__(self) -> None:
        """Raise `UsageError` for an invalid Kubernetes name and for conflicting options."""
        longest = _LONGEST_NAME if self.nodes == 1 else LONGEST_NODES_NAME
        for what, text, most in (
            ("name", self.name, longest),
            ("namespace", self.namespace, _LONGEST_NAME),
        ):
            if text is not None and (not _NAME.match(text) or len(text) > most):
                raise UsageError(
                    f"{what} {text!r} is not a valid Kubernetes name: expected a letter, "
                    f"then up to {most - 1} of a-z, 0-9 and -"
                )
        if self.pull_secret is not None:
            check_secret("--pull-secret", self.pull_secret)
        if self.max_replicas is not None and not 1 <= self.replicas <= self.max_replicas:
            raise UsageError(
                f"--max-replicas {self.max_replicas} with --replicas {self.replicas}: expected "
                "at least 1 replica, and no more than the maximum"
            )
        if self.engine == "modelpack" and (self.model_image or self.nodes > 1):
            option = "--model-image" if self.model_image else "--nodes"
            if self.model.config.format == "gguf":
                raise UsageError(
                    f"{option} cannot be used: {self.reference.familiar} is a GGUF file, which "
                    "only --engine modelpack serves",
                    hint=f"leave out {option}",
                )
            why = "" if self.model_image else ": it runs on one node"
            raise UsageError(
                f"--engine modelpack cannot be combined with {option}{why}",
                hint=f"leave out {option}, or give --engine vllm",
            )
        if self.engine == "vllm" and not self.gpus:
            raise UsageError(
                "--engine vllm requires a GPU", hint="give --engine modelpack to run on a CPU"
            )
        if self.model.config.format in ("dduf", "diffusers"):
            raise UsageError(
                f"{self.reference.familiar} cannot be served: it is a DDUF file, a model that "
                "generates images",
                hint="unpack it with `modelpack bundle`, and open the DDUF file with diffusers",
            )
        if self.engine == "vllm" and self.model.config.format == "gguf":
            raise UsageError(
                f"--engine vllm cannot serve {self.reference.familiar}: it is a GGUF file",
                hint="give --engine modelpack",
            )

    @property
    def demands(self) -> Demands:
        """The resources that the model needs."""
        return demands_of(self.model)

    @property
    def shares_memory(self) -> bool:
        """Whether the processes of a pod need more shared memory than a container has.

        Those of vLLM may, also with one GPU: its executor decides whether workers are processes.
        """
        return self.engine == "vllm" or self.gpus > 1

    @property
    def most_replicas(self) -> int:
        """The number of pods, or of groups of them, at most."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def pinned(self) -> str:
        """The reference of the model by digest."""
        return f"{self.reference.name}@{self.model.digest}"

    @property
    def labels(self) -> dict[str, str]:
        """The labels of all objects."""
        return {"app.kubernetes.io/name": self.name, _COMPONENT: "model"}

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of an object."""
        made: dict[str, Any] = {"name": self.name, "labels": self.labels}
        if self.namespace:
            made["namespace"] = self.namespace
        made["annotations"] = {"modelpack.artifacts.model": self.pinned}
        return made


def check_secret(option: str, name: str) -> None:
    """Raise `UsageError` if `name` cannot be that of a Secret."""
    if not _SECRET_NAME.match(name) or len(name) > _LONGEST_SECRET_NAME:
        raise UsageError(
            f"{option} {name[:300]!r} is not a valid name of a Secret: expected up to "
            f"{_LONGEST_SECRET_NAME} of a-z, 0-9, - and ., with a letter or a digit at each end"
        )


def default_name(reference: Reference) -> str:
    """Return the default object name: the last part of the repository as a Kubernetes name."""
    last = reference.repository.rpartition("/")[2].lower()
    text = re.sub(r"[^a-z0-9]+", "-", last).strip("-")
    return (text if text[:1].isalpha() else f"m-{text}")[:63].rstrip("-")


def deployment(workload: Workload) -> list[dict[str, Any]]:
    """Return the Deployment, the Service and the objects that the workload's options add.

    These are a ConfigMap if the registry has an authority, a PodDisruptionBudget for several pods,
    a HorizontalPodAutoscaler and a ServiceMonitor. For several nodes, a LeaderWorkerSet takes the
    place of the Deployment.
    """
    service: dict[str, Any] = {
        "selector": workload.labels,
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    }
    return [
        _one_node(workload) if workload.nodes == 1 else _leader_worker_set(workload),
        manifest("v1", "Service", workload, service),
        *registry_authority(workload),
        *_disruption_budget(workload),
        *_autoscaler(workload),
        *_monitor(workload),
    ]


def _one_node(workload: Workload) -> dict[str, Any]:
    pod = {**pod_spec(workload), "topologySpreadConstraints": spread(workload.labels)}
    spec: dict[str, Any] = {
        **_replicas(workload),
        "selector": {"matchLabels": workload.labels},
        "strategy": update_strategy(workload),
        "progressDeadlineSeconds": workload.demands.start_seconds * 2,
        "template": {"metadata": {"labels": workload.labels}, "spec": pod},
    }
    return manifest("apps/v1", "Deployment", workload, spec)


def spread(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the constraint that puts the pods of a Deployment on different nodes, if it can."""
    return [{
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(labels)},
        # An update counts its new pods only: the old ones leave.
        "matchLabelKeys": ["pod-template-hash"],
    }]  # fmt: skip


def update_strategy(workload: Workload) -> dict[str, Any]:
    """Return how an update replaces pods: on GPUs, old ones go first, since few are free."""
    if not workload.gpus:
        return {"type": "RollingUpdate"}
    if workload.most_replicas < 2:
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


def _leader_worker_set(workload: Workload) -> dict[str, Any]:
    """Return groups of pods that start together: a leader with the API, and its workers.

    The processes of a group cannot replace one of them, so the whole group restarts with any pod.
    """
    leader = {"metadata": {"labels": workload.labels}, "spec": pod_spec(workload)}
    worker = {
        "metadata": {"labels": _worker_labels(workload)},
        "spec": pod_spec(workload, is_worker=True),
    }
    spec: dict[str, Any] = {
        **_replicas(workload),
        "leaderWorkerTemplate": {
            "size": workload.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": leader,
            "workerTemplate": worker,
        },
    }
    made = manifest("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", workload, spec)
    made["metadata"]["name"] = f"{workload.name}-{_NODES}"
    return made


def _replicas(workload: Workload) -> dict[str, int]:
    """Return the number, unless an autoscaler has it: applying again must not reset it."""
    return {} if workload.max_replicas else {"replicas": workload.replicas}


def _worker_labels(workload: Workload) -> dict[str, str]:
    """Return labels that the Service does not select: workers have no API."""
    return {**workload.labels, _COMPONENT: "model-worker"}


def _disruption_budget(workload: Workload) -> list[dict[str, Any]]:
    """Return the budget that lets nodes drain one pod at a time; a single pod may always leave.

    Without one of its pods a group restarts, so all pods of groups count.
    """
    if workload.most_replicas < 2:
        return []
    selector: dict[str, Any] = {"matchLabels": workload.labels}
    if workload.nodes > 1:
        # Not the name alone: a gateway's pods have it and a budget of their own, and a pod with two
        # budgets cannot be evicted.
        components = [labels[_COMPONENT] for labels in (workload.labels, _worker_labels(workload))]
        others = {name: value for name, value in workload.labels.items() if name != _COMPONENT}
        selector = {
            "matchLabels": others,
            "matchExpressions": [{"key": _COMPONENT, "operator": "In", "values": components}],
        }
    spec = {"maxUnavailable": 1, "selector": selector}
    return [manifest("policy/v1", "PodDisruptionBudget", workload, spec)]


def _autoscaler(workload: Workload) -> list[dict[str, Any]]:
    if workload.max_replicas is None:
        return []
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": workload.name}
    if workload.nodes > 1:
        target = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet",
                  "name": f"{workload.name}-{_NODES}"}  # fmt: skip
    spec = {
        "scaleTargetRef": target,
        "minReplicas": workload.replicas,
        "maxReplicas": workload.max_replicas,
        "metrics": [
            {"type": "Pods", "pods": {"metric": {"name": name},
                                      "target": {"type": "AverageValue", "averageValue": value}}}
            for name, value in SCALED_BY.items()
        ],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": _SCALE_DOWN}},
    }  # fmt: skip
    return [manifest("autoscaling/v2", "HorizontalPodAutoscaler", workload, spec)]


def _monitor(workload: Workload) -> list[dict[str, Any]]:
    if not workload.monitored:
        return []
    spec = {
        "selector": {"matchLabels": workload.labels},
        "endpoints": [{"port": "http", "path": "/metrics", "interval": "15s"}],
    }
    return [manifest("monitoring.coreos.com/v1", "ServiceMonitor", workload, spec)]


def manifest(version: str, kind: str, workload: Workload, spec: dict[str, Any]) -> dict[str, Any]:
    """Return an object of the workload, with its metadata."""
    return {"apiVersion": version, "kind": kind, "metadata": workload.metadata(), "spec": spec}


def registry_authority(workload: Workload) -> list[dict[str, Any]]:
    """Return the ConfigMap with the authority of the registry, if pods that pull need one."""
    if not workload.access.authority or workload.model_image:
        return []
    metadata = {**workload.metadata(), "name": f"{workload.name}-{_TRUSTED}"}
    data = {_CA_FILE: workload.access.authority}
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}]


def pod_spec(
    workload: Workload,
    container: str = "server",
    service: str | None = None,
    *,
    is_worker: bool = False,
) -> dict[str, Any]:
    """Return the pod spec: the server as `container`, and the init container that pulls the model.

    `service` is the name of the Service of the pod (None: the name of the workload). `is_worker`
    is for pods of a group besides its leader.
    """
    made = pod_basis(workload)
    if not workload.model_image:
        made["initContainers"] = [_pull(workload)]
    server = _server(workload, container, service or workload.name)
    made["containers"] = [_worker(server) if is_worker else server]
    if is_worker:
        made["terminationGracePeriodSeconds"] = _STOP_WORKER
    if workload.engine == "vllm":
        # The first process of a namespace ignores SIGTERM until it has a handler, which vLLM sets
        # after its slow imports; a pod that stops before would keep its GPUs until it is killed.
        made["shareProcessNamespace"] = True
    made["volumes"] = _volumes(workload)
    return made


def pod_basis(workload: Workload) -> dict[str, Any]:
    """Return the fields of a pod spec besides its containers and volumes."""
    made: dict[str, Any] = {
        "automountServiceAccountToken": False,
        # The variables of a Service named `vllm` would be read as vLLM's own, such as VLLM_PORT.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": DRAIN + STOP_TIMEOUT + _KILL,
    }
    if workload.user:
        made["securityContext"] = {
            "runAsNonRoot": True,
            "runAsUser": workload.user,
            "runAsGroup": workload.user,
            "fsGroup": workload.user,
        }
    if workload.pull_secret:
        made["imagePullSecrets"] = [{"name": workload.pull_secret}]
    return made


def _server(workload: Workload, name: str, service: str) -> dict[str, Any]:
    mounts = [{"name": MODEL_VOLUME, "mountPath": MODEL_MOUNT, "readOnly": True}]
    if workload.engine == "modelpack":
        del mounts[0]["readOnly"]  # the locks of the store are files
    if workload.shares_memory:
        mounts.append({"name": _SHARED, "mountPath": "/dev/shm"})  # noqa: S108 - the pod's own
    mounts.append({"name": TEMPORARY, "mountPath": "/tmp"})  # noqa: S108 - the pod's own
    return {
        "name": name,
        "image": workload.engine_image,
        **_command(workload, service),
        "ports": [{"name": "http", "containerPort": PORTS[workload.engine]}],
        "resources": resources(workload),
        "volumeMounts": mounts,
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **_probes(workload),
    }


def _worker(server: dict[str, Any]) -> dict[str, Any]:
    """Return the container of a pod without an API, made from that of its leader.

    The StatefulSet of the workers belongs to the leader, so an update stops them after it.
    """
    made = {name: value for name, value in server.items() if name not in _LEADER_ONLY}
    command = list(made["command"])
    command[command.index("--node-rank") + 1] = _RANK
    return {**made, "command": [*command, "--headless"]}


def _command(workload: Workload, service: str) -> dict[str, Any]:
    port = str(PORTS[workload.engine])
    if workload.engine == "modelpack":
        device = "gpu" if workload.gpus else "cpu"
        command = ["modelpack", "serve", workload.pinned, "--served-model-name",
                   workload.served_name, "--host", "0.0.0.0", "--allow-anonymous", "--port", port,  # noqa: S104
                   "--device", device, "--drain", str(DRAIN),
                   "--stop-timeout", str(STOP_TIMEOUT)]  # fmt: skip
        if workload.monitored:
            command.append("--allow-remote-metrics")
        if workload.gpus > 1:
            command += ["--tensor-parallel-size", str(workload.gpus)]
        store = {"name": "MODELPACK_STORE", "value": f"{MODEL_MOUNT}/store"}
        return {
            "command": [*command, *host_options(workload, service)],
            "env": [store, NAMESPACE, HOME],
        }
    where = f"{MODEL_MOUNT}/models" if workload.model_image else f"{MODEL_MOUNT}/bundle/model"
    nodes = []
    if workload.nodes > 1:
        nodes = ["--pipeline-parallel-size", str(workload.nodes), "--nnodes", str(workload.nodes),
                 "--node-rank", "0", "--master-addr", _LEADER]  # fmt: skip
    return {
        "command": ["vllm", "serve", where, "--served-model-name", workload.served_name,
                    "--port", port, "--tensor-parallel-size", str(workload.gpus),
                    *nodes, "--shutdown-timeout", str(STOP_TIMEOUT), *vllm_flags(workload, where)],
        # All files are in the volume, so vLLM must not contact the hub. PyTorch asks for the user's
        # name, which the image may not know.
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "USER", "value": "vllm"}, HOME],
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN}}},
    }  # fmt: skip


def host_options(workload: Workload, service: str) -> list[str]:
    """Return the options that accept the names of a Service, in a container with `NAMESPACE`.

    Source: Kubernetes, "DNS for Services and Pods".
    """
    within = f"{service}.$({_NAMESPACE})"
    names = (service, within, f"{within}.svc", f"{within}.svc.cluster.local", *workload.hosts)
    return [word for name in names for word in ("--allow-host", name)]


def vllm_flags(workload: Workload, directory: str) -> list[str]:
    """Return vLLM's options for the packaged settings of a model in `directory`."""
    settings = VllmSettings.of(workload.model)
    # A bundle renames the chat template to CHAT_TEMPLATE; an image keeps the names of the model.
    name = settings.chat_template if workload.model_image else CHAT_TEMPLATE
    options = settings.options(f"{directory}/{name}")
    return [f"--{option}={value}" for option, value in options.items()]


def _pull(workload: Workload) -> dict[str, Any]:
    """Return the init container, which pulls the model by digest and resumes after a restart."""
    remote = workload.access.options
    command = ["modelpack", "pull", workload.pinned, *remote]
    if workload.engine == "vllm":
        command = ["modelpack", "bundle", "--pull", "--force", workload.pinned,
                   f"{MODEL_MOUNT}/bundle", *remote]  # fmt: skip
    env = [{"name": "MODELPACK_STORE", "value": f"{MODEL_MOUNT}/store"}, HOME]
    mounts: list[dict[str, Any]] = [
        {"name": MODEL_VOLUME, "mountPath": MODEL_MOUNT},
        {"name": TEMPORARY, "mountPath": "/tmp"},  # noqa: S108 - the pod's own
    ]
    if workload.access.authority:
        mounts.append({"name": _TRUSTED, "mountPath": _CA_DIRECTORY, "readOnly": True})
    if workload.pull_secret:
        env.append({"name": "DOCKER_CONFIG", "value": _SECRET})
        mounts.append({"name": _LOGIN, "mountPath": _SECRET, "readOnly": True})
    return {
        "name": "pull",
        "image": workload.tool_image,
        "command": command,
        "env": env,
        "resources": {
            "requests": {"cpu": "500m", "memory": "512Mi",
                         "ephemeral-storage": f"{workload.demands.disk}Gi"},
            "limits": {"memory": "1Gi"},
        },
        "volumeMounts": mounts,
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }  # fmt: skip


def _volumes(workload: Workload) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = []
    if workload.model_image:
        image = {"reference": workload.model_image, "pullPolicy": "IfNotPresent"}
        volumes.append({"name": MODEL_VOLUME, "image": image})
    else:
        limit = f"{workload.demands.disk}Gi"
        volumes.append({"name": MODEL_VOLUME, "emptyDir": {"sizeLimit": limit}})
    if workload.shares_memory:
        # NCCL and the workers communicate through it; the default size is 64 MiB.
        volumes.append({"name": _SHARED, "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}})
    if workload.pull_secret and not workload.model_image:
        items = [{"key": ".dockerconfigjson", "path": "config.json"}]
        secret = {"secretName": workload.pull_secret, "items": items}
        volumes.append({"name": _LOGIN, "secret": secret})
    volumes.append({"name": TEMPORARY, "emptyDir": {}})
    if workload.access.authority and not workload.model_image:
        found = {"name": f"{workload.name}-{_TRUSTED}"}
        volumes.append({"name": _TRUSTED, "configMap": found})
    return volumes


def resources(workload: Workload) -> dict[str, Any]:
    """Return the requests and limits of the server."""
    demands = workload.demands
    memory = f"{demands.host_memory if workload.gpus else demands.memory}Gi"
    cpus = f"{int(workload.cpus * 1000)}m" if workload.cpus % 1 else str(int(workload.cpus))
    made = {"requests": {"cpu": cpus, "memory": memory}, "limits": {"memory": memory}}
    if workload.gpus:
        made["limits"]["nvidia.com/gpu"] = str(workload.gpus)
    return made


def _probes(workload: Workload) -> dict[str, Any]:
    period = 10
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": period}
    failures = -(-workload.demands.start_seconds // period)
    return {
        # During loading, only the startup probe runs. Afterwards, a server that is not ready gets
        # no requests. It is restarted if it does not answer for half a minute.
        "startupProbe": {**health, "failureThreshold": failures},
        "readinessProbe": {**health, "timeoutSeconds": 5},
        "livenessProbe": {**health, "timeoutSeconds": 10, "failureThreshold": 3},
    }
