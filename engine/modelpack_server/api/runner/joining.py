"""Streamed replies as the one object that they would have been, to be shown to people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Base64 of images and sound is cut to that many characters.
_MEDIA = 100


def joined(reply: str) -> tuple[str, str]:
    """Return the response and the error that a reply amounts to; one of them is "".

    A stream of server-sent events or of lines of JSON becomes the object that the same request
    gives without streaming; what is neither stays as it is.
    """
    events = list(_events(reply))
    if not events:
        return reply, ""
    for event in events:
        if event.get("error") or event.get("type") == "error":
            return "", json.dumps(event, ensure_ascii=False)
    if any(event.get("type") == "message_start" for event in events):
        whole = _anthropic(events)
    elif any(str(event.get("type", "")).startswith("response.") for event in events):
        whole = _responses(events)
    elif "choices" in events[0]:
        whole = _openai(events)
    else:
        whole = _ollama(events)
    return json.dumps(whole, ensure_ascii=False), ""


def without_media(value: Any) -> Any:
    """Return decoded JSON with images and sound cut short."""
    if isinstance(value, Mapping):
        return {key: without_media(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_media(item) for item in value]
    if isinstance(value, str) and len(value) > 10 * _MEDIA and " " not in value[: 10 * _MEDIA]:
        head, comma, data = value.partition(",") if value.startswith("data:") else ("", "", value)
        return f"{head}{comma}{data[:_MEDIA]}...[truncated {len(data) - _MEDIA} chars]"
    return value


def _events(reply: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream; nothing for a reply that is none."""
    is_sse = reply.startswith(("data: ", "event: ", ": "))
    if not is_sse and '}\n{"' not in reply:
        return
    for line in reply.splitlines():
        if is_sse and not line.startswith("data: "):
            continue
        try:
            value = json.loads(line.removeprefix("data: "))
        except ValueError:
            continue  # [DONE], or cut short
        if isinstance(value, dict):
            yield value


def _openai(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Join chunks of a (chat) completion; `choices` by index."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for piece in event.get("choices") or ():
            choice = choices.setdefault(piece.get("index", 0), {"index": piece.get("index", 0)})
            choice["finish_reason"] = piece.get("finish_reason") or choice.get("finish_reason")
            if "text" in piece:
                choice["text"] = choice.get("text", "") + piece["text"]
            if "delta" in piece:
                message = choice.setdefault("message", {"role": "assistant", "content": ""})
                _add_delta(message, piece["delta"] or {})
    head = {key: value for key, value in events[0].items() if key not in ("choices", "usage")}
    head["object"] = str(head.get("object", "")).removesuffix(".chunk")
    whole = {**head, "choices": [choices[index] for index in sorted(choices)]}
    return whole | ({"usage": usage} if usage else {})


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name in ("content", "reasoning_content", "reasoning"):
        if isinstance(delta.get(name), str):
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= call.get("index", 0):
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        mine = calls[call.get("index", 0)]
        if call.get("id"):
            mine["id"] = call["id"]
        for name, text in (call.get("function") or {}).items():
            mine["function"][name] = mine["function"].get(name, "") + (text or "")


def _anthropic(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the events of a message."""
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = event.get("type")
        if kind == "message_start":
            message = dict(event.get("message") or {})
        elif kind == "content_block_start":
            blocks[event["index"]] = dict(event.get("content_block") or {})
        elif kind == "content_block_delta":
            block = blocks.setdefault(event["index"], {})
            for name, text in event["delta"].items():
                if name != "type" and isinstance(text, str):
                    block[name] = (block.get(name) or "") + text
        elif kind == "message_delta":
            message |= event.get("delta") or {}
            message["usage"] = {**(message.get("usage") or {}), **(event.get("usage") or {})}
    return {**message, "content": [blocks[index] for index in sorted(blocks)]}


def _responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the response of the last event that has one."""
    found = [event["response"] for event in events if isinstance(event.get("response"), dict)]
    return found[-1] if found else events[-1]


def _ollama(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Join lines of a chat or a generation."""
    whole = dict(events[-1])
    if "response" in whole:
        whole["response"] = "".join(str(event.get("response", "")) for event in events)
    if isinstance(whole.get("message"), dict):
        texts = [event["message"].get("content", "") for event in events if event.get("message")]
        whole["message"] = {**whole["message"], "content": "".join(texts)}
    return whole
