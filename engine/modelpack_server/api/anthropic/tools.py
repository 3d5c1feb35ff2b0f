"""Tools of the Messages API and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictStr, ValidationError

from modelpack_engine.errors import RequestError
from modelpack_server.api.json_bodies import Body
from modelpack_server.tool_parsers.tools import Tool, ToolChoice


class ToolFields(Body):
    """A tool that the caller runs."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["custom"] | None = None
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None


class ChoiceFields(Body):
    """Whether a tool is called, and which."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False


def tools_of(
    given: Sequence[dict[str, Any]], choice: ChoiceFields | None
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Return the tools and the choice among them.

    Raises `RequestError` for tools that Anthropic's servers run themselves, and for a choice that
    names no tool.
    """
    tools = tuple(_tool(fields, i) for i, fields in enumerate(given))
    known = {tool.name for tool in tools}
    if len(known) < len(tools):
        raise RequestError("two tools have the same name", param="tools")
    if choice is None or choice.type == "auto":
        return tools, ToolChoice()
    if choice.type == "none":
        return tools, ToolChoice("none")
    if not tools:
        raise RequestError("tool_choice asks for a call, and there are no tools", param="tools")
    if choice.type == "any":
        return tools, ToolChoice("required")
    if choice.name not in known:
        raise RequestError(
            f"tool_choice names {choice.name!r}, which is not in tools", param="tool_choice.name"
        )
    return tools, ToolChoice("required", (choice.name,))


def _tool(given: dict[str, Any], index: int) -> Tool:
    kind = given.get("type")
    if kind not in (None, "custom"):
        raise RequestError(
            f"tools.{index}: a tool of the type {kind!r} runs on Anthropic's servers, and not here",
            param=f"tools.{index}.type",
            hint="offer tools with a name and an input_schema",
        )
    try:
        fields = ToolFields.model_validate({k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["tools", str(index), *map(str, first["loc"])])
        raise RequestError(f"{where}: {first['msg']}", param=where) from None
    return Tool(fields.name, fields.description or "", fields.input_schema, bool(fields.strict))
