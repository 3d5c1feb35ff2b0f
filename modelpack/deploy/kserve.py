"""Build the objects of KServe that serve a model: an InferenceService, and its runtime."""

from __future__ import annotations

from typing import Any

from modelpack.deploy.kubernetes import (
    MODEL_VOLUME,
    Workload,
    manifest,
    pod_spec,
    registry_authority,
    resources,
    update_strategy,
    vllm_flags,
)
from modelpack.errors import UsageError

#: The container name that KServe expects for the server.
_CONTAINER = "kserve-container"
#: The path at which KServe mounts the model of a `storageUri`.
_KSERVE_MOUNT = "/mnt/models"
_MODEL_FORMAT = "safetensors"
#: KServe limits a container that has no limit of CPU to one core. No node has as many as these.
_CPU_LIMIT = "1024"


def inference_service(workload: Workload, *, own_runtime: bool = False) -> list[dict[str, Any]]:
    """Return the InferenceService, and a ConfigMap if the registry has an authority.

    With `own_runtime`, a ClusterServingRuntime comes first, which runs the workload's image on a
    mounted model; otherwise KServe selects one of its own runtimes. Raises `UsageError` if no model
    image is mounted, since the pods need no runtime then.
    """
    timeout = workload.demands.start_seconds
    predictor: dict[str, Any] = {"minReplicas": workload.replicas, "timeout": timeout}
    if workload.gpus:  # KServe's own strategy starts the new pod first, which needs a free GPU
        predictor["deploymentStrategy"] = update_strategy(workload)
    runtime = []
    if own_runtime:
        if not workload.model_image:
            raise UsageError(
                "--serving-runtime requires --model-image: pods that pull need no runtime",
                hint="leave out --serving-runtime",
            )
        runtime = [_serving_runtime(workload)]
        predictor["model"] = {
            "modelFormat": {"name": _MODEL_FORMAT},
            "runtime": runtime[0]["metadata"]["name"],
            "storageUri": f"oci+native://{workload.model_image}",
            "resources": _resources(workload),
        }
        pod = pod_spec(workload)
        predictor |= {name: pod[name] for name in pod if name not in ("containers", "volumes")}
    elif workload.model_image:
        predictor["model"] = {
            "modelFormat": {"name": "huggingface"},
            "storageUri": f"oci+native://{workload.model_image}",
            "args": [f"--model_name={workload.served_name}",
                     f"--tensor-parallel-size={workload.gpus}",
                     *vllm_flags(workload, _KSERVE_MOUNT)],
            "resources": _resources(workload),
        }  # fmt: skip
        if workload.pull_secret:
            predictor["imagePullSecrets"] = [{"name": workload.pull_secret}]
    else:
        predictor |= pod_spec(workload, _CONTAINER, f"{workload.name}-predictor")
        predictor["containers"][0]["resources"] = _resources(workload)
    metadata = workload.metadata()
    # A start takes minutes, which exceeds the limits of Knative's scaling by requests.
    metadata["annotations"]["serving.kserve.io/deploymentMode"] = "Standard"
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }
    return [*runtime, service, *registry_authority(workload)]


def _resources(workload: Workload) -> dict[str, Any]:
    """Return the requests and limits of the server, with a limit that KServe does not lower."""
    made = resources(workload)
    made["limits"]["cpu"] = _CPU_LIMIT
    return made


def _serving_runtime(workload: Workload) -> dict[str, Any]:
    """Return the runtime: the pod of a Deployment, with the model where KServe mounts it."""
    pod = pod_spec(workload, _CONTAINER, f"{workload.name}-predictor")
    [server] = pod["containers"]
    # The model's path is the third word, and in vLLM's flags at the end; a name may look like it.
    command, flags = server["command"], vllm_flags(workload, _KSERVE_MOUNT)
    between = command[3 : len(command) - len(flags)]
    server["command"] = [*command[:2], _KSERVE_MOUNT, *between, *flags]
    server["volumeMounts"] = [one for one in server["volumeMounts"] if one["name"] != MODEL_VOLUME]
    spec = {
        "supportedModelFormats": [{"name": _MODEL_FORMAT}],
        "containers": [server],
        "volumes": [volume for volume in pod["volumes"] if volume["name"] != MODEL_VOLUME],
    }
    made = manifest("serving.kserve.io/v1alpha1", "ClusterServingRuntime", workload, spec)
    # It belongs to the cluster, where two namespaces may have models of one name.
    namespace = made["metadata"].pop("namespace", None)
    name = f"{workload.name}-runtime"
    made["metadata"]["name"] = f"{namespace}.{name}" if namespace else name
    return made
