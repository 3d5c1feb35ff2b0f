"""PDF documents in prompts: each page is a picture."""

from __future__ import annotations

import base64
import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pypdfium2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from modelpack_engine.errors import RequestError
from modelpack_engine.vision.processor import Picture
from modelpack_engine.worker.document import MAX_PAGE_SIDE
from modelpack_server.api.app import create_app
from modelpack_server.conversation import pictures
from modelpack_server.conversation.pictures import PDF, PictureFiles, PictureReader, with_pages
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import TinyCatalogue
from tests.engine.vision import tiny
from tests.engine.vision.media import saved, url
from tests.engine.vision.tiny import picture

QUESTION = {"type": "text", "text": "What is it?"}


def pdf(*images: Image.Image) -> bytes:
    """Return a PDF with a page for each picture."""
    return saved(images[0], "PDF", save_all=True, append_images=images[1:])


def written(*objects: str, streams: dict[int, bytes] | None = None, trailer: str = "") -> bytes:
    """Return a PDF of these objects, from 1 on; PDFium finds them without a table."""
    out = b"%PDF-1.7\n"
    for number, text in enumerate(objects, 1):
        out += f"{number} 0 obj\n{text}\n".encode()
        if streams and number in streams:
            out += b"stream\n" + streams[number] + b"\nendstream\n"
        out += b"endobj\n"
    return out + f"trailer << /Root 1 0 R {trailer} >>\n%%EOF\n".encode()


CATALOG = "<< /Type /Catalog /Pages 2 0 R >>"
PAGES = "<< /Type /Pages /Kids [3 0 R] /Count 1 >>"


def page(box: str = "0 0 60 40", content: bytes = b"", more: str = "") -> bytes:
    """Return a PDF of one page."""
    return written(
        CATALOG, PAGES,
        f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents 4 0 R {more} >>",
        f"<< /Length {len(content)} >>", streams={4: content},
    )  # fmt: skip


def _encrypted() -> bytes:
    secret = "41" * 32
    lock = f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{secret}> /U <{secret}> >>"
    return written(
        CATALOG, PAGES, "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] >>", lock,
        trailer=f"/Encrypt 4 0 R /ID [<{secret}> <{secret}>]",
    )  # fmt: skip


def _bomb() -> bytes:
    """A picture of 3.6 GB in 4 MB."""
    data = zlib.compress(bytes(60_000_000), 9)
    size = "/Width 30000 /Height 30000 /ColorSpace /DeviceRGB /BitsPerComponent 8"
    image = f"<< /Type /XObject /Subtype /Image {size} /Filter /FlateDecode /Length {len(data)} >>"
    content = b"60 0 0 40 0 0 cm /A Do"
    return written(
        CATALOG, PAGES,
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 60 40] /Contents 4 0 R"
        " /Resources << /XObject << /A 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>", image, streams={4: content, 5: data},
    )  # fmt: skip


ONE = pdf(Image.fromarray(picture(1).pixels))
THREE = pdf(*(Image.new("RGB", (30 + n, 20), (n, 100, 0)) for n in range(3)))

#: Files that are refused: a name, the file, and a part of the message.
BAD_DOCUMENTS: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty", lambda: b"", "the document is empty"),
    ("text", lambda: b"hello, this is no document", "the document is damaged"),
    ("a picture", lambda: saved(Image.new("RGB", (8, 8))), "the document is damaged"),
    ("zeros", lambda: bytes(1000), "the document is damaged"),
    ("only the header", lambda: b"%PDF-1.7\n", "the document is damaged"),
    ("no catalog", lambda: written("<< >>"), "the document is damaged"),
    ("cut", lambda: ONE[:100], "the document is damaged"),
    ("with a password", _encrypted, "the document is refused: it needs a password"),
    ("no pages", lambda: written(CATALOG, "<< /Type /Pages /Kids [] /Count 0 >>"), "is damaged"),
    (
        "33 pages",
        lambda: pdf(*[Image.new("RGB", (2, 2))] * 33),
        "the document has 33 pages, the limit is 32 pages and pictures",
    ),
    (
        "pages that are not there",
        lambda: written(CATALOG, "<< /Type /Pages /Kids [9 0 R] /Count 1 >>"),
        "is damaged",
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_pages_count_with_all_files(kind: str) -> None:
    parts = [{"type": kind}] * 30
    message = "the document has 3 pages, the limit is 32 pages and pictures in one request"
    with pytest.raises(RequestError, match=message):
        pages_of(THREE, *parts)


def pages_of(data: bytes, *others: dict[str, Any]) -> list[Picture]:
    reader = PictureReader()
    parts = [*others, reader.document(base64.b64encode(data).decode(), "here")]
    [message] = with_pages(_Model(), [{"role": "user", "content": parts}])  # type: ignore[arg-type]
    with PictureFiles([part["picture"] for part in message["content"]]) as files:
        return [each.decode() for each in files]


class _Model:
    """A model whose queue has room."""

    class engine:
        @staticmethod
        def check_queue() -> None:
            """Refuse nothing."""


@pytest.mark.parametrize(
    ("name", "make", "message"), BAD_DOCUMENTS, ids=[b[0] for b in BAD_DOCUMENTS]
)
def test_bad_documents(name: str, make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        pages_of(make())
    assert message in str(caught.value)
    assert str(caught.value).startswith("here: ")
    assert caught.value.param == "here"


def test_pages_are_pictures() -> None:
    found = pages_of(THREE)
    assert [each.pixels.shape for each in found] == [(40, 60, 3), (40, 62, 3), (40, 64, 3)]
    assert [int(each.pixels[20, 20, 0].round(-1)) for each in found] == [0, 0, 0]
    assert {each.param for each in found} == {"here"}


def test_vectors_are_drawn_on_white() -> None:
    [found] = pages_of(page(content=b"1 0 0 rg 0 0 30 40 re f"))
    assert found.pixels.shape == (80, 120, 3)
    assert found.pixels[40, 10].tolist() == [255, 0, 0]
    assert found.pixels[40, 110].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        ("0 0 14400 14400", (MAX_PAGE_SIDE, MAX_PAGE_SIDE)),
        ("0 0 14400 144", (16, MAX_PAGE_SIDE)),
        ("0 0 1000000 1000000", (MAX_PAGE_SIDE, MAX_PAGE_SIDE)),
        ("0 0 0 0", (MAX_PAGE_SIDE, 1212)),  # US Letter, as the specification has it
    ],
)
def test_large_pages_are_made_small(box: str, shape: tuple[int, int]) -> None:
    [found] = pages_of(page(box))
    assert found.pixels.shape[:2] == shape


