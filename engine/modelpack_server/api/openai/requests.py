"""Request bodies of the OpenAI API: messages, tools, sampling parameters, response formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast, get_args

from fastapi import Query
from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, SparseBody, object_schema
from modelpack_server.conversation.pictures import PictureReader
from modelpack_server.structured_output import Constraint
from modelpack_server.structured_output.closed_objects import check_strict
from modelpack_server.tool_parsers.parts import Tool, ToolChoice, check_names

#: Metadata of batches and conversations, within OpenAI's limits.
_Key = Annotated[StrictStr, Field(max_length=64)]
_Value = Annotated[StrictStr, Field(max_length=512)]
Metadata = Annotated[dict[_Key, _Value], Field(max_length=16)]
#: Parameters of routes that list objects in pages.
PageLimit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


class FunctionCall(Body):
    """A function and its arguments, a JSON object as a string."""

    name: StrictStr
    arguments: StrictStr = "{}"


class ToolCall(Body):
    """A tool call of an earlier turn."""

    id: StrictStr = ""
    type: Literal["function"] = "function"
    function: FunctionCall


_WITH_CONTENT = ("developer", "system", "user")


def _required(roles: Sequence[str], name: str, **schema: Any) -> dict[str, Any]:
    """Return the JSON schema of messages in which these roles require a field."""
    return {
        "if": {"properties": {"role": {"enum": list(roles)}}},
        "then": {"required": [name], "properties": {name: schema}},
    }


class Message(Body):
    """A message of a conversation; other fields are kept for templates that use them."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "allOf": [
                _required(_WITH_CONTENT, "content", type=["string", "array"]),
                _required(["tool"], "tool_call_id", type="string", minLength=1),
                _required(["function"], "name", type="string", minLength=1),
            ]
        },
    )
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: StrictStr | list[dict[str, Any]] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    function_call: FunctionCall | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    refusal: StrictStr | None = None


def template_messages(
    messages: Sequence[Message], pictures: PictureReader | None = None
) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates expect: content as text, current tool fields.

    The content of a message with pictures is a list of parts; without `pictures`, they are refused.
    Raises `RequestError` with the place of the content that cannot become part of the prompt.
    """
    return [_plain(message, i, pictures) for i, message in enumerate(messages)]


def _plain(message: Message, index: int, pictures: PictureReader | None) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.content is None and message.role in _WITH_CONTENT:
        raise RequestError(
            f"content is required in a {message.role} message", param=f"{where}.content"
        )
    plain: dict[str, Any] = dict(message.model_extra or {})
    plain["role"] = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if message.role != "user" and pictures is not None:
        _refuse_pictures(message.content, where)
        pictures = None
    plain["content"] = _content(message.content, where, pictures)
    if message.refusal and not plain["content"]:
        plain["content"] = message.refusal
    if message.name is not None:
        plain["name"] = message.name
    if message.role == "tool":
        if not message.tool_call_id:
            raise RequestError(
                "tool_call_id is required in a tool message", param=f"{where}.tool_call_id"
            )
        plain["tool_call_id"] = message.tool_call_id
    elif message.role == "function":
        if not message.name:
            raise RequestError("name is required in a function message", param=f"{where}.name")
        plain["tool_call_id"] = f"call_{message.name}"
    elif message.role == "assistant":
        calls = list(message.tool_calls or ())
        if message.function_call is not None:
            call = message.function_call
            calls.append(ToolCall(id=f"call_{call.name}", function=call))
        if calls:
            plain["tool_calls"] = [call.model_dump() for call in calls]
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            plain["reasoning_content"] = reasoning
    return plain


#: Parts of users' messages that models with vision read.
_MEDIA = ("image_url", "file", "input_audio", "video_url")


def _refuse_pictures(content: str | list[dict[str, Any]] | None, where: str) -> None:
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if part.get("type") in _MEDIA:
            param = f"{where}.content[{i}]"
            raise RequestError(f"{param}: files are read in messages of the user only", param=param)


def _content(
    content: str | list[dict[str, Any]] | None, where: str, pictures: PictureReader | None
) -> str | list[dict[str, Any]]:
    """Return text, or a list of parts if there are pictures, sounds, videos or documents."""
    if content is None or isinstance(content, str):
        return content or ""
    if pictures is None or all(part.get("type") not in _MEDIA for part in content):
        return _text(content, where)
    parts = []
    for i, part in enumerate(content):
        if part.get("type") == "image_url":
            given = part.get("image_url")
            fields = given if isinstance(given, dict) else {"url": given}
            place = f"{where}.content[{i}]"
            parts.append(pictures.url(fields.get("url"), place, fields.get("detail")))
        elif part.get("type") == "file":
            parts.append(_document(part.get("file"), f"{where}.content[{i}]", pictures))
        elif part.get("type") == "input_audio":
            parts.append(pictures.sound(part.get("input_audio"), f"{where}.content[{i}]"))
        elif part.get("type") == "video_url":  # vLLM's
            given = part.get("video_url")
            url = given.get("url") if isinstance(given, dict) else given
            parts.append(pictures.video(url, f"{where}.content[{i}]"))
        else:
            parts.append({"type": "text", "text": _text([part], where, i)})
    return parts


def _document(given: object, where: str, pictures: PictureReader) -> dict[str, Any]:
    data = given.get("file_data") if isinstance(given, dict) else None
    if data is None:
        raise RequestError(
            f"{where}: file.file_data is required", param=where,
            hint="send the file as data:application/pdf;base64,…; uploaded files are not read",
        )  # fmt: skip
    return pictures.document(data, where)


def unknown_part(kind: object, where: str, known: Sequence[str]) -> RequestError:
    """Return the error for a part of content that a model of text, or no model, reads."""
    if isinstance(kind, str) and kind not in known:
        message = f"{where}: parts of type {kind!r} are not known"
        return RequestError(message, param=where, hint=f"send one of {', '.join(known)}")
    return RequestError(f"this model accepts text only, not {kind!r}", param=where)


def _text(content: list[dict[str, Any]], where: str, first: int = 0) -> str:
    texts = []
    for i, part in enumerate(content, first):
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise unknown_part(kind, f"{where}.content[{i}]", ("text", *_MEDIA))
        texts.append(text)
    return "".join(texts)


MAX_CHOICES = 128
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class StreamOptions(Body):
    """The `stream_options` field."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class SamplingFields(SparseBody):
    """The common fields of chat completions and completions."""

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

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options requires stream: true", param="stream_options")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def given(self) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets."""
        names = {
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "seed",
        }  # fmt: skip
        found = self.model_dump(include=names, exclude_none=True)
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
            f"logit_bias has keys that are not token ids: {sorted(bias)[:5]}", param="logit_bias"
        ) from None


