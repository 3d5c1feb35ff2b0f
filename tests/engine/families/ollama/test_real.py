"""SmolLM2 with Ollama's own client."""

from __future__ import annotations

from collections.abc import Iterator

import ollama
import pytest

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from tests.engine.families.ollama.conftest import Stocked, serving

pytestmark = pytest.mark.long

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
CONFIG = EngineConfig(device="cpu", max_num_seqs=2, max_num_batched_tokens=64, kv_cache_bytes=2**27)
OPTIONS = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stocked]:
    root = tmp_path_factory.mktemp("smol") / "store"
    request = PackageRequest(gguf=smollm2_gguf())
    modelpack.package("smol", request, store=LayoutStore(root), link=True)
    with serving(root, CONFIG) as stocked:
        yield stocked


def test_a_round(smol: Stocked) -> None:
    client = smol.client
    shown = client.show("smol")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert 130e6 < shown.modelinfo["general.parameter_count"] < 140e6
    assert shown.template is not None
    assert "<|im_start|>" in shown.template
    assert shown.details is not None
    assert shown.details.family == "llama"
    whole = client.chat("smol", QUESTION, options=OPTIONS)
    assert "Paris" in (whole.message.content or "")
    assert whole.done_reason == "stop"
    lines = list(client.chat("smol", QUESTION, options=OPTIONS, stream=True))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert len(lines) > 3
    first = client.generate("smol", "My name is Ada.", options=OPTIONS)
    second = client.generate("smol", "What is my name?", context=first.context, options=OPTIONS)
    alone = client.generate("smol", "What is my name?", options=OPTIONS)
    assert second.prompt_eval_count == (alone.prompt_eval_count or 0) + len(first.context or ())
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat("smol", QUESTION, options=OPTIONS, format=schema)
    assert (answer.message.content or "").startswith("{")
    with pytest.raises(ollama.ResponseError, match="does not support insert"):
        client.generate("smol", "def f(", suffix="return 1")


def test_a_persona_is_followed(smol: Stocked) -> None:
    smol.client.create("pirate", from_="smol", system="You are a pirate. Talk like one.",
                       parameters=OPTIONS)  # fmt: skip
    asked = [{"role": "user", "content": "What is your name?"}]
    said = smol.client.chat("pirate", asked).message.content or ""
    assert any(word in said for word in ("Aye", "Captain", "sail", "matey", "Ahoy"))
    smol.client.delete("pirate")
