"""All that `modelpack k8s` prints, against the schemas of Kubernetes and of its operators."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.deploy.gateway import behind_gateway
from modelpack.deploy.kserve import inference_service
from modelpack.deploy.kubernetes import Access, Workload, deployment
from modelpack.errors import UsageError
from modelpack.store.layout import LayoutStore
from tests.deployment.schemas import kubeconform, write_schemas
from tests.models import package, tiny_safetensors

pytestmark = [pytest.mark.long, pytest.mark.peer("go")]  # modules are fetched
IMAGE = "registry.example/team/tiny-image@sha256:" + "a" * 64

#: What may be chosen, each independently of the others.
CHOICES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"engine": "modelpack", "gpus": 0}, {"engine": "modelpack", "gpus": 2},
     {"engine": "vllm", "gpus": 1}, {"engine": "vllm", "gpus": 4}),
    ({}, {"model_image": IMAGE}),
    ({}, {"nodes": 3}),
    ({}, {"replicas": 0}, {"replicas": 2}, {"max_replicas": 4}),
    ({}, {"monitored": True}),
    ({}, {"pull_secret": "login"}),
    ({}, {"access": Access(plain_http=True)},
     {"access": Access(insecure=("registry.example:5000",), authority="PEM")}),
    ({}, {"user": 0, "namespace": "models", "hosts": ("ai.example",)}),
)  # fmt: skip


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("schemas")
    write_schemas(made)
    return made


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    root = tmp_path_factory.mktemp("model")
    store = LayoutStore(root / "store")
    package("registry.example/team/tiny:v1", tiny_safetensors(root), store)
    name = "registry.example/team/tiny:v1"
    return Workload(
        model=modelpack.inspect(name, store=store), reference=Reference.parse(name), name="tiny",
        engine="modelpack", engine_image="server:v1", tool_image="modelpack:v1", gpus=0,
        served_name="tiny",
    )  # fmt: skip


def choices(workload: Workload) -> Iterator[Workload]:
    """Yield the workload with all options that can be combined."""
    for chosen in itertools.product(*CHOICES):
        options = {name: value for choice in chosen for name, value in choice.items()}
        try:
            yield replace(workload, **options)
        except UsageError:
            continue


def printed(workload: Workload) -> Iterator[dict[str, Any]]:
    yield from deployment(workload)
    yield from behind_gateway(workload, "keys" if workload.pull_secret else None)
    if workload.nodes == 1 and workload.max_replicas is None and not workload.monitored:
        yield from inference_service(workload)
        if workload.model_image:
            yield from inference_service(workload, own_runtime=True)


def test_every_combination_of_options_is_valid(schemas: Path, workload: Workload) -> None:
    found = [item for each in choices(workload) for item in printed(each)]
    assert {item["kind"] for item in found} == {
        "Deployment", "LeaderWorkerSet", "InferenceService", "ClusterServingRuntime", "Service",
        "ConfigMap", "PodDisruptionBudget", "HorizontalPodAutoscaler", "ServiceMonitor",
    }  # fmt: skip
    assert len(found) > 1000
    assert kubeconform(schemas, found) == []


def test_the_schemas_refuse_what_is_wrong(schemas: Path, workload: Workload) -> None:
    """A field that does not exist, deep in each kind of object, and a value of another type."""
    all_kinds = replace(workload, replicas=2, max_replicas=4, monitored=True,
                        access=Access(authority="PEM"))  # fmt: skip
    nodes = replace(workload, engine="vllm", gpus=1, nodes=2)
    mounted = replace(workload, engine="vllm", gpus=1, model_image=IMAGE)
    [runtime, _] = inference_service(mounted, own_runtime=True)
    good = [*deployment(all_kinds), *deployment(nodes)[:1], *inference_service(workload), runtime]
    assert kubeconform(schemas, good) == []
    deep = {
        "Deployment": ("template", "spec", "containers", 0), "Service": ("ports", 0),
        "PodDisruptionBudget": ("selector",), "HorizontalPodAutoscaler": ("metrics", 0, "pods"),
        "ServiceMonitor": ("endpoints", 0),
        "LeaderWorkerSet": ("leaderWorkerTemplate", "workerTemplate", "spec", "volumes", 0),
        "ClusterServingRuntime": ("supportedModelFormats", 0),
        "InferenceService": ("predictor", "containers", 0, "resources"),
    }  # fmt: skip
    wrong = []
    for item in good:
        if item["kind"] in deep:
            for field, value in (("unheardOf", {}), ("name", 7), ("matchLabels", "text")):
                changed = deepcopy(item)
                place = changed["spec"]
                for step in deep[item["kind"]]:
                    place = place[step]
                place[field] = value
                wrong.append(changed)
    told = kubeconform(schemas, wrong)
    assert len(told) == len(wrong)
    assert {line.split()[0] for line in told} == {*deep}
