"""The response object of the Responses API, its output items and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from modelpack_engine.request import SamplingParams
from modelpack_server.api.bodies import written
from modelpack_server.api.continuation import carry
from modelpack_server.api.errors import Problem
from modelpack_server.api.openai.replies import chat_logprobs
from modelpack_server.api.openai.responses.requests import (
    CARRIED_REASONING,
    Item,
    ResponseRequest,
    new_id,
)
from modelpack_server.api.sse import dumps, event
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.spec import ChatDelta, ChatUsage
from modelpack_server.tool_parsers.parts import Reasoning, Text, ToolArguments, ToolStart

Event = dict[str, Any]


class Output:
    """The output items of a response: `take` and `end` return events, `items` the finished items.

    With `words`, text has log-probabilities. With `carries`, reasoning items contain a continuation
    token, so that clients without a stored response can send them back. Whitespace before a text is
    held back, so that whitespace between thoughts and calls makes no message.
    """

    def __init__(
        self,
        words: Vocabulary | None = None,
        *,
        carries: bool = False,
        namespaces: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.items: list[Item] = []
        self._words = words
        self._carries = carries
        self._namespaces = namespaces or {}
        self._open: Item | None = None
        self._pieces: list[str] = []
        self._logprobs: list[Any] = []
        self._space = ""

    def take(self, delta: ChatDelta) -> list[Event]:
        """Return the events for a delta."""
        events: list[Event] = []
        logprobs: list[Any] = []
        if self._words is not None and delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._words)["content"]
        for part in delta.parts:
            match part:
                case Text():
                    events += self._text(part.text, logprobs)
                    logprobs = []
                case Reasoning():
                    events += self._to("reasoning", {"summary": [], "content": []})
                    events += self._more("response.reasoning_text.delta", part.text)
                case ToolStart():
                    events += self.close("completed")
                    events += self._to("function_call", self._called(part))
                case ToolArguments():
                    self._pieces.append(part.fragment)
                    kind = "response.function_call_arguments.delta"
                    events.append(self._event(kind, delta=part.fragment))
        return events

    def end(self, status: str) -> list[Event]:
        """Return the final events; an open item gets `status`."""
        events: list[Event] = []
        if not self.items and self._open is None:
            events += self._say(self._space, [])  # a response has at least one message
        return events + self.close(status)

    def close(self, status: str) -> list[Event]:
        """Return the events that close the open item, if any."""
        item = self._open
        if item is None:
            return []
        text = "".join(self._pieces)
        if item["type"] == "function_call":
            item["arguments"] = text or "{}"
            done = "response.function_call_arguments.done"
            events = [self._event(done, name=item["name"], arguments=item["arguments"])]
        else:
            part = self._part(text)
            item["content"] = [part]
            is_text = item["type"] == "message"
            fields: dict[str, Any] = {"logprobs": self._logprobs} if is_text else {}
            kind = "response.output_text.done" if is_text else "response.reasoning_text.done"
            events = [
                self._event(kind, content_index=0, text=text, **fields),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
            if self._carries and not is_text:
                item["encrypted_content"] = carry(text)
        item["status"] = status
        events.append(self._item_event("response.output_item.done"))
        self.items.append(item)
        self._open, self._pieces, self._logprobs = None, [], []
        return events

    def _called(self, part: ToolStart) -> Item:
        namespace, name = self._namespaces.get(part.name, (None, part.name))
        called = {"call_id": part.id, "name": name, "arguments": ""}
        return called | ({"namespace": namespace} if namespace else {})

    def _text(self, text: str, logprobs: list[Any]) -> list[Event]:
        if self._open is None or self._open["type"] != "message":
            text = self._space + text
            if not text.strip():
                self._space = text
                return []
        return self._say(text, logprobs)

    def _say(self, text: str, logprobs: list[Any]) -> list[Event]:
        events = self._to("message", {"role": "assistant", "content": []})
        self._logprobs += logprobs
        if not text:
            return events
        return events + self._more("response.output_text.delta", text, logprobs=logprobs)

    def _more(self, kind: str, text: str, **fields: Any) -> list[Event]:
        self._pieces.append(text)
        return [self._event(kind, content_index=0, delta=text, **fields)]

    def _to(self, kind: str, fields: Item) -> list[Event]:
        """Open an item of this kind, unless the open item is of this kind."""
        if self._open is not None and self._open["type"] == kind:
            return []
        events = self.close("completed")
        self._space = ""
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        self._open = {"id": new_id(prefix), "type": kind, "status": "in_progress", **fields}
        events.append(self._item_event("response.output_item.added"))
        if kind != "function_call":
            added = "response.content_part.added"
            events.append(self._event(added, content_index=0, part=self._part("")))
        return events

    def _part(self, text: str) -> Item:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _event(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.items),
                **fields}  # fmt: skip

    def _item_event(self, kind: str) -> Event:
        assert self._open is not None
        return {"type": kind, "output_index": len(self.items), "item": dict(self._open)}


class Reply:
    """One response: takes deltas, and returns stream events or the whole response object.

    Events are texts, numbered from 0.
    """

    def __init__(self, request: ResponseRequest) -> None:
        self.id = new_id("resp")
        self._request = request
        self._created = int(time.time())
        self._params = SamplingParams()
        self._output = Output(carries=CARRIED_REASONING in request.include)
        self._status = "queued" if request.background else "in_progress"
        self._error: dict[str, Any] | None = None
        self._usage: ChatUsage | None = None
        self._completed: int | None = None
        self._numbers = 0

    @property
    def output(self) -> list[Item]:
        """The finished output items."""
        return self._output.items

    def start(
        self,
        params: SamplingParams,
        words: Vocabulary | None,
        namespaces: Mapping[str, tuple[str, str]],
    ) -> None:
        """Set what only the model determines: the sampling parameters, the vocabulary for
        log-probabilities and the namespaces of functions.
        """
        self._params = params
        carries = CARRIED_REASONING in self._request.include
        self._output = Output(words, carries=carries, namespaces=namespaces)

    @property
    def has_ended(self) -> bool:
        """Whether the status is final."""
        return self._status not in ("queued", "in_progress")

    def begin(self) -> list[str]:
        """Return the events that begin the stream."""
        body = self.json()
        kinds = ("response.created", f"response.{self._status}")
        return self._written({"type": kind, "response": body} for kind in kinds)

    def progress(self) -> list[str]:
        """Return the event for the end of the queue of a background response."""
        self._status = "in_progress"
        return self._written([{"type": "response.in_progress", "response": self.json()}])

    def take(self, delta: ChatDelta) -> list[str]:
        """Return the events for a delta, including the final events if it ends the response."""
        events = self._output.take(delta)
        if delta.finish is not None:
            self._status = "incomplete" if delta.finish == "length" else "completed"
            self._completed = int(time.time())
            self._usage = delta.usage
            events += self._output.end(self._status)
            events.append({"type": f"response.{self._status}", "response": self.json()})
        return self._written(events)

    def cancel(self) -> list[str]:
        """Return the events for a background response that the client cancelled."""
        self._status = "cancelled"
        events = self._output.close("incomplete")
        return self._written([*events, {"type": "response.cancelled", "response": self.json()}])

    def fail(self, problem: Problem) -> list[str]:
        """Return the events for an error within the stream."""
        self._status = "failed"
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        if problem.status == 429:
            code = "rate_limit_exceeded"
        self._error = {"code": code, "message": problem.message}
        events = self._output.close("incomplete")
        told = {"type": "error", **self._error, "param": problem.param}
        events += [told, {"type": "response.failed", "response": self.json()}]
        return self._written(events)

    def json(self) -> dict[str, Any]:
        """Return the response object of the deltas taken so far."""
        asked = self._request
        reasoning = asked.reasoning
        text = asked.text
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed if self._status == "completed" else None,
            "status": self._status,
            "background": bool(asked.background),
            "error": self._error,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if self._status == "incomplete" else None
            ),
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "model": asked.model,
            "output": list(self._output.items),
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {
                "effort": asked.effort,
                "summary": reasoning.summary if reasoning is not None else None,
            },
            "service_tier": "default",
            "store": asked.store,
            "temperature": self._params.temperature,
            "text": {
                "format": (text.format if text is not None else None) or {"type": "text"},
                "verbosity": (text.verbosity if text is not None else None) or "medium",
            },
            "tool_choice": asked.tool_choice,
            "tools": [_told(tool) for tool in asked.tools],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": self._params.top_p,
            "truncation": asked.truncation,
            "usage": usage_json(self._usage) if self._usage is not None else None,
            "user": asked.user,
            "metadata": asked.metadata,
        } | ({"conversation": {"id": name}} if (name := asked.conversation_id) else {})

    def _written(self, events: Iterable[dict[str, Any]]) -> list[str]:
        texts = []
        for body in events:
            numbered = {**body, "sequence_number": self._numbers}
            self._numbers += 1
            write = written if self._request.wants_logprobs else dumps
            texts.append(event(numbered, body["type"], write))
        return texts


def usage_json(usage: ChatUsage) -> dict[str, Any]:
    """Return the token counts in this API's fields."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _told(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with all fields that the API requires."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": {}, "strict": False} | tool
