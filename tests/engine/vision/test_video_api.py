"""Videos through the APIs of a server and `run`: good ones, and bad ones by status."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from modelpack import package
from modelpack.builder.request import PackageRequest
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.vision.videos import Video
from modelpack_engine.worker.video import Sampling, decode
from modelpack_server.api.app import create_app
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.cli.running import modelpack
from tests.engine.serving.tiny import TinyCatalogue, tiny_server, write_tiny
from tests.engine.vision import tiny, watching
from tests.engine.vision.media import file_of
from tests.engine.vision.media import url as picture_url
from tests.engine.vision.test_api import Served
from tests.engine.vision.test_media_urls import Pictures
from tests.engine.vision.tiny import picture
from tests.engine.vision.video_files import BAD_FILES, TINY, frames, plain, written

pytestmark = pytest.mark.long

CLIP = written(frames(30), codec="libx264")
QUESTION = {"type": "text", "text": "What happens?"}
PROMPT = "user: <video>What happens?\nassistant:"


def url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url(data)}}


def shown(data: bytes, sampling: Sampling = TINY) -> Video:
    """Return what a tiny model sees of a video."""
    seconds, times, pixels = decode(data, sampling)
    return Video(pixels, tuple(times), seconds)


def said(kind: str, prompt: str, *files: Any) -> str:
    """Return the text that mlx-vlm's tokens are."""
    return tiny.tiny_loaded(kind).tokenizer.decode(watching.expected(kind, prompt, [*files]))


def _engine(kind: str) -> Any:
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=256)
    own = engine.tokenizer.chat_template or ""
    token = "{% elif p.type == 'video' %}" + watching.placeholder(kind) + "{% else %}{{ p.text }}"
    engine.tokenizer._chat_template = ChatTemplate(own.replace("{% else %}{{ p.text }}", token))
    return engine


def served(kind: str) -> Iterator[Served]:
    catalogue = TinyCatalogue(lambda: _engine(kind))
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


@pytest.fixture(scope="module")
def qwen() -> Iterator[Served]:
    yield from served("qwen2_5_vl")


@pytest.fixture(scope="module")
def text() -> Iterator[Served]:
    catalogue = TinyCatalogue()
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as http:
        yield Served(http, catalogue)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/engines/v1/chat/completions"])
def test_openai_and_docker(qwen: Served, path: str) -> None:
    answer = qwen.chat([part(CLIP), QUESTION], path).json()
    assert answer["choices"][0]["message"]["content"] == said("qwen2_5_vl", PROMPT, shown(CLIP))
    # Three groups of frames, of 2 x 2 tokens each, and the two tokens around them.
    assert answer["usage"]["prompt_tokens"] == 3 * 4 + 2 + len(PROMPT) - len("<video>")


@pytest.mark.parametrize(
    "kind",
    [
        "qwen3_vl",
        *tiny.kinds(
            "qwen2_vl", "qwen3_5", "gemma4", "gemma4_unified", "llava_onevision", "mage_vl"
        ),
    ],
)
def test_other_models(kind: str) -> None:
    for model in served(kind):
        answer = model.chat([part(CLIP), QUESTION]).json()
    assert answer["choices"][0]["message"]["content"] == said(
        kind, PROMPT, shown(CLIP, watching.sampling_of(kind))
    )


def test_a_picture_and_a_video(qwen: Served) -> None:
    image = {"type": "image_url", "image_url": {"url": picture_url(file_of(picture(1)))}}
    answer = qwen.chat([image, part(CLIP), QUESTION]).json()
    expected = said(
        "qwen2_5_vl", "user: <image><video>What happens?\nassistant:", picture(1), shown(CLIP)
    )
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    tiny.prompt_of("<|image_pad|>", tiny.TEMPLATE),
])  # fmt: skip
def test_templates_that_show_no_videos(template: str, qwen: Served) -> None:
    """The placeholder comes where the video is."""
    tokenizer = qwen.engine.tokenizer
    own, tokenizer._chat_template = tokenizer._chat_template, ChatTemplate(template)
    try:
        answer = qwen.chat([part(CLIP), QUESTION]).json()
    finally:
        tokenizer._chat_template = own
    assert answer["choices"][0]["message"]["content"] == said("qwen2_5_vl", PROMPT, shown(CLIP))


