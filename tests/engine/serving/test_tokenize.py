"""/tokenize and /detokenize, as in vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from modelpack_engine.models.chat_template import ChatTemplate
from tests.engine.serving.conftest import Scripted
from tests.engine.serving.tiny import EOS, VOCAB

HELLO = [{"role": "user", "content": "hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "Well"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def tokenize(api: Scripted, **body: Any) -> Any:
    return api.http.post("/tokenize", json={"model": "m"} | body)


def prompt_of_a_chat(api: Scripted, **body: Any) -> list[int]:
    assert api.chat(**body).status_code == 200
    return api.engine.submitted[-1][0]


@pytest.mark.parametrize("prefix", ["", "/v1", "/engines/v1", "/engines/vllm/v1"])
def test_a_text_there_and_back(api: Scripted, prefix: str) -> None:
    text = "héllo <eos>"
    found = api.http.post(f"{prefix}/tokenize", json={"model": "m", "prompt": text}).json()
    assert found == {
        "count": 8, "max_model_len": 4096, "token_strs": None,
        "tokens": api.engine.tokenizer.encode(text),
    }  # fmt: skip
    assert found["tokens"][-1] == EOS
    body = {"model": "m", "tokens": found["tokens"]}
    assert api.http.post(f"{prefix}/detokenize", json=body).json() == {"prompt": text}


def test_the_texts_of_tokens(api: Scripted) -> None:
    found = tokenize(api, prompt="a b", return_token_strs=True).json()
    assert found["token_strs"] == ["a", "Ġ", "b"]


def test_special_tokens_are_added_unless_refused(api: Scripted) -> None:
    asked: list[bool] = []
    encode = api.engine.tokenizer.encode

    def spied(text: str, **options: Any) -> list[int]:
        asked.append(options["add_special_tokens"])
        return encode(text, **options)

    api.engine.tokenizer.encode = spied  # type: ignore[method-assign]
    for body in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        assert tokenize(api, prompt="hello", **body).json()["count"] == 5
    assert asked == [True, True, False]


@pytest.mark.parametrize(
    "body", [{}, {"tools": [TOOL]}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_a_conversation_has_the_tokens_of_its_chat(api: Scripted, body: dict[str, Any]) -> None:
    found = tokenize(api, messages=HELLO, **body).json()
    assert found["tokens"] == prompt_of_a_chat(api, messages=HELLO, **body)
    assert found["count"] == len(found["tokens"])


def test_the_end_of_a_conversations_prompt(api: Scripted) -> None:
    ends = "{% if add_generation_prompt %}assistant:{% endif %}"
    api.engine.tokenizer._chat_template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}" + ends
    )

    def prompt(**body: Any) -> str:
        tokens = tokenize(api, **body).json()["tokens"]
        back = api.http.post("/detokenize", json={"model": "m", "tokens": tokens})
        return str(back.json()["prompt"])

    assert prompt(messages=HELLO) == "user:hello|assistant:"
    assert prompt(messages=HELLO, add_generation_prompt=False) == "user:hello|"
    assert prompt(messages=BEGUN, continue_final_message=True) == "user:hello|assistant:Well"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True},
         "continue_final_message"),
        ("/tokenize", {"messages": BEGUN, "continue_final_message": True,
                       "add_generation_prompt": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "x" * 10_000_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 10_000_000}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 4097}, "tokens"),
    ],
)  # fmt: skip
def test_refused(api: Scripted, path: str, body: dict[str, Any], param: str) -> None:
    response = api.http.post(path, json={"model": "m"} | body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model(api: Scripted, path: str) -> None:
    body = {"model": "none", "prompt": "a", "tokens": [1]}
    response = api.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
