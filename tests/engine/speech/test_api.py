"""Transcriptions over HTTP: by OpenAI's own client, and requests that are refused."""

from __future__ import annotations

import importlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.models import ModelFiles
from modelpack_engine.speech.async_transcriber import AsyncTranscriber
from modelpack_engine.speech.loader import Transcriber, load_transcriber
from modelpack_engine.speech.transcript import Transcript, TranscriptionRequest
from modelpack_engine.speech.whisper import Whisper
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway import Protection, protect
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.embedding.models import write_model
from tests.engine.embedding.test_decoders import write as write_decoder
from tests.engine.speech.tiny import noise, tone, wav, write_parakeet, write_whisper

SOUND = wav(noise(35))
SHORT = wav(tone(1))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def store(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    root = tmp_path_factory.mktemp("models")
    store = LayoutStore(root / "store")
    for name in ("generator", "encoder"):
        (root / name).mkdir()
    write_decoder(root / "generator", "llama")
    for name, path in (
        ("whisper", directory),
        ("english", write_whisper(root / "english", multilingual=False)),
        ("parakeet", write_parakeet(root / "parakeet")),
        ("generator", root / "generator"),
        ("encoder", write_model(root / "encoder", "bert")),
    ):
        modelpack.package(name, modelpack.PackageRequest(safetensors_dir=path), store=store)
    return store


@pytest.fixture(scope="module")
def url(store: LayoutStore) -> Iterator[str]:
    config = EngineConfig(device="cpu", kv_cache_bytes=1 << 20, warm_up=False)
    catalogue = StoreCatalogue(store, config)
    with ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(directory: Path) -> Transcript:
    """The transcript of SOUND, of which a WAV keeps 16 bits a sample."""
    model = load_transcriber(ModelFiles.from_directory(directory), device="cpu")
    samples = (noise(35) * 32767).astype("<i2").astype("f4") / 32768
    return model.transcribe(TranscriptionRequest(samples, language="en"))


def post(
    url: str, tail: str = "transcriptions", data: bytes = SHORT, **fields: Any
) -> requests.Response:
    given = {"model": "whisper", **fields}
    return requests.post(
        f"{url}/v1/audio/{tail}", files={"file": ("a.wav", data)}, data=given, timeout=120
    )


@pytest.mark.long
def test_openais_client(client: openai.OpenAI, expected: Transcript) -> None:
    made = client.audio.transcriptions.create(
        model="whisper", file=("a.wav", SOUND), language="en", temperature=0
    )
    assert made.text == expected.text != ""
    assert made.usage is not None
    assert made.usage.type == "duration"
    assert made.usage.seconds == 35


@pytest.mark.long
def test_each_format(client: openai.OpenAI, expected: Transcript) -> None:
    def made(format: Any, sound: bytes = SOUND, **options: Any) -> Any:
        return client.audio.transcriptions.create(
            model="whisper", file=("a.wav", sound), language="en", response_format=format, **options
        )

    assert made("text") == f"{expected.text}\n"
    assert re.findall(r"(?m)^w.*", made("srt")) == [s.text.strip() for s in expected.segments]
    assert made("vtt").startswith("WEBVTT\n\n00:00:")
    verbose = made("verbose_json")
    assert (verbose.language, verbose.duration) == ("english", 35)
    assert verbose.words is None
    for ours, theirs in zip(verbose.segments, expected.segments, strict=True):
        assert (ours.text, ours.tokens, ours.seek) == (
            theirs.text,
            list(theirs.tokens),
            theirs.seek,
        )
        assert ours.start == pytest.approx(theirs.start, abs=0.001)
    words = made("verbose_json", SHORT, timestamp_granularities=["word"])
    assert words.segments is None
    assert [word.word for word in words.words] == words.text.split()
    assert all(0 <= word.start <= word.end <= 60 for word in words.words)
    both = made("verbose_json", SHORT, timestamp_granularities=["word", "segment"])
    assert both.words == words.words
    assert both.segments
    indexed = {"timestamp_granularities[0]": "word", "timestamp_granularities[1]": "segment"}
    sent = made("verbose_json", SHORT, extra_body=indexed)
    assert (sent.words, sent.segments) == (both.words, both.segments)


def test_translations(client: openai.OpenAI) -> None:
    with pytest.deprecated_call():
        made = client.audio.translations.create(
            model="whisper", file=("a.wav", SHORT), response_format="verbose_json"
        )
    plain = client.audio.transcriptions.create(
        model="whisper", file=("a.wav", SHORT), response_format="verbose_json"
    )
    assert made.text != plain.text != ""
    assert made.to_dict()["task"] == "translate"
    assert made.language == "english"  # that of the text; it was spoken in another one
    assert plain.language != "english"
    assert plain.to_dict()["task"] == "transcribe"


def test_a_stream_has_the_text_in_parts(client: openai.OpenAI, expected: Transcript) -> None:
    events = list(
        client.audio.transcriptions.create(
            model="whisper", file=("a.wav", SOUND), language="en", stream=True
        )
    )
    *deltas, done = events
    assert len(deltas) == len(expected.segments) > 1
    assert done.type == "transcript.text.done"
    assert "".join(getattr(one, "delta", "") for one in deltas) == done.text == expected.text


@pytest.mark.long
def test_parakeet(client: openai.OpenAI) -> None:
    made = client.audio.transcriptions.create(
        model="parakeet", file=("a.wav", SHORT), response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )  # fmt: skip
    assert made.segments
    assert made.words
    assert sorted(word.word for word in made.words) == sorted(made.text.split())


@pytest.mark.parametrize("prefix", ["/v1", "", "/engines/v1", "/engines/mlx/v1"])
def test_paths(url: str, prefix: str) -> None:
    reply = requests.post(
        f"{url}{prefix}/audio/transcriptions",
        files={"file": ("a.wav", SHORT)},
        data={"model": "whisper", "temperature": "", "language": "EN", "chunking_strategy": "auto"},
        timeout=120,
    )
    assert reply.status_code == 200
    assert reply.json()["text"]


@pytest.mark.parametrize(
    ("data", "fields", "param", "said"),
    [
        (b"", {}, "file", "the sound is empty"),
        (b"this is no sound", {}, "file", "unknown format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), {}, "file", "unknown format"),
        (SHORT[:9000], {}, "file", "it ends after 9000 of"),
        (wav(noise(0.05)), {}, "file", "the sound has 0.050 s, expected 0.1 s or more"),
        (wav(noise(0)), {}, "file", "it has no samples"),
        (SHORT, {"model": ""}, "model", "model is required"),
        (SHORT, {"model": ["whisper", "parakeet"]}, "model", "model is given 2 times"),
        (SHORT, {"model": "generator"}, "model", "generator is not a speech-to-text model"),
        (SHORT, {"model": "encoder"}, "model", "encoder is not a speech-to-text model"),
        (SHORT, {"response_format": "xml"}, "response_format", "'xml', expected one of json, text"),
        (SHORT, {"response_format": "diarized_json"}, "response_format", "'diarized_json'"),
        (SHORT, {"language": "klingon"}, "language", "does not know the language 'klingon'"),
        (SHORT, {"temperature": "hot"}, "temperature", "'hot', expected a number"),
        (SHORT, {"temperature": "2"}, "temperature", "temperature is 2, expected 0 to 1"),
        (SHORT, {"temperature": "nan"}, "temperature", "temperature is nan"),
        (SHORT, {"stream": "maybe"}, "stream", "'maybe', expected one of true, false"),
        (SHORT, {"stream": "true", "response_format": "srt"}, "response_format", "json or text"),
        (SHORT, {"timestamp_granularities[]": "word"}, "timestamp_granularities", "verbose_json"),
        (
            SHORT,
            {"timestamp_granularities[]": "letter", "response_format": "verbose_json"},
            "timestamp_granularities",
            "'letter', expected one of segment, word",
        ),
        (SHORT, {"include[]": "logprobs"}, "include", "include is not supported"),
        (SHORT, {"include[]": ["logprobs", "words"]}, "include", "include is not supported"),
        (
            SHORT,
            {"known_speaker_names[]": ["Ann", "Bo"]},
            "known_speaker_names",
            "known_speaker_names is not supported",
        ),
        (SHORT, {"timestamp_granularities[0]": "word"}, "timestamp_granularities", "verbose_json"),
        (SHORT, {"keep_alive": "soon"}, "keep_alive", "soon"),
        (SHORT, {"prompt": "x" * 5000}, "prompt", "a field of the form is too long"),
        (SHORT, {"model": "parakeet", "prompt": "Names."}, "prompt", "take no prompt"),
    ],
)
def test_refused(url: str, data: bytes, fields: dict[str, Any], param: str, said: str) -> None:
    reply = post(url, data=data, **fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], said in error["message"]) == (param, True), error["message"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("english", "English only"),
        ("parakeet", "do not translate"),
        ("generator", "speech-to-text"),
    ],
)
def test_models_that_do_not_translate(url: str, model: str, said: str) -> None:
    reply = post(url, "translations", model=model)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "nothing"}, 404),
        ({"model": "generator"}, 400),
        ({"language": "klingon"}, 400),
        ({"temperature": "2"}, 400),
        ({"model": "parakeet", "prompt": "Names."}, 400),
    ],
)
def test_a_refused_request_decodes_no_sound(
    url: str, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], status: int
) -> None:
    decoded: list[bytes] = []
    module = importlib.import_module("modelpack_server.api.openai.transcriptions")
    monkeypatch.setattr(module, "decode_sound", lambda data, *_, **__: decoded.append(data))
    assert post(url, **fields).status_code == status
    assert decoded == []