def test_the_official_sdk() -> None:
    with (
        tiny_server(lambda: _engine("qwen2_5_vl")) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        content: Any = [part(CLIP), QUESTION]
        asked: dict[str, Any] = {
            "model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8,
            "temperature": 0, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        answer = client.chat.completions.create(**asked)
        expected = said("qwen2_5_vl", PROMPT, shown(CLIP))
        assert answer.choices[0].message.content == expected
        content[0] = part(b"bad")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked)
        assert caught.value.param == "messages[0].content[0]"
        assert client.chat.completions.create(**asked | {"messages": [
            {"role": "user", "content": [part(CLIP), QUESTION]}
        ]}).choices[0].message.content == expected  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(qwen: Served, name: str, make: Callable[[], bytes], message: str) -> None:
    refused = qwen.chat([QUESTION, part(make())])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"].startswith("messages[0].content[1]: the video is ")
    assert message in error["message"]
    assert error["param"] == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "video_url"}, "the URL of the video is not a string"),
        ({"type": "video_url", "video_url": {}}, "the URL of the video is not a string"),
        ({"type": "video_url", "video_url": {"url": 7}}, "the URL of the video is not a string"),
        ({"type": "video_url", "video_url": {"url": "/etc/passwd"}}, "is not a data: URL"),
        ({"type": "video_url", "video_url": {"url": "file:///a.mp4"}}, "is not a data: URL"),
        ({"type": "video_url", "video_url": {"url": "http://a/b.mp4"}},
         "videos are not fetched from the network: the server was started without --allow"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4,x"}}, "has no base64"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,!"}}, "not valid"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}}, "is empty"),
        ({"type": "video_url", "video_url": {"url": picture_url(b"a")}}, "is not a video"),
        ({"type": "video_url", "video_url": {"url": url(file_of(picture(1)))}}, "unknown format"),
        ({"type": "image_url", "image_url": {"url": picture_url(CLIP)}}, "unknown format"),
        ({"type": "input_video", "input_video": {}}, "type 'input_video' are not known"),
    ],
)  # fmt: skip
def test_bad_parts(qwen: Served, given: dict[str, Any], message: str) -> None:
    refused = qwen.chat([QUESTION, given])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["param"] == "messages[0].content[1]"


def test_a_bad_video_fails_its_request_alone(qwen: Served) -> None:
    assert qwen.chat([part(b"bad"), QUESTION]).status_code == 400
    answer = qwen.chat([part(CLIP), QUESTION]).json()
    assert answer["choices"][0]["message"]["content"] == said("qwen2_5_vl", PROMPT, shown(CLIP))


def test_videos_and_pictures_have_one_limit(qwen: Served) -> None:
    image = {"type": "image_url", "image_url": {"url": picture_url(file_of(picture(1)))}}
    refused = qwen.chat([image] * 16 + [part(b"bad")] * 17)
    assert refused.status_code == 400
    assert "more than 32 videos and pictures" in refused.json()["error"]["message"]


def test_more_tokens_than_the_context(qwen: Served) -> None:
    refused = qwen.chat([*[part(CLIP)] * 4, {"type": "text", "text": "a" * 960}])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_videos_are_for_users(qwen: Served) -> None:
    messages = [{"role": "system", "content": [part(CLIP)]}, {"role": "user", "content": "a"}]
    refused = qwen.chat("", messages=messages)
    assert refused.status_code == 400
    assert "files are read in messages of the user only" in refused.text


def test_a_placeholder_in_the_text(qwen: Served) -> None:
    refused = qwen.chat([part(CLIP), {"type": "text", "text": "a <|video_pad|>?"}])
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "2 placeholders <|image_pad|> and <|video_pad|> for 1 file" in message


def test_models_that_read_no_videos(text: Served) -> None:
    for model in served("llava"):
        refused = model.chat([part(CLIP), QUESTION])
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == (
            "messages[0].content[0]: this model reads no video: its processor takes none"
        )
    refused = text.chat([part(CLIP), QUESTION])
    assert refused.status_code == 400
    assert "this model accepts text only, not 'video_url'" in refused.text


def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "av" else find(name)
    )


