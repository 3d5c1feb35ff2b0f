"""/api/create and /api/blobs: new models from other models and from uploaded files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ollama
import pytest
import requests

from modelpack.artifacts.reference import Reference
from tests.engine.families.ollama.conftest import Stocked, serving
from tests.engine.serving.tiny import write_tiny
from tests.models import tiny_gguf

pytestmark = pytest.mark.long

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@contextmanager
def created(stocked: Stocked, name: str, **recipe: Any) -> Iterator[str]:
    """Create a model for the duration of a block."""
    assert stocked.client.create(name, **recipe).status == "success"
    try:
        yield name
    finally:
        stocked.client.delete(name)


def prompt_length(stocked: Stocked, name: str, **chat: Any) -> int | None:
    """Return the number of tokens (bytes) in the prompt of a chat."""
    options = {"num_predict": 1} | chat.pop("options", {})
    return stocked.client.chat(name, HELLO, options=options, **chat).prompt_eval_count


def test_a_model_carries_how_it_is_used(stocked: Stocked) -> None:
    recipe: dict[str, Any] = {
        "from_": "tiny",
        "template": TEMPLATE,
        "system": "be brief",
        "license": ["MIT", "and more"],
        "parameters": {"temperature": 0.0, "num_predict": 3, "stop": ["END", "FIN"], "num_ctx": 90},
        "messages": [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
        ],
    }
    with created(stocked, "mine:v1", **recipe):
        shown = stocked.client.show("mine:v1")
        assert shown.template == TEMPLATE
        assert shown.license is not None
        assert sorted(shown.license.split("\n")) == ["MIT", "and more"]
        assert shown.parameters is not None
        assert shown.parameters.split("\n") == [
            "num_ctx                        90",
            "num_predict                    3",
            'stop                           "END"',
            'stop                           "FIN"',
            "temperature                    0.0",
        ]
        assert shown.modelfile is not None
        assert 'SYSTEM """be brief"""' in shown.modelfile
        raw = requests.post(f"{stocked.url}/api/show", json={"model": "mine:v1"}, timeout=30).json()
        assert raw["system"] == "be brief"
        assert raw["messages"] == recipe["messages"]
        whole = "<system>be brief<user>1<assistant>2<user>hello<assistant>"
        answer = stocked.client.chat("mine:v1", HELLO)
        assert (answer.prompt_eval_count, answer.eval_count) == (len(whole), 3)
        again = stocked.client.chat("mine:v1", HELLO)
        assert again.message.content == answer.message.content
        [model] = [m for m in stocked.client.ps().models if m.model == "mine:v1"]
        assert model.context_length == 90
        generated = stocked.client.generate("mine:v1", "hello", system="no")
        assert generated.prompt_eval_count == len(whole) - len("be brief") + len("no")
        openai = requests.post(
            f"{stocked.url}/v1/chat/completions",
            json={"model": "mine:v1", "messages": HELLO},
            timeout=30,
        ).json()
        assert openai["usage"]["prompt_tokens"] == len(whole)
        assert openai["usage"]["completion_tokens"] == 3


def test_what_a_model_starts_from_is_kept(stocked: Stocked) -> None:
    first: dict[str, Any] = {
        "from_": "tiny",
        "system": "one",
        "parameters": {"top_k": 3, "seed": 1},
    }
    with (
        created(stocked, "first", **first),
        created(stocked, "second", from_="first", parameters={"top_k": 5}, license="MIT"),
    ):
        shown = stocked.client.show("second")
        assert shown.parameters is not None
        assert [line.split() for line in shown.parameters.split("\n")] == [
            ["seed", "1"], ["temperature", "0.0"], ["top_k", "5"],
        ]  # fmt: skip
        assert shown.license == "MIT"
        assert prompt_length(stocked, "second") == len("system: one\nuser: hello\nassistant:")
    assert prompt_length(stocked, "tiny") == len("user: hello\nassistant:")


def test_it_survives_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "store") as stocked:
        files = write_tiny(tmp_path / "files")
        digests = {path.name: stocked.client.create_blob(path) for path in files.iterdir()}
        stocked.client.create("own", files=digests, system="again", parameters={"num_predict": 2})
        before = stocked.client.chat("own", HELLO)
    with serving(tmp_path / "store") as stocked:
        after = stocked.client.chat("own", HELLO)
        assert before.prompt_eval_count == after.prompt_eval_count
        assert after.prompt_eval_count == len("system: again\nuser: hello\nassistant:")
        assert (before.eval_count, after.eval_count) == (2, 2)
        assert stocked.client.show("own").parameters == (
            "num_predict                    2\ntemperature                    0.7"
        )


def test_a_model_from_an_uploaded_file(stocked: Stocked, tmp_path: Path) -> None:
    digest = stocked.client.create_blob(tiny_gguf(tmp_path))
    with created(stocked, "uploaded", files={"tiny.gguf": digest}):
        details = stocked.client.show("uploaded").details
        assert details is not None
        assert details.format == "gguf"
        same = stocked.store.get(str(Reference.parse("uploaded")))
        assert same.digest == stocked.store.resolve(str(Reference.parse("weights"))).digest


def test_creating_is_told(stocked: Stocked) -> None:
    lines = list(stocked.client.create("told", from_="tiny", system="x", stream=True))
    assert lines[0].status == "gathering model components"
    assert [line.status for line in lines[-2:]] == ["writing manifest", "success"]
    stocked.client.delete("told")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "'from' and 'files'"),
        ({"from": "tiny", "files": {"a.gguf": "sha256:" + "0" * 64}}, "'from' and 'files'"),
        ({"modelfile": "FROM tiny"}, "modelfile"),
        ({"from": "tiny", "adapters": {"a": "sha256:" + "0" * 64}}, "adapters"),
        ({"from": "tiny", "quantize": "q4_K_M"}, "cannot quantize"),
        ({"from": "tiny", "parameters": {"temprature": 1}}, "temprature"),
        ({"from": "tiny", "parameters": {"temperature": "hot"}}, "temperature"),
        ({"from": "tiny", "template": "{% if %}"}, "line 1"),
        ({"from": "tiny", "messages": [{"role": "bard", "content": "x"}]}, "role"),
        ({"files": {"a.gguf": "sha256:" + "0" * 64}}, "no such blob"),
        ({"files": {"../a.gguf": "sha256:" + "0" * 64}}, "../a.gguf"),
        ({"files": {"a.gguf": "nothing"}}, "nothing"),
        ({"model": "a//b", "from": "tiny"}, "component"),
        # Addresses of objects are for the command line: a request opens none.
        ({"from": "file:///etc"}, "invalid"),
        ({"from": "memory://m"}, "invalid"),
        ({"from": "s3://models/m"}, "invalid"),
        ({"from": "sftp://host/m"}, "invalid"),
    ],
)
def test_what_cannot_be_made(stocked: Stocked, body: dict[str, Any], message: str) -> None:
    given = {"model": "bad", "stream": False} | body
    answer = requests.post(f"{stocked.url}/api/create", json=given, timeout=30)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert "bad:latest" not in {model.model for model in stocked.client.list().models}


def test_the_quantization_that_weights_have_is_accepted(stocked: Stocked) -> None:
    with created(stocked, "same", from_="weights", quantize="f32"):
        shown = stocked.client.show("same").details
        assert shown is not None
        assert shown.quantization_level == "F32"


def test_a_failure_while_it_is_told(stocked: Stocked) -> None:
    with pytest.raises(ollama.ResponseError, match="cannot quantize") as caught:
        list(stocked.client.create("bad", from_="tiny", quantize="q8_0", stream=True))
    assert caught.value.status_code == -1


def test_blobs(stocked: Stocked) -> None:
    content = b"a blob" * 100_000
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    url = f"{stocked.url}/api/blobs/{digest}"
    assert requests.head(url, timeout=30).status_code == 404
    wrong = requests.post(url, data=b"something else", timeout=30)
    assert wrong.status_code == 400
    assert digest in wrong.json()["error"]
    assert requests.head(url, timeout=30).status_code == 404
    assert requests.post(url, data=iter([content[:7], content[7:]]), timeout=30).status_code == 201
    assert requests.head(url, timeout=30).status_code == 200
    assert requests.head(url.replace("sha256:", "sha256-"), timeout=30).status_code == 200
    assert requests.post(url, data=content, timeout=30).status_code == 200
    assert requests.post(f"{stocked.url}/api/blobs/x", data=b"", timeout=30).status_code == 400
    uploads = stocked.store.root / "ingest" / "uploads"
    assert not [path for path in uploads.iterdir() if path.name.startswith(("ollama", "create"))]
