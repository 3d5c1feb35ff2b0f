"""The official JavaScript clients of OpenAI and Anthropic, and Vercel's AI SDK, with SmolLM2.

One run of clients.mjs asks for everything; the tests read its results. A second server has a tiny
LLaVA, which reads pictures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.speech.samples import sample
from tests.conftest import ROOT
from tests.engine.clients.installed import ClientsError, npm_clients
from tests.engine.real_server import DIGITS, FAMILIAR, MINILM, SMOLLM2
from tests.engine.serving.tiny import tiny_server
from tests.engine.speech.tiny import wav
from tests.engine.vision import tiny
from tests.engine.vision.media import file_of
from tests.peers import missing, require

pytestmark = [pytest.mark.peer("node"), pytest.mark.weights, pytest.mark.long]

TEXT = "The capital of France is Paris."
PROMPT, REPLY = 37, 8  # tokens
OPENAI, ANTHROPIC = "openai", "anthropic"
VERCEL_OPENAI, VERCEL_ANTHROPIC = "ai with openai-compatible", "ai with anthropic"
DIGITS_SAID = sample(1_000_000_000)
CLIENTS = (OPENAI, ANTHROPIC, VERCEL_OPENAI, VERCEL_ANTHROPIC)


@pytest.fixture(scope="module")
def pictures_url() -> Iterator[str]:
    """The address of a server with a model that reads pictures."""
    with tiny_server(lambda: tiny.tiny_engine("llava", max_num_batched_tokens=256)) as url:
        yield url


@pytest.fixture(scope="module")
def results(
    smollm2_url: str, pictures_url: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What clients.mjs prints."""
    node = require("node")
    try:
        directory = npm_clients(ROOT / ".cache")
    except ClientsError as error:
        missing(str(error))
    # Node looks for packages beside the script.
    script = shutil.copy(Path(__file__).parent / "clients.mjs", directory)
    files = tmp_path_factory.mktemp("files")
    sound, picture = files / "digits.wav", files / "picture.png"
    sound.write_bytes(wav(DIGITS_SAID.sound))
    picture.write_bytes(file_of(tiny.picture(1)))
    done = subprocess.run(
        [
            node, script, smollm2_url, SMOLLM2, MINILM, DIGITS, sound,
            pictures_url, "tiny", picture,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def result(results: dict[str, dict[str, Any]], client: str, feature: str) -> dict[str, Any]:
    """Return what one feature gave; fail with the client's error if it raised one."""
    found: dict[str, Any] = results[client][feature]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("feature", ["chat", "stream"])
def test_a_reply(results: dict[str, dict[str, Any]], client: str, feature: str) -> None:
    found = result(results, client, feature)
    assert found["text"] == TEXT
    assert found["finish"] == ("end_turn" if client == ANTHROPIC else "stop")
    usage = found["usage"]
    if client == OPENAI:
        counts = usage["prompt_tokens"], usage["completion_tokens"]
    elif client == ANTHROPIC:
        # Anthropic counts cached tokens apart.
        cached = usage["cache_read_input_tokens"]
        counts = usage["input_tokens"] + cached, usage["output_tokens"]
    else:
        counts = usage["inputTokens"], usage["outputTokens"]
    assert counts == (PROMPT, REPLY)
    assert found.get("pieces", REPLY) > 2


@pytest.mark.parametrize("client", CLIENTS)
def test_a_tool_is_called(results: dict[str, dict[str, Any]], client: str) -> None:
    """All but openai-node, which stops after a named tool, hand the result back to the model."""
    found = result(results, client, "tools")
    assert found["called"] == ["Paris"]
    if client != OPENAI:
        assert found["finish"] == ("tool_use" if client == ANTHROPIC else "tool-calls")
        assert found["text"]


@pytest.mark.parametrize(
    ("client", "feature"),
    [*((client, "schema") for client in CLIENTS), (OPENAI, "responsesSchema")],
)
def test_a_schema(results: dict[str, dict[str, Any]], client: str, feature: str) -> None:
    assert result(results, client, feature)["object"] == {"city": "Paris"}


def test_a_transcription(results: dict[str, dict[str, Any]]) -> None:
    found = result(results, OPENAI, "transcription")
    assert found["text"] == "".join(found["deltas"]) == DIGITS_SAID.text
    assert found["words"] == DIGITS_SAID.text.split()


def said(prompt: str) -> str:
    """Return the text of mlx-vlm's tokens for the picture."""
    tokens = tiny.expected("llava", prompt, [tiny.picture(1)])
    return tiny.tiny_loaded("llava").tokenizer.decode(tokens)


@pytest.mark.parametrize("feature", ["picture", "pictureStream", "pictureResponses"])
def test_a_picture_in_a_data_url(results: dict[str, dict[str, Any]], feature: str) -> None:
    expected = said("user: <image>What is it?\nassistant:")
    assert result(results, OPENAI, feature) == {"text": expected}


@pytest.mark.parametrize(
    ("client", "prompt"),
    [
        (ANTHROPIC, "user: <image>What is it?\nassistant:"),
        (VERCEL_OPENAI, "user: <image>What is it?\nassistant:"),
        (VERCEL_ANTHROPIC, "user: <image>What is it?\nassistant:"),
    ],
)
def test_a_picture_until_the_end_of_the_reply(
    results: dict[str, dict[str, Any]], client: str, prompt: str
) -> None:
    """These clients do not ask the server to ignore the end-of-sequence token."""
    text = result(results, client, "picture")["text"]
    assert text
    assert said(prompt).startswith(text)


def test_a_bad_picture(results: dict[str, dict[str, Any]]) -> None:
    assert result(results, OPENAI, "badPicture") == {
        "name": "BadRequestError", "status": 400, "param": "messages[0].content[0]",
    }  # fmt: skip


@pytest.mark.parametrize("client", [OPENAI, VERCEL_OPENAI])
def test_embeddings(results: dict[str, dict[str, Any]], client: str) -> None:
    """openai-node asks for base64 and decodes it, the AI SDK asks for numbers."""
    found = result(results, client, "embeddings")
    assert found["lengths"] == [384, 384]
    assert sum(value**2 for value in found["first"]) == pytest.approx(1, abs=1e-3)
    other = result(results, OPENAI, "embeddings")["first"]
    assert found["first"] == pytest.approx(other, abs=1e-5)


def test_responses(results: dict[str, dict[str, Any]]) -> None:
    assert result(results, OPENAI, "responses") == {"text": TEXT, "status": "completed"}


def test_counting_tokens(results: dict[str, dict[str, Any]]) -> None:
    assert result(results, ANTHROPIC, "count") == {"tokens": PROMPT}


@pytest.mark.parametrize("client", [OPENAI, ANTHROPIC])
def test_models(results: dict[str, dict[str, Any]], client: str) -> None:
    assert set(result(results, client, "models")["found"]) == set(FAMILIAR.values())


@pytest.mark.parametrize(
    ("client", "expected"),
    [(OPENAI, {"code": "model_not_found"}), (ANTHROPIC, {"type": "not_found_error"})],
)
def test_an_unknown_model(
    results: dict[str, dict[str, Any]], client: str, expected: dict[str, str]
) -> None:
    found = result(results, client, "refusal")
    assert found == {"name": "NotFoundError", "status": 404} | expected
