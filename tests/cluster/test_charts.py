"""What `modelpack k8s --helm` and `--kustomize` write, installed in a real Kubernetes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Cluster, until
from tests.cluster.workloads import (
    IMAGE,
    TINY,
    ask,
    asking,
    modelpack,
    pod_names,
    pods,
    until_ready,
)
from tests.interop.compose import ROOT
from tests.interop.go_tool import build_go_tool

pytestmark = pytest.mark.cluster
OPTIONS = ("--engine", "modelpack", "--image", IMAGE, "--tool-image", IMAGE, "--plain-http",
           "--cpus", "0.2")  # fmt: skip


def helm(cluster: Cluster, *arguments: str) -> str:
    program = build_go_tool(ROOT / "tests" / "interop" / "helm_cli", ROOT / ".cache")
    return cluster.run(str(program), *arguments)


def objects(cluster: Cluster, namespace: str) -> set[str]:
    """Return the names of all objects in a namespace, besides events."""
    kinds = cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    listed = ",".join(kind for kind in kinds if not kind.startswith("events"))
    return set(cluster.kubectl("get", listed, "--namespace", namespace, "-o", "name").split())


@pytest.mark.parametrize("more", [(), ("--gateway",)], ids=["plain", "gateway"])
def test_a_chart_is_installed_upgraded_and_uninstalled(
    cluster: Cluster, more: tuple[str, ...]
) -> None:
    """By Helm, into a namespace of its own; the upgrade adds a pod while clients send requests."""
    name = "-".join(["chart", *(option.strip("-") for option in more)])
    chart = str(cluster.directory / name)
    modelpack(cluster, "k8s", TINY, *OPTIONS, "--served-model-name", name, "--helm", chart, *more)
    cluster.kubectl("create", "namespace", name)
    where = ("--namespace", name)
    given = {"serviceaccount/default", "configmap/kube-root-ca.crt"}
    until("the namespace is set up", lambda: objects(cluster, name) == given, 30, lambda: "")
    helm(cluster, "install", name, chart, *where, "--wait", "--timeout", "3m")
    [pod] = pod_names(cluster, name, "model", name)
    assert len(pod_names(cluster, name, "gateway", name)) == (2 if more else 0)
    assert ask(cluster, name, name, "Hello", namespace=name)["usage"]["completion_tokens"] > 0
    with asking(cluster, name, 500, namespace=name) as found:
        helm(cluster, "upgrade", name, chart, *where, "--set", "replicas=2", "--wait",
             "--timeout", "3m")  # fmt: skip
        two = pod_names(cluster, name, "model", name)
    print(f"{found['answers']} answers, {len(found['failures'])} failures")
    assert found["failures"] == []
    assert found["answers"] >= 500
    assert len(two) == 2
    assert pod in two, "more pods need no other ones"
    helm(cluster, "uninstall", name, *where, "--wait", "--timeout", "3m")
    until("nothing is left", lambda: objects(cluster, name) == given, 90,
          lambda: str(objects(cluster, name)))  # fmt: skip


def test_an_overlay_is_applied(cluster: Cluster) -> None:
    """By kubectl, which has Kustomize: the namespace and the number of pods are the overlay's."""
    directory = cluster.directory / "kustomize"
    modelpack(cluster, "k8s", TINY, *OPTIONS, "--name", "overlaid", "--kustomize", str(directory))
    overlay = directory / "overlays" / "production"
    edit(overlay / "kustomization.yaml", replicas=2)
    cluster.kubectl("create", "namespace", "production")
    cluster.kubectl("apply", "-k", str(overlay))
    try:
        until_ready(cluster, "overlaid", namespace="production")
        assert len(pods(cluster, "overlaid", "production")) == 2
        assert pods(cluster, "overlaid") == []
        answer = ask(cluster, "overlaid", TINY, "Hello", namespace="production")
        assert answer["usage"]["completion_tokens"] > 0
    finally:
        cluster.kubectl("delete", "--grace-period=1", "-k", str(overlay))


def edit(file: Path, replicas: int) -> None:
    overlay = yaml.safe_load(file.read_text())
    [entry] = overlay["replicas"]
    assert entry == {"name": "overlaid", "count": 1}
    entry["count"] = replicas
    file.write_text(yaml.safe_dump(overlay))