def test_an_unknown_model(url: str) -> None:
    reply = post(url, model="nothing")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (b"{}", "application/json", "expected a form"),
        (b"", "multipart/form-data", "expected a form"),
        (b"--x\r\n", "multipart/form-data; boundary=x", "not complete"),
        (b"nothing", "multipart/form-data; boundary=x", "not valid"),
        (
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            "file is required",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="sound"; filename="a"\r\n\r\n\r\n--x--',
            "multipart/form-data; boundary=x",
            "expected one file, in the field 'file'",
        ),
    ],
)
def test_forms_that_are_none(url: str, body: bytes, content_type: str, said: str) -> None:
    reply = requests.post(
        f"{url}/v1/audio/transcriptions",
        data=body,
        headers={"Content-Type": content_type},
        timeout=60,
    )
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_a_path_in_place_of_a_file(url: str) -> None:
    """curl's -F file=PATH, without the @."""
    fields = {"model": (None, "whisper"), "file": (None, "speech.wav")}
    reply = requests.post(f"{url}/v1/audio/transcriptions", files=fields, timeout=60)
    assert reply.status_code == 400
    assert "file is text without a file name" in reply.json()["error"]["message"]
    assert "-F file=@PATH" in reply.json()["error"]["message"]


def test_a_large_file(url: str) -> None:
    reply = post(url, data=bytes(25 * 1024 * 1024 + 1))
    assert reply.status_code == 413
    assert "exceeds 26214400 bytes" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/tokenize", {"prompt": "a"}),
        ("/api/generate", {"prompt": "a"}),
    ],
)
def test_it_answers_no_prompts(url: str, path: str, body: dict[str, Any]) -> None:
    reply = requests.post(f"{url}{path}", json={"model": "whisper", **body}, timeout=60)
    assert reply.status_code == 400
    assert "answers no prompts" in reply.text
    assert "/v1/audio/transcriptions" in reply.text


