"""Write a Helm chart that serves a model: the objects of `kubernetes`, with values.

A release is named when it is installed, so the objects are made for the name RELEASE, which becomes
Helm's expression. So does what users may set; `values.yaml` has what `modelpack k8s` prints.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

from modelpack.artifacts.model import Model
from modelpack.deploy.kubernetes import LONGEST_NODES_NAME
from modelpack.deploy.manifests import to_yaml

#: The name of a workload whose objects are for a chart.
RELEASE: Final = "modelpack-helm-release"
_RELEASE_EXPRESSION: Final = "{{ .Release.Name }}"
# A scalar that becomes an expression of Helm, and one that becomes a block of YAML. No name of a
# model or of its files, which an author chooses, can begin like them.
_MARK: Final = secrets.token_hex(8)
_SCALAR, _BLOCK = f"helm-{_MARK}:", f"helm-block-{_MARK}:"
_EXPRESSION: Final = re.compile(rf"['\"]?{_SCALAR}([^'\"\n]+)['\"]?")
_BLOCK_LINE: Final = re.compile(rf"^( *)(\S+): ['\"]?{_BLOCK}([^'\"\n]+)['\"]?$", re.MULTILINE)
#: Helm's own limit is 53 characters.
_SHORT_NAME: Final = (
    f"{{{{- if gt (len .Release.Name) {LONGEST_NODES_NAME} }}}}"
    f'{{{{- fail "the name of the release has more than {LONGEST_NODES_NAME} characters" }}}}'
    "{{- end }}\n"
)
_NOTES: Final = """\
{model}
is served by Service {{{{ .Release.Name }}}} in namespace {{{{ .Release.Namespace }}}}. To try it:

  kubectl -n {{{{ .Release.Namespace }}}} port-forward service/{{{{ .Release.Name }}}} 8080:{{{{ .Values.service.port }}}}
  curl {header}http://localhost:8080/v1/models
"""  # noqa: E501 - one command


def chart(
    name: str,
    model: Model,
    pinned: str,
    objects: Sequence[Mapping[str, Any]],
    *,
    needs_key: bool = False,
) -> dict[str, str]:
    """Return the files of a chart by path: the objects of a workload that is named RELEASE.

    `pinned` is the model's reference by digest. With `needs_key`, the server requires an API key.
    """
    values: dict[str, Any] = {}
    made = [_templated(deepcopy(dict(item)), values) for item in objects]
    text = "---\n".join(_expressions(to_yaml([item])) for item in made)
    if any(item["kind"] == "LeaderWorkerSet" for item in objects):
        text = _SHORT_NAME + text
    return {
        "Chart.yaml": to_yaml([{
            "apiVersion": "v2",
            "name": name,
            "description": f"Serves {pinned}",
            "type": "application",
            "version": "0.1.0",
            "appVersion": str(model.digest),
        }]),
        "values.yaml": to_yaml([values]),
        "values.schema.json": json.dumps(_schema(values), indent=2) + "\n",
        "templates/model.yaml": text,
        "templates/NOTES.txt": _NOTES.format(
            model=pinned, header='-H "Authorization: Bearer KEY" ' if needs_key else ""
        ),
    }  # fmt: skip


def _templated(item: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Replace what users may set by expressions, and add it to `values`."""
    labels = item["metadata"]["labels"]
    is_gateway = labels["app.kubernetes.io/component"] == "gateway"
    item["metadata"]["labels"] = {  # a new value: selectors may share the labels
        **labels,
        "helm.sh/chart": f"{_SCALAR}.Chart.Name",
        "app.kubernetes.io/managed-by": f"{_SCALAR}.Release.Service",
    }
    spec, kind = item.get("spec", {}), item["kind"]
    if kind == "Deployment" and is_gateway:
        [server] = spec["template"]["spec"]["containers"]
        values["toolImage"] = server["image"]
        values["gateway"] = {"replicas": spec["replicas"], "resources": server["resources"]}
        spec["replicas"] = f"{_SCALAR}.Values.gateway.replicas"
        server["image"] = f"{_SCALAR}.Values.toolImage | quote"
        server["resources"] = f"{_BLOCK}.Values.gateway.resources"
    elif kind in ("Deployment", "LeaderWorkerSet"):
        if "replicas" in spec:
            values["replicas"] = spec["replicas"]
            spec["replicas"] = f"{_SCALAR}.Values.replicas"
        group = spec.get("leaderWorkerTemplate", {"template": spec.get("template")})
        for name in ("template", "leaderTemplate", "workerTemplate"):
            if name in group:
                _template_pod(group[name], values)
    elif kind == "Service" and spec.get("clusterIP") != "None":
        values["service"] = {"type": "ClusterIP", "port": spec["ports"][0]["port"]}
        spec["type"] = f"{_SCALAR}.Values.service.type"
        spec["ports"][0]["port"] = f"{_SCALAR}.Values.service.port"
    elif kind == "HorizontalPodAutoscaler":
        values["autoscaling"] = {name: spec[name] for name in ("minReplicas", "maxReplicas")}
        for name in values["autoscaling"]:
            spec[name] = f"{_SCALAR}.Values.autoscaling.{name}"
    return item


def _template_pod(template: dict[str, Any], values: dict[str, Any]) -> None:
    """Replace what users may set of the pods of a model; all of them have the same values."""
    pod = template["spec"]
    [server] = pod["containers"]
    values["image"] = server["image"]
    server["image"] = f"{_SCALAR}.Values.image | quote"
    for pull in pod.get("initContainers", []):
        values["toolImage"] = pull["image"]
        pull["image"] = f"{_SCALAR}.Values.toolImage | quote"
    values["resources"] = server["resources"]
    server["resources"] = f"{_BLOCK}.Values.resources"
    values |= {"nodeSelector": {}, "tolerations": [], "affinity": {}, "podAnnotations": {}}
    for name in ("nodeSelector", "tolerations", "affinity"):
        pod[name] = f"{_BLOCK}.Values.{name}"
    template["metadata"]["annotations"] = f"{_BLOCK}.Values.podAnnotations"


def _expressions(text: str) -> str:
    """Return YAML with Helm's expressions; what looks like one in the objects stays as it is."""
    text = text.replace("{{", '{{ "{{" }}').replace(RELEASE, _RELEASE_EXPRESSION)
    text = _BLOCK_LINE.sub(
        lambda found: (
            f"{found[1]}{found[2]}: {{{{- toYaml {found[3]} | nindent {len(found[1]) + 2} }}}}"
        ),
        text,
    )
    return _EXPRESSION.sub(lambda found: f"{{{{ {found[1]} }}}}", text)


def _schema(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of values: their names and types."""

    def of(value: Any) -> dict[str, Any]:
        kinds = {dict: "object", list: "array", int: "integer", str: "string"}
        return {"type": kinds[type(value)]}

    properties = {name: of(value) for name, value in values.items()}
    for name in ("service", "autoscaling", "gateway"):
        if name in values:
            properties[name] = _closed({key: of(value) for key, value in values[name].items()})
    for of_pods in (properties, properties.get("gateway", {}).get("properties", {})):
        if "replicas" in of_pods:
            of_pods["replicas"]["minimum"] = 0
    # Helm adds the values of subcharts and `global`.
    closed = _closed({**properties, "global": {"type": "object"}})
    return {"$schema": "http://json-schema.org/draft-07/schema#", **closed}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}
