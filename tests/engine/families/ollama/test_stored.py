"""Models in a real store: list, show, load, unload, copy, delete, embed."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ollama
import pytest
import requests

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.builder.request import PackageRequest
from modelpack.errors import AuthError, DeniedError
from modelpack.operations.remote import RemoteOptions
from modelpack.trust.policy import Rule, Trust
from modelpack_server.api.errors import problem_of
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.families.ollama.conftest import Stocked
from tests.engine.families.test_fields import nulls
from tests.engine.serving.tiny import CONTEXT
from tests.models import FIXTURES

pytestmark = pytest.mark.long

GREEDY = {"num_predict": 4, "temperature": 0}


def loaded(stocked: Stocked) -> list[str | None]:
    return [model.model for model in stocked.client.ps().models]


def engines(stocked: Stocked) -> Any:
    return requests.get(f"{stocked.url}/pool", timeout=30).json()["models"]


def test_no_validation_error(stocked: Stocked) -> None:
    client = stocked.client
    lines = list(client.chat("tiny", [{"role": "user", "content": "a"}], stream=True,
                             options=GREEDY))  # fmt: skip
    last = lines[-1]
    assert isinstance(last.total_duration, int)
    assert last.total_duration > 0
    assert (last.eval_count, last.done_reason) == (4, "length")
    assert client.generate("tiny", "a", options=GREEDY).eval_count == 4
    assert len(client.embed("vectors", ["w4 w5", "w6"]).embeddings) == 2
    assert client.show("tiny").modelinfo
    assert "tiny:latest" in loaded(stocked)
    assert {model.model for model in client.list().models} >= {"tiny:latest", "vectors:latest"}

    async def run() -> None:
        async with ollama.AsyncClient(stocked.url) as other:
            assert (await other.generate("tiny", "a", options=GREEDY)).done
            assert len((await other.embed("vectors", "w4")).embeddings) == 1
            assert (await other.show("tiny")).details
            assert (await other.ps()).models
            assert (await other.list()).models
            stream = await other.chat(
                "tiny", [{"role": "user", "content": "a"}], stream=True, options=GREEDY
            )
            assert [line.done async for line in stream][-1] is True

    asyncio.run(run())


def test_load_and_unload(stocked: Stocked) -> None:
    client = stocked.client
    answer = requests.post(f"{stocked.url}/api/generate", json={"model": "tiny"}, timeout=60)
    assert (answer.json()["done"], answer.json()["done_reason"]) == (True, "load")
    assert answer.json()["response"] == ""
    assert "tiny:latest" in loaded(stocked)
    assert "tiny" in [model["name"] for model in engines(stocked)]
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert "tiny:latest" not in loaded(stocked)
    assert client.chat("tiny", []).done_reason == "load"
    assert "tiny:latest" in loaded(stocked)
    assert client.chat("tiny", [], keep_alive=0).done_reason == "unload"
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert "tiny:latest" not in loaded(stocked)


def test_an_answer_that_is_to_be_the_last(stocked: Stocked) -> None:
    stocked.client.generate("tiny", "a", options=GREEDY, keep_alive=0)
    assert "tiny" not in [m["name"] for m in engines(stocked) if m["state"] == "ready"]


def test_how_long_models_stay(stocked: Stocked) -> None:
    client = stocked.client
    for keep_alive, seconds in (("10m", 600), (30, 30), ("1h30m", 5400)):
        client.generate("tiny", keep_alive=keep_alive)
        [model] = [model for model in client.ps().models if model.model == "tiny:latest"]
        assert model.expires_at is not None
        left = (model.expires_at - datetime.now(UTC)).total_seconds()
        assert seconds - 20 < left <= seconds
    client.generate("tiny", keep_alive=-1)
    [model] = [model for model in client.ps().models if model.model == "tiny:latest"]
    assert model.expires_at is not None
    assert model.expires_at - datetime.now(UTC) > timedelta(days=36500)
    assert model.size is not None
    assert model.size > 2**18
    assert (model.size_vram, model.context_length) == (0, CONTEXT)
    assert model.name == "tiny:latest"
    assert model.details is not None
    client.generate("tiny", keep_alive=0)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 10**30}, {"seed": 10**30}, {"num_predict": 10**30}, {"num_ctx": 10**30},
        {"temperature": 1e300}, {"temperature": 1e-300}, {"repeat_penalty": 1e300},
        {"min_p": 1}, {"top_p": 1e-300}, {"presence_penalty": -2, "frequency_penalty": 2},
    ],
    ids=str,
)  # fmt: skip
def test_extreme_numbers(stocked: Stocked, options: dict[str, Any]) -> None:
    given = {"model": "tiny", "prompt": "a", "options": {"num_predict": 2} | options}
    answer = requests.post(
        f"{stocked.url}/api/generate",
        json=given | {"stream": False, "keep_alive": 1e300},
        timeout=60,
    )
    assert answer.status_code in (200, 400), answer.text
    assert requests.get(f"{stocked.url}/api/ps", timeout=30).status_code == 200
    assert stocked.client.generate("tiny", "a", options=GREEDY).done


def test_what_is_listed(stocked: Stocked) -> None:
    models = {model.model: model for model in stocked.client.list().models}
    tiny = models["tiny:latest"]
    assert tiny.size is not None
    assert tiny.size > 100_000
    assert tiny.digest is not None
    assert len(tiny.digest) == 64
    assert tiny.details is not None
    assert tiny.details.format == "safetensors"
    assert models["weights:latest"].details is not None
    assert models["weights:latest"].details.format == "gguf"
    assert models["weights:latest"].details.quantization_level == "F32"
    assert tiny.modified_at is not None
    assert abs((datetime.now(UTC) - tiny.modified_at).total_seconds()) < 3600
    raw = requests.get(f"{stocked.url}/api/tags", timeout=30).json()["models"]
    assert all(model["name"] == model["model"] for model in raw)
    assert requests.head(f"{stocked.url}/api/tags", timeout=30).status_code == 200


def test_what_is_shown(stocked: Stocked) -> None:
    shown = stocked.client.show("tiny")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == CONTEXT
    assert shown.modelinfo["llama.embedding_length"] == 64
    assert shown.template is not None
    assert shown.template.startswith("{% for m in messages %}")
    assert shown.capabilities == ["completion"]
    assert shown.modelfile is not None
    assert shown.modelfile.startswith("FROM tiny")
    assert shown.parameters == "temperature                    0.0"
    vectors = stocked.client.show("vectors")
    assert (vectors.capabilities, vectors.parameters) == (["embedding"], "")
    gguf = stocked.client.show("weights:latest")
    assert gguf.modelinfo is not None
    assert gguf.modelinfo["general.architecture"]
    assert gguf.modelinfo["general.parameter_count"] > 0
    assert gguf.parameters == "temperature                    0.7"
    old = requests.post(
        f"{stocked.url}/api/show", json={"name": "weights", "verbose": True}, timeout=30
    )
    assert old.json()["tensors"]


def test_openai_s_list_says_what_a_model_can_do(stocked: Stocked) -> None:
    listed = requests.get(f"{stocked.url}/v1/models", timeout=30).json()["data"]
    found = {card["id"]: card["capabilities"] for card in listed}
    assert (found["tiny"], found["vectors"]) == (["completion"], ["embedding"])
    one = requests.get(f"{stocked.url}/v1/models/vectors", timeout=30).json()
    assert one["capabilities"] == ["embedding"]


def test_what_a_chat_template_can_do_is_listed(stocked: Stocked, tmp_path: Path) -> None:
    """`/v1/models` and `/api/show` agree. With a policy no file is opened: the config decides."""
    template = (
        "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}{{ messages }}<think></think>"
    )
    (tmp_path / "t.jinja").write_text(template)
    path = FIXTURES / "models/tiny-gguf/tiny.gguf"
    request = PackageRequest(gguf=path, chat_template=tmp_path / "t.jinja", format="cncf")
    modelpack.package("thinker", request, store=stocked.store)
    card = requests.get(f"{stocked.url}/v1/models/thinker", timeout=30).json()
    assert card["capabilities"] == ["completion", "tools", "reasoning"]
    shown = stocked.client.show("thinker").capabilities
    assert shown is not None
    assert {"completion", "tools", "thinking"} <= set(shown)
    rules = RemoteOptions(trust=Trust(((Rule(("*",), (), 0),),)))
    found = StoreCatalogue(stocked.store, remote=rules).find("thinker")
    assert found.templated == ("tools", "reasoning")
    stocked.client.delete("thinker")


def test_what_is_shown_of_a_model_that_cannot_be_loaded(stocked: Stocked) -> None:
    path = FIXTURES / "models" / "tiny-dduf" / "tiny.dduf"
    modelpack.package("images", PackageRequest(dduf=path), store=stocked.store)
    shown = stocked.client.show("images")
    assert shown.modelinfo
    assert (shown.capabilities, shown.template) == ([], "")
    assert shown.details is not None
    assert shown.details.format == "dduf"
    answer = requests.post(
        f"{stocked.url}/v1/chat/completions",
        json={"model": "images", "messages": [{"role": "user", "content": "a cat"}]},
        timeout=60,
    )
    assert answer.status_code == 500
    assert "a model that generates images, which is not supported" in answer.text
    assert "open the DDUF file with diffusers" in answer.text
    stocked.client.delete("images")


def test_vectors(stocked: Stocked) -> None:
    client = stocked.client
    answer = client.embed("vectors", ["w4 w5 w6", "w7"])
    for vector in answer.embeddings:
        assert math.isclose(sum(x * x for x in vector), 1.0, rel_tol=1e-5)
    assert answer.prompt_eval_count == 5 + 3  # each between [CLS] and [SEP]
    assert answer.total_duration
    short = client.embed("vectors", "w4 w5 w6", dimensions=8).embeddings
    assert [len(vector) for vector in short] == [8]
    old = client.embeddings("vectors", "w4 w5 w6").embedding
    length = math.sqrt(sum(x * x for x in old))
    same = [x / length for x in old]
    assert same == pytest.approx(answer.embeddings[0], abs=1e-5)
    long = " ".join(["w9"] * 500)
    assert client.embed("vectors", long).prompt_eval_count == 160
    with pytest.raises(ollama.ResponseError, match="502 tokens"):
        client.embed("vectors", long, truncate=False)
    assert client.embed("vectors", "").embeddings == []
    assert client.embeddings("vectors", "").embedding == []
    with pytest.raises(ollama.ResponseError, match="not an embedding model") as caught:
        client.embed("tiny", "a")
    assert caught.value.status_code == 400


def test_copy_and_delete(stocked: Stocked) -> None:
    client = stocked.client
    assert client.copy("tiny", "team/other:v2").status == "success"
    assert "team/other:v2" in {model.model for model in client.list().models}
    answer = client.generate("team/other:v2", "a", options=GREEDY)
    assert answer.response == client.generate("tiny", "a", options=GREEDY).response
    assert client.delete("team/other:v2").status == "success"
    assert "team/other:v2" not in {model.model for model in client.list().models}
    for call in (lambda: client.copy("nope", "x"), lambda: client.delete("team/other:v2")):
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            call()
        assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="name component is empty") as caught:
        client.copy("tiny", "a//b")
    assert caught.value.status_code == 400


def test_an_id_with_several_names_is_not_deleted(stocked: Stocked) -> None:
    client = stocked.client
    client.copy("tiny", "twin")
    digest = str(stocked.store.resolve(str(Reference.parse("tiny"))).digest)
    with pytest.raises(ollama.ResponseError, match="twin") as caught:
        client.delete(digest)
    assert caught.value.status_code == 409
    client.delete("twin")


def test_what_a_registry_refuses_has_its_status() -> None:
    assert problem_of(AuthError("who are you?")).status == 401
    denied = problem_of(DeniedError("not you"))
    assert denied.status == 403
    assert denied.body()["error"]["type"] == "permission_error", "as the gateway's refusals"


def test_deleting_the_last_name_unloads_the_model(stocked: Stocked) -> None:
    client = stocked.client
    client.create("gone", from_="tiny", system="bye")
    client.generate("gone")
    assert "gone:latest" in loaded(stocked)
    client.delete("gone")
    assert "gone:latest" not in loaded(stocked)
    with pytest.raises(ollama.ResponseError, match="'gone' not found"):
        client.generate("gone", "a")


def test_num_ctx_makes_room_and_takes_none(stocked: Stocked) -> None:
    client = stocked.client

    def window() -> int | None:
        return next(m.context_length for m in client.ps().models if m.model == "small:latest")

    client.generate("small")
    assert window() == 100
    client.generate("small", "a", options=GREEDY | {"num_ctx": 50})
    assert window() == 100
    with pytest.raises(ollama.ResponseError, match="100"):
        client.generate("small", "x" * 150, options=GREEDY)
    client.generate("small", "x" * 150, options=GREEDY | {"num_ctx": 200})
    assert window() == 200
    client.generate("small", "a", options=GREEDY | {"num_ctx": 100_000})
    assert window() == CONTEXT
    assert client.generate("small", "x" * 150, options=GREEDY).done
    client.generate("small", keep_alive=0)


def test_tokens_that_are_none(stocked: Stocked) -> None:
    with pytest.raises(ollama.ResponseError, match="99999") as caught:
        stocked.client.generate("tiny", "a", context=[99999])
    assert caught.value.status_code == 400


def test_names_mean_the_latest_tag(stocked: Stocked) -> None:
    digest = stocked.store.resolve(str(Reference.parse("tiny"))).digest
    for name in ("tiny", "tiny:latest", "ai/tiny", "docker.io/ai/tiny:latest", str(digest)):
        assert stocked.client.show(name).details is not None


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/api/tags", None, ollama.ListResponse),
        ("/api/show", {"model": "tiny"}, ollama.ShowResponse),
        ("/api/show", {"model": "weights", "verbose": True}, ollama.ShowResponse),
        ("/api/embed", {"model": "vectors", "input": "hello"}, ollama.EmbedResponse),
    ],
)
def test_responses_have_ollamas_fields(stocked: Stocked, path: str, body: Any, kind: Any) -> None:
    reply = requests.request("POST" if body else "GET", stocked.url + path, json=body, timeout=60)
    kind.model_validate(reply.json())
    assert set(nulls(reply.json())) <= {"families"}