def test_lists_name_the_capability(url: str) -> None:
    assert post(url, keep_alive="9m").status_code == 200
    cards = {
        card["id"]: card["capabilities"]
        for card in requests.get(f"{url}/v1/models", timeout=60).json()["data"]
    }
    assert cards["whisper"] == cards["parakeet"] == ["transcription"]
    shown = requests.post(f"{url}/api/show", json={"model": "whisper"}, timeout=60).json()
    assert shown["capabilities"] == ["transcription"]
    [loaded] = [
        model
        for model in requests.get(f"{url}/pool", timeout=60).json()["models"]
        if model["name"] == "whisper"
    ]
    assert (loaded["state"], loaded["keep_alive"], loaded["context_size"]) == (
        "ready",
        "9m0s",
        None,
    )
    assert loaded["memory"] > 3_000_000


def test_the_memory_plan_has_its_weights_in_float32(store: LayoutStore, directory: Path) -> None:
    catalogue = StoreCatalogue(store, EngineConfig(device="cpu"))
    planned = catalogue.needs(catalogue.find("whisper"), ModelSettings())
    model = load_transcriber(ModelFiles.from_directory(directory), device="cpu")
    positions = 1500 * 16 * 4  # of the encoder, which are computed
    assert planned == model.weight_bytes + positions


