"""litellm, pydantic-ai and llm with SmolLM2, each by a script of `python/` in its own process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine.clients.installed import ClientsError, python_clients
from tests.engine.real_server import MINILM, SMOLLM2
from tests.peers import missing

pytestmark = [pytest.mark.peer("pip"), pytest.mark.weights, pytest.mark.long]

TEXT = "The capital of France is Paris."
TOKENS = [37, 8]  # of the prompt, of the reply
CLIENTS = ("litellm", "pydantic_ai", "llm")
# The ways in which each of them can talk to the server.
WAYS = {
    "litellm": ("", " vllm", " anthropic", " ollama"),
    "pydantic_ai": ("", " responses"),
    "llm": ("", " responses"),
}

Results = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(smollm2_url: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each script prints."""
    try:
        python = python_clients(ROOT / ".cache")
    except ClientsError as error:
        missing(str(error))
    home = {"HOME": str(tmp_path_factory.mktemp("home")), "PYTHONDONTWRITEBYTECODE": "1"}
    found = {}
    for client in CLIENTS:
        script = Path(__file__).parent / "python" / f"{client}_client.py"
        done = subprocess.run(
            [python, script, smollm2_url, SMOLLM2, MINILM],
            capture_output=True, text=True, timeout=200, env=home,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[client] = json.loads(done.stdout)
    return found


def result(results: Results, client: str, feature: str) -> dict[str, Any]:
    """Return what one feature gave; fail with the client's traceback if it raised."""
    found = results[client][feature]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize(
    ("client", "way"), [(client, way) for client, ways in WAYS.items() for way in ways]
)
def test_a_reply(results: Results, client: str, way: str) -> None:
    whole = result(results, client, f"chat{way}")
    streamed = result(results, client, f"stream{way}")
    assert (whole["text"], whole["tokens"]) == (TEXT, TOKENS)
    assert (streamed["text"], streamed["tokens"]) == (TEXT, TOKENS)
    assert streamed["pieces"] > 2


@pytest.mark.parametrize("client", ["litellm", "llm"])
def test_a_tool_is_called(results: Results, client: str) -> None:
    found = result(results, client, "tools")
    assert found["called"] == ["Paris"]
    assert found["text"]


def test_an_output_tool(results: Results) -> None:
    """Agents of pydantic-ai require a call of the tool that returns their output."""
    assert result(results, "pydantic_ai", "tools")["object"] == {"city": "Paris"}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_schema(results: Results, client: str) -> None:
    assert result(results, client, "schema")["object"] == {"city": "Paris"}


@pytest.mark.parametrize("client", CLIENTS)
def test_embeddings(results: Results, client: str) -> None:
    vectors = result(results, client, "embeddings")["vectors"]
    assert [len(vector) for vector in vectors] == [384, 384]
    for vector in vectors:
        assert sum(value**2 for value in vector) == pytest.approx(1, abs=1e-3)


def test_an_unknown_model(results: Results) -> None:
    assert result(results, "litellm", "refusal") == {"status": 404}