_Mode = Literal["auto", "none", "required"]


class FunctionFields(Body):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(object_schema)] | None = None
    strict: StrictBool | None = None

    def tool(self) -> Tool:
        parameters = self.parameters or {"type": "object", "properties": {}}
        if self.strict:
            check_strict(parameters, "tools")
        return Tool(self.name, self.description or "", parameters, bool(self.strict))


class ToolFields(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionFields


class FunctionChoice(Body):
    """The function that the model must call."""

    name: StrictStr


def tools_of(request: ChatRequest) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Return the tools and the tool choice of a request.

    Raises `RequestError` for a choice that names an unknown tool.
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
    """Raise `RequestError` for two tools of one name, or a choice that names an unknown tool."""
    check_names(tools)
    known = {tool.name for tool in tools}
    for name in choice.names:
        if name not in known:
            raise RequestError(f"no such tool: {name!r}", param=param)
    if choice.mode == "required" and not tools:
        raise RequestError(f"{param} requires a call, but tools is empty", param=param)


def _legacy_choice(value: str | FunctionChoice | None) -> ToolChoice:
    if isinstance(value, FunctionChoice):
        return ToolChoice("required", (value.name,))
    if value not in (None, "auto", "none"):
        raise RequestError(
            f"function_call is {value!r}, expected auto, none or a function", param="function_call"
        )
    return ToolChoice("none" if value == "none" else "auto")


def choice_of(value: str | dict[str, Any] | None) -> ToolChoice:
    """Return a `tool_choice` of chat completions or the Responses API; raises `RequestError`."""
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
    raise RequestError(f"tool_choice of type {kind!r} is not supported", param="tool_choice")


def _mode(value: Any) -> _Mode:
    if value in get_args(_Mode):
        return cast(_Mode, value)
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


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

#: The limit of prompts in a request for completions.
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
    # Accepted without effect.
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: StrictStr | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other or are not supported."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs requires logprobs: true", param="top_logprobs")
        if self.audio is not None or set(self.modalities or ()) - {"text"}:
            name = "modalities" if self.modalities else "audio"
            raise RequestError("this server generates text only", param=name)
        for name in ("web_search_options", "moderation"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not supported", param=name)
        if self.tools and self.functions:
            raise RequestError("functions cannot be combined with tools", param="functions")

    @property
    def is_legacy(self) -> bool:
        """Whether the reply has its tool call in `function_call`."""
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
        """Raise `RequestError` for fields that contradict each other or are not supported."""
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


_PARAM = "response_format"


def constraint_of(value: Mapping[str, Any] | None) -> Constraint | None:
    """Return the constraint of a response format, None for plain text.

    Beyond OpenAI's types, `regex` and `grammar` work as in vLLM, each with a field of the same
    name. Raises `RequestError` for an invalid format.
    """
    if value is None or value.get("type") == "text":
        return None
    kind = value.get("type")
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's form
        if isinstance(schema, dict):
            return Constraint("json_schema", schema)
        return Constraint("json_object", "")
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict):
            raise RequestError("json_schema is required", param=f"{_PARAM}.json_schema")
        schema = inner.get("schema", {})
        if not isinstance(schema, dict):
            raise RequestError("the schema is not an object", param=f"{_PARAM}.json_schema.schema")
        if inner.get("strict") is True:
            check_strict(schema, f"{_PARAM}.json_schema.schema")
        return Constraint("json_schema", schema)
    if kind in ("regex", "grammar"):
        text = value.get(kind)
        if not isinstance(text, str):
            raise RequestError(f"{kind} is required", param=f"{_PARAM}.{kind}")
        return Constraint(kind, text)
    raise RequestError(
        f"type is {kind!r}, expected text, json_object, json_schema, regex or grammar",
        param=f"{_PARAM}.type",
    )
