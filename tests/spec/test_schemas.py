"""The schemas are valid, need no network and agree with the pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from modelpack import specfiles
from modelpack.artifacts import media_types
from modelpack.artifacts.reference import Reference
from modelpack.errors import InvalidReferenceError

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = specfiles.schema_names()
METADATA = "org.cncf.model.file.metadata+json"


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from nodes(item)


def complaints(name: str, value: Any) -> list[str]:
    errors = specfiles.validator(name).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in errors]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_a_valid_schema(name: str) -> None:
    schema = specfiles.schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"{name}.schema.json"


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_reference_between_schemas_leads_somewhere(name: str) -> None:
    for node in nodes(specfiles.schema(name)):
        if "$ref" in node:
            file, _, pointer = node["$ref"].partition("#")
            assert ":" not in file, "an absolute reference would be fetched"
            target: Any = specfiles.schema(file.removesuffix(".schema.json") or name)
            for step in filter(None, pointer.split("/")):
                target = target[step]
            assert isinstance(target, dict)


def test_a_reference_that_leads_nowhere_is_not_fetched() -> None:
    validator = specfiles.validator("manifest").evolve(schema={"$ref": "https://127.0.0.1:9/x"})
    with pytest.raises(Exception, match=r"127\.0\.0\.1:9"):
        validator.is_valid({})


@pytest.mark.parametrize("name", SCHEMAS)
def test_patterns_mean_the_same_to_every_engine(name: str) -> None:
    for node in nodes(specfiles.schema(name)):
        pattern = node.get("pattern")
        if isinstance(pattern, str):
            assert pattern.startswith("^"), pattern
            assert pattern.endswith(r"$(?!\n)"), pattern  # Python's $ matches before a newline
            assert not re.search(r"\\[dwsbDWSBAZ]", pattern), pattern  # Unicode or not: it differs


def test_the_schemas_know_the_media_types_of_the_library() -> None:
    text = json.dumps([specfiles.schema(name) for name in SCHEMAS])
    known = set(re.findall(r'"(application/vnd\.[^"^]+)"', text))
    library = {value for value in vars(media_types).values() if isinstance(value, str)}
    assert len(known) >= 15
    assert known <= library


# The pages.

FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[Any]:
    found = []
    for page in specfiles.document_names():
        for language, info, body in FENCE.findall(specfiles.document(page)):
            if language == "json":
                found.append(pytest.param(info.strip(), body, id=f"{page}-{len(found)}"))
    return found


EXAMPLES = examples()


@pytest.mark.parametrize(("info", "body"), EXAMPLES)
def test_an_example_in_a_page_validates(info: str, body: str) -> None:
    name = info.removeprefix("schema=")
    assert name in SCHEMAS, f"a JSON example has to name its schema, not {info!r}"
    value = json.loads(body)
    assert complaints(name, value) == []
    for layer in value.get("layers", []):
        assert complaints("layer-metadata", json.loads(layer["annotations"][METADATA])) == []


def test_every_schema_has_an_example() -> None:
    shown = {example.values[0] for example in EXAMPLES} | {"schema=common", "schema=manifest"}
    assert shown == {f"schema={name}" for name in SCHEMAS}


@pytest.mark.parametrize("page", specfiles.document_names())
def test_links_between_pages_lead_somewhere(page: str) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

    for target, anchor in re.findall(r"\]\(([\w.-]*)(#[\w-]+)?\)", specfiles.document(page)):
        other = specfiles.document(target.removesuffix(".md") if target else page)
        assert not anchor or anchor[1:] in anchors(other), f"{target}{anchor}"


def test_every_page_and_schema_is_in_the_index() -> None:
    index = specfiles.document("README")
    assert all(f"({page}.md)" in index for page in specfiles.document_names() if page != "README")
    assert all(f"`{name}`" in index for name in SCHEMAS)


REFERENCES = re.findall(
    r"^\| `([^`]+)` \| `?([^`|]+)`? \|$", specfiles.document("references"), re.M
)


@pytest.mark.parametrize(("text", "meaning"), REFERENCES)
def test_the_table_of_references(text: str, meaning: str) -> None:
    hex_digits = "0123456789abcdef" * 4
    text, meaning = text.replace("H64", hex_digits), meaning.strip().replace("H64", hex_digits)
    if meaning == "refused":
        with pytest.raises(InvalidReferenceError):
            Reference.parse(text, default_registry="docker.io")
    else:
        assert str(Reference.parse(text, default_registry="docker.io")) == meaning


def test_the_table_of_references_is_there() -> None:
    assert len(REFERENCES) >= 30


# Manifests of writers.


def fixture(name: str) -> Any:
    return json.loads((ROOT / "fixtures" / "valid" / f"{name}.json").read_bytes())


@pytest.mark.parametrize("name", ["docker-v0.1", "docker-v0.2", "cncf", "layer-twice"])
def test_a_manifest_that_a_writer_makes(name: str) -> None:
    assert complaints("model-manifest", fixture(f"manifest/{name}")) == []


@pytest.mark.parametrize(
    "name",
    [
        "signature",
        "media-type-missing",
        "layers-empty",
        "layer-bare",
        "old-filepath-key",
        "cncf-archive",
        "cncf-without-artifacttype",
        "null-fields",
    ],
)
def test_a_manifest_that_a_reader_takes_and_no_writer_makes(name: str) -> None:
    value = fixture(f"manifest/{name}")
    assert complaints("manifest", value) == []
    assert complaints("model-manifest", value) != []


def test_the_file_metadata_in_valid_manifests_is_valid() -> None:
    checked = 0
    for path in (ROOT / "fixtures" / "valid" / "manifest").glob("*.json"):
        for layer in json.loads(path.read_bytes())["layers"]:
            text = layer.get("annotations", {}).get(METADATA)
            if text is not None:
                assert complaints("layer-metadata", json.loads(text)) == []
                checked += 1
    assert checked >= 10


# The output of Docker Model Runner's own code.

VECTORS = json.loads((ROOT / "fixtures" / "vectors" / "model_runner.json").read_bytes())["vectors"]
CONFIGS = {
    media_types.DOCKER_CONFIG_V01: "docker-config-v0.1",
    media_types.DOCKER_CONFIG_V02: "docker-config-v0.2",
    media_types.CNCF_CONFIG: "cncf-config",
}


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_what_docker_model_runner_writes_is_valid(vector: dict[str, Any]) -> None:
    manifest = json.loads(base64.b64decode(vector["manifest"]))
    config = json.loads(base64.b64decode(vector["config"]))
    # It packages unsafe names; the schema rejects only those.
    unsafe = [
        f"$.layers[{i}].annotations['{media_types.FILEPATH}']"
        for i, layer in enumerate(manifest["layers"])
        if re.search(r"[\\\x00-\x1f\x7f]", layer["annotations"][media_types.FILEPATH])
    ]
    refused = [complaint.split(": ")[0] for complaint in complaints("model-manifest", manifest)]
    assert refused == unsafe
    assert complaints(CONFIGS[manifest["config"]["mediaType"]], config) == []
    for layer in manifest["layers"]:
        assert complaints("layer-metadata", json.loads(layer["annotations"][METADATA])) == []
