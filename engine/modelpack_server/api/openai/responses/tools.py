"""Tools of the Responses API: functions, alone or grouped in namespaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from modelpack_engine.errors import RequestError
from modelpack_server.api.openai.tools import FunctionFields, check_choice, choice_of
from modelpack_server.tool_parsers.tools import Tool, ToolChoice


class _ToolFields(FunctionFields):
    """A tool; only functions are."""

    type: Literal["function"]


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What the model may call. It knows no namespaces: `namespaces` gives, for the names that it
    sees, the namespace and the name within it.
    """

    tools: tuple[Tool, ...]
    choice: ToolChoice
    namespaces: Mapping[str, tuple[str, str]]


def joined_name(namespace: str | None, name: str) -> str:
    """Return the name by which the model knows a function."""
    return f"{namespace}__{name}" if namespace else name


def toolbox_of(given: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> Toolbox:
    """Return the tools and the choice among them.

    Raises `RequestError` for what is no function, and for a choice that names none.
    """
    tools: list[Tool] = []
    namespaces: dict[str, tuple[str, str]] = {}
    for i, fields in enumerate(given):
        if fields.get("type") == "namespace":
            grouped = _namespace(fields, f"tools[{i}]")
            tools += grouped.values()
            namespaces |= {tool.name: (str(fields["name"]), name) for name, tool in grouped.items()}
        else:
            tools.append(_function(fields, f"tools[{i}]"))
    if isinstance(choice, Mapping) and isinstance(choice.get("name"), str):
        choice = {**choice, "name": joined_name(choice.get("namespace"), choice["name"])}
    chosen = choice_of(choice if isinstance(choice, str) else dict(choice))
    check_choice(tools, chosen)
    return Toolbox(tuple(tools), chosen, namespaces)


def _namespace(given: Mapping[str, Any], where: str) -> dict[str, Tool]:
    """Return the functions of a namespace by their own names; the first tells what it is."""
    name, inner = given.get("name"), given.get("tools")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name is missing or no text", param=f"{where}.name")
    if not isinstance(inner, list) or not all(isinstance(fields, dict) for fields in inner):
        raise RequestError(f"{where}.tools is no list of tools", param=f"{where}.tools")
    functions: dict[str, Tool] = {}
    for i, fields in enumerate(inner):
        function = _function(fields, f"{where}.tools[{i}]")
        about = given.get("description")
        text = function.description
        if not functions and isinstance(about, str) and about:
            text = f"{about}\n\n{text}"
        own = replace(function, name=joined_name(name, function.name), description=text)
        functions[function.name] = own
    return functions


def _function(given: Mapping[str, Any], where: str) -> Tool:
    kind = given.get("type")
    if kind != "function":
        raise RequestError(
            f"a tool of the type {kind!r} is not supported: this server has functions only",
            param=f"{where}.type",
        )
    try:
        return _ToolFields.model_validate(given).tool()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        raise RequestError(f"{place}: {first['msg']}", param=place) from None
