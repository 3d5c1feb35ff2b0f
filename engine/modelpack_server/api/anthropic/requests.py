"""Request bodies of the Messages API. Source: Anthropic's reference, "Create a Message".

Unknown fields are ignored, as newer clients send what older servers do not know; a known field of a
wrong type is a 400. `null` is the same as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from modelpack_engine.errors import RequestError
from modelpack_server.api.anthropic.tools import ChoiceFields
from modelpack_server.api.json_bodies import Body

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
            raise RequestError("thinking.budget_tokens is missing", param="thinking.budget_tokens")
        if self.thinking.budget_tokens >= self.max_tokens:
            raise RequestError(
                "thinking.budget_tokens has to be less than max_tokens",
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
