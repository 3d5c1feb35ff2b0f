"""The cache of `list`: its content, and when it is refreshed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.operations.model_list import Summary, summarize_models
from modelpack.store.layout import LISTING_VERSION
from tests.models import tiny_gguf


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    made = modelpack.Store(tmp_path / "store")
    for number in range(3):
        request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path), context_size=number + 1)
        modelpack.package(f"m{number}:v1", request, store=made)
    return made


def cached(store: modelpack.Store) -> Path:
    return store.root / "ingest" / "listing.json"


def test_the_second_list_reads_no_blob(
    store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = summarize_models(store)
    assert [item.summary.context_size for item in first if item.summary] == [1, 2, 3]

    def refuse(*_: Any) -> None:
        raise AssertionError("a blob is read")

    monkeypatch.setattr(modelpack.Store, "fetch_manifest", refuse)
    monkeypatch.setattr(modelpack.Store, "blob", refuse)
    assert summarize_models(store) == first


def test_only_what_is_new_is_read_and_what_has_gone_is_forgotten(
    store: modelpack.Store, tmp_path: Path
) -> None:
    summarize_models(store)
    request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path), context_size=99)
    made = modelpack.package("m9:v1", request, store=store)
    store.remove("m0:v1")
    summarize_models(store, "m9:v1")
    assert len(json.loads(cached(store).read_text())["models"]) == 4
    modelpack.package("m9:v2", modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)), store=store)
    summarize_models(store)
    models = json.loads(cached(store).read_text())["models"]
    assert set(models) == {str(model.digest) for model in store.models()}
    assert Summary.from_facts(models[str(made.digest)]) is not None


def test_a_manifest_that_was_lost_shows(store: modelpack.Store) -> None:
    summarize_models(store)
    digest = store.resolve("m1:v1").digest
    store.blob_path(digest).unlink()
    problems = {item.digest: item.problem for item in summarize_models(store)}
    assert str(digest) in problems[digest]
    assert len([text for text in problems.values() if text]) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"", b"nonsense", b"[]", b'{"version": 0}', b'{"version": 1, "models": []}', b"[" * 100_000,
        b'{"version": 1, "models": {"DIGEST": [1, 2]}}',
        b'{"version": 1, "models": {"DIGEST": ["1", "a", "b", "c", "d", null, null]}}',
        b'{"version": 1, "models": {"DIGEST": {"size": 1}}}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_damaged_cache_counts_as_none(store: modelpack.Store, content: bytes) -> None:
    assert LISTING_VERSION == 1
    want = summarize_models(store)
    digest = str(store.resolve("m1:v1").digest).encode()
    cached(store).write_bytes(content.replace(b"DIGEST", digest))
    assert summarize_models(store) == want


def test_facts_come_back_as_they_were() -> None:
    summary = Summary(5, "gguf", "7 B", "Q4_0", "llama", None, "2025-01-02T03:04:05Z")
    assert Summary.from_facts(json.loads(json.dumps(summary.to_facts()))) == summary
    assert Summary.from_facts(None) is None


def test_a_store_without_models(tmp_path: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    assert summarize_models(store) == ()
    assert not cached(store).exists()
    assert not store.has_file(Digest.of(b""))
