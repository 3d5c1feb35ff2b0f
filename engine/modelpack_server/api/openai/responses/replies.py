"""Reply: one response, as an object and as events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from modelpack_engine.sampling_params import SamplingParams
from modelpack_server.api.large_json import written
from modelpack_server.api.openai.responses.items import Item, new_id
from modelpack_server.api.openai.responses.output import Output
from modelpack_server.api.openai.responses.requests import CARRIED_REASONING, ResponseRequest
from modelpack_server.api.problems import Problem
from modelpack_server.api.sse import dumps, event
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.spec import ChatDelta, ChatUsage


class Reply:
    """Hand it the deltas, and take events or, in the end, the whole response.

    Events are numbered from 0, each one more than the one before.
    """

    def __init__(self, request: ResponseRequest) -> None:
        self.id = new_id("resp")
        self._request = request
        self._created = int(time.time())
        self._params = SamplingParams()
        self._output = Output(carries=CARRIED_REASONING in request.include)
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._usage: ChatUsage | None = None
        self._completed: int | None = None
        self._numbers = 0

    @property
    def items(self) -> list[Item]:
        """The items that were answered so far."""
        return self._output.items

    def start(
        self,
        params: SamplingParams,
        words: Vocabulary | None,
        namespaces: Mapping[str, tuple[str, str]],
    ) -> None:
        """Take in what the model makes of the request: its parameters, the words of its tokens, the
        namespaces of functions.
        """
        self._params = params
        carries = CARRIED_REASONING in self._request.include
        self._output = Output(words, carries=carries, namespaces=namespaces)

    def begin(self) -> str:
        """Return the events that begin the stream."""
        body = self.json()
        kinds = ("response.created", "response.in_progress")
        return self._written({"type": kind, "response": body} for kind in kinds)

    def take(self, delta: ChatDelta) -> str:
        """Return the events of what is new; with the end of the answer, those that end it."""
        events = self._output.take(delta)
        if delta.finish is not None:
            self._status = "incomplete" if delta.finish == "length" else "completed"
            self._completed = int(time.time())
            self._usage = delta.usage
            events += self._output.end(self._status)
            events.append({"type": f"response.{self._status}", "response": self.json()})
        return self._written(events)

    def fail(self, problem: Problem) -> str:
        """Return the events of a failure in the middle of the stream."""
        self._status = "failed"
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        self._error = {"code": code, "message": problem.message}
        events = self._output.close("incomplete")
        told = {"type": "error", **self._error, "param": problem.param}
        events += [told, {"type": "response.failed", "response": self.json()}]
        return self._written(events)

    def json(self) -> dict[str, Any]:
        """Return the response as far as it has come."""
        asked = self._request
        reasoning = asked.reasoning
        text = asked.text
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed if self._status == "completed" else None,
            "status": self._status,
            "background": False,
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
        }

    def _written(self, events: Iterable[dict[str, Any]]) -> str:
        texts = []
        for body in events:
            numbered = {**body, "sequence_number": self._numbers}
            self._numbers += 1
            write = written if self._request.wants_logprobs else dumps
            texts.append(event(numbered, body["type"], write))
        return "".join(texts)


def usage_json(usage: ChatUsage) -> dict[str, Any]:
    """Return token counts in the words of this API."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _told(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with the fields that the API always has."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": {}, "strict": False} | tool
