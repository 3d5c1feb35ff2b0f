"""Sounds through the APIs of a server, `run` and `smoke`: good ones, and bad ones by status."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from modelpack import package
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.models.files import ModelFiles
from modelpack_server.api.app import create_app
from modelpack_server.api.ollama.models import _capabilities
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.cli.running import modelpack
from tests.engine.serving.tiny import TinyCatalogue, tiny_server, write_tiny
from tests.engine.vision import hearing, phi4, tiny
from tests.engine.vision.hearing import RATE, sound
from tests.engine.vision.media import file_of, url
from tests.engine.vision.sound_files import BAD_FILES, fixture, wav
from tests.engine.vision.test_api import Served
from tests.engine.vision.tiny import picture

pytestmark = pytest.mark.long

SOUND = sound(1)
ONE = wav(SOUND.samples, RATE)
QUESTION = {"type": "text", "text": "What is it?"}
PROMPT = "user: <audio>What is it?\nassistant:"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def part(data: bytes, format: Any = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": encoded(data), "format": format}}


def said(prompt: str, *files: Any) -> str:
    """Return the text that mlx-vlm's tokens are."""
    tokens = hearing.expected("gemma4", prompt, list(files))
    return hearing.loaded("gemma4").tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def gemma() -> Iterator[Served]:
    catalogue = TinyCatalogue(lambda: hearing.engine_of("gemma4", max_num_batched_tokens=256))
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


@pytest.fixture(scope="module")
def llava() -> Iterator[Served]:
    catalogue = TinyCatalogue(lambda: tiny.tiny_engine("llava"))
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


@pytest.fixture(scope="module")
def text() -> Iterator[Served]:
    catalogue = TinyCatalogue()
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/engines/v1/chat/completions"])
def test_openai_and_docker(gemma: Served, path: str) -> None:
    answer = gemma.chat([part(ONE), QUESTION], path).json()
    assert answer["choices"][0]["message"]["content"] == said(PROMPT, SOUND)


def test_a_sound_and_a_picture(gemma: Served) -> None:
    shown = {"type": "image_url", "image_url": {"url": url(file_of(picture(1)))}}
    answer = gemma.chat([shown, part(ONE), QUESTION]).json()
    expected = said("user: <image><audio>What is it?\nassistant:", picture(1), SOUND)
    assert answer["choices"][0]["message"]["content"] == expected


def test_the_rate_of_a_file_is_changed(gemma: Served) -> None:
    """A second of any file has 25 tokens; its format is recognised by its content."""
    for name in ("tone.flac", "tone.mp3", "tone.ogg"):
        answer = gemma.chat([part(fixture(name), name[-3:] if name[-1] != "c" else "flac")]).json()
        assert answer["usage"]["prompt_tokens"] == 25 + 2 + len("user: \nassistant:")


def test_responses(gemma: Served) -> None:
    asked = {"role": "user", "content": [part(ONE), {"type": "input_text", "text": "What is it?"}]}
    body = {"model": "tiny", "temperature": 0, "max_output_tokens": 8, "ignore_eos": True}
    answer = gemma.http.post("/v1/responses", json=body | {"input": [asked]}).json()
    assert answer["output"][0]["content"][0]["text"] == said(PROMPT, SOUND)
    more = {"previous_response_id": answer["id"], "input": "Again?"}
    second = gemma.http.post("/v1/responses", json=body | more).json()
    assert second["usage"]["input_tokens"] > answer["usage"]["input_tokens"]


def test_ollama(gemma: Served) -> None:
    """Sounds are among its images, and recognised by their content."""
    body: dict[str, Any] = {
        "model": "tiny", "stream": False, "options": {"temperature": 0, "num_predict": 8},
    }  # fmt: skip
    asked = {"role": "user", "content": "What is it?", "images": [encoded(ONE)]}
    chat = gemma.http.post("/api/chat", json=body | {"messages": [asked]}).json()
    found = chat["message"]["content"]
    assert found
    assert said(PROMPT, SOUND).startswith(found)
    given = {"prompt": "What is it?", "images": [encoded(ONE)]}
    assert gemma.http.post("/api/generate", json=body | given).json()["response"] == found