def outcome(data: bytes) -> str:
    """Return how many pages were drawn, or the error."""
    try:
        return str(len(pages_of(data)))
    except RequestError as error:
        return str(error)


def test_long_pages_are_refused() -> None:
    assert "page 1 is refused: it has 28800 x 2 pixels" in outcome(page("0 0 14400 1"))


def test_a_bomb_takes_no_memory() -> None:
    """PDFium draws it line by line; if it did not, the worker would end at its limit."""
    found = outcome(_bomb())
    assert found == "1" or "page 1 is refused" in found
    assert outcome(ONE) == "1"


def test_the_number_of_pages_is_counted() -> None:
    """Not taken from the file."""
    many = written(CATALOG, PAGES.replace("1 >>", "1000000000 >>"),
                   "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] >>")  # fmt: skip
    assert outcome(many) == "1"
    loop = written(CATALOG, "<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2 >>")
    assert "is damaged" in outcome(loop)


@pytest.mark.long
def test_slow_pages_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.3)
    slow = b"0 0 60 40 re f* " * 1_000_000
    with pytest.raises(RequestError, match=r"here: page 1 is refused: .* longer than 0.3 s"):
        pages_of(page(content=slow))
    monkeypatch.undo()
    assert len(pages_of(ONE)) == 1


def test_pages_and_pictures_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURES", 3)
    assert len(pages_of(THREE)) == 3
    other = PictureReader().file(saved(Image.new("RGB", (8, 8))), "there")
    with pytest.raises(RequestError, match="here: the document has 3 pages, the limit is 3"):
        pages_of(THREE, other)


def test_limits_on_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(RequestError, match="here: the document has more than 100 bytes"):
        PictureReader().document(base64.b64encode(bytes(101)).decode(), "here")


@pytest.fixture(scope="module")
def llava() -> Iterator[TestClient]:
    catalogue = TinyCatalogue(lambda: tiny.tiny_engine("llava", max_num_batched_tokens=256))
    with TestClient(create_app(ModelPool(catalogue, memory=10_000, grace=0.0))) as client:
        yield client


def openai(data: object, **fields: Any) -> tuple[str, dict[str, Any]]:
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": data} | fields}
    return "/v1/chat/completions", {
        "model": "tiny", "messages": [{"role": "user", "content": [part, QUESTION]}],
        "temperature": 0, "max_tokens": 8, "ignore_eos": True,
    }  # fmt: skip


def responses(data: object, **fields: Any) -> tuple[str, dict[str, Any]]:
    part = {"type": "input_file", "filename": "a.pdf", "file_data": data} | fields
    content = [part, {"type": "input_text", "text": "What is it?"}]
    return "/v1/responses", {
        "model": "tiny", "input": [{"role": "user", "content": content}],
        "temperature": 0, "max_output_tokens": 8, "ignore_eos": True,
    }  # fmt: skip


def anthropic(source: object, **fields: Any) -> tuple[str, dict[str, Any]]:
    block = {"type": "document", "source": source} | fields
    return "/v1/messages", {
        "model": "tiny", "messages": [{"role": "user", "content": [block, QUESTION]}],
        "temperature": 0, "max_tokens": 8,
    }  # fmt: skip


def in_base64(data: bytes, kind: str = PDF) -> dict[str, str]:
    text = base64.b64encode(data).decode()
    return {"type": "base64", "media_type": kind, "data": text}