class Gate:
    """Blocks each window of Whisper until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows = threading.Semaphore(0)
        self.open = threading.Event()
        self.ended = threading.Event()
        transcribe = Whisper.transcribe

        def gated(model: Whisper, request: TranscriptionRequest, on_window: Any) -> Transcript:
            def wait() -> None:
                self.windows.release()
                assert self.open.wait(60)
                on_window()

            try:
                return transcribe(model, request, wait)
            finally:
                self.ended.set()

        monkeypatch.setattr(Whisper, "transcribe", gated)


def test_a_slow_transcription_blocks_no_chat(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(post, url) for _ in range(3)]
        assert gate.windows.acquire(timeout=60)
        chat = requests.post(
            f"{url}/v1/completions",
            json={"model": "generator", "prompt": "w5", "max_tokens": 3},
            timeout=60,
        )
        assert chat.status_code == 200, chat.text
        assert not any(one.done() for one in waiting)
        gate.open.set()
        texts = {one.result(60).json()["text"] for one in waiting}
        assert len(texts) == 1


@pytest.mark.long
def test_uploads_that_wait_for_their_turn_hold_no_memory_for_bodies(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of 1.1 MB wait, and the bodies of all requests may have 4 MB together."""
    monkeypatch.setattr("modelpack_server.gateway.checks.MAX_IN_FLIGHT", 1)
    gate, progress = Gate(monkeypatch), threading.Semaphore(0)
    call = AsyncTranscriber._call

    def called(model: AsyncTranscriber, job: Any) -> bool:
        progress.release()
        return call(model, job)

    monkeypatch.setattr(AsyncTranscriber, "_call", called)
    config = EngineConfig(device="cpu", kv_cache_bytes=1 << 20, warm_up=False)
    with (
        ModelServer(
            lambda: ModelPool(StoreCatalogue(store, config)),
            address="127.0.0.1:0",
            wrap=lambda app: protect(app, Protection(max_body=2 * 1024 * 1024)),
        ) as server,
        ThreadPoolExecutor(6) as threads,
    ):
        waiting = []
        for _ in range(6):
            waiting.append(threads.submit(post, server.url, data=SOUND))
            waiting[-1].add_done_callback(lambda _: progress.release())
            assert progress.acquire(timeout=60)
        gate.open.set()
        assert {one.result(60).status_code for one in waiting} == {200}


def test_a_client_that_leaves_stops_its_transcription(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    parts = urlsplit(url)
    request = requests.Request(
        "POST",
        f"{url}/v1/audio/transcriptions",
        files={"file": ("a.wav", SOUND)},
        data={"model": "whisper"},
    ).prepare()
    assert isinstance(request.body, bytes)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    lines = f"POST {parts.path}/v1/audio/transcriptions HTTP/1.1\r\nHost: {parts.netloc}\r\n{head}"
    with socket.create_connection((parts.hostname, parts.port)) as client:
        client.sendall(f"{lines}\r\n".encode() + request.body)
        assert gate.windows.acquire(timeout=60)
    while any(model["users"] for model in requests.get(f"{url}/pool", timeout=60).json()["models"]):
        pass
    gate.open.set()
    assert gate.ended.wait(60)
    assert not gate.windows.acquire(blocking=False)  # a second window would have followed
    assert post(url).status_code == 200


def test_a_failure_is_an_error_of_the_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Transcript:
        raise ValueError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Transcriber, "transcribe", fail)
        reply = post(url)
    assert reply.status_code == 500
    assert "the device is gone" in reply.text
    assert post(url).status_code == 200


def test_the_openapi_document_describes_the_form(url: str) -> None:
    document = requests.get(f"{url}/openapi.json", timeout=60).json()
    for tail, names in (("transcriptions", {"stream", "language"}), ("translations", {"prompt"})):
        body = document["paths"][f"/v1/audio/{tail}"]["post"]["requestBody"]
        schema = body["content"]["multipart/form-data"]["schema"]
        assert schema["required"] == ["file", "model"]
        assert names <= set(schema["properties"])


def test_the_package_says_what_it_is(directory: Path, tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    request = modelpack.PackageRequest(safetensors_dir=directory, format="cncf")
    made = modelpack.package("w", request, store=store)
    found = {"inputTypes": ["audio"], "outputTypes": ["text"]}
    assert made.config.cncf_config["capabilities"] == found
    assert made.config.capabilities == ("transcription",)
    assert made.config.architecture == "whisper"
