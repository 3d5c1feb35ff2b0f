"""Response bodies of the OpenAI API, built from the engine's events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modelpack_engine.outputs import FinishReason, RequestEvent, TokenLogprob, Usage
from modelpack_engine.server.vocabulary import Vocabulary

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "stop"}


@dataclass(slots=True)
class Choice:
    """One choice as it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    usage: Usage | None = None

    def add(self, event: RequestEvent) -> None:
        """Take in an event."""
        self.text += event.text
        self.logprobs += event.logprobs or ()
        if event.finish_reason is not None:
            self.reason = finish_reason(event)
            self.usage = event.usage


def finish_reason(event: RequestEvent) -> str | None:
    """Return the API's word for why a choice ended; None while it goes on."""
    return _REASONS.get(event.finish_reason, "stop") if event.finish_reason else None


def usage_json(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return the token counts of a whole request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def total_usage(usages: Sequence[Usage], prompts: int) -> dict[str, Any]:
    """Return the counts of several choices; a prompt that has several choices counts once."""
    per_prompt = len(usages) // prompts if prompts else 1
    firsts = usages[::per_prompt]
    return usage_json(
        sum(usage.prompt_tokens for usage in firsts),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in firsts),
    )


class Envelope:
    """The fields that all objects of one response share."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._kind = kind
        self._head = {"created": int(time.time()), "model": model}

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a whole response."""
        return {"id": self.id, "object": self._kind, **self._head, "choices": choices,
                "usage": usage}  # fmt: skip

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return one object of a stream."""
        kind = "chat.completion.chunk" if self._kind == "chat.completion" else self._kind
        return {"id": self.id, "object": kind, **self._head, "choices": choices, **more}


def chat_logprobs(logprobs: Sequence[TokenLogprob], words: Vocabulary) -> dict[str, Any]:
    """Return the log-probabilities of a chat choice."""
    return {
        "content": [
            _entry(words, item.token_id, item.logprob)
            | {"top_logprobs": [_entry(words, token, value) for token, value in item.top]}
            for item in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(
    logprobs: Sequence[TokenLogprob | None],
    token_ids: Sequence[int],
    words: Vocabulary,
    offset: int,
) -> dict[str, Any]:
    """Return the log-probabilities of a text choice; `offset` is where its text begins."""
    texts = [words.text(token) for token in token_ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [item.logprob if item else None for item in logprobs],
        "top_logprobs": [
            {words.text(token): value for token, value in item.top} if item and item.top else None
            for item in logprobs
        ],
        "text_offset": offsets,
    }


def _entry(words: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    raw = words.raw(token_id)
    return {"token": words.text(token_id), "logprob": logprob, "bytes": list(raw)}
