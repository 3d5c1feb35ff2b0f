"""What `modelpack k8s` prints, on two nodes: spread pods, and a node that drains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, Node
from tests.cluster.workloads import (
    TINY,
    apply,
    ask,
    asking,
    delete,
    manifests,
    pods,
    traces,
    until_ready,
)

pytestmark = pytest.mark.cluster
COMPONENT = "app.kubernetes.io/component"


@pytest.fixture(scope="module")
def second(cluster: Cluster) -> Iterator[Node]:
    """Another node, which leaves after these tests."""
    node = cluster.join()
    try:
        yield node
    finally:
        cluster.leave()


def by_node(cluster: Cluster, name: str, component: str) -> dict[str, list[Any]]:
    """Return the pods of a component that do not stop, by the name of their node."""
    found: dict[str, list[Any]] = {}
    for pod in pods(cluster, name):
        metadata = pod["metadata"]
        if metadata["labels"][COMPONENT] == component and "deletionTimestamp" not in metadata:
            found.setdefault(pod["spec"].get("nodeName", ""), []).append(pod)
    return found


def test_pods_are_spread_over_the_nodes(cluster: Cluster, second: Node) -> None:
    """Each node pulls the model into a volume of its own, and the Service reaches both."""
    text = manifests(cluster, TINY, "spread", "--replicas", "2", "--served-model-name", "spread")
    apply(cluster, text, "spread")
    try:
        found = by_node(cluster, "spread", "model")
        assert set(found) == {node.name for node in cluster.nodes}
        for node in cluster.nodes:
            [pod] = found[node.name]
            digest = pod["spec"]["initContainers"][0]["command"][2].rpartition("@")[2]
            store = node.volume(pod["metadata"]["uid"], "model") / "store"
            assert (store / "blobs" / digest.replace(":", "/")).is_file()
        for _ in range(20):
            asked = ask(cluster, "spread", "spread", "Hello", 2, "spread")
            assert asked["usage"]["completion_tokens"] == 2
        answered = {
            node: len(traces(cluster, pod["metadata"]["name"], "spread"))
            for node, [pod] in found.items()
        }
        print(f"answers by node: {answered}")
        assert sum(answered.values()) == 20
        assert all(answered.values())
    finally:
        delete(cluster, text)


@pytest.mark.parametrize("more", [(), ("--gateway",)], ids=["plain", "gateway"])
def test_a_node_that_drains_fails_no_request(
    cluster: Cluster, second: Node, more: tuple[str, ...]
) -> None:
    text = manifests(
        cluster, TINY, "drained", "--replicas", "2", "--served-model-name", "drained", *more
    )
    apply(cluster, text, "drained")
    parts = {"model": "drained", **({"gateway": "drained-gateway"} if more else {})}
    try:
        for deployment in parts.values():
            until_ready(cluster, deployment)
        assert second.name in by_node(cluster, "drained", "model")
        with asking(cluster, "drained", 500) as found:
            cluster.kubectl("drain", second.name, "--delete-emptydir-data", "--timeout=180s")
            for deployment in parts.values():
                until_ready(cluster, deployment)
        print(f"{found['answers']} answers, {len(found['failures'])} failures")
        assert found["failures"] == []
        assert found["answers"] >= 500
        for part in parts:
            left = by_node(cluster, "drained", part)
            assert {node: len(there) for node, there in left.items()} == {cluster.nodes[0].name: 2}
    finally:
        cluster.kubectl("uncordon", second.name)
        delete(cluster, text)
