"""Drafters: packaged as referrers of their model, found by it, and refused by name."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.errors import ModelpackError, NotFoundError
from modelpack.operations import drafters
from modelpack.operations.drafters import package_drafter, stored_drafters
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, LoadCancelledError, ModelLoadError
from modelpack_engine.models import load
from modelpack_engine.request import SamplingParams
from modelpack_server import stored_models
from modelpack_server.api.app import create_app
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import open_model, with_drafter
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.engine.serving.tiny import reference_tokens, write_tiny
from tests.engine.speculation.test_eagle import PUBLISHED, proposer_of, without, write_head

CONFIG = EngineConfig(
    device="cpu", backend="mlx", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False
)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    directory = tmp_path / "head"
    directory.mkdir()
    write_head(directory)
    return directory


@pytest.fixture
def store(tmp_path: Path) -> LayoutStore:
    made = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    modelpack.package("ai/tiny", PackageRequest(safetensors_dir=files), store=made)
    return made


def test_the_engine_finds_the_drafter_of_its_model(store: LayoutStore, head: Path) -> None:
    opened = open_model("ai/tiny", pull=False, store=store)
    assert with_drafter(CONFIG, opened.model, store, None) == CONFIG
    made = package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    assert made.manifest.artifact_type == media_types.DRAFTER
    assert made.manifest.subject is not None
    assert made.manifest.subject.digest == opened.model.digest
    assert made.manifest.annotations[media_types.BASE_DIGEST] == str(opened.model.digest)
    assert stored_drafters(opened.model.digest, store) == [made.digest]
    engine = opened.engine(CONFIG)
    assert isinstance(engine, Engine)
    assert proposer_of(engine).head
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    [events] = engine.generate([[1, 2, 3]], params)
    assert [t for event in events for t in event.token_ids] == reference_tokens([1, 2, 3], 12)
    assert engine.stats().num_proposals > 0
    chosen = {
        "none": replace(CONFIG, speculative_method="none"),
        "ngram": replace(CONFIG, speculative_method="ngram"),
        "CPU kernels": replace(CONFIG, backend="auto"),
    }
    for config in chosen.values():
        assert with_drafter(config, opened.model, store, None) == config
    wanted = with_drafter(replace(chosen["CPU kernels"], speculative_method="eagle3"),
                          opened.model, store, None)  # fmt: skip
    assert wanted.draft_model == str(made.digest)


def test_the_server_finds_it_and_lists_no_drafter_as_a_model(
    store: LayoutStore, head: Path
) -> None:
    package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    catalogue = StoreCatalogue(store, CONFIG)
    [model] = catalogue.stored()
    assert model.purpose == "generation"
    drafter = catalogue.find("ai/tiny:eagle")
    with pytest.raises(NotFoundError, match="is a drafter, which cannot run without its base"):
        catalogue.needs(drafter, ModelSettings())
    plain = ModelSettings(engine={"speculative_method": "none"})
    model = catalogue.find("ai/tiny")
    assert catalogue.needs(model, ModelSettings()) > catalogue.needs(model, plain)
    with pytest.raises(ModelLoadError, match=r"is a drafter \(eagle3\), which cannot run"):
        open_model("ai/tiny:eagle", pull=False, store=store).engine(CONFIG)


# Heads that the engine rejects once its model is loaded, by the tensors and by the model.
MISFITS: dict[str, tuple[dict[str, Any], Any]] = {
    "fc": ({}, {**without(""), "fc.weight": mx.zeros((64, 96))}),
    "hidden size": ({"target_hidden_size": 32}, {**without(""), "fc.weight": mx.zeros((64, 96))}),
    "vocabulary": ({"vocab_size": 300}, None),
}


def attach_misfit(
    store: LayoutStore, head: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> Digest:
    """Package a head that does not fit the model, as another client may."""
    config, tensors = MISFITS[kind]
    write_head(head, {**PUBLISHED, **config}, tensors)
    with monkeypatch.context() as patched:
        patched.setattr(drafters, "check_drafter", lambda *_: "eagle3")
        return package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store).digest


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("served", [False, True])
def test_a_model_runs_without_a_drafter_that_does_not_load(
    store: LayoutStore, head: Path, kind: str, served: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Only if the drafter was found: one that the user asks for is an error."""
    made = attach_misfit(store, head, kind, monkeypatch)
    catalogue = StoreCatalogue(store, CONFIG)
    found, opened = catalogue.find("ai/tiny"), open_model("ai/tiny", pull=False, store=store)
    models: list[weakref.ref[Any]] = []

    def loaded(*given: Any, **options: Any) -> Any:
        assert not any(model() for model in models), "a failed load still has its weights"
        result = load(*given, **options)
        models.append(weakref.ref(result.model))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(stored_models, "load", loaded)
        if served:
            catalogue.load(found, ModelSettings(), Meter(), None).engine.close()
        else:
            engine = opened.engine(CONFIG)
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            [events] = engine.generate([[1, 2, 3]], params)
            assert [t for event in events for t in event.token_ids] == reference_tokens(
                [1, 2, 3], 4
            )
            assert engine.stats().num_proposals == 0
    assert len(models) == 2
    [warning] = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warning.startswith(f"the drafter {made} is not used: ")
    for asked in ({"speculative_method": "eagle3"}, {"draft_model": str(made)}):
        with pytest.raises(EngineError):
            catalogue.load(found, ModelSettings(engine=asked), Meter(), None)
        with pytest.raises(EngineError):
            opened.engine(replace(CONFIG, **asked))  # type: ignore[arg-type]


