"""Blocks of content, and the texts that a model is shown in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError

# Claude Code puts such a line before its instructions, with another number in each request.
_BILLING = "x-anthropic-billing-header:"


def system_text(system: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the instructions; what changes with each request is left out.

    A prompt that begins differently each time would never be found in the prefix cache.
    """
    if system is None:
        return ""
    if isinstance(system, str):
        return _without_billing(system)
    texts = []
    for i, block in enumerate(system):
        if block.get("type") != "text":
            raise unknown_block(block, f"system.{i}")
        texts.append(_without_billing(text_of(block, "text", f"system.{i}")))
    return "\n\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    if not text.startswith(_BILLING):
        return text
    return text.partition("\n")[2].lstrip("\n")


def plain_text(content: str | Sequence[Any] | None, where: str) -> str:
    """Return the text of content that has nothing but text; `where` names it in errors."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, block in enumerate(content):
        place = f"{where}.{i}"
        if not isinstance(block, Mapping):
            raise RequestError(f"{place}: a block of content is an object", param=place)
        texts.append(shown(block, place))
    return "\n\n".join(text for text in texts if text)


def shown(block: Mapping[str, Any], where: str) -> str:
    """Return the text of a block: text, a document of text, a search result.

    Raises `RequestError`, naming its type, for any other.
    """
    match block.get("type"):
        case "text":
            return text_of(block, "text", where)
        case "document":
            return _document(block, where)
        case "search_result":
            head = [str(block[key]) for key in ("title", "source") if block.get(key)]
            return "\n".join([*head, plain_text(block.get("content"), f"{where}.content")])
    raise unknown_block(block, where)


def _document(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or kind not in ("text", "content"):
        raise RequestError(
            f"{where}: this model takes documents of text only, not {kind!r}", param=where
        )
    if kind == "text":
        text = text_of(source, "data", f"{where}.source")
    else:
        text = plain_text(source.get("content"), f"{where}.source.content")
    head = [str(block[key]) for key in ("title", "context") if block.get(key)]
    return "\n".join([*head, text])


def text_of(block: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field that has to be text."""
    text = block.get(key)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{key} is no text", param=f"{where}.{key}")
    return text


def unknown_block(block: Mapping[str, Any], where: str) -> RequestError:
    """Return the error for a block that cannot be shown to the model."""
    return RequestError(
        f"{where}: a block of the type {block.get('type')!r} is not supported here", param=where
    )
