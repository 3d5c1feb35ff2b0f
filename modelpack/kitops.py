"""KitOps ModelKits: what a Kitfile says, which is a ModelKit's config.

Layers are tar archives of paths below the directory that was packed, so that they unpack side by
side. Source: kitops-ml/kitops v1.7.0, pkg/artifact/kitfile.go and pkg/lib/kitfile/layer.go.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any, Final

from modelpack.descriptor import parsed_digest
from modelpack.digest import Digest
from modelpack.errors import ManifestError
from modelpack.gojson import kind_of

_LISTS: Final = ("code", "datasets", "docs")
_FORMATS: Final = ("gguf", "safetensors", "dduf")


def parse_kitfile(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` that a decoded Kitfile fills.

    Raises `ManifestError`, naming the place, for fields of other kinds than KitOps writes. What
    KitOps adds in later versions is ignored.
    """
    package = _object(value, "package", what)
    model = _object(value, "model", what)
    entries = list(_entries(value, model, what))
    paths, diff_ids = {}, []
    for entry, where in entries:
        digest, diff_id = (_digest(entry, key, where) for key in ("digest", "diffId"))
        path = _path(entry, where)
        if digest is not None and path != ".":
            paths[digest] = path
        if diff_id is not None:
            diff_ids.append(diff_id)
    description = _text(package, "description", what) or _text(model, "description", what)
    licence = _text(package, "license", what) or _text(model, "license", what)
    said = {
        "name": _text(package, "name", what) or _text(model, "name", what),
        "version": _text(package, "version", what) or _text(model, "version", what),
        "description": description,
        "authors": _texts(package, "authors", what),
        "licenses": [licence] if licence else [],
    }
    return {
        "format": _format(model, what),
        "diff_ids": tuple(diff_ids) if len(diff_ids) == len(entries) else (),
        "cncf_descriptor": {key: text for key, text in said.items() if text},
        "layer_paths": paths,
    }


def _entries(
    value: dict[str, Any], model: dict[str, Any], what: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield what has a layer, in the order of the layers."""
    if model.get("digest"):  # without: its path names another ModelKit, or there is none
        yield model, f"{what}: model"
    for i, part in enumerate(_list(model, "parts", what)):
        yield _checked_object(part, f"{what}: model.parts[{i}]"), f"{what}: model.parts[{i}]"
    for key in _LISTS:
        for i, entry in enumerate(_list(value, key, what)):
            yield _checked_object(entry, f"{what}: {key}[{i}]"), f"{what}: {key}[{i}]"


def _format(model: dict[str, Any], what: str) -> str:
    """Return the format of the weights: what the path says, else what somebody wrote."""
    extension = _text(model, "path", what).lower().rpartition(".")[2]
    said = (extension, *(_text(model, key, what).lower() for key in ("format", "framework")))
    return next((text for text in said if text in _FORMATS), "")


def _path(entry: dict[str, Any], where: str) -> str:
    """Return the path as KitOps cleans it; whether it is safe is seen where it is used."""
    return posixpath.normpath(_text(entry, "path", where) or ".")


def _digest(entry: dict[str, Any], key: str, where: str) -> Digest | None:
    return parsed_digest(entry[key], f"{where}.{key}") if entry.get(key) else None


def _object(value: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    found = value.get(key)
    return {} if found is None else _checked_object(found, f"{what}: {key}")


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"is {kind_of(value)}, expected an object", path=where)
    return value


def _list(value: dict[str, Any], key: str, what: str) -> list[Any]:
    found = value.get(key)
    if found is not None and not isinstance(found, list):
        raise ManifestError(f"{key!r} is {kind_of(found)}, expected an array", path=what)
    return found or []


def _texts(value: dict[str, Any], key: str, what: str) -> list[str]:
    found = _list(value, key, what)
    if not all(isinstance(text, str) for text in found):
        raise ManifestError(f"{key!r} is not an array of strings", path=what)
    return found


def _text(value: dict[str, Any], key: str, what: str) -> str:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise ManifestError(f"{key!r} is {kind_of(text)}, expected a string", path=what)
    return text or ""
