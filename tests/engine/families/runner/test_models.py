"""/models: list, look up, tag, remove and repackage models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_server.api.model_runner.names import tag_shown
from tests.engine.families.runner.conftest import Runner

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def only_id(runner: Runner) -> str:
    [model] = runner.http.get("/models").json()
    found: str = model["id"]
    return found


def test_the_list_has_what_the_command_line_shows(runner: Runner) -> None:
    [model] = runner.http.get("/models").json()
    assert set(model) == {"id", "tags", "created", "config"}
    assert DIGEST.fullmatch(model["id"])
    assert model["tags"] == ["ai/tiny:latest"]
    assert model["created"] == 1735787045
    assert model["config"]["format"] == "gguf"
    assert set(model["config"]) <= {
        "format", "quantization", "parameters", "architecture", "size", "gguf", "context_size",
    }  # fmt: skip
    runner.store.remove("tiny")
    assert runner.http.get("/models").json() == []


def test_a_cncf_config_has_the_same_shape(runner: Runner, gguf: Path) -> None:
    request = modelpack.PackageRequest(gguf=gguf, format="cncf")
    modelpack.package("team/other:v2", request, store=runner.store)
    found = runner.http.get("/models/team/other:v2").json()
    assert found["tags"] == ["team/other:v2"]
    assert found["config"]["format"] == "gguf"


@pytest.mark.parametrize(
    "name",
    ["tiny", "ai/tiny", "ai/tiny:latest", "AI/Tiny:latest", "docker.io/ai/tiny", "", "short"],
)
def test_a_model_by_all_its_names(shared: Runner, name: str) -> None:
    digest = only_id(shared)
    name = {"": digest, "short": digest[7:19]}.get(name, name)
    assert shared.http.get(f"/models/{name}").json()["id"] == digest


def test_the_last_part_of_a_name_is_enough(runner: Runner) -> None:
    runner.store.tag("tiny", Reference.parse("reg.example:5000/team/lonely:v3"))
    for name in ("lonely", "reg.example:5000/team/lonely:v3"):
        assert runner.http.get(f"/models/{name}").status_code == 200
    tagged = runner.http.post("/models/lonely/tag?repo=ai/again&tag=v1")
    assert tagged.status_code == 201
    removed = runner.http.delete("/models/lonely").json()
    assert removed == [{"Untagged": "reg.example:5000/team/lonely:v3"}]


@pytest.mark.parametrize("name", ["other", "a b", "ai/tiny:v2", "x/../y", "sha256:12", "b" * 300])
def test_a_model_that_is_none_is_a_line_of_text(shared: Runner, name: str) -> None:
    for method, path in (("GET", ""), ("GET", "/export"), ("DELETE", "")):
        response = shared.http.request(method, f"/models/{name}{path}")
        assert (response.status_code, response.headers["content-type"]) == (
            404, "text/plain; charset=utf-8",
        )  # fmt: skip
        assert response.text.startswith("Model not found: ")
        assert response.text.endswith("\n")


def test_what_a_registry_has_has_no_tags(runner: Runner, gguf: Path) -> None:
    with registry() as server:
        name = f"{server.host}/team/far:v1"
        modelpack.package(name, modelpack.PackageRequest(gguf=gguf), store=runner.store, push=True)
        runner.store.remove(name)
        for flag in ("remote=true", "remote=1", "remote"):
            found = runner.http.get(f"/models/{name}?{flag}").json()
            assert set(found) == {"id", "created", "config"}
        assert runner.http.get(f"/models/{name}?remote=false").status_code == 404
        other = runner.http.get(f"/models/{server.host}/team/none:v1?remote=true")
        assert other.status_code == 404


def test_tagging(runner: Runner) -> None:
    response = runner.http.post("/models/tiny/tag?repo=docker.io/team/x&tag=v1")
    assert response.status_code == 201
    assert response.json() == {
        "message": 'Model tagged successfully with "docker.io/team/x:v1"',
        "target": "docker.io/team/x:v1",
    }
    by_id = runner.http.post(f"/models/{only_id(runner)}/tag", params={"repo": "y", "tag": "v2"})
    assert by_id.status_code == 201
    [model] = runner.http.get("/models").json()
    assert sorted(model["tags"]) == ["ai/tiny:latest", "ai/y:v2", "team/x:v1"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("tiny/tag?repo=a", 400),
        ("tiny/tag?tag=a", 400),
        ("tiny/tag?repo=a%20b&tag=v1", 400),
        ("tiny/tag?repo=a&tag=a%20b", 400),
        ("none/tag?repo=a&tag=v1", 404),
        ("tiny/polish", 404),
        ("tiny", 404),
    ],
)
def test_actions_that_are_refused(shared: Runner, path: str, status: int) -> None:
    response = shared.http.post(f"/models/{path}")
    assert response.status_code == status
    assert response.headers["content-type"].startswith("text/plain")


def test_removing_names_then_the_model(runner: Runner) -> None:
    digest = only_id(runner)
    runner.store.tag("tiny", Reference.parse("team/x:v1"))
    conflict = runner.http.delete(f"/models/{digest}")
    assert conflict.status_code == 409
    assert "several names" in conflict.text
    assert runner.http.delete("/models/tiny?force=false").json() == [{"Untagged": "ai/tiny:latest"}]
    assert runner.http.delete("/models/team/x:v1").json() == [
        {"Untagged": "team/x:v1"},
        {"Deleted": digest},
    ]
    assert runner.http.get("/models").json() == []


@pytest.mark.parametrize("force", ["force=true", "force"])
def test_force_removes_all_names(runner: Runner, force: str) -> None:
    digest = only_id(runner)
    runner.store.tag("tiny", Reference.parse("team/x:v1"))
    removed = runner.http.delete(f"/models/{digest}?{force}").json()
    assert removed == [
        {"Untagged": "ai/tiny:latest"}, {"Untagged": "team/x:v1"}, {"Deleted": digest},
    ]  # fmt: skip


def test_a_model_that_is_removed_is_unloaded_first(runner: Runner) -> None:
    runner.chat()
    assert len(runner.pool.running()) == 1
    runner.http.delete("/models/tiny")
    assert runner.pool.running() == []


def test_purging(runner: Runner, gguf: Path) -> None:
    modelpack.package("team/other", modelpack.PackageRequest(gguf=gguf, context_size=9),
                      store=runner.store)  # fmt: skip
    runner.store.tag("tiny", Reference.parse("team/x:v1"))
    runner.chat()
    response = runner.http.delete("/models/purge")
    assert (response.status_code, response.content) == (200, b"")
    assert runner.http.get("/models").json() == []
    assert runner.pool.running() == []
    assert list((runner.store.root / "blobs" / "sha256").iterdir()) == []


def test_repackaging(runner: Runner) -> None:
    body = {"target": "team/small:v1", "context_size": 512}
    response = runner.http.post("/models/tiny/repackage", json=body)
    assert response.status_code == 201
    assert response.json() == {
        "message": 'Model repackaged successfully as "team/small:v1"',
        "source": "tiny",
        "target": "team/small:v1",
    }
    assert runner.http.get("/models/team/small:v1").json()["config"]["context_size"] == 512
    for path, wrong, status in (
        ("tiny", {}, 400),
        ("tiny", {"target": "x", "context_size": "many"}, 400),
        ("tiny", {"target": "a b"}, 400),
        ("none", body, 404),
    ):
        assert runner.http.post(f"/models/{path}/repackage", json=wrong).status_code == status


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("smollm2", "ai/smollm2:latest"),
        ("team/x:v1", "team/x:v1"),
        ("docker.io/a/b/c:v1", "a/b/c:v1"),
        ("docker.io/my.org/x:v1", "docker.io/my.org/x:v1"),
        ("localhost:5000/x:v1", "localhost:5000/x:v1"),
        ("hf.co/org/x:Q4", "huggingface.co/org/x:Q4"),
    ],
)
def test_tags_are_shown_without_dockers_registry(reference: str, shown: str) -> None:
    assert tag_shown(Reference.parse(reference)) == shown


def test_the_prefix_of_dockers_socket(shared: Runner) -> None:
    for prefix in ("/exp/vDD4.40", "/exp/vDD5.1"):
        assert shared.http.get(f"{prefix}/models/ai/tiny:latest").status_code == 200
        assert shared.http.get(f"{prefix}/engines/v1/models").json()["object"] == "list"
    assert shared.http.get("/exp/other/models").status_code == 404


def test_the_store_is_the_pools(runner: Runner, tmp_path: Path) -> None:
    assert LayoutStore(tmp_path / "store").get("tiny").digest
    assert runner.http.get("/openai.json").status_code == 404


def test_the_document_describes_bodies_and_errors(shared: Runner) -> None:
    document = shared.http.get("/openapi.json").json()
    paths = document["paths"]
    assert {"/models", "/models/create", "/models/{ref}", "/engines/_configure"} <= set(paths)
    body = paths["/engines/_configure"]["post"]["requestBody"]["content"]["application/json"]
    assert "gpu-memory-utilization" in str(body["schema"]["properties"]["vllm"])
    refused = paths["/models/{ref}/tag"]["post"]["responses"]["400"]["content"]
    assert set(refused) == {"text/plain"}
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named <= set(document["components"]["schemas"])
    assert "#/$defs" not in json.dumps(document)
