"""Request bodies of the Messages API, its tools and its tool choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.tool_parsers.parts import Tool, ToolChoice


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
        raise RequestError("tool_choice requires a call, but tools is empty", param="tools")
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
            f"tools.{index}: a tool of the type {kind!r} runs on Anthropic's servers only",
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


_Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Fields(Body):
    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class MessageFields(_Fields):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[dict[str, Any]]


class ThinkingFields(_Fields):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] = "summarized"


class FormatFields(_Fields):
    """What the text of the answer has to be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputFields(_Fields):
    """How the answer is made."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: FormatFields | None = None


class PromptRequest(_Fields):
    """What makes a prompt: the body of POST /v1/messages/count_tokens."""

    model: Annotated[StrictStr, Field(min_length=1)]
    messages: Annotated[list[MessageFields], Field(min_length=1)]
    system: StrictStr | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: ChoiceFields | None = None
    thinking: ThinkingFields | None = None
    output_config: OutputFields | None = None
    output_format: FormatFields | None = None  # what output_config.format was called before


class MessagesRequest(PromptRequest):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[StrictInt, Field(ge=1)]
    stream: StrictBool = False
    stop_sequences: list[Annotated[StrictStr, Field(min_length=1)]] = []
    temperature: _Fraction | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    preset: StrictStr | None = None
    keep_alive: StrictStr | StrictInt | float | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other."""
        if self.thinking is None or self.thinking.type != "enabled":
            return
        if self.thinking.budget_tokens is None:
            raise RequestError("thinking.budget_tokens is required", param="thinking.budget_tokens")
        if self.thinking.budget_tokens >= self.max_tokens:
            raise RequestError(
                "thinking.budget_tokens must be less than max_tokens",
                param="thinking.budget_tokens",
            )

    def given(self) -> dict[str, Any]:
        """Return the fields of SamplingParams that the request gives."""
        names = ("temperature", "top_p", "top_k")
        given = {name: getattr(self, name) for name in names}
        found = {name: value for name, value in given.items() if value is not None}
        if self.stop_sequences:
            found["stop"] = tuple(self.stop_sequences)
        return found
