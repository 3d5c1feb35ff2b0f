"""Pictures through the APIs of a server: OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from modelpack import package
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.patches import mlx_vlm_imports
from modelpack_engine.vision.processor import Picture
from modelpack_engine.vision.videos import VIDEO_CLASSES
from modelpack_server.api.app import create_app
from modelpack_server.api.ollama.models import _capabilities
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.serving.tiny import TinyCatalogue, write_tiny
from tests.engine.vision import tiny
from tests.engine.vision.media import BAD_FILES, BAD_URLS, file_of, url
from tests.engine.vision.tiny import picture

ONE, TWO = file_of(picture(1)), file_of(picture(2, 31, 17))
IN_PROMPT = "user: <image>What is it?\nassistant:"


class Served:
    """A client of a server with one tiny model, and the model's engine."""

    def __init__(self, http: TestClient, catalogue: TinyCatalogue) -> None:
        self.http, self.catalogue = http, catalogue

    def chat(self, content: Any, path: str = "/v1/chat/completions", **body: Any) -> Any:
        given = {
            "model": "tiny", "messages": [{"role": "user", "content": content}],
            "temperature": 0, "max_tokens": 8, "ignore_eos": True,
        }  # fmt: skip
        return self.http.post(path, json=given | body)

    @property
    def engine(self) -> Any:
        """The model's engine, loaded by a request."""
        assert self.chat("x", max_tokens=1).status_code == 200
        return self.catalogue.engines[-1]


def served(kind: str) -> Iterator[Served]:
    catalogue = TinyCatalogue(lambda: tiny.tiny_engine(kind, max_num_batched_tokens=256))
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


@pytest.fixture(scope="module")
def llava() -> Iterator[Served]:
    yield from served("llava")


@pytest.fixture(scope="module")
def idefics() -> Iterator[Served]:
    yield from served("idefics3")


@pytest.fixture(scope="module")
def text() -> Iterator[Served]:
    catalogue = TinyCatalogue()
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data), "detail": "low"}}


def said(kind: str, prompt: str, *pictures: Any) -> str:
    """Return the text that mlx-vlm's tokens are."""
    tokens = tiny.expected(kind, prompt, list(pictures))
    return tiny.tiny_loaded(kind).tokenizer.decode(tokens)


QUESTION = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def gemma() -> Iterator[Served]:
    yield from served("gemma3")


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["gemma3", "idefics3", "llava"])
def test_openai(kind: str, gemma: Served, idefics: Served, llava: Served) -> None:
    one = {"gemma3": gemma, "idefics3": idefics, "llava": llava}[kind]
    answer = one.chat([image(ONE), QUESTION]).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == said(kind, IN_PROMPT, picture(1))
    again = one.chat([image(ONE), {"type": "text", "text": "How many?"}]).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    streamed = one.chat([image(ONE), QUESTION], stream=True)
    assert streamed.status_code == 200


@pytest.mark.parametrize(
    "path", ["/engines/v1/chat/completions", "/engines/llama.cpp/v1/chat/completions"]
)
def test_docker_model_runner(llava: Served, path: str) -> None:
    answer = llava.chat([image(ONE), QUESTION], path).json()
    assert answer["choices"][0]["message"]["content"] == said("llava", IN_PROMPT, picture(1))


@pytest.mark.long
def test_low_detail(llava: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is made smaller before the model's processor has it."""
    shapes = []
    digest = Picture.digest

    def spied(self: Picture) -> bytes:
        shapes.append(self.pixels.shape[:2])
        return digest(self)

    monkeypatch.setattr(Picture, "digest", spied)
    large = [file_of(picture(seed, 600, 900)) for seed in range(6)]  # none is kept
    for detail, file in zip(("low", "high", "auto", 7), large, strict=False):
        part = {"type": "image_url", "image_url": {"url": url(file), "detail": detail}}
        assert llava.chat([part, QUESTION]).status_code == 200
    assert llava.chat([{"type": "image_url", "image_url": url(large[4])}, QUESTION]).is_success
    given = [asked(large[5], detail="low")]
    answer = llava.http.post("/v1/responses", json={"model": "tiny", "input": given})
    assert answer.status_code == 200
    assert shapes == [(341, 512), *[(600, 900)] * 4, (341, 512)]


def test_two_pictures_in_turns(llava: Served) -> None:
    messages = [
        {"role": "user", "content": [QUESTION, image(ONE)]},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [image(TWO), {"type": "text", "text": "And it?"}]},
    ]
    prompt = "user: What is it?<image>\nassistant: no\nuser: <image>And it?\nassistant:"
    answer = llava.chat("", messages=messages).json()
    expected = said("llava", prompt, picture(1), picture(2, 31, 17))
    assert answer["choices"][0]["message"]["content"] == expected


