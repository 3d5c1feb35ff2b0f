"""go-openai, async-openai (Rust) and LangChain4j (Java) with SmolLM2.

Each is one program that asks for everything; the tests read its results.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine.clients.installed import ClientsError, java_client, rust_client
from tests.engine.real_server import MINILM, SMOLLM2
from tests.interop.go_tool import build_go_tool
from tests.peers import missing, require

pytestmark = [pytest.mark.weights, pytest.mark.long]

Results = dict[str, dict[str, Any]]


def go_openai() -> list[str | Path]:
    """Return the command that runs go-openai."""
    require("go")
    return [build_go_tool(Path(__file__).parent / "go_openai", ROOT / ".cache")]


def async_openai() -> list[str | Path]:
    """Return the command that runs async-openai."""
    return [rust_client(ROOT / ".cache")]


def langchain4j() -> list[str | Path]:
    """Return the command that runs LangChain4j, with a limit on its memory."""
    java, directory = require("java"), java_client(ROOT / ".cache")
    return [java, "-Xmx256m", "-cp", f"{directory}:{directory}/*", "Client"]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(go_openai, marks=pytest.mark.peer("go")),
        pytest.param(async_openai, marks=pytest.mark.peer("cargo")),
        pytest.param(langchain4j, marks=pytest.mark.peer("java")),
    ],
    ids=lambda client: client.__name__,
)
def results(request: pytest.FixtureRequest, smollm2_url: str) -> Results:
    """What a program prints."""
    make: Callable[[], list[str | Path]] = request.param
    try:
        command = make()
    except ClientsError as error:
        missing(str(error))
    done = subprocess.run(
        [*command, smollm2_url, SMOLLM2, MINILM], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: Results = json.loads(done.stdout)
    return found


def result(results: Results, feature: str) -> dict[str, Any]:
    """Return what one feature gave; fail with the client's error if it returned one."""
    assert "error" not in results[feature], results[feature]["error"]
    return results[feature]


@pytest.mark.parametrize("feature", ["chat", "stream"])
def test_a_reply(results: Results, feature: str) -> None:
    found = result(results, feature)
    assert found["text"] == "The capital of France is Paris."
    assert (found["finish"], found["tokens"]) == ("stop", [37, 8])
    assert found.get("pieces", 8) > 2


def test_a_tool_is_called(results: Results) -> None:
    found = result(results, "tools")
    assert found["called"] == ["Paris"]
    assert found["text"]


def test_a_schema(results: Results) -> None:
    assert result(results, "schema")["object"] == {"city": "Paris"}


def test_embeddings(results: Results) -> None:
    """As numbers, and as base64 that the client decodes."""
    found = result(results, "embeddings")
    assert found["lengths"] == [384, 384]
    numbers, decoded = found["vectors"]
    assert decoded == pytest.approx(numbers, abs=1e-6)


def test_an_unknown_model(results: Results) -> None:
    assert result(results, "refusal") == {"status": 404, "code": "model_not_found"}
