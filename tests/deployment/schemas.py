"""The schemas of Kubernetes and of the operators that `modelpack k8s` prints objects for.

They are made from Go modules: Kubernetes' own OpenAPI document, and the operators' definitions of
custom resources. `kubeconform` checks objects against them. Fields that a schema does not list are
refused, as `kubectl apply --validate=strict` does.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool, go_module_file
from tests.peers import require

#: Module, version, sum.
_KUBERNETES = ("k8s.io/kubernetes", "v1.36.3", "h1:qDQdoMiluAE2Eab6Fa52YV+WjiGz9mZFFoagEA6cI+o=")
_LWS = ("sigs.k8s.io/lws", "v0.8.0", "h1:DdhJ8QabwTfWgbgaHH2gdf8twliioHaoSfmDXRYEVU0=")
_KSERVE = ("github.com/kserve/kserve", "v0.20.0", "h1:Bs7HxmGV4KFqqptDcWseKv+mwD4YOYHJWcuVgPG2Gug=")
_PROMETHEUS = (
    "github.com/prometheus-operator/prometheus-operator", "v0.91.0",
    "h1:rb4MKt5MlpYyDOzgGv1P8zhiHDxJrgQ6p6zhsIc+7ys=",
)  # fmt: skip
_OPENAPI = "api/openapi-spec/swagger.json"
CUSTOM = {
    "LeaderWorkerSet": (_LWS, "config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml"),
    "InferenceService": (_KSERVE, "config/crd/full/serving.kserve.io_inferenceservices.yaml"),
    "ClusterServingRuntime": (
        _KSERVE, "config/crd/full/serving.kserve.io_clusterservingruntimes.yaml"),
    "ServiceMonitor": (
        _PROMETHEUS,
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml"),
}  # fmt: skip
_KYVERNO = (
    "github.com/kyverno/kyverno",
    "v1.19.1",
    "h1:/MkgFii3/VlQfKR1JpC9tVwNNVNQTt2S4U6qCsafsTU=",
)
_POLICY_CONTROLLER = (
    "github.com/sigstore/policy-controller", "v0.13.1",
    "h1:Woy+6bQ7pT/0m3/PSO2RtDxSHKBZ/8iHpCZFcZJThM8=",
)  # fmt: skip
#: What examples/admission has, which `modelpack k8s` does not print.
ADMISSION = {
    "ClusterPolicy": (_KYVERNO, "config/crds/kyverno/kyverno.io_clusterpolicies.yaml"),
    "ImageValidatingPolicy": (
        _KYVERNO,
        "config/crds/policies.kyverno.io/policies.kyverno.io_imagevalidatingpolicies.yaml"),
    "ClusterImagePolicy": (_POLICY_CONTROLLER, "config/300-clusterimagepolicy.yaml"),
}  # fmt: skip
_LIBRARY = "io.k8s.apimachinery.pkg"
_INTEGER_OR_TEXT = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def custom_definition(kind: str) -> dict[str, Any]:
    """Return the CustomResourceDefinition of an operator."""
    require("go")
    module, path = (CUSTOM | ADMISSION)[kind]
    found: dict[str, Any] = yaml.load(go_module_file(*module, path), yaml.CSafeLoader)
    return found


def write_schemas(directory: Path) -> None:
    """Write a JSON Schema for each kind, by kubeconform's name of the file."""
    require("go")
    openapi = json.loads(go_module_file(*_KUBERNETES, _OPENAPI))["definitions"]
    definitions = {name: _strict(schema) for name, schema in openapi.items()}
    definitions[f"{_LIBRARY}.util.intstr.IntOrString"] = _INTEGER_OR_TEXT
    for name, schema in openapi.items():
        for kind in schema.get("x-kubernetes-group-version-kind", ()):
            if name.startswith("io.k8s.api."):
                used: dict[str, Any] = {}
                _collect(name, definitions, used)
                _write(directory, kind, {"$ref": f"#/definitions/{name}", "definitions": used})
    write_custom_schemas(directory, CUSTOM)


def write_custom_schemas(directory: Path, kinds: Iterable[str]) -> None:
    """Write a JSON Schema for each version of these custom resources."""
    openapi = json.loads(go_module_file(*_KUBERNETES, _OPENAPI))["definitions"]
    definitions = {name: _strict(schema) for name, schema in openapi.items()}
    metadata: dict[str, Any] = {}
    _collect(f"{_LIBRARY}.apis.meta.v1.ObjectMeta", definitions, metadata)
    for name in kinds:
        spec = custom_definition(name)["spec"]
        for version in spec["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            # The API server knows these; definitions leave them open, or out.
            schema["properties"] |= {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"$ref": f"#/definitions/{_LIBRARY}.apis.meta.v1.ObjectMeta"},
            }
            kind = {"group": spec["group"], "version": version["name"], "kind": name}
            _write(directory, kind, {**schema, "definitions": metadata})


def kubeconform(schemas: Path, objects: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the objects, a line for each invalid one."""
    program = build_go_tool(ROOT / "tests" / "interop" / "kubeconform_cli", ROOT / ".cache")
    found = list(objects)
    # Only these schemas: without one that fits, kubeconform would fetch it.
    where = f"{schemas}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    done = subprocess.run(
        [program, "-strict", "-output", "json", "-summary", "-schema-location", where, "-"],
        input="\n".join(f"---\n{json.dumps(item)}" for item in found),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    summary = report["summary"]
    assert summary["skipped"] == 0
    assert sum(summary.values()) == len(found), "an object was not looked at"
    return [f"{item['kind']} {item['name']}: {item['msg']}" for item in report["resources"] or ()]


def _write(directory: Path, kind: Mapping[str, str], schema: Mapping[str, Any]) -> None:
    group = kind["group"].partition(".")[0]
    parts = [kind["kind"], *([group] if group else []), kind["version"]]
    (directory / f"{'-'.join(parts).lower()}.json").write_text(json.dumps(schema))


def _strict(schema: Any) -> Any:
    """Return a schema that refuses unlisted fields and null, made from one of OpenAPI."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return _INTEGER_OR_TEXT
    made = {name: _strict(value) for name, value in schema.items() if name != "format"}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and not is_open:
        made.setdefault("additionalProperties", False)
    return made


def _collect(name: str, definitions: Mapping[str, Any], into: dict[str, Any]) -> None:
    """Add a definition, and those that it refers to."""
    if name not in into:
        into[name] = definitions[name]
        for reference in _references(definitions[name]):
            _collect(reference, definitions, into)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)
