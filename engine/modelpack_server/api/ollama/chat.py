"""POST /api/chat."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.cancelling import in_thread
from modelpack_server.api.ollama import replies
from modelpack_server.api.ollama.answers import load_or_unload, reply
from modelpack_server.api.ollama.asking import (
    constraint_of,
    refuse_images,
    sampling,
    thinking_of,
)
from modelpack_server.api.ollama.bodies import Call, ChatBody, ChatMessage, OfferedTool
from modelpack_server.api.ollama.ndjson import JsonRoute
from modelpack_server.conversation.chat import ChatStream, start_chat
from modelpack_server.conversation.served import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.pool import ModelPool
from modelpack_server.tool_parsers.tools import Tool


def router(pool: ModelPool) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.post("/api/chat", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, line by line or as a whole; without messages, load the model."""
        if not body.messages:
            return await load_or_unload(request, pool, body, replies.message)

        async def start(model: ServedModel) -> ChatStream:
            return await start_chat(model, await in_thread(spec_of, body, model))

        return await reply(request, pool, body, replies.message, start)

    return routes


def spec_of(body: ChatBody, model: ServedModel) -> ChatSpec:
    """Return what a request asks for, in nobody's words; raises `RequestError`."""
    params, limit = sampling(body, model)
    thinking = thinking_of(body, model)
    return ChatSpec(
        messages=template_messages(body.messages, body.model),
        params=params,
        max_tokens=limit,
        tools=_tools(body.tools),
        constraint=constraint_of(body),
        template_options=thinking.template_options,
        reasoning=thinking.reasoning,
    )


def template_messages(messages: Sequence[ChatMessage], model: str) -> list[dict[str, Any]]:
    """Return messages as chat templates take them.

    Ollama's calls need have no ids: results then belong to the calls before them, by the name of
    the tool, else in their order. Raises `RequestError` for images.
    """
    found = []
    waiting = _Waiting()
    numbers = iter(range(sum(len(message.tool_calls) for message in messages)))
    for message in messages:
        refuse_images(message.images, model)
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": message.content}
        if role == "assistant":
            if message.thinking:
                plain["reasoning_content"] = message.thinking
            if message.tool_calls:
                calls = [_call(call, f"call_{next(numbers)}") for call in message.tool_calls]
                waiting = _Waiting(calls)
                plain["tool_calls"] = calls
        elif role == "tool":
            plain |= waiting.answered(message)
        found.append(plain)
    return found


def _call(call: Call, own_id: str) -> dict[str, Any]:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or own_id, "type": "function", "function": function}


class _Waiting:
    """Calls that have no result yet, in their order."""

    def __init__(self, calls: Sequence[Mapping[str, Any]] = ()) -> None:
        self._names = {call["id"]: call["function"]["name"] for call in calls}
        self._ids: dict[str, deque[str]] = {}  # by name
        for call_id, name in self._names.items():
            self._ids.setdefault(name, deque()).append(call_id)

    def answered(self, message: ChatMessage) -> dict[str, str]:
        """Return the call that a tool's result answers; it waits no longer."""
        call_id: str | None = message.tool_call_id
        if call_id not in self._names:
            call_id = self._first(message.tool_name) or next(iter(self._names), None)
        if call_id is None:
            found = {"tool_call_id": message.tool_call_id or "call_0"}
            return found | ({"name": message.tool_name} if message.tool_name else {})
        name = self._names.pop(call_id)
        return {"tool_call_id": call_id, "name": message.tool_name or name}

    def _first(self, name: str | None) -> str | None:
        """Return the id of the first call of a name that still waits."""
        ids = self._ids.get(name or "", deque())
        while ids and ids[0] not in self._names:
            ids.popleft()
        return ids[0] if ids else None


def _tools(offered: Sequence[OfferedTool]) -> tuple[Tool, ...]:
    tools = tuple(_tool(tool) for tool in offered)
    if len({tool.name for tool in tools}) < len(tools):
        raise RequestError("two tools have the same name", param="tools")
    return tools


def _tool(offered: OfferedTool) -> Tool:
    function = offered.function
    parameters = {"type": "object", "properties": {}} | {
        key: value for key, value in function.parameters.items() if value is not None
    }
    return Tool(function.name, function.description, parameters, False)