def test_a_drafter_that_has_no_room_is_left_out(store: LayoutStore, head: Path) -> None:
    package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    catalogue, drafts = StoreCatalogue(store, CONFIG), ModelSettings()
    model = catalogue.find("ai/tiny")
    both = catalogue.needs(model, drafts)
    alone = catalogue.needs(model, ModelSettings(engine={"speculative_method": "none"}))
    asked = ModelSettings(engine={"speculative_method": "eagle3"})
    for settings, limit, expected in (
        (drafts, both, both), (drafts, both - 1, alone), (drafts, 1, alone), (asked, 1, both),
    ):  # fmt: skip
        assert catalogue.needs(model, settings, limit) == expected
    for room in (both, both - 1):
        engine = catalogue.load(model, drafts, Meter(), room).engine
        try:
            assert isinstance(engine, AsyncEngine)
            assert isinstance(engine._model, Engine)
            assert (engine._model._speculator is not None) == (room == both)
        finally:
            engine.close()


@pytest.mark.parametrize("method", [None, "eagle3"])
def test_a_server_with_memory_for_the_model_alone(
    store: LayoutStore, head: Path, method: str | None
) -> None:
    package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    catalogue = StoreCatalogue(store, CONFIG)
    both = catalogue.needs(catalogue.find("ai/tiny"), ModelSettings())
    settings = ModelSettings(engine={"speculative_method": method} if method else {})
    pool = ModelPool(catalogue, settings=settings, memory=both - 1, grace=0.0)
    body = {"model": "ai/tiny", "prompt": [1, 2, 3], "max_tokens": 2}
    with TestClient(create_app(pool)) as http:
        reply = http.post("/v1/completions", json=body)
    assert (reply.status_code == 200) == (method is None), reply.text


def test_a_drafter_without_a_readable_config(
    store: LayoutStore, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be sized either."""
    with monkeypatch.context() as patched:
        patched.setattr(drafters, "check_drafter", lambda *_: "eagle3")
        patched.setattr(drafters, "_config", lambda _: {})
        (head / "config.json").write_text("[" * 5000)
        package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    catalogue = StoreCatalogue(store, CONFIG)
    model = catalogue.find("ai/tiny")
    assert catalogue.needs(model, ModelSettings()) > 0
    catalogue.load(model, ModelSettings(), Meter(), None).engine.close()


def test_a_failure_of_the_model_is_not_blamed_on_its_drafter(
    store: LayoutStore, head: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    tried: list[ModelLoadError] = []

    def failing(*_: Any, **__: Any) -> Any:
        tried.append(ModelLoadError(f"try {len(tried)}"))
        raise tried[-1]

    monkeypatch.setattr(stored_models, "load", failing)
    with pytest.raises(ModelLoadError, match="try 1"):
        open_model("ai/tiny", pull=False, store=store).engine(CONFIG)
    assert "is not used" not in caplog.text
    cancelled = LoadCancelledError("nobody waits")
    monkeypatch.setattr(stored_models, "load", Mock(side_effect=[cancelled]))  # one try
    with pytest.raises(LoadCancelledError):
        open_model("ai/tiny", pull=False, store=store).engine(CONFIG)


def test_by_command_and_over_a_registry(store: LayoutStore, head: Path, tmp_path: Path) -> None:
    with registry() as server:
        where = f"{server.host}/team/tiny"
        succeed("tag", "ai/tiny", f"{where}:v1", "--store", store.root)
        succeed("push", f"{where}:v1", "--store", store.root, "--plain-http")
        succeed(
            "package", f"{where}:v1-eagle", "--drafter", head, "--base", f"{where}:v1", "--push",
            "--store", store.root, "--plain-http",
        )  # fmt: skip
        shown = succeed("inspect", f"{where}:v1-eagle", "--store", store.root).out
        assert re.search(r"Drafter: +eagle3\nBase: +" + re.escape(f"{where}:v1\n"), shown)
        other = LayoutStore(tmp_path / "other")
        succeed("pull", f"{where}:v1", "--with-referrers", "--store", other.root, "--plain-http")
        opened = open_model(f"{where}:v1", pull=False, store=other)
    found = with_drafter(CONFIG, opened.model, other, None)
    assert found.draft_model is not None
    assert proposer_of(opened.engine(CONFIG)).head  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, "is not that of an EAGLE-3 head"),
        ({}, without("fc.weight"), "has no matrix fc.weight"),
        ({"vocab_size": 300}, None, "a vocabulary of 300 tokens, the base's embeddings are 257"),
        ({}, {**without(""), "fc.weight": mx.zeros((64, 96))}, "reads 96 values per token"),
    ],
)
def test_heads_that_are_not_packaged(
    store: LayoutStore, head: Path, config: dict[str, Any], tensors: Any, says: str
) -> None:
    write_head(head, {**PUBLISHED, **config}, tensors)
    with pytest.raises(ModelpackError, match=says):
        package_drafter("ai/tiny:eagle", head, "ai/tiny", store=store)
    assert [str(name) for model in store.models() for name in model.names] == [
        "docker.io/ai/tiny:latest"
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--drafter", "head"), "--drafter and --base are required together"),
        (("--drafter", "h", "--base", "b", "--adapter", "a"), "package one of them"),
        (("--drafter", "h", "--base", "b", "--mmproj", "m"), "--drafter cannot be combined"),
        (("--drafter", "nowhere", "--base", "ai/none"), "nowhere is not a directory"),
    ],
)
def test_options_that_do_not_go_together(given: tuple[str, ...], says: str) -> None:
    refused = run("package", "ai/tiny:eagle", *given)
    assert refused.code != 0
    assert says in refused.err
