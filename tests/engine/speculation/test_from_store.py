"""Draft models from a store and from a directory, and the errors of loading them."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelpack
from modelpack.errors import NotFoundError
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.request import SamplingParams
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import open_model
from tests.cli.running import modelpack as run
from tests.engine.serving.tiny import reference_tokens, write_tiny

pytestmark = pytest.mark.long

CONFIG = EngineConfig(device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("draft") / "files")


@pytest.fixture(scope="module")
def store(files: Path) -> LayoutStore:
    made = LayoutStore(files.parent / "store")
    for name in ("ai/tiny", "ai/smaller"):
        modelpack.package(name, PackageRequest(safetensors_dir=files), store=made)
    return made


@pytest.mark.parametrize("by", ["name", "path"])
def test_a_draft_model_by_name_and_by_path(store: LayoutStore, files: Path, by: str) -> None:
    draft: str | Path = "ai/smaller" if by == "name" else files
    engine = open_model("ai/tiny", pull=False, store=store).engine(
        EngineConfig(device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, draft_model=draft)
    )
    [events] = engine.generate([[1, 2, 3]], GREEDY)
    assert [t for event in events for t in event.token_ids] == reference_tokens([1, 2, 3], 12)
    assert engine.stats().accepted_tokens > 6


def test_a_models_own_settings(store: LayoutStore) -> None:
    catalogue = StoreCatalogue(store, CONFIG)
    model = catalogue.find("ai/tiny")
    plain, drafted = ModelSettings(), ModelSettings(runtime_flags=("-md", "ai/smaller"))
    assert catalogue.needs(model, drafted) > catalogue.needs(model, plain)
    loaded = catalogue.load(model, drafted, Meter(), None)
    try:
        assert loaded.engine.memory_bytes > 2 * model.size * 0.9
    finally:
        loaded.engine.close()
    missing = ModelSettings(engine={"draft_model": "ai/none"})
    with pytest.raises(NotFoundError, match="ai/none"):
        catalogue.load(model, missing, Meter(), None)
    with pytest.raises(NotFoundError, match="ai/none"):
        catalogue.needs(model, missing)


def test_names_that_come_over_http_are_not_paths(store: LayoutStore, files: Path) -> None:
    catalogue = StoreCatalogue(store, CONFIG)
    named = ModelSettings(engine={"draft_model": str(files)})
    with pytest.raises(modelpack.errors.ModelpackError):
        catalogue.load(catalogue.find("ai/tiny"), named, Meter(), None)


@pytest.mark.parametrize("given", [["--draft-model", "ai/smaller"], ["--draft-model", "{files}"]])
def test_the_command_line(store: LayoutStore, files: Path, given: list[str]) -> None:
    options = [word.format(files=files) for word in given]
    report = run(
        "smoke", "ai/tiny", "--store", store.root, "--device", "cpu", "--max-tokens", "8",
        "--kv-cache-bytes", 2**20, "--speculative-disable-by-batch-size", "1", *options,
    )  # fmt: skip
    assert report.json["checks"], report.err
    missing = run(
        "smoke", "ai/tiny", "--store", store.root, "--draft-model", "127.0.0.1:1/no/model",
        "--plain-http",
    )  # fmt: skip
    assert missing.code != 0
    assert "127.0.0.1:1" in missing.err


def test_no_method_but_these() -> None:
    refused = run("serve", "--speculative-method", "guess")
    assert refused.code == 2
    assert "'ngram', 'draft'" in refused.err
