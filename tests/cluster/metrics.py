"""The part of Prometheus and its adapter that an autoscaler needs: metrics of pods, as an API.

    python metrics.py ADDRESS PORT CERTIFICATE KEY

Serves Kubernetes' custom metrics API. A metric `vllm_NAME` of a pod is the sum of `vllm:NAME` in
`/metrics` of that pod, read at each request, as the rule in docs/kubernetes.md says it.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

VERSION = "custom.metrics.k8s.io/v1beta2"
_METRIC = re.compile(rf"/apis/{VERSION}/namespaces/([^/]+)/pods/\*/vllm_(\w+)\Z")


def measured(pod: dict[str, Any], name: str) -> float:
    """Return the sum of the series of a metric; the server's port is the container's first."""
    port = pod["spec"]["containers"][0]["ports"][0]["containerPort"]
    connection = http.client.HTTPConnection(pod["status"]["podIP"], port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    series = re.findall(rf"^vllm:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, series))


def metric_values(namespace: str, name: str, selector: str) -> dict[str, Any]:
    """Return a MetricValueList of the pods that are ready."""
    command = ["kubectl", "get", "pods", "-n", namespace, "-l", selector, "-o", "json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["items"]
    items = []
    for pod in found:
        conditions = {one["type"]: one["status"] for one in pod["status"].get("conditions", ())}
        if conditions.get("Ready") == "True":
            items.append({
                "describedObject": {"kind": "Pod", "apiVersion": "/v1", "namespace": namespace,
                                    "name": pod["metadata"]["name"]},
                "metric": {"name": f"vllm_{name}"},
                "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "value": f"{round(measured(pod, name) * 1000)}m",
            })  # fmt: skip
    return {"kind": "MetricValueList", "apiVersion": VERSION, "metadata": {}, "items": items}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        wanted = _METRIC.match(unquote(url.path))
        if url.path == f"/apis/{VERSION}":
            kinds = [
                {"name": f"pods/vllm_{name}", "namespaced": True, "kind": "MetricValueList",
                 "singularName": "", "verbs": ["get"]}
                for name in ("num_requests_waiting", "kv_cache_usage_perc")
            ]  # fmt: skip
            self._reply(200, {"kind": "APIResourceList", "apiVersion": "v1",
                              "groupVersion": VERSION, "resources": kinds})  # fmt: skip
        elif wanted:
            [selector] = parse_qs(url.query)["labelSelector"]
            self._reply(200, metric_values(wanted[1], wanted[2], selector))
        else:
            self._reply(404, {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                              "code": 404})  # fmt: skip

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def main() -> None:
    address, port, certificate, key = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer((address, int(port)), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
