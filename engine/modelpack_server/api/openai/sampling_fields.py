"""The fields that chat completions and completions have in common.

Source: the OpenAI API reference, and the fields that vLLM and llama.cpp add to it. Unknown fields
are ignored, as local clients send many; a known field of a wrong type is a 400. `null` is the same
as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from modelpack_engine.errors import RequestError
from modelpack_server.api.json_bodies import Body

MAX_CHOICES = 128
Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(Body):
    """What a stream tells besides its text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class SamplingFields(Body):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[StrictStr, Field(min_length=1)]
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
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
    user: StrictStr | None = None
    preset: StrictStr | None = None
    keep_alive: StrictStr | StrictInt | Number | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def given(self) -> dict[str, Any]:
        """Return the fields of SamplingParams that the request gives."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "seed",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        found = {name: value for name, value in given.items() if value is not None}
        if self.logit_bias:
            found["logit_bias"] = _token_ids(self.logit_bias)
        if self.stop:
            found["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids:
            found["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.min_tokens:
            found["min_tokens"] = self.min_tokens
        if self.ignore_eos:
            found["ignore_eos"] = True
        return found


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(key): value for key, value in bias.items()}
    except ValueError:
        raise RequestError(
            f"logit_bias has keys that are no token ids: {sorted(bias)[:5]}", param="logit_bias"
        ) from None