def rendered(data: bytes) -> Picture:
    """Return the first page, as PDFium draws it at 144 dpi."""
    image = pypdfium2.PdfDocument(io.BytesIO(data))[0].render(scale=2).to_pil()
    return Picture(np.asarray(image.convert("RGB")))


def said(prompt: str, *pages: Picture) -> str:
    tokens = tiny.expected("llava", prompt, list(pages))
    return tiny.tiny_loaded("llava").tokenizer.decode(tokens)


def test_all_apis(llava: TestClient) -> None:
    """The answers are mlx-vlm's to a picture of the page."""
    first = rendered(ONE)
    expected = said("user: <image>What is it?\nassistant:", first)
    path, body = openai(url(ONE, PDF))
    assert llava.post(path, json=body).json()["choices"][0]["message"]["content"] == expected
    path, body = openai(base64.b64encode(ONE).decode())
    assert llava.post(path, json=body).json()["choices"][0]["message"]["content"] == expected
    path, body = responses(url(ONE, PDF))
    assert llava.post(path, json=body).json()["output"][0]["content"][0]["text"] == expected
    path, body = anthropic(in_base64(ONE))
    found = llava.post(path, json=body).json()["content"][0]["text"]
    assert found
    assert expected.startswith(found)
    path, body = anthropic(in_base64(ONE), title="A", context="b")
    titled = llava.post(path, json=body).json()["content"][0]["text"]
    assert said("user: A\nb\n<image>What is it?\nassistant:", first).startswith(titled)
    tokens = llava.post(f"{path}/count_tokens", json={**body, "max_tokens": 1})
    assert tokens.json()["input_tokens"] == 16 + len("user: A\nb\nWhat is it?\nassistant:")


def test_text_documents_stay_text(llava: TestClient) -> None:
    path, body = anthropic({"type": "text", "media_type": "text/plain", "data": "Hello"})
    tokens = llava.post(f"{path}/count_tokens", json={**body, "max_tokens": 1}).json()
    assert tokens["input_tokens"] == len("user: Hello\n\nWhat is it?\nassistant:")


REFUSED = [
    (openai(None), "file.file_data is required"),
    (openai(None, file_id="file-1"), "uploaded files are not read"),
    (openai(7), "the document is not a base64 string"),
    (openai(""), "the document is empty"),
    (openai("data:application/pdf,abc"), "the data: URL has no base64"),
    (openai("data:text/html;base64,aGk="), "'text/html' is not application/pdf"),
    (openai("data:application/pdf;base64,a!b="), "the base64 is not valid"),
    (openai("https://example.com/a.pdf"), "the base64 is not valid"),
    (openai("file:///etc/passwd"), "the base64 is not valid"),
    (openai(url(b"hello", PDF)), "the document is damaged"),
    (responses(None), "file_data is required and must be a string"),
    (responses(None, file_id="file-1"), "uploaded files and URLs are not read"),
    (responses(None, file_url="https://example.com/a.pdf"), "uploaded files and URLs are not read"),
    (responses(url(b"hello", PDF)), "the document is damaged"),
    (anthropic(in_base64(b"hello")), "the document is damaged"),
    (anthropic(in_base64(b"hello", "text/html")), "have the media_type application/pdf"),
    (anthropic({"type": "base64", "media_type": PDF, "data": 7}), "is not a base64 string"),
    (anthropic({"type": "url", "url": "https://example.com/a.pdf"}), "a source of type text"),
    (anthropic({"type": "url", "url": "file:///etc/passwd"}), "a source of type text"),
    (anthropic({"type": "file", "file_id": "f"}), "a source of type text"),
    (anthropic(None), "a source of type text"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED)
def test_refused(llava: TestClient, request_: tuple[str, dict[str, Any]], message: str) -> None:
    path, body = request_
    refused = llava.post(path, json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert message in error["message"]
    place = {"/v1/messages": "messages.0.content.0", "/v1/responses": "input[0].content[0]"}
    assert error["message"].startswith(place.get(path, "messages[0].content[0]"))


def test_documents_are_for_users(llava: TestClient) -> None:
    path, body = openai(url(ONE, PDF))
    body["messages"][0]["role"] = "system"
    refused = llava.post(path, json=body)
    assert refused.status_code == 400
    assert "messages of the user only" in refused.json()["error"]["message"]


def test_without_the_extra(llava: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pypdfium2" else find(name)
    )
    for path, body in (openai(url(ONE, PDF)), responses(url(ONE, PDF)), anthropic(in_base64(ONE))):
        refused = llava.post(path, json=body)
        assert refused.status_code == 400
        assert "content" in refused.json()["error"]["message"].partition(":")[0]
        assert "need the extra 'documents', which is not installed" in refused.text
        assert "pip install 'modelpack[documents]'" in refused.text


@pytest.mark.long
def test_a_model_of_text(llava: TestClient) -> None:
    with TestClient(create_app(ModelPool(TinyCatalogue(), memory=10_000, grace=0.0))) as text:
        for path, body in (
            openai(url(ONE, PDF)), responses(url(ONE, PDF)), anthropic(in_base64(ONE))
        ):  # fmt: skip
            assert text.post(path, json=body).status_code == 400
