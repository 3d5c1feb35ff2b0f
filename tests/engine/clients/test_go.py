"""go-openai with SmolLM2: one run of the program in `go_openai/`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine.real_server import MINILM, SMOLLM2
from tests.interop.go_tool import build_go_tool
from tests.peers import require

pytestmark = [pytest.mark.peer("go"), pytest.mark.weights, pytest.mark.long]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(smollm2_url: str) -> Results:
    """What the program prints."""
    require("go")
    program = build_go_tool(Path(__file__).parent / "go_openai", ROOT / ".cache")
    done = subprocess.run(
        [program, smollm2_url, SMOLLM2, MINILM], capture_output=True, text=True, timeout=200
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
