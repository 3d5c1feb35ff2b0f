"""Tools of the chat completions API, today's and the functions of before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, StrictBool, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.json_bodies import Body
from modelpack_server.tool_parsers.tools import Tool, ToolChoice

if TYPE_CHECKING:
    from modelpack_server.api.openai.requests import ChatRequest

_Mode = Literal["auto", "none", "required"]


class FunctionFields(Body):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore")
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    def tool(self) -> Tool:
        """Return the tool."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        return Tool(self.name, self.description or "", parameters, bool(self.strict))


class ToolFields(Body):
    """A tool; only functions are."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["function"]
    function: FunctionFields


class FunctionChoice(Body):
    """The function that has to be called."""

    model_config = ConfigDict(extra="ignore")
    name: StrictStr


def tools_of(request: ChatRequest) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Return the tools of a request and the choice among them.

    Raises `RequestError` for a choice that names no tool of the request.
    """
    functions = [fields.function for fields in request.tools or ()] or (request.functions or [])
    tools = tuple(function.tool() for function in functions)
    if request.is_legacy:
        choice, param = _legacy_choice(request.function_call), "function_call"
    else:
        choice, param = choice_of(request.tool_choice), "tool_choice"
    check_choice(tools, choice, param)
    return tools, choice


def check_choice(tools: Sequence[Tool], choice: ToolChoice, param: str = "tool_choice") -> None:
    """Raise `RequestError` for tools of the same name, and a choice that names none of them."""
    known = {tool.name for tool in tools}
    if len(known) < len(tools):
        raise RequestError("two tools have the same name", param="tools")
    for name in choice.names:
        if name not in known:
            raise RequestError(f"there is no tool {name!r} in tools", param=param)
    if choice.mode == "required" and not tools:
        raise RequestError(f"{param} asks for a call, and there are no tools", param=param)


def _legacy_choice(value: str | FunctionChoice | None) -> ToolChoice:
    if isinstance(value, FunctionChoice):
        return ToolChoice("required", (value.name,))
    if value not in (None, "auto", "none"):
        raise RequestError(f"function_call is {value!r}", param="function_call")
    return ToolChoice("none" if value == "none" else "auto")


def choice_of(value: str | dict[str, Any] | None) -> ToolChoice:
    """Return a `tool_choice`, also as the Responses API has it; raises `RequestError`."""
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        return ToolChoice(_mode(value))
    kind = value.get("type")
    if kind == "function":
        return ToolChoice("required", (_name(value),))
    if kind == "allowed_tools":
        allowed = value.get("allowed_tools")
        inner = allowed if isinstance(allowed, dict) else value
        listed = inner.get("tools")
        if not isinstance(listed, list) or not listed:
            raise RequestError("allowed_tools lists no tools", param="tool_choice")
        names = tuple(_name(tool if isinstance(tool, dict) else {}) for tool in listed)
        return ToolChoice(_mode(inner.get("mode", "auto")), names)
    raise RequestError(f"tool_choice of the type {kind!r} is not supported", param="tool_choice")


def _mode(value: Any) -> _Mode:
    for mode in get_args(_Mode):
        if value == mode:
            found: _Mode = mode
            return found
    raise RequestError(
        f"tool_choice is {value!r}, expected auto, none, required or a function",
        param="tool_choice",
    )


def _name(value: dict[str, Any]) -> str:
    function = value.get("function")
    name = function.get("name") if isinstance(function, dict) else value.get("name")
    if not isinstance(name, str):
        raise RequestError("tool_choice names no function", param="tool_choice")
    return name
