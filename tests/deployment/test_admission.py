"""The admission policies in examples/admission: their operators' definitions, and Kyverno itself.

Building Kyverno's command line takes some minutes of two cores, once.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.operations import signatures
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import watching
from modelpack.testing import registry
from modelpack.trust.keys import (
    PrivateKey,
    generate_key_pair,
    parse_public_key,
    read_private_key,
)
from modelpack.trust.sigstore import sign_simply, signature_tag, signatures_manifest
from tests.cli.running import succeed
from tests.conftest import ROOT
from tests.deployment.schemas import ADMISSION, kubeconform, write_custom_schemas
from tests.interop.go_tool import build_go_tool
from tests.models import package, tiny_safetensors

pytestmark = [pytest.mark.peer("go"), pytest.mark.long]

POLICIES = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / "examples" / "admission").glob("*.yaml"))
}


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("schemas")
    write_custom_schemas(made, ADMISSION)
    return made


def test_they_are_valid(schemas: Path) -> None:
    assert {policy["kind"] for policy in POLICIES.values()} == {*ADMISSION}
    assert kubeconform(schemas, POLICIES.values()) == []


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects in a policy, but for its metadata."""
    if isinstance(value, dict):
        yield value
        for name, one in value.items():
            if name != "metadata":
                yield from objects_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from objects_in(one)


@pytest.mark.parametrize("name", POLICIES)
def test_a_field_that_does_not_exist(schemas: Path, name: str) -> None:
    """In every object of a policy: so the schema knows all of it."""
    wrong = []
    for at in range(len([*objects_in(POLICIES[name]["spec"])])):
        changed = deepcopy(POLICIES[name])
        [*objects_in(changed["spec"])][at]["unheardOf"] = "text"
        wrong.append(changed)
    assert len(kubeconform(schemas, wrong)) == len(wrong)


def test_their_keys_are_keys() -> None:
    found = [
        value
        for policy in POLICIES.values()
        for one in objects_in(policy["spec"])
        for value in one.values()
        if isinstance(value, str) and "PUBLIC KEY" in value
    ]
    assert len(found) == 4
    assert {parse_public_key(pem.encode(), "policy").der for pem in found} == {
        parse_public_key(found[0].encode(), "policy").der
    }


