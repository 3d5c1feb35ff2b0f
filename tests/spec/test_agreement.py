"""Schemas and library accept the same documents: fixtures and changed ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack import specfiles
from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.manifest import Index, Manifest
from modelpack.artifacts.model import Model
from modelpack.builder.files import LayerMetadata
from modelpack.errors import ModelpackError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def parse_manifest(raw: bytes) -> None:
    """Read a manifest and name its files, as every use of a model does first."""
    manifest = Manifest.parse(raw)
    Model(None, manifest.descriptor, manifest, ModelConfig(manifest.config.media_type)).files()


def parse_config(media_type: str) -> Callable[[bytes], object]:
    return lambda raw: ModelConfig.parse(raw, media_type)


LIBRARY: dict[str, Callable[[bytes], object]] = {
    "manifest": parse_manifest,
    "index": Index.parse,
    "docker-config-v0.1": parse_config(media_types.DOCKER_CONFIG_V01),
    "docker-config-v0.2": parse_config(media_types.DOCKER_CONFIG_V02),
    "cncf-config": parse_config(media_types.CNCF_CONFIG),
    "layer-metadata": lambda raw: LayerMetadata.parse(raw.decode(errors="surrogateescape")),
}
VALIDATORS = {name: specfiles.validator(name) for name in LIBRARY}


def strict_json(raw: bytes) -> Any:
    """Read JSON by the rules of spec/README.md, without the library's own reader."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    if len(raw) > 4 * 1024 * 1024:
        raise ValueError("too long")
    text = raw.decode("utf-8")
    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair
    return value


def schema_complaint(name: str, raw: bytes) -> str | None:
    """Return why the schema rejects a document, or None if it accepts it."""
    try:
        value = strict_json(raw)
    except (ValueError, RecursionError) as error:
        return f"not strict JSON: {error}"
    errors = [
        f"{error.json_path}: {error.message}" for error in VALIDATORS[name].iter_errors(value)
    ]
    return "; ".join(errors) or None


def library_complaint(name: str, raw: bytes) -> str | None:
    """Return why the library rejects a document; errors of other kinds are failures."""
    try:
        LIBRARY[name](raw)
    except ModelpackError as error:
        return str(error) or type(error).__name__
    return None


def fixtures(verdict: str) -> list[Any]:
    return [
        pytest.param(path, id=f"{path.parent.name}/{path.stem}")
        for path in sorted((FIXTURES / verdict).glob("*/*.json"))
    ]


@pytest.mark.parametrize("path", fixtures("valid"))
def test_both_take_a_valid_document(path: Path) -> None:
    name, raw = path.parent.name, path.read_bytes()
    assert schema_complaint(name, raw) is None
    assert library_complaint(name, raw) is None


@pytest.mark.parametrize("path", fixtures("invalid"))
def test_both_refuse_an_invalid_document(path: Path) -> None:
    name, raw = path.parent.name, path.read_bytes()
    assert schema_complaint(name, raw) is not None
    assert library_complaint(name, raw) is not None


@pytest.mark.parametrize(("verdict", "least"), [("valid", 15), ("invalid", 35)])
def test_there_are_fixtures_for_every_parser(verdict: str, least: int) -> None:
    found = list((FIXTURES / verdict).glob("*/*.json"))
    assert len(found) >= least
    assert {path.parent.name for path in found} == set(LIBRARY)


# Replacements for fields: values close to valid ones, and values of other types.
TEXTS = [
    "", "text", "rootfs", "layers", "a/b", "../a", "C:a", "a\n", "é", "en", "2.0", "a/" + "b" * 256,
    ".", "./", "a/", "a//", "application/x", "application/x; q=1",
    "application/vnd.docker.ai.dir.tar", "application/vnd.oci.empty.v1+json",
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json",
    "2024-02-29T00:00:00Z", "2023-02-29T00:00:00Z", "2024-02-29T00:00:00.1234567890Z",
    "1900-02-29T00:00:00Z", "2000-02-29T00:00:00+23:59", "٢٠٢٤-02-29T00:00:00Z",
    "sha256:" + "0" * 64, "sha256:" + "٠" * 64, "sha512:" + "f" * 128, "sha256:" + "F" * 64,
]  # fmt: skip
NUMBERS = [
    0, 1, 2, -1, 255, 256, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**32, 2**63 - 1,
    2**63, 10**30, 2.0, 0.5,
]  # fmt: skip
SCALARS: list[Any] = [None, False, True, *NUMBERS, *TEXTS]
JUNK: list[Any] = [
    *SCALARS,
    [], [[]], [None], [1], ["text"], ["sha256:" + "0" * 64],
    {}, {"": ""}, {"x": None}, {"x": 1}, {"x": "y"}, {"type": "rootfs"}, {"size": 1},
    {media_types.FILEPATH: "../x"}, {media_types.FILEPATH_ALIAS: "../x"},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field and item of a document."""
    items = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def container(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path[:-1]:
        value = value[step]
    return value


def load(name: str) -> Any:
    return json.loads((FIXTURES / "valid" / f"{name}.json").read_bytes())


def disagreement(name: str, value: Any) -> str | None:
    raw = json.dumps(value).encode()
    schema, library = schema_complaint(name, raw), library_complaint(name, raw)
    if (schema is None) == (library is None):
        return None
    return f"schema: {schema}\nlibrary: {library}\n{raw.decode()}"


@pytest.mark.long
@pytest.mark.parametrize(
    "fixture",
    [
        "manifest/signature",
        "manifest/layer-empty-file",
        "manifest/old-filepath-key",
        "manifest/cncf-archive",
        "index/store",
        "docker-config-v0.1/gguf",
        "docker-config-v0.2/safetensors",
        "cncf-config/all-fields",
        "layer-metadata/file",
    ],
)
def test_they_agree_whatever_stands_in_one_field(fixture: str) -> None:
    name, original = fixture.partition("/")[0], load(fixture)
    tried, found = 0, []
    for path in places(original):
        value = copy.deepcopy(original)
        place = container(value, path)
        for junk in JUNK:
            place[path[-1]] = junk
            found.append(disagreement(name, value))
        del place[path[-1]]
        found.append(disagreement(name, value))
        tried += 1
    assert tried >= 7
    assert [complaint for complaint in found if complaint] == []


DOCUMENTS = [
    (path.parent.name, json.loads(path.read_bytes()))
    for path in sorted((FIXTURES / "valid").glob("*/*.json"))
]
NAMES = st.sampled_from(
    ["mediaType", "size", "type", "x", "", "artifactType", media_types.FILEPATH, "format"]
)
VALUES = st.one_of(
    st.sampled_from(JUNK),
    st.text(max_size=3),
    st.dictionaries(NAMES, st.sampled_from(SCALARS), max_size=2),
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid document with a few fields replaced, dropped or added."""
    name, value = copy.deepcopy(draw(st.sampled_from(DOCUMENTS)))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        place = container(value, path)
        match draw(st.sampled_from(("replace", "drop", "add"))):
            case "drop":
                del place[path[-1]]
            case "add" if isinstance(place, dict):
                place[draw(NAMES)] = copy.deepcopy(draw(VALUES))
            case _:
                place[path[-1]] = copy.deepcopy(draw(VALUES))
    return name, value


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_they_agree_on_documents_that_nobody_wrote(document: tuple[str, Any]) -> None:
    assert disagreement(*document) is None
