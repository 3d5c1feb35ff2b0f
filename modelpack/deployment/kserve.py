"""A KServe InferenceService that serves one model.

Source: KServe 0.21, serving.kserve.io/v1beta1. An image with the model under /models is mounted by
KServe itself (`oci+native://`); otherwise the pod is that of the Deployment.
"""

from __future__ import annotations

from typing import Any

from modelpack.deployment.kubernetes import Workload, pod_spec, resources, vllm_flags

#: The name by which KServe finds the container that answers.
_CONTAINER = "kserve-container"
#: Where KServe mounts the model of a `storageUri`.
_MOUNT = "/mnt/models"


def inference_service(workload: Workload) -> list[dict[str, Any]]:
    """Return the InferenceService."""
    predictor: dict[str, Any] = {
        "minReplicas": workload.replicas,
        "timeout": workload.demands.start_seconds,
    }
    if workload.model_image:
        predictor["model"] = {
            "modelFormat": {"name": "huggingface"},
            "storageUri": f"oci+native://{workload.model_image}",
            "args": [f"--model_name={workload.served_name}",
                     f"--tensor-parallel-size={workload.gpus}",
                     *vllm_flags(workload, _MOUNT)],
            "resources": resources(workload),
        }  # fmt: skip
        if workload.pull_secret:
            predictor["imagePullSecrets"] = [{"name": workload.pull_secret}]
    else:
        predictor |= pod_spec(workload, _CONTAINER, f"{workload.name}-predictor")
    metadata = workload.metadata()
    # Startup is counted in minutes: Knative, which scales by requests, would give up on it.
    metadata["annotations"]["serving.kserve.io/deploymentMode"] = "Standard"
    return [
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": metadata,
            "spec": {"predictor": predictor},
        }
    ]
