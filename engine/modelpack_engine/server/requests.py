"""Request bodies of the OpenAI API, and the sampling parameters that they ask for.

Source: the OpenAI API reference, "Create chat completion" and "Create completion". Unknown fields
are ignored, as local clients send many; a known field of a wrong type is a 400.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_engine.sampling_params import SamplingParams

_MAX_CHOICES = 32
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream tells besides its text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class Message(BaseModel):
    """A message of a conversation; what templates may want beyond these is kept."""

    model_config = ConfigDict(extra="allow")
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: StrictStr | list[dict[str, Any]] | None = None


class SamplingFields(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(extra="ignore")
    model: StrictStr
    n: Annotated[StrictInt, Field(ge=1, le=_MAX_CHOICES)] = 1
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: StrictInt | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    logit_bias: dict[str, Number] | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    ignore_eos: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Return the engine's parameters; fields that were left out keep the engine's defaults."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            logit_bias=_token_ids(self.logit_bias or {}),
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages as a chat template takes them: plain texts."""
        return [
            message.model_dump(exclude_none=True)
            | {
                "role": "system" if message.role == "developer" else message.role,
                "content": _text(message.content, i),
            }
            for i, message in enumerate(self.messages)
        ]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None

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
            return [[token for token in prompt if isinstance(token, int)]]
        return [item for item in prompt if not isinstance(item, int)]


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(key): value for key, value in bias.items()}
    except ValueError:
        raise RequestError(
            f"logit_bias has keys that are no token ids: {sorted(bias)[:5]}", param="logit_bias"
        ) from None


def _text(content: str | list[dict[str, Any]] | None, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"this model takes text only, not {part.get('type')!r}",
                param=f"messages[{index}].content",
            )
        texts.append(part["text"])
    return "".join(texts)
