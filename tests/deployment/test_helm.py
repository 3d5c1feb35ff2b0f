"""`modelpack k8s --helm`: charts by Helm's own command."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.models import package, tiny_safetensors
from tests.peers import require

OWN = ("--engine", "modelpack")


#: Options of `k8s`, the same ones for all engines.
SHAPES = {
    "one pod": OWN,
    "vllm": ("--gpus", "2", "--pull-secret", "login"),
    "autoscaled": (*OWN, "--replicas", "2", "--max-replicas", "5", "--monitor"),
    "gateway": (*OWN, "--gateway", "--monitor", "--replicas", "2", "--keys-secret", "keys"),
    "nodes": ("--nodes", "2", "--gpus", "8", "--max-replicas", "2"),
    "nodes behind a gateway": ("--nodes", "2", "--gateway", "--replicas", "2"),
    "names": (*OWN, "--served-model-name", "a {{ .Values.b }} c", "--allow-host", "ai.example"),
    "a model called helm": (*OWN, "--served-model-name", "team/helm:v1"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A model in a registry: its reference and digest."""
    root = tmp_path_factory.mktemp("helm")
    with registry() as server:
        name = f"{server.host}/team/tiny:v1"
        made = package(name, tiny_safetensors(root), LayoutStore(root / "store"), push=True)
        yield name, str(made.digest)


def chart(published: tuple[str, str], directory: Path, *options: str) -> Path:
    made = directory / "chart"
    done = succeed("k8s", published[0], "--helm", str(made), *options)
    assert done.out == str(made)
    return made


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    require("go")
    program = build_go_tool(ROOT / "tests" / "interop" / "helm_cli", ROOT / ".cache")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def rendered(made: Path, *options: str) -> list[dict[str, Any]]:
    done = helm("template", "assistant", made, *options)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_the_files_of_a_chart(published: tuple[str, str], tmp_path: Path) -> None:
    made = chart(published, tmp_path, *OWN, "--max-replicas", "3")
    about = yaml.safe_load((made / "Chart.yaml").read_text())
    assert about["name"] == "tiny"
    assert about["appVersion"] == published[1]
    values = yaml.safe_load((made / "values.yaml").read_text())
    assert values["autoscaling"] == {"minReplicas": 1, "maxReplicas": 3}
    assert values["resources"]["requests"]["cpu"] == "1"
    schema = json.loads((made / "values.schema.json").read_text())
    assert {*schema["properties"]} == {*values, "global"}
    again = chart(published, tmp_path / "other", *OWN, "--max-replicas", "3")
    for path in made.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(made)).read_bytes()


@pytest.mark.parametrize("name", ["team/helm:v1", "helm-block:.Values.image", 'helm:env "HOME"'])
def test_names_are_no_expressions(published: tuple[str, str], tmp_path: Path, name: str) -> None:
    """A model and its files have the names that its author chose."""
    made = chart(published, tmp_path, *OWN, "--served-model-name", name)
    text = (made / "templates" / "model.yaml").read_text()
    assert name in text.replace("''", "'")
    expressions = set(re.findall("{{.*?}}", text))
    plain = chart(published, tmp_path / "plain", *OWN, "--served-model-name", "tiny")
    assert expressions == set(
        re.findall("{{.*?}}", (plain / "templates" / "model.yaml").read_text())
    )


