"""ServedModel: a model behind the API, from the moment that its loading begins."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.errors import ContextLengthError
from modelpack_engine.loaders.tokenizer import Tokenizer
from modelpack_engine.server.vocabulary import Vocabulary


class ServedModel:
    """A model's names and its engine. What needs the tokenizer waits until it is loaded."""

    def __init__(self, names: tuple[str, ...], engine: AsyncEngine) -> None:
        self.names = names
        self.engine = engine
        self.created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens as clients see them."""
        return Vocabulary(self.tokenizer)

    async def chat_prompt(
        self, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> list[int]:
        """Return the token ids of a conversation, by the model's chat template."""
        # A template may be slow, and a long text takes its time: not on the event loop.
        return await asyncio.to_thread(
            lambda: self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, **options
            )
        )

    async def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of a text; ids are checked by the engine."""
        if isinstance(prompt, list):
            return prompt
        return await asyncio.to_thread(self.tokenizer.encode, prompt)

    def token_limit(self, prompt_tokens: int, asked: int | None) -> int:
        """Return how many tokens may be generated: what was asked for, or what the context holds.

        Raises `ContextLengthError` if the prompt leaves no room.
        """
        context = self.engine.max_model_len
        if prompt_tokens >= context:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens, and the context of this model holds "
                f"{context}, the answer included",
                param="messages",
                hint="shorten the prompt",
            )
        room = context - prompt_tokens
        return room if asked is None else min(asked, room)