def test_a_model_that_reads_sounds_only() -> None:
    catalogue = TinyCatalogue(lambda: phi4.engine_of(max_num_batched_tokens=256))
    app = create_app(ModelPool(catalogue, memory=10_000, grace=0.0))
    with TestClient(app) as http:
        served = Served(http, catalogue)
        answer = served.chat([part(ONE), QUESTION]).json()
        prompt = f"<|user|><audio>{QUESTION['text']}<eos><|assistant|>"
        tokens = phi4.expected(prompt, [SOUND])
        text = phi4.loaded().tokenizer.decode(tokens)
        assert answer["choices"][0]["message"]["content"] == text
        shown = {"type": "image_url", "image_url": {"url": url(file_of(picture(1)))}}
        refused = served.chat([part(ONE), shown])
        assert refused.status_code == 400
        why = "messages[0].content[1]: this model reads no pictures: only its sounds are read"
        assert refused.json()["error"]["message"] == why


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}?"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}assistant:",
    "{# Not 'audio' parts. #}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "assistant:",
])  # fmt: skip
def test_templates_that_show_no_sounds(template: str, gemma: Served) -> None:
    """The placeholder comes where the sound is."""
    tokenizer = gemma.engine.tokenizer
    own, tokenizer._chat_template = tokenizer._chat_template, ChatTemplate(template)
    try:
        answer = gemma.chat([part(ONE), QUESTION]).json()
    finally:
        tokenizer._chat_template = own
    assert answer["choices"][0]["message"]["content"] == said(PROMPT, SOUND)


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(gemma: Served, name: str, make: Callable[[], bytes], message: str) -> None:
    refused = gemma.chat([QUESTION, part(make())])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"].startswith("messages[0].content[1]: the sound is ")
    if "longer" not in message:  # than the model reads, which is less
        assert message in error["message"]
    assert error["param"] == "messages[0].content[1]"


LONG = wav(np.zeros(RATE * 31, np.int16), RATE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "input_audio"}, "the sound is not a base64 string"),
        ({"type": "input_audio", "input_audio": "UklGRg=="}, "the sound is not a base64 string"),
        ({"type": "input_audio", "input_audio": []}, "the sound is not a base64 string"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "is not a base64 string"),
        ({"type": "input_audio", "input_audio": {"data": 7}}, "is not a base64 string"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "the sound is empty"),
        ({"type": "input_audio", "input_audio": {"data": "!"}}, "the base64 is not valid"),
        ({"type": "input_audio", "input_audio": {"data": "a"}}, "the base64 is not valid"),
        (
            {"type": "input_audio", "input_audio": {"data": "data:audio/wav;base64,UklG"}},
            "the base64 is not valid",
        ),
        ({"type": "input_audio", "input_audio": {"data": "http://a/b.wav"}}, "is not valid"),
        ({"type": "input_audio", "input_audio": {"data": "/etc/passwd"}}, "not valid"),
        (part(ONE, "aac"), "format is 'aac', expected wav, mp3, flac, ogg"),
        (part(ONE, None), "format is 'None', expected wav"),
        (part(ONE, 7), "format is '7', expected wav"),
        (part(ONE, ["wav"]), "expected wav"),
        (part(file_of(picture(1))), "unknown format, expected WAV"),
        (part(LONG), "the sound is refused: it is longer than 30 s"),
        ({"type": "audio", "sound": "x"}, "content[1]: parts of type 'audio' are not known"),
        ({"type": "audio_url", "audio_url": {"url": "http://a/b.wav"}}, "type 'audio_url' are not"),
    ],
)  # fmt: skip
def test_bad_parts(gemma: Served, given: dict[str, Any], message: str) -> None:
    refused = gemma.chat([QUESTION, given])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["param"] == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "input_audio is required and must be an object"),
        ("x", "input_audio is required and must be an object"),
        ({"data": 7}, "the sound is not a base64 string"),
        ({"data": encoded(b"bad"), "format": "wav"}, "unknown format"),
    ],
)
def test_responses_refuse_bad_sounds(gemma: Served, given: Any, message: str) -> None:
    asked = {"role": "user", "content": [{"type": "input_audio", "input_audio": given}]}
    refused = gemma.http.post("/v1/responses", json={"model": "tiny", "input": [asked]})
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "input[0].content[0]"


