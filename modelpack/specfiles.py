"""Read the specification's documents and JSON Schemas, which are shipped with the package.

A wheel contains them as `modelpack/_spec`; an editable install reads `spec/` of the source tree.
They are for other tools: the parsers of Modelpack do not use the schemas, and the tests check that
schemas and parsers accept the same fixtures.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelpack.errors import ModelpackError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.resources.abc import Traversable

    from jsonschema.protocols import Validator

_SCHEMA_SUFFIX = ".schema.json"
_DOCUMENT_SUFFIX = ".md"


def schema_names() -> tuple[str, ...]:
    """Return the names of the schemas, sorted: `manifest`, `index` and others."""
    return _names(_root() / "schema", _SCHEMA_SUFFIX)


def document_names() -> tuple[str, ...]:
    """Return the names of the documents, sorted: `README`, `manifest`, `layers` and others."""
    return _names(_root(), _DOCUMENT_SUFFIX)


def schema(name: str) -> dict[str, Any]:
    """Return a new copy of the JSON Schema (draft 2020-12) `name`.

    Raises `UsageError` if there is no such schema.
    """
    _check_known("schema", name, schema_names())
    text = (_root() / "schema" / f"{name}{_SCHEMA_SUFFIX}").read_bytes()
    value: dict[str, Any] = json.loads(text)
    return value


def document(name: str) -> str:
    """Return the document `name` as Markdown; raise `UsageError` if there is no such document."""
    _check_known("document", name, document_names())
    return (_root() / f"{name}{_DOCUMENT_SUFFIX}").read_text(encoding="utf-8")


def validator(name: str) -> Validator:
    """Return a jsonschema validator for a schema; references between schemas resolve offline.

    Unlike JSON Schema, but like Go's decoder, it does not accept 2.0 as an integer. The caller
    must reject text that is not strict JSON, for example with a repeated key.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    derive: Callable[..., type[Validator]] = extend
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
    return derive(Draft202012Validator, type_checker=types)(schema(name), registry=_registry())


def _is_integer(_checker: object, instance: object) -> bool:
    return isinstance(instance, int) and not isinstance(instance, bool)


@cache
def _registry() -> Any:
    from referencing import Registry, Resource

    resources = [Resource.from_contents(schema(name)) for name in schema_names()]
    return Registry().with_resources([(str(resource.id()), resource) for resource in resources])


@cache
def _root() -> Traversable:
    packaged = files("modelpack") / "_spec"
    if packaged.is_dir():
        return packaged
    source = Path(__file__).resolve().parent.parent / "spec"
    if (source / "schema").is_dir():
        return source
    raise ModelpackError(
        f"the specification's files are missing: neither {packaged} nor {source} exists",
        hint="reinstall modelpack",
    )


def _names(folder: Traversable, suffix: str) -> tuple[str, ...]:
    entries = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(suffix) for name in entries if name.endswith(suffix)))


def _check_known(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UsageError(f"no such {kind}: {name!r}", hint=f"use one of {', '.join(known)}")
