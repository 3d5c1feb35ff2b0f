"""Request bodies of the Responses API, and its tools: functions, alone or in namespaces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.api.openai.requests import (
    Effort,
    FunctionFields,
    SamplingFields,
    check_choice,
    choice_of,
    constraint_of,
)
from modelpack_server.structured_output import Constraint
from modelpack_server.tool_parsers.parts import Tool, ToolChoice


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
        raise RequestError(f"{where}.name is required and must be a string", param=f"{where}.name")
    if not isinstance(inner, list) or not all(isinstance(fields, dict) for fields in inner):
        raise RequestError(f"{where}.tools is not a list of tools", param=f"{where}.tools")
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


#: What `include` may ask for; what else it names is of tools that are not here.
CARRIED_REASONING = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"

#: Characters of JSON in the fields that a response repeats, its events several times.
MAX_REPEATED = 1024 * 1024
_REPEATED = frozenset(("tools", "tool_choice", "text", "reasoning", "metadata", "user"))

# Fields for what only a hosted service has: to ignore them would be a silent difference.
_HOSTED = ("background", "conversation", "prompt", "moderation")


class ReasoningFields(Body):
    """How much the model thinks, and what of it is told."""

    model_config = ConfigDict(extra="ignore")
    effort: Effort | None = None
    summary: StrictStr | None = None


class TextFields(Body):
    """What the text of the answer has to be."""

    model_config = ConfigDict(extra="ignore")
    format: dict[str, Any] | None = None
    verbosity: StrictStr | None = None


class ResponseRequest(SamplingFields):
    """The body of POST /v1/responses."""

    input: StrictStr | list[dict[str, Any]]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool = True
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_tool_calls: Annotated[StrictInt, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: StrictStr | dict[str, Any] = "auto"
    parallel_tool_calls: StrictBool = True
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    reasoning_effort: Effort | None = None  # as some clients have it
    include: list[StrictStr] = Field(default_factory=list)
    truncation: Literal["auto", "disabled"] = "disabled"
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    background: StrictBool | None = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None

    def check(self) -> None:
        """Raise `RequestError` for what we do not do."""
        super().check()
        for name in _HOSTED:
            if getattr(self, name) not in (None, False):
                raise RequestError(f"{name} is not something a local server has", param=name)
        if self.n != 1:
            raise RequestError("a response has one answer", param="n")
        if not self.input and not self.previous_response_id:
            raise RequestError("input is empty", param="input")

    def check_repeated(self) -> None:
        """Raise `RequestError` where the response would repeat too much. Call it in a thread."""
        size = len(json.dumps(self.model_dump(include=set(_REPEATED)), ensure_ascii=False))
        if size > MAX_REPEATED:
            names = ", ".join(sorted(_REPEATED))
            raise RequestError(
                f"{names} have {size} characters in all, the limit is {MAX_REPEATED}",
                param="metadata",
            )

    @property
    def effort(self) -> str | None:
        """How much the model is to think."""
        return (self.reasoning.effort if self.reasoning else None) or self.reasoning_effort

    @property
    def wants_logprobs(self) -> bool:
        """Whether text comes with log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in self.include

    def toolbox(self) -> Toolbox:
        """Return the tools and the choice among them; raises `RequestError`."""
        return toolbox_of(self.tools, self.tool_choice)

    def constraint(self) -> Constraint | None:
        """Return what the text has to be; raises `RequestError`."""
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.get("type") != "json_schema":
            return constraint_of(wanted)
        return constraint_of({"type": "json_schema", "json_schema": wanted})