def test_anthropic(llava: Served) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(ONE).decode()}
    body = {
        "model": "tiny", "max_tokens": 8, "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "image", "source": source}, QUESTION]}],
    }  # fmt: skip
    answer = llava.http.post("/v1/messages", json=body).json()
    expected = said("llava", IN_PROMPT, picture(1))
    found = answer["content"][0]["text"]
    assert found
    assert expected.startswith(found)
    counted = llava.http.post("/v1/messages/count_tokens", json=body | {"max_tokens": 1}).json()
    assert counted["input_tokens"] > 16


def test_pictures_of_tools_in_anthropic(llava: Served) -> None:
    """A screenshot begins the user's turn: templates show texts of tools only."""
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(ONE).decode()}
    seen, shot = {"type": "text", "text": "seen"}, {"type": "image", "source": source}

    def ask(content: list[Any], *rest: Any) -> Any:
        result = {"type": "tool_result", "tool_use_id": "t1", "content": content}
        use = {"type": "tool_use", "id": "t1", "name": "screen", "input": {}}
        body = {
            "model": "tiny", "max_tokens": 8, "temperature": 0,
            "messages": [
                {"role": "user", "content": "look"},
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [result, *rest]},
            ],
        }  # fmt: skip
        return llava.http.post("/v1/messages", json=body)

    for rest in ([QUESTION], []):
        expected, found = ask([seen], shot, *rest).json(), ask([seen, shot], *rest).json()
        assert found["content"] == expected["content"]
        counts = [
            each["usage"]["input_tokens"] + each["usage"]["cache_read_input_tokens"]
            for each in (expected, found)
        ]
        assert counts[0] == counts[1]
    refused = ask([seen, {"type": "image", "source": source | {"data": 7}}])
    assert refused.status_code == 400
    assert "messages.2.content.0.content.1: " in refused.json()["error"]["message"]


