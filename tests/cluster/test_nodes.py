"""What `modelpack k8s` prints, on two nodes: spread pods, a node that drains, one that dies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, Node, until
from tests.cluster.workloads import (
    TINY,
    apply,
    ask,
    asking,
    delete,
    manifests,
    pods,
    traces,
    until_gateways_know,
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


def test_requests_go_on_when_a_node_dies(cluster: Cluster, second: Node) -> None:
    """A power failure: no packet comes from the node any more, and nothing ends on it.

    Of the requests to the gateway on the other node, those fail that the dead pod had accepted.
    The Service sends connections to the dead gateway until Kubernetes misses the node. This is the
    last test with this node.
    """
    text = manifests(
        cluster, TINY, "dead", "--replicas", "2", "--served-model-name", "dead", "--gateway"
    )
    # Else the scheduler may put both pods of a kind on one node.
    text = text.replace("ScheduleAnyway", "DoNotSchedule")
    apply(cluster, text, "dead")
    try:
        until_ready(cluster, "dead-gateway")
        first = cluster.nodes[0]
        [gateway] = by_node(cluster, "dead", "gateway")[first.name]
        assert set(by_node(cluster, "dead", "model")) == {first.name, second.name}
        until_gateways_know(cluster, "dead", 2)
        at = gateway["status"]["podIP"]
        with asking(cluster, "dead", 500, at=f"{at}:12435") as found:
            second.cut(first)
            second.stop()
            until("Kubernetes misses the node", lambda: not cluster.is_ready(second), 120,
                  lambda: cluster.kubectl("get", "nodes"))  # fmt: skip
            until("the Service has one gateway", lambda: endpoints(cluster, "dead") == [at], 60,
                  lambda: str(endpoints(cluster, "dead")))  # fmt: skip
        print(f"{found['answers']} answers, {found['failed']} failures: {found['failures']}")
        assert found["answers"] >= 500
        assert found["failed"] <= 4, "one request of each client was at the pod that died"
        with asking(cluster, "dead", 200) as afterwards:
            pass
        assert afterwards["failures"] == []
    finally:
        cluster.kubectl("delete", "node", second.name)
        delete(cluster, text)


def endpoints(cluster: Cluster, service: str) -> list[str]:
    """Return the addresses that a Service sends connections to."""
    label = f"kubernetes.io/service-name={service}"
    return [
        address
        for part in cluster.get("endpointslices", "-l", label)["items"]
        for endpoint in part["endpoints"] or ()
        if endpoint["conditions"]["ready"]
        for address in endpoint["addresses"]
    ]
