"""Request bodies of the OpenAI API. Source: its reference, "Create chat completion" and
"Create completion".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.openai.messages import Message
from modelpack_server.api.openai.sampling_fields import SamplingFields
from modelpack_server.api.openai.tools import FunctionChoice, FunctionFields, ToolFields

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


#: The most prompts of a request for completions.
MAX_PROMPTS = 128


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[ToolFields] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool = True
    functions: list[FunctionFields] | None = None
    function_call: StrictStr | FunctionChoice | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: StrictBool | None = None
    thinking_token_budget: Annotated[StrictInt, Field(ge=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[StrictStr] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: Any = None
    # Accepted, and of no effect here.
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: StrictStr | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other, or that we do not do."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.audio is not None or set(self.modalities or ()) - {"text"}:
            name = "modalities" if self.modalities else "audio"
            raise RequestError("this server answers in text only", param=name)
        for name in ("web_search_options", "moderation"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not something a local server has", param=name)
        if self.tools and self.functions:
            raise RequestError("functions is the old name of tools: give one", param="functions")

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def is_legacy(self) -> bool:
        """Whether calls are answered as `function_call`."""
        return bool(self.functions)


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(max_length=MAX_PROMPTS)]
        | list[StrictInt]
        | Annotated[list[list[StrictInt]], Field(max_length=MAX_PROMPTS)]
    )
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    suffix: StrictStr | None = None
    best_of: Annotated[StrictInt, Field(ge=1)] | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other, or that we do not do."""
        super().check()
        if self.suffix:
            raise RequestError("suffix (fill in the middle) is not supported", param="suffix")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of other than n is not supported", param="best_of")
        if not self.prompts:
            raise RequestError("prompt is empty", param="prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts: texts, or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return [item for item in prompt if not isinstance(item, int)]
