"""Prompts for the text between a prompt and a suffix, with the markers of each family."""

from __future__ import annotations

import ollama
import pytest

from modelpack_engine.models.tokenizer import Tokenizer, TokenText
from modelpack_server.conversation.prompt import find_markers, infilling_prompt, may_infill
from tests.engine.families.served import PLAIN, Served
from tests.engine.serving.tiny import EOS, tiny_tokenizer

QWEN = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


def with_tokens(*names: str, bos: bool = False) -> Tokenizer:
    backend = tiny_tokenizer()._backend
    backend.add_special_tokens(list(names))
    start = backend.token_to_id("<eos>") if bos else None
    return Tokenizer(backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[EOS], bos=start)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (QWEN, "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"),
        (
            ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
            "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>",
        ),
        (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]b[PREFIX]a"),
    ],
)
def test_prompts(names: list[str], expected: str) -> None:
    for bos in (False, True):
        tokenizer = with_tokens(*names, bos=bos)
        markers = find_markers(tokenizer)
        assert markers is not None
        token_ids = infilling_prompt(tokenizer, markers, "a", "b")
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
        assert text == ("<eos>" if bos else "") + expected
        assert len(token_ids) == len(names) + 2 + bos
        written = infilling_prompt(tokenizer, markers, names[0], "b")
        assert written.count(token_ids[bos]) == 1  # a marker in the user's text is text


def test_models_that_cannot() -> None:
    assert find_markers(tiny_tokenizer()) is None
    assert find_markers(with_tokens(*QWEN[:2])) is None
    assert may_infill(" ".join(QWEN).encode())
    assert not may_infill(QWEN[0].encode())


def test_a_suffix(served: Served, client: ollama.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engines[PLAIN], "tokenizer", with_tokens(*QWEN))
    answer = client.generate(served.says(PLAIN, "mid", "dle"), "def f(", suffix="return 1")
    assert answer.response == "middle"
    assert answer.context is None
    assert served.prompt(PLAIN) == "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|>"
