"""Filters for the model lists of upstreams, by the models that a key may use."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Scope, Send

from modelpack.artifacts.reference import DEFAULT_ORGANISATION, is_model_id
from modelpack_server.gateway.families import error_response, family_in

#: The largest list that is filtered, in bytes; a larger one becomes an error.
MAX_LIST = 8 * 1024 * 1024

_NAMES = ("id", "name", "model")


def filtering(scope: Scope, send: Send, allows: Callable[[str], bool]) -> Send:
    """Return a `send` that removes models from a list unless `allows(name)`; 502 if it is no list.

    It treats each successful response as a list, including partial ones (206).
    """
    start: Message = {}
    pieces: list[bytes] = []
    size = 0

    async def filtered(message: Message) -> None:
        nonlocal start, size
        if message["type"] == "http.response.start" and 200 <= message["status"] < 300:
            start = message
            return
        if message["type"] != "http.response.body" or not start:
            await send(message)
            return
        size += len(message.get("body", b""))
        if size <= MAX_LIST:
            pieces.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        headers = MutableHeaders(scope=start)
        if scope["method"] == "HEAD":
            body = b""
            del headers["content-length"]
        else:
            found = None if size > MAX_LIST else allowed_only(b"".join(pieces), allows)
            if found is None:
                text = "the upstream's list of models cannot be read"
                refusal = error_response(family_in(scope), 502, text, code="upstream_error")
                start = {**start, "status": 502, "headers": list(refusal.raw_headers)}
                found = bytes(refusal.body)
            else:
                headers["content-length"] = str(len(found))
            body = found
        await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return filtered


def allowed_only(body: bytes, allows: Callable[[str], bool]) -> bytes | None:
    """Return a JSON list of models with the allowed ones only; None if it is not a list.

    Formats: OpenAI's and Anthropic's `data`, Ollama's `models`, Docker Model Runner's array.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(document, list):
        return json.dumps(_allowed(document, allows)).encode()
    lists = [name for name in ("data", "models") if isinstance(document, dict) and name in document]
    if not lists or not all(isinstance(document[name], list) for name in lists):
        return None
    # Other fields may contain names of other models, as `first_id` does.
    kept = {name: document[name] for name in ("object", "has_more") if name in document}
    kept |= {name: _allowed(document[name], allows) for name in lists}
    if "first_id" in document or "last_id" in document:
        ids = [item["id"] for item in kept.get("data", []) if "id" in item]
        kept |= {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return json.dumps(kept).encode()


def _allowed(items: list[Any], allows: Callable[[str], bool]) -> list[dict[str, Any]]:
    kept = []
    for item in items:
        if not isinstance(item, dict):
            continue
        tags = item.get("tags")
        if isinstance(tags, list):
            shown = [tag for tag in tags if isinstance(tag, str) and allows(tag)]
            if shown:
                kept.append({**item, "tags": shown})
            continue
        names = {key: item[key] for key in _NAMES if isinstance(item.get(key), str)}
        shown_as = {key: _name_shown(name, allows) for key, name in names.items()}
        if names and all(shown_as.values()):
            kept.append(item | shown_as)
    return kept


def _name_shown(name: str, allows: Callable[[str], bool]) -> str | None:
    """Return the name under which the caller may use a model, or None.

    Modelpack and Docker omit the organisation `ai` in lists of models.
    """
    if allows(name):
        return name
    whole = f"{DEFAULT_ORGANISATION}/{name}"
    short = "/" not in name and not name.startswith("sha256:") and not is_model_id(name)
    return whole if short and allows(whole) else None
