"""Messages of the chat completions API, and what chat templates take in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.json_bodies import Body


class FunctionCall(Body):
    """A function and its arguments, the text of a JSON object."""

    model_config = ConfigDict(extra="ignore")
    name: StrictStr
    arguments: StrictStr = "{}"


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    model_config = ConfigDict(extra="ignore")
    id: StrictStr = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """A message of a conversation; what templates may want beyond these is kept."""

    model_config = ConfigDict(extra="allow")
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: StrictStr | list[dict[str, Any]] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    function_call: FunctionCall | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    refusal: StrictStr | None = None


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them: plain texts, tools in today's form.

    Raises `RequestError`, naming the message, for what cannot be shown to the model.
    """
    return [_plain(message, i) for i, message in enumerate(messages)]


def _plain(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    plain: dict[str, Any] = dict(message.model_extra or {})
    plain["role"] = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    plain["content"] = _text(message.content, where)
    if message.refusal and not plain["content"]:
        plain["content"] = message.refusal
    if message.name is not None:
        plain["name"] = message.name
    if message.role == "tool":
        if not message.tool_call_id:
            raise RequestError(
                "a tool message says which call it answers", param=f"{where}.tool_call_id"
            )
        plain["tool_call_id"] = message.tool_call_id
    elif message.role == "function":
        if not message.name:
            raise RequestError("a function message has a name", param=f"{where}.name")
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


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise RequestError(
                f"this model takes text only, not {kind!r}", param=f"{where}.content[{i}]"
            )
        texts.append(text)
    return "".join(texts)
