"""A chat with a model of a running server, through its OpenAI API."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from modelpack.errors import ModelpackError, RemoteUnavailableError
from modelpack_engine.request import SamplingParams
from modelpack_server.conversation.spec import ChatDelta, ChatUsage
from modelpack_server.pool.settings import preset_named
from modelpack_server.repl.chat import Chat
from modelpack_server.server_client import problem_of
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text

# Connecting; a model that is loaded first takes its time before the first byte.
_TIMEOUT = httpx.Timeout(600, connect=5)


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """What is known of a server's model: enough for `Chat`."""

    url: str
    name: str
    max_model_len: int | None = None
    vocab_size: int = 1 << 30  # the server knows, and says which ids are wrong

    def default(self, name: str) -> Any:
        """The server's defaults are its own affair."""
        return getattr(SamplingParams(), name, None)

    def sampling_params(
        self, given: Mapping[str, Any], *, preset: str | None = None
    ) -> SamplingParams:
        """Return what is known of how answers are sampled."""
        chosen = preset_named(preset).sampling if preset else {}
        return SamplingParams(**{**chosen, **given})


class RemoteChat(Chat):
    """Sends what was said to the server with each question."""

    model: RemoteModel  # type: ignore[assignment]
    knows_defaults = False

    async def ask(self, text: str) -> AsyncGenerator[ChatDelta, None]:
        """Yield the answer as it comes, as `Chat.ask` does; leaving it ends it on the server."""
        question = {"role": "user", "content": text}
        url = f"{self.model.url}/v1/chat/completions"
        key = os.environ.get("MODELPACK_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        said: list[Part] = []
        try:
            async with (
                httpx.AsyncClient(timeout=_TIMEOUT, headers=headers, trust_env=False) as client,
                client.stream("POST", url, json=self._body([*self.turns, question])) as response,
            ):
                if response.status_code >= 400:
                    raise problem_of(response.status_code, _decoded(await response.aread()))
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        delta = _read(data, url)
                        said += delta.parts
                        yield delta
        except httpx.HTTPError as error:
            raise RemoteUnavailableError(f"no answer from {url}: {error}") from error
        finally:
            self.remember(question, said)

    def _body(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        optional = {
            "max_tokens": self.max_tokens,
            "preset": self.preset,
            "enable_thinking": self.reasoning,
        }
        return {
            "model": self.model.name,
            "messages": [*system, *turns],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in optional.items() if value is not None},
            **self.given,
        }


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _read(data: str, url: str) -> ChatDelta:
    try:
        return _delta(json.loads(data))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelpackError(f"cannot read the answer of {url}: {error}") from error


def _delta(event: dict[str, Any]) -> ChatDelta:
    """Return what a chunk says: a piece, the end, or the counts that come after it."""
    if "error" in event:
        raise ModelpackError(str(event["error"].get("message", "the server failed")))
    usage = event.get("usage")
    counted = None
    if usage is not None:
        prompt, answer = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
        counted = ChatUsage(
            usage["prompt_tokens"],
            usage["completion_tokens"],
            (prompt or {}).get("cached_tokens") or 0,
            (answer or {}).get("reasoning_tokens") or 0,
        )
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        parts: list[Part] = []
        if delta.get("reasoning_content"):
            parts.append(Reasoning(_text(delta["reasoning_content"])))
        if delta.get("content"):
            parts.append(Text(_text(delta["content"])))
        return ChatDelta(0, tuple(parts), finish=choice.get("finish_reason"), usage=counted)
    return ChatDelta(0, usage=counted)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value
