"""Close the objects of a JSON schema: without extra keys that the schema does not name.

JSON Schema allows additional properties by default, which a model fills with inventions. As in
llama.cpp, an object with `properties` and without `additionalProperties` has no other keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modelpack_engine.errors import RequestError

#: Keywords whose values are not schemas, and keywords whose values are schemas by name.
DATA = {"const", "enum", "default", "examples", "x-guidance"}
BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
# Keywords with other schemas of the same value, and those by which a schema names properties.
_LISTS = ("allOf", "anyOf", "oneOf")
_SINGLE = ("not", "if", "then", "else")
_NAMING = {
    "properties", "patternProperties", "additionalProperties", "dependentSchemas", "$ref",
    *_LISTS, *_SINGLE,
}  # fmt: skip


def close_objects(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with `additionalProperties` false where an object names its properties.

    An object stays open if another schema names properties of the same object (`allOf`, or a `$ref`
    or `anyOf` beside `properties`), or if it requires a property that it does not name.
    """
    combined = _combined(schema)

    def close(part: Mapping[str, Any]) -> dict[str, Any]:
        result = {key: _mapped(key, value, close) for key, value in part.items()}
        named, required = part.get("properties"), part.get("required")
        required = required if isinstance(required, list) else []
        alone = id(part) not in combined and "unevaluatedProperties" not in part
        known = named.keys() if isinstance(named, Mapping) else None
        if alone and known is not None and set(map(str, required)) <= known:
            result.setdefault("additionalProperties", False)
        return result

    return close(schema)


def check_strict(schema: Mapping[str, Any], param: str) -> None:
    """Raise `RequestError` if an object allows properties that it does not name.

    OpenAI refuses such a schema with `strict`. It also refuses optional properties, which are
    supported here.
    """
    for part in _parts(schema):
        if part.get("additionalProperties", False) is not False:
            raise RequestError(
                "the schema is strict, but an object has additionalProperties that are not false",
                param=param,
                hint="set additionalProperties to false, or leave strict out",
            )


def _mapped(key: str, value: Any, change: Any) -> Any:
    """Return the value of a keyword with `change` applied to each schema in it."""
    if key in DATA:
        return value
    if isinstance(value, Mapping):
        if key not in BY_NAME:
            return change(value)
        return {n: change(part) if isinstance(part, Mapping) else part for n, part in value.items()}
    if isinstance(value, list):
        return [change(part) if isinstance(part, Mapping) else part for part in value]
    return value


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all schemas in it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        yield part
        for key, value in part.items():
            _mapped(key, value, waiting.append)


def _combined(root: Mapping[str, Any]) -> set[int]:
    """Return the ids of the schemas that apply together with others that name properties."""
    found: set[int] = set()

    def mark(part: Mapping[str, Any]) -> None:
        if id(part) not in found:
            found.add(id(part))
            for group in _groups(part, root):
                for member in group:
                    mark(member)

    for part in _parts(root):
        naming = [[one for one in group if _NAMING & one.keys()] for group in _groups(part, root)]
        if sum(map(bool, naming)) + ("properties" in part) > 1:
            mark(part)
    return found


def _groups(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the alternatives of each schema that applies to the same value as `schema`."""
    for key in _LISTS:
        members = schema.get(key)
        if isinstance(members, list):
            found = [member for member in members if isinstance(member, Mapping)]
            yield from ([member] for member in found) if key == "allOf" else [found]
    yield from ([part] for key in _SINGLE if isinstance(part := schema.get(key), Mapping))
    dependent = schema.get("dependentSchemas")
    if isinstance(dependent, Mapping):
        yield from ([part] for part in dependent.values() if isinstance(part, Mapping))
    if target := _referred(schema.get("$ref"), root):
        yield [target]


def _referred(reference: object, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference[1:].split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None
