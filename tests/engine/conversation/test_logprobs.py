"""The bytes of log-probabilities, joined, are the reply's text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.core.detokenizer import Detokenizer
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.request import SamplingParams
from modelpack_server.conversation.chat import start_chat
from modelpack_server.conversation.logprobs import TextLogprobs
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.tool_parsers.parts import Reasoning, Text, Tool
from tests.engine.scripted import HERMES, THINKING, scripted

EOS = 99


class Words:
    """A tokenizer whose tokens are the given bytes."""

    special_token_ids = frozenset({EOS})
    strips_leading_space = True

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokens = tokens

    def token_bytes(self, token_id: int) -> bytes:
        return b"<|end|>" if token_id == EOS else self._tokens[token_id]


def joined(items: Iterable[TokenLogprob]) -> str:
    return b"".join(item.data or b"" for item in items).decode(errors="replace")


pieces = st.one_of(
    st.sampled_from([b"a", b"b", b"ab", b" a", b"\xe2\x82", b"\xac", b"\xff", b"<", b"a>b"]),
    st.text("ab <\u20ac", min_size=1, max_size=3).map(str.encode),
)


@given(st.lists(pieces, max_size=12), st.sampled_from([(), ("ab",), ("b<",), ("aa", "\u20ac")]))
def test_deltas_of_tokens_and_text_join(tokens: list[bytes], stop: tuple[str, ...]) -> None:
    words = Words(tokens)
    detokenizer = Detokenizer(words, SamplingParams(stop=stop))
    matched = TextLogprobs(words)  # type: ignore[arg-type]
    text, found = "", []
    for token_id in [*range(len(tokens)), EOS]:
        delta = detokenizer.push([token_id])
        ended = token_id == EOS or delta.stopped_by is not None
        piece = delta.text + (detokenizer.finish() if ended else "")
        text += piece
        found += matched.take([TokenLogprob(token_id, -1.0)], [Text(piece)], ended=ended)
        assert text.startswith(joined(found)) or not text.isascii()
        if ended:
            break
    assert joined(found) == text
    assert EOS not in [item.token_id for item in found]
    assert [item.token_id for item in found] == sorted(item.token_id for item in found)


def test_reasoning_has_tokens_of_its_own() -> None:
    matched = TextLogprobs(Words([b"<think>", b"so", b"</think>\n", b"\nso", b" be"]))  # type: ignore[arg-type]
    tokens = [TokenLogprob(token_id, -1.0) for token_id in range(5)]
    found = matched.take(tokens, [Reasoning("so"), Text("so be")], ended=True)
    assert [(item.token_id, item.data) for item in found] == [(3, b"so"), (4, b" be")]


@pytest.mark.parametrize(
    ("template", "pieces", "content"),
    [
        (THINKING, ("why", " not", "</think>", "\n\n", "Yes", "."), "Yes."),
        (HERMES, ("Well.", ' <tool_call>\n{"name": "w", "arguments": ', "{}}\n</tool_call>"),
         "Well."),
        (HERMES, ("It is", " STO", "ne", " STOP", " more"), "It is STOne "),
    ],
)  # fmt: skip
def test_replies_with_markers(template: str, pieces: tuple[str, ...], content: str) -> None:
    model, _ = scripted(*pieces, template=template)
    spec = ChatSpec(
        [{"role": "user", "content": "hello"}],
        SamplingParams(max_tokens=64, logprobs=0, stop=("STOP",)),
        tools=(Tool("w"),),
    )

    async def run() -> None:
        async with await start_chat(model, spec) as stream:
            deltas = [delta async for delta in stream]
        texts = [p.text for d in deltas for p in d.parts if isinstance(p, Text)]
        assert "".join(texts) == content
        assert joined(item for d in deltas for item in d.logprobs or ()) == content

    asyncio.run(run())