def test_a_bad_sound_fails_its_request_alone(gemma: Served) -> None:
    assert gemma.chat([QUESTION, part(b"bad")]).status_code == 400
    answer = gemma.chat([part(ONE), QUESTION]).json()
    assert answer["choices"][0]["message"]["content"] == said(PROMPT, SOUND)


def test_sounds_have_their_own_limit(gemma: Served) -> None:
    """Pictures have at most 20 MiB, sounds 25."""
    large = encoded(b"ID3" + bytes(21 * 1024 * 1024))
    asked = {"type": "input_audio", "input_audio": {"data": large, "format": "mp3"}}
    assert "the sound is damaged" in gemma.chat([asked]).json()["error"]["message"]
    body = {"model": "tiny", "prompt": "a", "images": [large]}
    assert "the sound is damaged" in gemma.http.post("/api/generate", json=body).json()["error"]
    body["images"] = [encoded(b"\x89PNG" + bytes(21 * 1024 * 1024))]
    reply = gemma.http.post("/api/generate", json=body).json()["error"]
    assert "the picture has more than 20971520 bytes" in reply
    body["images"] = [encoded(b"ID3" + bytes(25 * 1024 * 1024))]
    reply = gemma.http.post("/api/generate", json=body).json()["error"]
    assert "the picture or sound has more than 26214400 bytes" in reply


def test_sounds_and_pictures_have_one_limit(gemma: Served) -> None:
    shown = {"type": "image_url", "image_url": {"url": url(file_of(picture(1)))}}
    refused = gemma.chat([shown] * 16 + [part(ONE)] * 17)
    assert refused.status_code == 400
    assert "more than 32 sounds and pictures" in refused.json()["error"]["message"]


def test_sounds_are_for_users(gemma: Served) -> None:
    messages = [{"role": "system", "content": [part(ONE)]}, {"role": "user", "content": "a"}]
    refused = gemma.chat("", messages=messages)
    assert refused.status_code == 400
    assert "files are read in messages of the user only" in refused.text
    given = {"role": "assistant", "content": [part(ONE)]}
    refused = gemma.http.post("/v1/responses", json={"model": "tiny", "input": [given]})
    assert refused.status_code == 400


@pytest.mark.parametrize("place", ["<|audio|>", "<|image|>"])
def test_a_placeholder_in_the_text(gemma: Served, place: str) -> None:
    refused = gemma.chat([part(ONE), {"type": "text", "text": f"a {place}?"}])
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "2 placeholders <|image|>, <|audio|> and <|video|> for 1 file" in message


def test_models_without_an_audio_tower(llava: Served, text: Served) -> None:
    refused = llava.chat([part(ONE), QUESTION])
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "messages[0].content[0]: this model reads no sound: it has no audio tower"
    )
    body = {"model": "tiny", "prompt": "a", "images": [encoded(ONE)], "stream": False}
    refused = llava.http.post("/api/generate", json=body)
    assert refused.status_code == 400
    assert "images[0]: this model reads no sound" in refused.json()["error"]
    refused = text.chat([part(ONE), QUESTION])
    assert refused.status_code == 400
    assert "this model accepts text only, not 'input_audio'" in refused.text


def without_miniaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "miniaudio" else find(name)
    )


