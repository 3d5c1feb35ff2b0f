"""Conversation: questions and answers with one model, for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from modelpack_engine.engine import Engine
from modelpack_engine.errors import ContextLengthError, EngineError
from modelpack_engine.outputs import FinishReason, Usage
from modelpack_engine.sampling_params import SamplingParams


class Conversation:
    """Keeps what was said, so that each question comes after all before."""

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.7,
        seed: int | None = None,
    ) -> None:
        self._engine = engine
        self._messages: list[dict[str, Any]] = []
        if system:
            self._messages.append({"role": "system", "content": system})
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._seed = seed
        self._numbers = itertools.count()
        self.last_usage = Usage(0, 0)

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; it is remembered once it is complete.

        Raises `ContextLengthError` if the conversation has become too long.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        token_ids = self._engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        room = self._engine.max_model_len - len(token_ids)
        if room < 1:
            raise ContextLengthError(
                f"the conversation has {len(token_ids)} tokens, and the context holds "
                f"{self._engine.max_model_len}",
                hint="start a new one",
            )
        params = SamplingParams(
            max_tokens=min(self._max_tokens, room),
            temperature=self._temperature,
            seed=self._seed,
        )
        request_id = f"chat-{next(self._numbers)}"
        self._engine.add_request(request_id, token_ids, params)
        answer = ""
        try:
            while self._engine.has_work:
                for event in self._engine.step():
                    if event.finish_reason is FinishReason.ERROR:
                        raise EngineError(event.error or "the request failed")
                    answer += event.text
                    if event.text:
                        yield event.text
                    if event.usage is not None:
                        self.last_usage = event.usage
        finally:
            self._engine.abort(request_id)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