def test_pictures_of_tools_in_responses(llava: Served) -> None:
    seen, shot = {"type": "input_text", "text": "seen"}, asked(ONE)["content"][0]

    def ask(output: list[Any], *content: Any) -> Any:
        items: list[Any] = [
            {"role": "user", "content": "look"},
            {"type": "function_call", "call_id": "t1", "name": "screen", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t1", "output": output},
        ]
        items += [{"role": "user", "content": [*content]}] * bool(content)
        body = {"model": "tiny", "temperature": 0, "max_output_tokens": 8, "ignore_eos": True}
        return llava.http.post("/v1/responses", json=body | {"input": items})

    question = {"type": "input_text", "text": "What is it?"}
    for rest in ([question], []):
        expected, found = ask([seen], shot, *rest).json(), ask([seen, shot], *rest).json()
        assert found["output"][0]["content"] == expected["output"][0]["content"]
        assert found["usage"]["input_tokens"] == expected["usage"]["input_tokens"]
    refused = ask([seen, {"type": "input_image", "image_url": "data:image/png;base64,!"}])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input[2].output[1]"


def test_anthropic_refuses_other_sources(llava: Served) -> None:
    for source, message in (
        ({"type": "url", "url": "https://example.com/a.png"}, "not fetched from the network"),
        ({"type": "file", "file_id": "f"}, "type base64, not 'file'"),
        ({"type": "base64", "data": 7}, "is not a base64 string"),
        (None, "type base64, not None"),
    ):
        content = [{"type": "image", "source": source}, QUESTION]
        body = {
            "model": "tiny",
            "max_tokens": 8,
            "messages": [{"role": "user", "content": content}],
        }
        refused = llava.http.post("/v1/messages", json=body)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
        assert "messages.0.content.0" in refused.json()["error"]["message"]


def test_ollama(llava: Served) -> None:
    data = base64.b64encode(ONE).decode()
    body: dict[str, Any] = {
        "model": "tiny", "stream": False, "options": {"temperature": 0, "num_predict": 8},
    }  # fmt: skip
    message = {"role": "user", "content": "What is it?", "images": [data]}
    expected = said("llava", IN_PROMPT, picture(1))
    chat = llava.http.post("/api/chat", json=body | {"messages": [message]})
    found = chat.json()["message"]["content"]
    assert found
    assert expected.startswith(found)
    made = llava.http.post("/api/generate", json=body | {"prompt": "What is it?", "images": [data]})
    assert made.json()["response"] == found
    for extra in ({"raw": True}, {"suffix": "b"}):
        refused = llava.http.post(
            "/api/generate", json=body | {"prompt": "a", "images": [data]} | extra
        )
        assert refused.status_code == 400
        assert "images cannot be combined" in refused.json()["error"]
    bad = llava.http.post("/api/generate", json=body | {"prompt": "a", "images": ["!"]})
    assert bad.status_code == 400
    assert "images[0]: the base64 is not valid" in bad.json()["error"]


def asked(data: bytes, text: str = "What is it?", **fields: Any) -> dict[str, Any]:
    """Return a message of the Responses API."""
    picture = {"type": "input_image", "image_url": url(data), "detail": "high"} | fields
    return {"role": "user", "content": [picture, {"type": "input_text", "text": text}]}


def test_responses(llava: Served) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "temperature": 0, "max_output_tokens": 8, "ignore_eos": True,
    }  # fmt: skip
    first = llava.http.post("/v1/responses", json=body | {"input": [asked(ONE)]}).json()
    found = first["output"][0]["content"][0]["text"]
    assert found == said("llava", IN_PROMPT, picture(1))
    assert first["usage"]["input_tokens"] == 44
    more = body | {"previous_response_id": first["id"]}
    second = llava.http.post("/v1/responses", json=more | {"input": [asked(TWO, "And it?")]}).json()
    # Ids would be as random as the text of the first answer, which is no text that is read again.
    assert second["usage"]["input_tokens"] > 80
    listed = llava.http.get(f"/v1/responses/{second['id']}/input_items").json()["data"]
    assert [item["content"][0]["type"] for item in listed] == [
        "input_image", "output_text", "input_image",
    ]  # fmt: skip
    assert listed[-1]["content"][0] == asked(ONE)["content"][0]
    counted = llava.http.post(
        "/v1/responses/input_tokens", json={"model": "tiny", "input": [asked(ONE)]}
    )
    assert counted.json()["input_tokens"] == 44
    for given in (body | {"stream": True}, body | {"truncation": "auto"}):
        again = llava.http.post("/v1/responses", json=given | {"input": [asked(ONE)]})
        assert again.status_code == 200
        assert json.dumps(found, ensure_ascii=False)[1:-1] in again.text or found in again.text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"image_url": None}, "image_url is required and must be a string"),
        ({"image_url": None, "file_id": "f"}, "files are not read"),
        ({"image_url": {"url": url(ONE)}}, "image_url is required and must be a string"),
        ({"image_url": "https://example.com/a.png"}, "not fetched from the network"),
        ({"image_url": url(b"bad")}, "unknown format"),
        ({"image_url": url(b"")}, "the picture is empty"),
    ],
)
def test_responses_refuse_bad_pictures(llava: Served, part: Any, message: str) -> None:
    given = [{"role": "user", "content": "hello"}, asked(ONE, **part)]
    refused = llava.http.post("/v1/responses", json={"model": "tiny", "input": given})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["message"].startswith("input[1].content[0]: ")
    assert error["param"] == "input[1].content[0]"


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_responses_read_pictures_of_users_only(llava: Served, role: str) -> None:
    given = asked(ONE) | {"role": role}
    refused = llava.http.post("/v1/responses", json={"model": "tiny", "input": [given]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input[0].content[0]"


def test_no_context_of_ollama_without_its_pictures(llava: Served) -> None:
    """The next request would have their tokens and not the pictures."""
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "stream": False}
    body |= {"options": {"num_predict": 2}}
    assert "context" in llava.http.post("/api/generate", json=body).json()
    body["images"] = [base64.b64encode(ONE).decode()]
    answer = llava.http.post("/api/generate", json=body)
    assert answer.status_code == 200
    assert "context" not in answer.json()


def test_a_model_of_text_refuses_pictures(text: Served) -> None:
    by_responses = text.http.post("/v1/responses", json={"model": "tiny", "input": [asked(ONE)]})
    assert by_responses.status_code == 400
    assert by_responses.json()["error"]["param"] == "input[0].content[0]"
    assert "accepts text only, not 'input_image'" in by_responses.text
    refused = text.chat([QUESTION, image(ONE)])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"] == "this model accepts text only, not 'image_url'"
    assert error["param"] == "messages[0].content[1]"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA answers text, and a picture is refused with the command that installs the extra."""
    monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
    data = base64.b64encode(ONE).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    asked = {"role": "user", "content": "What is it?", "images": [data]}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image(ONE)]}]}),
        ("/v1/messages", {
            "max_tokens": 8,
            "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
        }),
        ("/api/chat", {"messages": [asked]}),
    ]  # fmt: skip
    for one in served("llava"):
        assert one.chat("hello").status_code == 200
        for path, body in bodies:
            refused = one.http.post(path, json={"model": "tiny"} | body)
            assert refused.status_code == 400
            assert "this model accepts text only: the extra 'vision' is not" in refused.text
            assert "pip install 'modelpack[vision]'" in refused.text


def test_there_are_sixty_bad_pictures() -> None:
    assert len(BAD_FILES) + len(BAD_URLS) >= 60


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(llava: Served, name: str, make: Any, message: str) -> None:
    refused = llava.chat([QUESTION, image(make())])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["param"] == "messages[0].content[1]"


@pytest.mark.parametrize(("given", "message"), BAD_URLS)
def test_bad_urls(llava: Served, given: Any, message: str) -> None:
    refused = llava.chat([{"type": "image_url", "image_url": {"url": given}}, QUESTION])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["param"] == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "is not a string"),
        ({"type": "image_url", "image_url": []}, "is not a string"),
        ({"type": "image", "picture": "x"}, "content[1]: parts of type 'image' are not known"),
        ({"type": "input_audio"}, "this model reads no sound: it has no audio tower"),
        ({"type": "image_url", "picture": 1, "image_url": url(b"")}, "the picture is empty"),
    ],
)
def test_bad_parts(llava: Served, part: dict[str, Any], message: str) -> None:
    refused = llava.chat([QUESTION, part])
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]


def test_pictures_are_for_users(llava: Served) -> None:
    messages = [{"role": "system", "content": [image(ONE)]}, {"role": "user", "content": "a"}]
    refused = llava.chat("", messages=messages)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages[0].content[0]"
    assert "files are read in messages of the user only" in refused.text


def test_a_placeholder_in_the_text(llava: Served) -> None:
    """It would take the picture's place, so the request is refused; text alone is as before."""
    refused = llava.chat([image(ONE), {"type": "text", "text": "an <image>?"}])
    assert refused.status_code == 400
    assert "2 placeholders <image> for 1 picture" in refused.json()["error"]["message"]
    assert llava.chat("an <image>?").status_code == 200


def test_a_bad_file_fails_its_request_alone(llava: Served) -> None:
    assert llava.chat([QUESTION, image(b"bad")]).status_code == 400
    answer = llava.chat([image(ONE), QUESTION]).json()
    expected = said("llava", IN_PROMPT, picture(1))
    assert answer["choices"][0]["message"]["content"] == expected


def test_more_tokens_than_the_context(idefics: Served) -> None:
    """Pictures after the context's end are not even decoded."""
    refused = idefics.chat([image(ONE)] * 31 + [image(b"bad")])
    assert refused.status_code == 400
    assert "maximum context length is 1024 tokens" in refused.json()["error"]["message"]


def test_a_full_queue_refuses_pictures_before_they_are_decoded(
    llava: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = llava.engine._ready()._scheduler
    monkeypatch.setattr(scheduler, "config", dataclasses.replace(scheduler.config, max_waiting=0))
    refused = llava.chat([image(b"bad")])
    assert refused.status_code == 429
    assert "the queue is full" in refused.json()["error"]["message"]


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
])  # fmt: skip
def test_templates_that_show_text_only(template: str, llava: Served) -> None:
    """The placeholder comes where the picture is."""
    from modelpack_engine.models.chat_template import ChatTemplate

    engine = llava.engine
    tokenizer, own = engine.tokenizer, engine.tokenizer._chat_template
    tokenizer._chat_template = ChatTemplate(template)
    try:
        answer = llava.chat([image(ONE), QUESTION]).json()
    finally:
        tokenizer._chat_template = own
    expected = said("llava", IN_PROMPT, picture(1))
    assert answer["choices"][0]["message"]["content"] == expected