@dataclass(frozen=True)
class World:
    """A registry with a signed and an unsigned model, image of a model and image of modelpack."""

    host: str
    store: Path
    key: PrivateKey

    def pod(self, name: str, *options: str) -> dict[str, Any]:
        """Return the pod that `modelpack k8s` prints for a model."""
        printed = yaml.safe_load_all(succeed("k8s", f"{self.host}/team/{name}:v1", *options).out)
        [template] = [one["spec"]["template"] for one in printed if one["kind"] == "Deployment"]
        metadata = {"name": name, "namespace": "default", **template["metadata"]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    def policy(self, name: str) -> str:
        """Return an example with the registry and the key of this world."""
        text = (ROOT / "examples" / "admission" / name).read_text()
        lines = text.replace("registry.example", self.host).splitlines()
        first = next(line for line in lines if "BEGIN PUBLIC KEY" in line).strip()
        example = lines[next(i for i, line in enumerate(lines) if first in line) :][1:3]
        pem = self.key.public.pem.decode().splitlines()[1:-1]
        for old, new in zip(example, pem, strict=True):
            lines = [line.replace(old.strip(), new) for line in lines]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    generate_key_pair(directory / "team", b"")
    key = read_private_key(directory / "team.key", b"")
    with registry(directory / "registry") as server:
        made = World(server.host, directory / "store", key)
        store = modelpack.Store(made.store)
        for name in ("signed", "unsigned"):
            (directory / name).mkdir()
            files = tiny_safetensors(directory / name)
            (files / "README.md").write_text(name)
            model = f"{server.host}/team/{name}:v1"
            package(model, files, store, push=True)
            for image in (f"{server.host}/team/{name}:image", f"{server.host}/modelpack:{name}"):
                succeed("--store", made.store, "convert", model, image, "--to", "image", "--push")
                if name == "signed":
                    sign_image(image, key)
        signatures.sign(f"{server.host}/team/signed:v1", key)
        yield made


def sign_image(name: str, key: PrivateKey) -> None:
    """Sign an image as `cosign sign --key` does."""
    where = Reference.parse(name)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        digest = repository.resolve(where.target).digest
        layer, payload = sign_simply(where.name, digest, key)
        manifest, blobs = signatures_manifest([layer])
        signatures.put(
            repository, manifest, {**blobs, layer: payload}, signature_tag(digest), watching(None)
        )


@pytest.fixture(scope="module")
def kyverno() -> Path:
    return build_go_tool(ROOT / "tests" / "interop" / "kyverno_cli", ROOT / ".cache")


def _tagged(pod: dict[str, Any]) -> None:
    """Pull the model by its tag, which may move after the check."""
    command = pod["spec"]["initContainers"][0]["command"]
    at = next(i for i, word in enumerate(command) if "@sha256:" in word)
    command[at] = command[at].partition("@")[0] + ":v1"


def _another(pod: dict[str, Any]) -> None:
    """Pull another model in a container of one's own."""
    own = deepcopy(pod["spec"]["initContainers"][0])
    own |= {"name": "own", "command": ["modelpack", "pull", EVIL]}
    pod["spec"]["initContainers"].append(own)


def _pulled_too(pod: dict[str, Any]) -> None:
    """Pull another model with the same command."""
    pod["spec"]["initContainers"][0]["command"] = ["modelpack", "pull", _model(pod), EVIL]


def _in_arguments(pod: dict[str, Any]) -> None:
    """Pull another model by the arguments, which follow the command."""
    pull = pod["spec"]["initContainers"][0]
    pull |= {"command": ["modelpack", "pull", _model(pod)], "args": [EVIL]}


def _as_a_name(pod: dict[str, Any]) -> None:
    """Serve another model under the name of the signed one."""
    command = ["modelpack", "serve", EVIL, "--served-model-name", _model(pod)]
    pod["spec"]["containers"][0]["command"] = command


def _after_a_space(pod: dict[str, Any]) -> None:
    """Serve another model after a value that contains an option."""
    pod["spec"]["containers"][0]["command"] += ["--port", "80 --host", EVIL]


def _by_a_hook(pod: dict[str, Any]) -> None:
    """Pull another model after the start."""
    hook = {"postStart": {"exec": {"command": ["modelpack", "pull", EVIL]}}}
    pod["spec"]["containers"][0]["lifecycle"] = hook


def _by_a_probe(pod: dict[str, Any]) -> None:
    """Pull another model to test whether the server is alive."""
    probe = {"exec": {"command": ["modelpack", "pull", EVIL]}}
    pod["spec"]["containers"][0]["livenessProbe"] = probe


def _model(pod: dict[str, Any]) -> str:
    """Return the model that a pod pulls."""
    command = pod["spec"]["initContainers"][0]["command"]
    return next(str(word) for word in command if "@sha256:" in word)


EVIL = "hub.example/evil:v1"
DENIED = "only with one model, named by digest"
CLUSTER, MODELS = "kyverno-cluster-policy.yaml", "kyverno-image-validating-policy.yaml"
TOOL = "--tool-image", "HOST/modelpack:signed"
VLLM, OWN = TOOL, ("--engine", "modelpack", *TOOL)
REMOTE = "--plain-http", "--insecure", "other.example:5000"
ALL = (*REMOTE, "--gpus", "2", "--monitor", "--allow-host", "ai.example")
#: Policy, model, options of `modelpack k8s`, change of the pod, and why it is denied.
ADMITTED: dict[str, tuple[str, str, tuple[str, ...], Callable[..., None] | None, str | None]] = {
    "signed images": (CLUSTER, "signed", VLLM, None, None),
    "an unsigned image of modelpack": (
        CLUSTER, "signed", ("--tool-image", "HOST/modelpack:unsigned"), None,
        "failed to verify image HOST/modelpack:unsigned"),
    "a signed volume": (CLUSTER, "signed", ("--model-image", "HOST/team/signed:image"), None, None),
    "an unsigned volume": (
        CLUSTER, "unsigned", ("--model-image", "HOST/team/unsigned:image"), None,
        "failed to verify image HOST/team/unsigned:image"),
    "a signed model": (MODELS, "signed", VLLM, None, None),
    "a signed model, our engine": (MODELS, "signed", OWN, None, None),
    "an unsigned model": (MODELS, "unsigned", VLLM, None, "the model is not signed by the team"),
    "an unsigned model, our engine": (
        MODELS, "unsigned", OWN, None, "the model is not signed by the team"),
    "a signed model, all options": (MODELS, "signed", (*OWN, *ALL), None, None),
    "a signed model, options of the registry": (MODELS, "signed", (*VLLM, *REMOTE), None, None),
    "a model by its tag": (MODELS, "signed", VLLM, _tagged, DENIED),
    "a second model": (MODELS, "signed", VLLM, _another, DENIED),
    "a second model, same command": (MODELS, "signed", VLLM, _pulled_too, DENIED),
    "a second model in the arguments": (MODELS, "signed", OWN, _in_arguments, DENIED),
    "a signed model as the name of another": (MODELS, "signed", OWN, _as_a_name, DENIED),
    "a second model after a space": (MODELS, "signed", OWN, _after_a_space, DENIED),
    "a second model by a hook": (MODELS, "signed", OWN, _by_a_hook, DENIED),
    "a second model by a probe": (MODELS, "signed", OWN, _by_a_probe, DENIED),
    "a signed volume of a model": (
        MODELS, "signed", ("--model-image", "HOST/team/signed:image"), None, None),
    "an unsigned volume of a model": (
        MODELS, "unsigned", ("--model-image", "HOST/team/unsigned:image"), None,
        "the image volume is not signed by the team"),
}  # fmt: skip


@pytest.mark.cluster  # it takes minutes to build
@pytest.mark.parametrize("name", ADMITTED)
def test_kyverno_admits_signed_models(
    kyverno: Path, world: World, tmp_path: Path, name: str
) -> None:
    policy, model, options, change, denied = ADMITTED[name]
    pod = world.pod(model, *(word.replace("HOST", world.host) for word in options))
    if change is not None:
        change(pod)
    (tmp_path / "policy.yaml").write_text(world.policy(policy))
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    done = subprocess.run(
        [kyverno, "apply", "policy.yaml", "-r", "pod.yaml", "--registry", "--remove-color", "-t",
         "--detailed-results"],
        cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    shown = done.stdout + done.stderr
    if denied is None:
        assert done.returncode == 0, shown
        assert "Pass" in shown
    else:
        assert done.returncode == 1, shown
        assert denied.replace("HOST", world.host) in shown
