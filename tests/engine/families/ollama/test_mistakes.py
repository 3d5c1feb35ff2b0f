"""Mistakes of other servers with this API: missing counts and fields, lost errors, evictions."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest
import requests

from modelpack_engine.outputs import FinishReason
from tests.engine.families.ollama.conftest import Stocked
from tests.engine.families.served import CALLER, PLAIN, Served

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip


def post(url: str, path: str, **body: Any) -> requests.Response:
    return requests.post(f"{url}/api/{path}", json=body, timeout=60)


def lines(response: requests.Response) -> list[Any]:
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize(
    ("path", "body"),
    [("generate", {"prompt": "a"}), ("chat", {"messages": [{"role": "user", "content": "a"}]})],
)
def test_the_last_line_has_counts_durations_and_a_reason(
    stocked: Stocked, path: str, body: dict[str, Any]
) -> None:
    given = {"model": "tiny", "options": {"num_predict": 3, "temperature": 0}} | body
    last = lines(post(stocked.url, path, **given))[-1]
    whole = post(stocked.url, path, **given, stream=False).json()
    for found in (last, whole):
        assert found["done_reason"] == "length"
        assert (found["eval_count"], found["prompt_eval_count"]) == (3, len("user: a\nassistant:"))
        for name in ("total", "prompt_eval", "eval"):
            assert isinstance(found[f"{name}_duration"], int)
            assert found[f"{name}_duration"] > 0
        parts = found["load_duration"] + found["prompt_eval_duration"] + found["eval_duration"]
        assert parts <= found["total_duration"] * 1.001


def test_tags_have_sizes_and_formats_and_the_version_is_recent(stocked: Stocked) -> None:
    models = requests.get(f"{stocked.url}/api/tags", timeout=30).json()["models"]
    assert all(model["size"] > 0 for model in models)
    assert {model["details"]["format"] for model in models} == {"gguf", "safetensors"}
    assert requests.get(f"{stocked.url}/api/version", timeout=30).json()["version"] != "0.1.0"


def test_show_has_model_info(stocked: Stocked) -> None:
    for name in ("tiny", "vectors", "weights"):
        assert post(stocked.url, "show", model=name).json()["model_info"]
        assert stocked.client.show(name).modelinfo


def test_an_empty_prompt_loads(stocked: Stocked) -> None:
    stocked.client.generate("tiny", keep_alive=0)
    assert post(stocked.url, "generate", model="tiny", prompt="").json()["done_reason"] == "load"
    assert [model.model for model in stocked.client.ps().models].count("tiny:latest") == 1


def test_fields_of_generate_count(served: Served) -> None:
    name = served.says(PLAIN, "x")
    engine = served.engines[PLAIN]
    post(served.url, "generate", model=name, prompt="a", system="be brief")
    assert "be brief" in engine.prompt
    post(served.url, "generate", model=name, prompt="a", raw=True)
    assert engine.prompt == "a"
    post(served.url, "generate", model=name, prompt="a", template="{{ messages[-1].content }}!")
    assert engine.prompt == "a!"
    post(served.url, "generate", model=name, prompt="a", format="json")
    assert engine.params.mask is not None
    for field in ({"suffix": "b"}, {"images": ["aGk="]}, {"think": "high"}):
        refused = post(served.url, "generate", model=name, prompt="a", **field)
        assert refused.status_code == 400
        assert refused.json()["error"]


def test_the_routes_are_there(stocked: Stocked) -> None:
    for path in ("embed", "embeddings", "copy", "create", "push"):
        assert post(stocked.url, path).status_code == 400  # the body is missing, the route exists
    url = f"{stocked.url}/api/blobs/sha256:{'0' * 64}"
    assert requests.post(url, data=b"x", timeout=30).status_code == 400
    gone = requests.delete(f"{stocked.url}/api/delete", json={"model": "gone"}, timeout=30)
    assert gone.status_code == 404


def test_errors_and_calls_of_a_stream_arrive_whole(served: Served) -> None:
    served.says(CALLER, *CALL)
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}
    found = lines(post(served.url, "chat", model=CALLER, **body))
    calls = [call for line in found for call in line["message"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "weather", "arguments": {"city": "Paris"}}
    ]
    refused = post(served.url, "chat", model=CALLER, **body, options={"temperature": "hot"})
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]
    served.says(CALLER, "a", ends=FinishReason.ERROR)
    assert lines(post(served.url, "chat", model=CALLER, **body))[-1] == {
        "error": "the request failed"
    }


def test_fields_of_a_request_evict_nothing(stocked: Stocked) -> None:
    stocked.client.generate("tiny", keep_alive=1000)

    def loaded() -> Any:
        running = requests.get(f"{stocked.url}/pool", timeout=30).json()["models"]
        return next((m["keep_alive"], m["context_size"]) for m in running if m["name"] == "tiny")

    before = loaded()
    options = {"num_ctx": 20, "num_predict": 1}
    stocked.client.generate("tiny", "x" * 100, options=options, think=False)
    assert loaded() == before
    with pytest.raises(ollama.ResponseError):
        stocked.client.generate("tiny", "a", options=options, keep_alive="soon")
    assert loaded() == before
    stocked.client.generate("tiny", keep_alive=0)
