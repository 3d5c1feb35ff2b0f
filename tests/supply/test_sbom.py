"""Bills of materials: valid by CycloneDX's own schema, with correct content."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import modelpack
from modelpack.artifacts.digest import ALGORITHMS, Digest
from modelpack.cli.main import run
from modelpack.operations.lookup import inspect
from modelpack.operations.referrers import referrers
from modelpack.operations.sbom import sbom
from modelpack.trust.sbom import CYCLONEDX, BaseModel, ml_bom
from tests.models import package, tiny_gguf, tiny_safetensors
from tests.supply.conftest import Published

CARD = """---
license: mit
base_model:
- org/base-one
- "org/base-two"
---
# A model
"""


def checked(document: bytes) -> dict[str, Any]:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.decode())
    assert error is None, error
    value: dict[str, Any] = json.loads(document)
    return value


def test_the_files_and_their_digests(published: Published) -> None:
    value = checked(sbom(published.reference, store=published.origin).document)
    model = inspect(published.reference, store=published.origin)
    assert {one["name"]: one["hashes"][0]["content"] for one in value["components"]} == {
        file.filepath: file.descriptor.digest.encoded for file in model.files()
    }
    component = value["metadata"]["component"]
    assert component["type"] == "machine-learning-model"
    assert component["hashes"] == [{"alg": "SHA-256", "content": published.digest.encoded}]
    assert component["licenses"] == [{"license": {"id": "MIT"}}]
    properties = {one["name"]: one["value"] for one in component["properties"]}
    assert properties["modelpack:format"] == "safetensors"
    assert properties["modelpack:quantization"] == model.config.quantization
    assert component["purl"].startswith(f"pkg:oci/model@sha256%3A{published.digest.encoded}?")
    refs = {one["bom-ref"] for one in value["components"]}
    assert set(value["dependencies"][0]["dependsOn"]) == refs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_of_digests(published: Published, algorithm: str) -> None:
    model = inspect(published.reference, store=published.origin)
    layer, *others = model.manifest.layers
    other = replace(layer, digest=Digest.of(b"", algorithm))
    manifest = replace(model.manifest, layers=(other, *others))
    [component, *_] = checked(ml_bom(replace(model, manifest=manifest)))["components"]
    [stated] = component["hashes"]
    assert stated["alg"].replace("-", "").lower() == algorithm
    assert stated["content"] == other.digest.encoded


def test_the_same_model_gives_the_same_bytes(published: Published) -> None:
    first = sbom(published.reference, store=published.origin).document
    assert sbom(published.reference, from_registry=True).document == first


def test_base_models_and_the_licence_of_a_card(tmp_path: Path) -> None:
    directory, store = tiny_safetensors(tmp_path), modelpack.Store(tmp_path / "store")
    (directory / "LICENSE").unlink()
    (directory / "README.md").write_text(CARD)
    package("team/m:v1", directory, store)
    component = checked(sbom("team/m:v1", store=store).document)["metadata"]["component"]
    assert component["licenses"] == [{"license": {"id": "MIT"}}]
    ancestors = component["pedigree"]["ancestors"]
    assert [one["name"] for one in ancestors] == ["org/base-one", "org/base-two"]
    assert ancestors[0]["externalReferences"][0]["url"] == "https://huggingface.co/org/base-one"


@pytest.mark.parametrize("licence", ["LicenseRef-Llama-3.1", "our own", "GPL-3.0-only", "mit"])
def test_licences(tmp_path: Path, licence: str) -> None:
    store = modelpack.Store(tmp_path / "store")
    package("team/g:v1", tiny_gguf(tmp_path), store)
    model = inspect("team/g:v1", store=store)
    bom = checked(ml_bom(model, licences=[licence, licence], bases=[BaseModel("a base")]))
    [stated] = bom["metadata"]["component"]["licenses"]
    known = {"mit": {"id": "MIT"}, "GPL-3.0-only": {"id": "GPL-3.0-only"}}
    assert stated["license"] == known.get(licence, {"name": licence})


def test_attached_to_the_model(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(published.origin.root)]
    for _ in range(2):  # the second time changes nothing
        assert run(["sbom", published.reference, "-r", "--attach"]) == 0
        [attached] = referrers(published.reference, artifact_type=CYCLONEDX)
        assert capsys.readouterr().out.strip() == str(attached.digest)
    assert run(["sbom", published.reference, "--attach", *store]) == 0
    [local] = referrers(published.reference, artifact_type=CYCLONEDX, store=published.origin)
    assert local.digest == attached.digest
    output = tmp_path / "bom.json"
    assert run(["sbom", published.reference, "-o", str(output), *store]) == 0
    checked(output.read_bytes())
