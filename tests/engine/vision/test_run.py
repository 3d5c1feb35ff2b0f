"""`modelpack run MODEL PROMPT FILE`: pictures from files, here and through a server."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from tests.cli.running import Result
from tests.cli.running import modelpack as run
from tests.engine.serving.tiny import tiny_server, write_tiny
from tests.engine.vision import tiny
from tests.engine.vision.media import file_of
from tests.engine.vision.test_api import said
from tests.engine.vision.tiny import picture

pytestmark = pytest.mark.long

SMALL = ("--device", "cpu", "--kv-cache-bytes", "2000000", "--max-tokens", "8", "--json")
PROMPT = "user: <image>What is it?\nassistant:"


@pytest.fixture(autouse=True)
def stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.PNG"
    path.write_bytes(file_of(picture(1)))
    return path


def ask(model: object, *arguments: object) -> Result:
    return run("run", model, *arguments, "--temperature", "0", *SMALL)


def test_a_picture_after_the_prompt(photo: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    found = ask(tiny.directory("llava"), "What is it?", photo, *store)
    assert found.code == 0, found.err
    text = found.json["text"]
    assert text
    assert said("llava", PROMPT, picture(1)).startswith(text)
    assert "PyTorch" not in found.err


def test_two_pictures(photo: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    one = ask(tiny.directory("llava"), "What is it?", photo, *store)
    two = ask(tiny.directory("llava"), "What is it?", photo, photo, *store)
    assert two.json["prompt_tokens"] == one.json["prompt_tokens"] + 16


def test_a_model_of_text(photo: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "text")
    found = ask(tmp_path / "text", "What is it?", photo, "--store", tmp_path / "store")
    assert found.code != 0
    assert "text accepts text only, not pictures" in found.err


def test_a_picture_that_does_not_exist(photo: Path, tmp_path: Path) -> None:
    model = tiny.directory("llava")
    found = ask(model, "What is it?", "pictures/phot.png", photo, "--store", tmp_path / "store")
    assert found.code == 3
    assert "pictures/phot.png: no such file" in found.err
    found = ask(model, "What is it?", "phot.png", "--store", tmp_path / "store")
    assert found.code == 3
    assert "phot.png: no such file" in found.err
    assert ask(model, "What", "is", "phot.png", "--store", tmp_path / "store").code == 0
    text = "What is at https://example.com/a.png"
    assert ask(model, text, "--store", tmp_path / "store").code == 0


def test_a_picture_of_another_name(photo: Path, tmp_path: Path) -> None:
    """After a prompt in quotes, a file is never sent as its name."""
    model, store = tiny.directory("llava"), ("--store", tmp_path / "store")
    expected = ask(model, "What is it?", photo, *store).json["text"]
    for name in ("photo", "photo.heic"):
        renamed = tmp_path / name
        renamed.write_bytes(photo.read_bytes())
        assert ask(model, "What is it?", renamed, *store).json["text"] == expected
    renamed.write_text("a text")
    found = ask(model, "What is it?", photo, renamed, *store)
    assert found.code != 0
    assert "photo.heic: the picture is refused: unknown format" in found.err
    plain = ask(model, "explain", renamed, *store)
    assert plain.code == 0, plain.err
    long = ask(model, "Why is it so? " * 20, "x" * 300, *store)
    assert long.code == 0, long.err


@pytest.mark.parametrize(
    ("content", "prompt", "message"),
    [
        (b"", ["hi"], "the picture is empty"),
        (b"bad", ["hi"], "unknown format"),
        (b"bad", [], "no prompt"),
    ],
)
def test_bad_pictures(content: bytes, prompt: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    found = ask(tiny.directory("llava"), *prompt, path, "--store", tmp_path / "store")
    assert found.code != 0
    assert message in found.err


def test_a_name_that_is_no_file_is_text(tmp_path: Path) -> None:
    found = ask(tiny.directory("llava"), "explain", "a.png", "--store", tmp_path / "store")
    assert found.code == 0, found.err
    assert found.json["prompt_tokens"] == len("user: explain a.png\nassistant:")


def test_through_a_server(photo: Path) -> None:
    with tiny_server(lambda: tiny.tiny_engine("llava")) as url:
        found = run("run", "tiny", "What is it?", photo, "--url", url,
                    "--temperature", "0", "--max-tokens", "8", "--json")  # fmt: skip
    assert found.code == 0, found.err
    assert said("llava", PROMPT, picture(1)).startswith(found.json["text"])
    assert found.json["prompt_tokens"] == 16 + len(PROMPT) - len("<image>")


def smoke(*arguments: object) -> Result:
    return run("smoke", *arguments, *SMALL[:-1])


@pytest.mark.parametrize("kind", ["idefics3", "llava", "qwen2_5_vl"])
def test_smoke_with_a_picture(kind: str, photo: Path, tmp_path: Path) -> None:
    """The reply of the stored model is the one to this picture, and the report names it."""
    store = ("--store", tmp_path / "store")
    made = run("package", "--safetensors-dir", tiny.directory(kind), "tiny", *store)
    assert made.code == 0, made.err
    found = smoke("tiny", "--prompt", "What is it?", "--image", photo, *store).json
    assert found["images"] == [f"sha256:{hashlib.sha256(photo.read_bytes()).hexdigest()}"]
    assert found["answer"]
    assert said(kind, PROMPT, picture(1)).startswith(found["answer"])
    asked = smoke("tiny", "--image", photo, *store).json
    assert asked["prompt"] == "What is in the picture?"
    plain = smoke("tiny", "--prompt", "What is it?", *store).json
    assert "images" not in plain
    assert plain["answer"] != found["answer"]
    photo.write_bytes(b"bad")
    bad = smoke("tiny", "--image", photo, *store)
    assert bad.code == 1
    assert "unknown format" in bad.json["problems"][0]
    missing = smoke("tiny", "--image", tmp_path / "none.png", *store)
    assert missing.code == 2
    assert "none.png" in missing.err


def test_smoke_of_a_model_of_text(photo: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    write_tiny(tmp_path / "text")
    made = run("package", "--safetensors-dir", tmp_path / "text", "text", *store)
    assert made.code == 0, made.err
    found = smoke("text", "--image", photo, *store)
    assert found.code == 1
    assert "accepts text only, not pictures" in found.json["problems"][0]
