"""Operators of the cluster: their definitions and webhooks, and their controllers beside the pods.

Controllers are built from their Go modules, with definitions and webhooks of the same versions as
`tests.deployment.schemas` has.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.cluster import Cluster, until
from tests.cluster.node import ADDRESS
from tests.deployment.schemas import CUSTOM
from tests.interop.compose import ROOT
from tests.interop.go_tool import build_go_tool, go_module_file


class _Loader(yaml.CSafeLoader):
    """YAML without a meaning of `=`, which definitions have as a plain value."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda _, node: node.value)


def module_objects(kind: str, path: str) -> list[dict[str, Any]]:
    """Return the objects in a file of the Go module that defines the custom resource `kind`."""
    module, _ = CUSTOM[kind]
    text = go_module_file(*module, path)
    return [found for found in yaml.load_all(text, _Loader) if found]


def define(cluster: Cluster, definitions: Iterable[Mapping[str, Any]]) -> None:
    """Create definitions of custom resources, where they are not there; return when all serve."""
    names = []
    for definition in definitions:
        name = definition["metadata"]["name"]
        text = json.dumps(definition)
        # Not a plain `apply`: its annotation would be longer than annotations may be.
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=text)
        names.append(name)
    for name in names:
        until(f"{name} is known", partial(_is_known, cluster, name), 60, lambda: "")


def _is_known(cluster: Cluster, name: str) -> bool:
    found = cluster.get("crd", name)["status"].get("conditions") or ()
    return ("Established", "True") in [(each["type"], each["status"]) for each in found]


@dataclass(frozen=True)
class Operator:
    """A controller: the directory of its go.mod, and the end of its command's path there.

    `options` and `environment` may have `{directory}`, where its certificate is, as tls.crt and
    tls.key in `certificates`. `webhooks` are configurations of an installation, for `port`.
    """

    source: str
    tool: str
    options: Sequence[str]
    webhooks: Sequence[Mapping[str, Any]] = ()
    port: int = 0
    certificates: str = "certificates"
    environment: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> Path:
        """Return its program, built where it is not yet."""
        return build_go_tool(ROOT / "tests" / "cluster" / self.source, ROOT / ".cache", self.tool)

    @contextmanager
    def running(self, cluster: Cluster) -> Iterator[Path]:
        """Run it until the end of the block; yield the path of its log."""
        program = self.build()
        directory = cluster.directory / "operators" / self.tool.replace("/", "-")
        certificate = _certificate(directory / self.certificates)
        own = [f"{name}={value}" for name, value in self.environment.items()]
        command = [word.format(directory=directory) for word in (*own, str(program), *self.options)]
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [
            _configuration(hooks, self.port, certificate) for hooks in self.webhooks]})  # fmt: skip
        log = cluster.directory / "beside.log"
        with cluster.serving("env", *command):
            for path in (hook["clientConfig"]["service"]["path"] for hooks in self.webhooks
                         for hook in hooks["webhooks"]):  # fmt: skip
                until(f"{path} answers", partial(self._answers, cluster, path), 60,
                      lambda: log.read_text()[-4000:])  # fmt: skip
            if self.webhooks:
                cluster.kubectl("apply", "-f", "-", input=text)
            try:
                yield log
            finally:
                if self.webhooks:
                    cluster.kubectl("delete", "--ignore-not-found", "-f", "-", input=text)

    def _answers(self, cluster: Cluster, path: str) -> bool:
        url = f"https://{ADDRESS}:{self.port}{path}"
        found = cluster.run("curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", url,
                            check=False)  # fmt: skip
        return found not in ("000", "404")


def _certificate(directory: Path) -> str:
    """Write a certificate for the node's address and its key; return it in base64, as PEM."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=operator", "-addext", f"subjectAltName=IP:{ADDRESS}", "-keyout",
         directory / "tls.key", "-out", directory / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    return base64.b64encode((directory / "tls.crt").read_bytes()).decode()


def _configuration(hooks: Mapping[str, Any], port: int, certificate: str) -> dict[str, Any]:
    """Return a configuration of webhooks that finds them at the node's address."""
    made = []
    for hook in hooks["webhooks"]:
        url = f"https://{ADDRESS}:{port}{hook['clientConfig']['service']['path']}"
        made.append({**hook, "clientConfig": {"url": url, "caBundle": certificate}})
    metadata = {"name": hooks["metadata"]["name"]}
    return {**hooks, "metadata": metadata, "webhooks": made}