def test_without_the_extra(qwen: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    without_av(monkeypatch)
    refused = qwen.chat([part(CLIP), QUESTION])
    assert refused.status_code == 400
    assert "messages[0].content[0]: videos need the extra 'video'" in refused.text


def test_urls() -> None:
    """They pass the guards of pictures, and have the content type of a video."""
    files = {"/clip.mp4": ("video/mp4", CLIP), "/clip.png": ("image/png", CLIP)}
    with Pictures() as other:
        other.files = files
        catalogue = TinyCatalogue(lambda: _engine("qwen2_5_vl"))
        pool = ModelPool(catalogue, memory=10_000, grace=0.0)
        with TestClient(create_app(pool, media_hosts=[f"127.0.0.1:{other.port}"])) as http:
            qwen = Served(http, catalogue)

            def ask(path: str) -> Any:
                given = {"type": "video_url", "video_url": {"url": f"{other.url}{path}"}}
                return qwen.chat([given, QUESTION])

            answer = ask("/clip.mp4").json()
            expected = said("qwen2_5_vl", PROMPT, shown(CLIP))
            assert answer["choices"][0]["message"]["content"] == expected
            refused = ask("/clip.png")
            assert refused.status_code == 400
            assert "its content type is not that of a video" in refused.text
        other.shutdown()


def test_the_memory_plan_leaves_out_the_voice(tmp_path: Path) -> None:
    """Qwen3-Omni's talker stays in the files."""
    store, files = LayoutStore(tmp_path / "store"), tiny.directory("qwen3_omni_moe")
    package("omni", PackageRequest(safetensors_dir=files), store=store)
    catalogue = StoreCatalogue(store, EngineConfig(device="cpu", kv_cache_bytes=1 << 20))
    tensors = read_safetensors_header(files / "model.safetensors").tensors
    [voice] = [tensor.size for tensor in tensors if tensor.name.startswith("talker.")]
    assert voice > 0
    planned = catalogue.needs(catalogue.find("omni"), ModelSettings())
    assert planned == (files / "model.safetensors").stat().st_size - voice + (1 << 20)


def test_capabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LayoutStore(tmp_path / "store")
    package("qwen", PackageRequest(safetensors_dir=tiny.directory("qwen2_5_vl")), store=store)
    package("llava", PackageRequest(safetensors_dir=tiny.directory("llava")), store=store)

    def listed() -> list[list[str]]:
        with TestClient(create_app(ModelPool(StoreCatalogue(store)))) as http:
            cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
            return [cards[name]["capabilities"] for name in ("qwen", "llava")]

    assert listed() == [["completion", "vision", "video"], ["completion", "vision"]]
    without_av(monkeypatch)
    assert listed() == [["completion", "vision"], ["completion", "vision"]]


SMALL = ("--device", "cpu", "--kv-cache-bytes", "2000000", "--max-tokens", "8")


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    path = tmp_path / "a clip.MP4"
    path.write_bytes(CLIP)
    return path


def test_run(clip: Path, tmp_path: Path) -> None:
    def ask(model: object) -> Any:
        return modelpack("run", model, "What happens?", clip, "--temperature", "0", "--json",
                         *SMALL, "--store", tmp_path / "store")  # fmt: skip

    found = ask(tiny.directory("qwen2_5_vl"))
    assert found.code == 0, found.err
    assert found.json["text"]
    assert said("qwen2_5_vl", PROMPT, shown(CLIP)).startswith(found.json["text"])
    write_tiny(tmp_path / "text")
    refused = ask(tmp_path / "text")
    assert refused.code != 0
    assert "text accepts text only" in refused.err
    refused = ask(tiny.directory("llava"))
    assert refused.code != 0
    assert "reads no video: its processor takes none" in refused.err
    clip.write_bytes(plain()[:100])
    refused = ask(tiny.directory("qwen2_5_vl"))
    assert refused.code != 0
    assert "a clip.MP4: the video is damaged" in refused.err


def test_run_through_a_server(clip: Path) -> None:
    with tiny_server(lambda: _engine("qwen2_5_vl")) as address:
        found = modelpack("run", "tiny", "What happens?", clip, "--url", address,
                          "--temperature", "0", "--max-tokens", "8", "--json")  # fmt: skip
    assert found.code == 0, found.err
    assert said("qwen2_5_vl", PROMPT, shown(CLIP)).startswith(found.json["text"])