@pytest.mark.parametrize(
    ("options", "header"),
    [(("--gateway",), ""), (SHAPES["gateway"], '-H "Authorization: Bearer KEY" ')],
)
def test_the_notes_have_the_key_that_the_server_requires(
    published: tuple[str, str], tmp_path: Path, options: tuple[str, ...], header: str
) -> None:
    notes = (chart(published, tmp_path, *options) / "templates" / "NOTES.txt").read_text()
    assert f"  curl {header}http://localhost:8080/v1/models\n" in notes


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--kserve",), "--helm cannot be combined with --kserve"),
        (("--namespace", "one"), "--helm cannot be combined with --namespace"),
        (("--name", "Not a name"), "name 'Not a name' is not a valid Kubernetes name"),
    ],
)
def test_options_that_do_not_go_together(
    published: tuple[str, str], tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    done = run("k8s", published[0], "--helm", str(tmp_path / "chart"), *options)
    assert done.code == 2
    assert problem in done.err
    assert not (tmp_path / "chart").exists()


def test_directories_that_are_not_empty(published: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for directory in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        done = run("k8s", published[0], "--helm", str(directory))
        assert done.code == 2
        assert f"cannot write a chart to {directory}" in done.err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.cluster  # helm is compiled, the first time
@pytest.mark.peer("go")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_release_has_the_printed_objects(
    published: tuple[str, str], tmp_path: Path, shape: str
) -> None:
    made = chart(published, tmp_path, *SHAPES[shape])
    linted = helm("lint", "--strict", made)
    assert linted.returncode == 0, linted.stdout
    found = by_name(rendered(made))
    printed = succeed("k8s", published[0], "--name", "assistant", *SHAPES[shape]).out
    expected = by_name(list(yaml.safe_load_all(printed)))
    for item in found.values():
        if item["kind"] not in ("ServiceMonitor", "LeaderWorkerSet"):  # not Kubernetes' own
            kubernetes_validate.validate(item, "1.35", strict=True)
        labels = item["metadata"]["labels"]
        assert labels.pop("helm.sh/chart") == "tiny"
        assert labels.pop("app.kubernetes.io/managed-by") == "Helm"
        if labels["app.kubernetes.io/component"] == "model":
            for template in templates(item):
                assert template["metadata"].pop("annotations") == {}
                for name, default in (("nodeSelector", {}), ("tolerations", []), ("affinity", {})):
                    assert template["spec"].pop(name) == default
    assert found["Service", "assistant"]["spec"].pop("type") == "ClusterIP"
    assert found == expected


def by_name(found: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    made = {(item["kind"], item["metadata"]["name"]): item for item in found}
    assert len(made) == len(found)
    return made


def templates(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the templates of an object's pods."""
    spec = item["spec"]
    places = (spec, spec.get("leaderWorkerTemplate", {}))
    names = ("template", "leaderTemplate", "workerTemplate")
    return [place[name] for place in places for name in names if name in place]


@pytest.mark.cluster
@pytest.mark.peer("go")
def test_values_of_a_gateway_and_of_groups(published: tuple[str, str], tmp_path: Path) -> None:
    made = chart(published, tmp_path, "--nodes", "2", "--gateway")
    changed = {
        "toolImage": "tool:v3", "image": "server:v2", "nodeSelector": {"disk": "fast"},
        "gateway": {"replicas": 3, "resources": {"limits": {"memory": "2Gi"}}},
        "service": {"port": 8080},
    }  # fmt: skip
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(changed))
    found = by_name(rendered(made, "--values", str(values)))
    gateway = found["Deployment", "assistant-gateway"]["spec"]
    assert gateway["replicas"] == 3
    [container] = gateway["template"]["spec"]["containers"]
    assert container["image"] == "tool:v3"
    assert container["resources"]["limits"] == {"memory": "2Gi"}
    assert found["Service", "assistant"]["spec"]["ports"][0]["port"] == 8080
    assert found["Service", "assistant-servers"]["spec"]["ports"][0]["port"] == 80
    leader, worker = templates(found["LeaderWorkerSet", "assistant-nodes"])
    for template in (leader, worker):
        pod = template["spec"]
        assert pod["nodeSelector"] == {"disk": "fast"}
        assert (pod["containers"][0]["image"], pod["initContainers"][0]["image"]) == (
            "server:v2", "tool:v3")  # fmt: skip
    assert helm("template", "x" * 40, made).returncode == 0
    refused = helm("template", "x" * 41, made)
    assert refused.returncode != 0
    assert "has more than 40 characters" in refused.stderr


@pytest.mark.cluster
@pytest.mark.peer("go")
def test_values_change_the_objects(published: tuple[str, str], tmp_path: Path) -> None:
    made = chart(published, tmp_path, *OWN)
    changed = {
        "replicas": 4, "image": "registry.example/modelpack:v2", "toolImage": "tool:v3",
        "resources": {"requests": {"cpu": "2", "memory": "9Gi"}, "limits": {"memory": "9Gi"}},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}], "podAnnotations": {"a": "b"},
        "affinity": {"nodeAffinity": {}}, "service": {"type": "NodePort", "port": 8080},
    }  # fmt: skip
    assert {*changed} == {*yaml.safe_load((made / "values.yaml").read_text())}
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(changed))
    found = {item["kind"]: item["spec"] for item in rendered(made, "--values", str(values))}
    deployment, service = found["Deployment"], found["Service"]
    pod = deployment["template"]["spec"]
    assert deployment["replicas"] == 4
    assert pod["containers"][0]["image"] == "registry.example/modelpack:v2"
    assert pod["containers"][0]["resources"] == changed["resources"]
    assert pod["initContainers"][0]["image"] == "tool:v3"
    assert deployment["template"]["metadata"]["annotations"] == {"a": "b"}
    for name in ("nodeSelector", "tolerations", "affinity"):
        assert pod[name] == changed[name]
    assert service["type"] == "NodePort"
    assert service["ports"][0]["port"] == 8080


@pytest.mark.cluster
@pytest.mark.peer("go")
@pytest.mark.parametrize("value", ["replicas=-1", "replicas=many", "replica=2", "service.prot=1",
                                   "gateway.replicas=-1", "gateway.replica=1"])  # fmt: skip
def test_wrong_values_are_refused(published: tuple[str, str], tmp_path: Path, value: str) -> None:
    made = chart(published, tmp_path, *OWN, "--gateway")
    done = helm("template", "assistant", made, "--set", value)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
