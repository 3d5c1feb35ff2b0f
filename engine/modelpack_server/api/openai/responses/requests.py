"""The body of POST /v1/responses. Source: OpenAI's reference, "Create a model response"."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)

from modelpack_engine.errors import RequestError
from modelpack_server.api.json_bodies import Body
from modelpack_server.api.openai.requests import Effort
from modelpack_server.api.openai.response_format import constraint_of
from modelpack_server.api.openai.responses.tools import Toolbox, toolbox_of
from modelpack_server.api.openai.sampling_fields import SamplingFields
from modelpack_server.structured_output import Constraint

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