def test_capabilities_of_ollama(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ModelFiles.from_directory(tiny.directory("llava"))
    assert "vision" in _capabilities(files, tiny.TEMPLATE, None)
    monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
    assert "vision" not in _capabilities(files, tiny.TEMPLATE, None)


@pytest.mark.long
def test_models_that_read_pictures_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LayoutStore(tmp_path / "store")
    for kind in tiny.KINDS:
        package(kind, PackageRequest(safetensors_dir=tiny.directory(kind)), store=store)
    package("text", PackageRequest(safetensors_dir=write_tiny(tmp_path / "text")), store=store)

    def listed() -> dict[str, list[str]]:
        with TestClient(create_app(ModelPool(StoreCatalogue(store)))) as http:
            cards = http.get("/v1/models").json()["data"]
            for card in cards:
                assert http.get(f"/v1/models/{card['id']}").json() == card
            return {card["id"]: card["capabilities"] for card in cards}

    expected = {kind: ["completion", "vision"] for kind in tiny.KINDS}
    for kind in ("gemma3n", "qwen3_omni_moe"):
        expected[kind].append("audio")
    for kind in VIDEO_CLASSES:
        expected[kind].append("video")
    assert listed() == expected | {"text": ["completion"]}
    monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
    assert listed() == {name: ["completion"] for name in (*expected, "text")}
