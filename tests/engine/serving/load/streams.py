"""Complete streams of three families: checks of their format, and their text."""

from __future__ import annotations

import json
from typing import Any


def malformed(family: str, content: bytes) -> str:
    """Return the error in a stream, or ""."""
    try:
        return _RULES[family](content)
    except (ValueError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {error} in {content[-300:]!r}"


def text_of(family: str, content: bytes) -> str:
    """Return the text of a well-formed stream."""
    if family == "openai":
        choices = [choice for chunk in _chunks(content) for choice in chunk["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    if family == "anthropic":
        deltas = [data["delta"] for name, data in _events(content) if name == "content_block_delta"]
        return "".join(delta["text"] for delta in deltas)
    return "".join(line["message"]["content"] for line in _lines(content))


def _events(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return server-sent events with their names, without comments."""
    events = []
    text = content.decode()
    if not text.endswith("\n\n"):
        raise ValueError("the last event has no end")
    for block in text[:-2].split("\n\n"):
        name = ""
        for line in block.split("\n"):
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                events.append((name, {} if value == "[DONE]" else json.loads(value)))
            elif field != "":
                raise ValueError(f"what is {line!r}?")
    return events


def _lines(content: bytes) -> list[dict[str, Any]]:
    if not content.endswith(b"\n"):
        raise ValueError("the last line has no end")
    return [json.loads(line) for line in content[:-1].split(b"\n")]


def _chunks(content: bytes) -> list[dict[str, Any]]:
    *chunks, (_, done) = _events(content)
    if done != {}:
        raise ValueError("there is no [DONE] at the end")
    return [chunk for _, chunk in chunks]


def _openai(content: bytes) -> str:
    chunks = _chunks(content)
    if len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) != 1:
        return "chunks of several answers"
    choices = [chunk["choices"][0] for chunk in chunks]
    roles = [choice["delta"].get("role") for choice in choices]
    ends = [choice["finish_reason"] for choice in choices]
    if roles[0] != "assistant" or any(roles[1:]):
        return f"roles {roles}"
    return "" if ends[-1] in ("stop", "length") and not any(ends[:-1]) else f"ends {ends}"


def _anthropic(content: bytes) -> str:
    events = [(name, data) for name, data in _events(content) if name != "ping"]
    if any(data["type"] != name for name, data in events):
        return "an event whose name is not its type"
    names = [name for name, _ in events]
    around = ["message_start", "content_block_start", "content_block_stop", "message_delta",
              "message_stop"]  # fmt: skip
    if [name for name in names if name != "content_block_delta"] != around:
        return f"events {names}"
    reason = events[-2][1]["delta"]["stop_reason"]
    return "" if reason in ("end_turn", "max_tokens") else f"stop_reason {reason}"


def _ollama(content: bytes) -> str:
    lines = _lines(content)
    if any(line["message"]["role"] != "assistant" for line in lines):
        return "a line without its role"
    if [line["done"] for line in lines] != [False] * (len(lines) - 1) + [True]:
        return "done where it was not, or not done"
    reason = lines[-1]["done_reason"]
    return "" if reason in ("stop", "length") else f"done_reason {reason}"


_RULES = {"openai": _openai, "anthropic": _anthropic, "ollama": _ollama}
