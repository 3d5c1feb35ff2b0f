"""Clients recognise a prompt that exceeds the context by the words of the error.

Source of the words: litellm 1.109, litellm_core_utils/exception_mapping_utils.py, which raises
`ContextWindowExceededError` for them; agents then shorten the conversation.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.engine.families.served import PLAIN, Served

WORDS = {"openai": "this model's maximum context length is", "anthropic": "prompt is too long"}


@pytest.mark.sample(6)
@pytest.mark.parametrize("size", [5_000, 1_000_000], ids=["by tokens", "by bytes"])
@pytest.mark.parametrize(
    ("family", "path", "body"),
    [
        ("openai", "/v1/chat/completions", {"messages": "TURNS"}),
        ("openai", "/v1/completions", {"prompt": "TEXT"}),
        ("openai", "/v1/completions", {"prompt": "IDS"}),
        ("openai", "/v1/responses", {"input": "TEXT"}),
        ("anthropic", "/v1/messages", {"messages": "TURNS", "max_tokens": 5}),
        ("anthropic", "/v1/messages", {"messages": "TURNS", "max_tokens": 5, "stream": True}),
    ],
)
def test_an_overflow_has_the_words(
    served: Served, family: str, path: str, body: dict[str, Any], size: int
) -> None:
    text = "x" * size
    values = {"TEXT": text, "IDS": [1] * size, "TURNS": [{"role": "user", "content": text}]}
    given = {key: values.get(str(value), value) for key, value in body.items()}
    reply = httpx.post(served.url + path, json=given | {"model": served.says(PLAIN, "a")})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert WORDS[family] in error["message"].lower()
    if family == "openai":
        assert error["code"] == "context_length_exceeded"