def test_without_the_extra(gemma: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    without_miniaudio(monkeypatch)
    refused = gemma.chat([part(ONE), QUESTION])
    assert refused.status_code == 400
    assert "messages[0].content[0]: sounds need the extra 'audio'" in refused.text
    assert "pip install 'modelpack[audio]'" in refused.text


def test_capabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ModelFiles.from_directory(hearing.directory("gemma4"))
    store = LayoutStore(tmp_path / "store")
    package("gemma4", PackageRequest(safetensors_dir=hearing.directory("gemma4")), store=store)
    package("llava", PackageRequest(safetensors_dir=tiny.directory("llava")), store=store)

    def listed() -> list[list[str]]:
        with TestClient(create_app(ModelPool(StoreCatalogue(store)))) as http:
            cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
            return [cards[name]["capabilities"] for name in ("gemma4", "llava")]

    assert listed() == [["completion", "vision", "audio", "video"], ["completion", "vision"]]
    assert {"vision", "audio"} <= {*_capabilities(files, tiny.TEMPLATE, None)}
    without_miniaudio(monkeypatch)
    assert listed() == [["completion", "vision", "video"], ["completion", "vision"]]
    assert "audio" not in _capabilities(files, tiny.TEMPLATE, None)


def test_capabilities_of_artifacts(tmp_path: Path) -> None:
    """CNCF's config names sound among the inputs, and `inspect` shows it."""
    store = ("--store", tmp_path / "store")
    made = modelpack(
        "package", "--format", "cncf", "--safetensors-dir", hearing.directory("gemma4"), "tiny",
        *store,
    )  # fmt: skip
    assert made.code == 0, made.err
    shown = modelpack("inspect", "tiny", "--json", *store)
    assert shown.code == 0, shown.err
    assert "audio" in shown.json["config"]["capabilities"]["inputTypes"]


SMALL = ("--device", "cpu", "--kv-cache-bytes", "2000000", "--max-tokens", "8")


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    path = tmp_path / "a clip.WAV"
    path.write_bytes(ONE)
    return path


def test_run(clip: Path, tmp_path: Path) -> None:
    def ask(model: object, *given: object) -> Any:
        return modelpack("run", model, "What is it?", clip, *given, "--temperature", "0", "--json",
                         *SMALL, "--store", tmp_path / "store")  # fmt: skip

    found = ask(hearing.directory("gemma4"))
    assert found.code == 0, found.err
    assert found.json["text"]
    assert said(PROMPT, SOUND).startswith(found.json["text"])
    write_tiny(tmp_path / "text")
    refused = ask(tmp_path / "text")
    assert refused.code != 0
    assert "text accepts text only" in refused.err
    refused = ask(tiny.directory("llava"))
    assert refused.code != 0
    assert "reads no sound: it has no audio tower" in refused.err
    clip.write_bytes(b"bad")
    refused = ask(hearing.directory("gemma4"))
    assert refused.code != 0
    assert "a clip.WAV: the sound is refused: unknown format" in refused.err


def test_run_through_a_server(clip: Path) -> None:
    with tiny_server(lambda: hearing.engine_of("gemma4")) as address:
        found = modelpack("run", "tiny", "What is it?", clip, "--url", address,
                          "--temperature", "0", "--max-tokens", "8", "--json")  # fmt: skip
    assert found.code == 0, found.err
    assert said(PROMPT, SOUND).startswith(found.json["text"])


def test_smoke(clip: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    made = modelpack("package", "--safetensors-dir", hearing.directory("gemma4"), "tiny", *store)
    assert made.code == 0, made.err
    found = modelpack("smoke", "tiny", "--prompt", "What is it?", "--audio", clip, *store, *SMALL)
    assert found.json["sounds"] == [f"sha256:{hashlib.sha256(ONE).hexdigest()}"]
    assert "images" not in found.json
    assert found.json["answer"]
    assert said(PROMPT, SOUND).startswith(found.json["answer"])
    clip.write_bytes(struct.pack("<4sI4s", b"RIFF", 99, b"WAVE"))
    bad = modelpack("smoke", "tiny", "--audio", clip, *store, *SMALL)
    assert bad.code == 1
    assert "it ends after 12 of 107 bytes" in bad.json["problems"][0]
