"""`modelpack k8s`: its objects satisfy the schemas of Kubernetes and depend on the model."""

from __future__ import annotations

import copy
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import requests
import yaml
from hypothesis import given
from hypothesis import strategies as st

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.deploy.kubernetes import GIB, Demands, default_name
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.models import package, tiny_safetensors

VERSIONS = ("1.35", "1.37")
IMAGE = "registry.example/team/tiny-image@sha256:" + "a" * 64


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A model in a registry: its reference and digest."""
    root = tmp_path_factory.mktemp("k8s")
    with registry() as server:
        name = f"{server.host}/team/Tiny_Model:v1".lower()
        made = package(name, tiny_safetensors(root), LayoutStore(root / "store"), push=True)
        yield name, str(made.digest)


def objects(*arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = list(yaml.safe_load_all(succeed("k8s", *arguments).out))
    return found


def pod(found: list[dict[str, Any]]) -> dict[str, Any]:
    [made] = [item for item in found if item["kind"] == "Deployment"]
    spec: dict[str, Any] = made["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--gpus", "4", "--pull-secret", "login", "--namespace", "models", "--replicas", "2"),
        ("--model-image", IMAGE, "--pull-secret", "login"),
        ("--engine", "modelpack"),
        ("--engine", "modelpack", "--gpus", "2", "--plain-http"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40] or "plain",
)
def test_the_schemas_of_kubernetes_allow_it(
    published: tuple[str, str], arguments: tuple[str, ...], version: str
) -> None:
    found = objects(published[0], *arguments)
    assert [item["kind"] for item in found] == ["Deployment", "Service"]
    for item in found:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_would_refuse_what_is_wrong(published: tuple[str, str]) -> None:
    good = objects(published[0])[0]
    for path, value in (("replicas", "two"), ("replica", 1)):
        wrong = copy.deepcopy(good)
        wrong["spec"][path] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_the_pod_pulls_by_digest_and_serves_what_it_pulled(published: tuple[str, str]) -> None:
    name, digest = published
    spec = pod(objects(name, "--pull-secret", "login", "--plain-http"))
    pinned = f"{name.rpartition(':')[0]}@{digest}"
    [pull] = spec["initContainers"]
    assert pull["command"] == [
        "modelpack", "bundle", "--pull", "--force", pinned, "/model/bundle", "--plain-http"
    ]  # fmt: skip
    [login] = [volume for volume in spec["volumes"] if volume["name"] == "login"]
    assert login["secret"]["items"] == [{"key": ".dockerconfigjson", "path": "config.json"}]
    assert {"name": "DOCKER_CONFIG", "value": "/var/run/modelpack/docker"} in pull["env"]
    [server] = spec["containers"]
    assert server["command"][:4] == ["vllm", "serve", "/model/bundle/model", "--served-model-name"]
    assert server["command"][4] == name
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(("kserve", "service"), [(False, "tiny"), (True, "tiny-predictor")])
def test_modelpack_answers_to_the_names_of_the_service(
    published: tuple[str, str], kserve: bool, service: str
) -> None:
    options = ["--engine", "modelpack", "--name", "tiny", "--allow-host", ".example.com"]
    made = objects(published[0], *options, *(["--kserve"] if kserve else []))
    spec = made[0]["spec"]["predictor"] if kserve else pod(made)
    [server] = spec["containers"]
    command = server["command"]
    assert [name for word, name in itertools.pairwise(command) if word == "--allow-host"] == [
        service, f"{service}.$(POD_NAMESPACE)", f"{service}.$(POD_NAMESPACE).svc",
        f"{service}.$(POD_NAMESPACE).svc.cluster.local", ".example.com",
    ]  # fmt: skip
    field = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert {"name": "POD_NAMESPACE", "valueFrom": field} in server["env"]


def test_the_commands_in_the_pod_are_ours(published: tuple[str, str], tmp_path: Path) -> None:
    """Run the commands of the init containers here, with a directory as the volume."""
    for engine in ("vllm", "modelpack"):
        spec = pod(objects(published[0], "--engine", engine))
        command = [
            word.replace("/model/", f"{tmp_path}/{engine}/")
            for word in spec["initContainers"][0]["command"]
        ]
        assert command[0] == "modelpack"
        (tmp_path / engine).mkdir()
        succeed(*command[1:], "--store", str(tmp_path / engine / "store"))
        succeed(*command[1:], "--store", str(tmp_path / engine / "store"))  # the pod restarts
    assert (tmp_path / "vllm" / "bundle" / "model" / "config.json").is_file()
    store = LayoutStore(tmp_path / "modelpack" / "store")
    served = pod(objects(published[0], "--engine", "modelpack"))["containers"][0]["command"]
    assert modelpack.inspect(served[2], store=store).digest
    assert run(*served[1:3], "--help").code == 0


def test_an_image_is_mounted_and_nothing_is_pulled(published: tuple[str, str]) -> None:
    spec = pod(objects(published[0], "--model-image", IMAGE))
    assert "initContainers" not in spec
    assert spec["volumes"] == [
        {"name": "model", "image": {"reference": IMAGE, "pullPolicy": "IfNotPresent"}}
    ]
    assert spec["containers"][0]["command"][2] == "/model/models"


def test_an_image_that_convert_makes_has_its_files_where_the_pod_looks(
    published: tuple[str, str],
) -> None:
    image = f"{published[0].rpartition(':')[0]}:image"
    digest = succeed("convert", published[0], image, "--to", "image", "--push").out
    pinned = f"{image.rpartition(':')[0]}@{digest}"
    spec = pod(objects(published[0], "--model-image", pinned))
    [volume] = spec["volumes"]
    assert volume["image"]["reference"] == pinned
    [server] = spec["containers"]
    below = Path(server["command"][2]).relative_to(server["volumeMounts"][0]["mountPath"])
    files = {name for name in names_in(pinned) if not name.endswith("/")}
    assert f"{below}/config.json" in files
    assert f"{below}/model.safetensors" in files


def names_in(image: str) -> set[str]:
    """Return the paths in the layers of an image for this architecture, read from its registry."""
    host, _, rest = image.partition("/")
    repository, _, digest = rest.partition("@")
    address = f"http://{host}/v2/{repository}"
    accept = {"Accept": "application/vnd.oci.image.index.v1+json, "
              "application/vnd.oci.image.manifest.v1+json"}  # fmt: skip
    manifest = requests.get(f"{address}/manifests/{digest}", headers=accept, timeout=10).json()
    if "manifests" in manifest:
        child = manifest["manifests"][0]["digest"]
        manifest = requests.get(f"{address}/manifests/{child}", headers=accept, timeout=10).json()
    found: set[str] = set()
    for layer in manifest["layers"]:
        blob = requests.get(f"{address}/blobs/{layer['digest']}", timeout=10).content
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            found |= {entry.name for entry in tar}
    return found


def test_what_an_inference_service_says(published: tuple[str, str]) -> None:
    [mounted] = objects(published[0], "--kserve", "--model-image", IMAGE)
    assert mounted["spec"]["predictor"]["model"]["storageUri"] == f"oci+native://{IMAGE}"
    [pulled] = objects(published[0], "--kserve", "--engine", "modelpack")
    predictor = pulled["spec"]["predictor"]
    assert predictor["containers"][0]["name"] == "kserve-container"
    assert predictor["initContainers"][0]["command"][1] == "pull"


def test_json_is_a_list(published: tuple[str, str]) -> None:
    value = json.loads(succeed("k8s", published[0], "--json").stdout)
    assert value["kind"] == "List"
    assert value["items"] == objects(published[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--name", "Tiny"), "'Tiny' is not a valid Kubernetes name"),
        (("--namespace", "a_b"), "'a_b' is not a valid Kubernetes name"),
        (
            ("--engine", "modelpack", "--model-image", IMAGE),
            "cannot be combined with --model-image",
        ),
        (("--gpus", "0"), "requires a GPU"),
        (("--gpu-memory", "many"), "many"),
    ],
)
def test_what_makes_no_sense_is_refused(
    published: tuple[str, str], arguments: tuple[str, ...], words: str
) -> None:
    result = run("k8s", published[0], *arguments)
    assert result.code == 2
    assert words in result.err


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("ai/smollm2:135M-Q4", "smollm2"),
        ("registry.example/a/b_c.d", "b-c-d"),
        ("registry.example/a/7b", "m-7b"),
        ("registry.example/a/" + "x" * 90, "x" * 63),
    ],
)
def test_names(reference: str, name: str) -> None:
    assert default_name(Reference.parse(reference)) == name


@pytest.mark.parametrize(
    ("weights", "gpus"), [(16 * 10**9, 1), (70 * 10**9, 2), (140 * 10**9, 4), (800 * 10**9, 16)]
)
def test_gpus_follow_the_size(weights: int, gpus: int) -> None:
    assert Demands(weights).gpus(80 * 10**9) == gpus


@given(st.integers(1, 10**13))
def test_demands_hold_the_weights(weights: int) -> None:
    demands = Demands(weights)
    assert demands.memory * GIB > weights
    assert demands.disk * GIB > weights
    assert demands.start_seconds > 300
    assert demands.gpus(80 * 10**9) * 80 * 10**9 > weights
