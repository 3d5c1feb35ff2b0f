"""A server with --verify-key: a model runs only if it is signed, however it got into the store."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.operations import archives, signatures
from modelpack.operations.archives import import_archive
from modelpack.operations.drafters import package_drafter
from modelpack.operations.package import PackageRequest
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.trust import trusted_import
from modelpack.registry import RetryPolicy
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack.trust.keys import PrivateKey, generate_key_pair, read_private_key
from modelpack.trust.policy import Trust
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.eagle import EagleHead, load_head
from modelpack_server import stored_models
from modelpack_server.api.app import create_app
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import open_model, with_drafter
from tests.engine.serving.tiny import write_tiny
from tests.engine.speculation.test_eagle import write_head

pytestmark = pytest.mark.long

CONFIG = EngineConfig(device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False)


@dataclass
class World:
    """A server that trusts one key; its registry has a signed and an unsigned model."""

    http: TestClient
    store: LayoutStore
    remote: RemoteOptions
    key: PrivateKey
    host: str

    @property
    def good(self) -> str:
        return f"{self.host}/team/good:v1"

    @property
    def evil(self) -> str:
        return f"{self.host}/team/evil:v1"

    def chat(self, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        response: httpx.Response = self.http.post("/v1/chat/completions", json=body)
        return response

    def refused(self, model: str) -> bool:
        response = self.chat(model)
        return response.status_code == 403 and "is not signed" in response.text

    def stored(self) -> set[str]:
        return {str(ref) for model in self.store.models() for ref in model.references}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    path = tmp_path_factory.mktemp("keys") / "ours"
    generate_key_pair(path, b"")
    return read_private_key(path.with_suffix(".key"), b"")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture
def world(tmp_path: Path, key: PrivateKey, files: Path) -> Iterator[World]:
    with registry(tmp_path / "registry") as server:
        origin = LayoutStore(tmp_path / "origin")
        for name, context in (("good", 32), ("evil", 31)):
            request = modelpack.PackageRequest(safetensors_dir=files, context_size=context)
            modelpack.package(f"{server.host}/team/{name}:v1", request, push=True, store=origin)
        signatures.sign(f"{server.host}/team/good:v1", key)
        store = LayoutStore(tmp_path / "store")
        trust = Trust.of([key.public])
        remote = RemoteOptions(trust=trust, retry=RetryPolicy(tries=1))
        pool = ModelPool(StoreCatalogue(store, CONFIG, remote=remote), memory=2**32, grace=0.0)
        with TestClient(create_app(pool), raise_server_exceptions=False) as http:
            yield World(http, store, remote, key, server.host)


def test_what_is_signed_answers(world: World) -> None:
    """A copy is the same model, so it runs too."""
    reply = world.http.post("/api/pull", json={"model": world.good, "stream": False})
    assert reply.status_code == 200, reply.text
    assert world.chat(world.good).status_code == 200
    copy = f"{world.host}/team/copy:v1"
    done = world.http.post("/api/copy", json={"source": world.good, "destination": copy})
    assert done.status_code == 200, done.text
    assert world.chat(copy).status_code == 200
    # The name is given to another model after the first was loaded.
    modelpack.pull(world.evil, to=world.good, store=world.store)
    assert world.refused(world.good)


def test_no_file_is_opened_before_the_check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    modelpack.pull(world.evil, store=world.store)
    opened: list[str] = []
    monkeypatch.setattr(
        stored_models, "stored_files", lambda model, store: opened.append(str(model))
    )
    monkeypatch.setattr(StoreCatalogue, "_loaded_bytes", lambda *given: opened.append(str(given)))
    assert world.refused(world.evil)
    assert not opened


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/pull", {"model": "{evil}", "stream": False}),
        ("/models/create", {"from": "{evil}"}),
        ("/models/create", {"from": "{evil}", "bearer-token": "x"}),
        ("/api/create", {"model": "{host}/team/made:v1", "from": "{evil}", "stream": False}),
    ],
)
def test_nothing_unsigned_is_pulled(world: World, path: str, body: dict[str, object]) -> None:
    filled = {
        name: value.format(evil=world.evil, host=world.host) if isinstance(value, str) else value
        for name, value in body.items()
    }
    reply = world.http.post(path, json=filled)
    assert "is not signed" in reply.text
    assert world.stored() == set()


def _as_it_is(world: World) -> str:
    """A model that was in the store before the server had keys."""
    return world.evil


def _by_digest(world: World) -> str:
    return str(world.store.resolve(world.evil).digest)


def _copied(world: World) -> str:
    """An unsigned model under the name of the signed one."""
    reply = world.http.post("/api/copy", json={"source": world.evil, "destination": world.good})
    assert reply.status_code == 200, reply.text
    return world.good


def _tagged(world: World) -> str:
    reply = world.http.post(f"/models/{world.evil}/tag?repo={world.host}/team/good&tag=v1")
    assert reply.status_code == 201, reply.text
    return world.good


def _loaded(world: World) -> str:
    """An unsigned model from an archive, under the name of the signed one."""
    world.store.tag(world.evil, modelpack.Reference.parse(world.good))
    archive = archives.archive_of(world.store, [world.good], watching(None))
    raw = b"".join(archive.pieces)
    world.store.remove(world.good)
    world.store.remove(world.evil)
    reply = world.http.post("/models/load", content=raw)
    assert reply.status_code == 200, reply.text
    return world.good


def _created(world: World) -> str:
    """A model created from the signed one, with another system prompt, is another model."""
    modelpack.pull(world.good, store=world.store, remote=world.remote)
    made = f"{world.host}/team/made:v1"
    body = {"model": made, "from": world.good, "system": "Obey.", "stream": False}
    reply = world.http.post("/api/create", json=body)
    assert reply.status_code == 200, reply.text
    return made


def _repackaged(world: World) -> str:
    modelpack.pull(world.good, store=world.store, remote=world.remote)
    made = f"{world.host}/team/made:v1"
    reply = world.http.post(
        f"/models/{world.good}/repackage", json={"target": made, "context_size": 8}
    )
    assert reply.status_code == 201, reply.text
    return made


@pytest.mark.parametrize(
    "way", [_as_it_is, _by_digest, _copied, _tagged, _loaded, _created, _repackaged]
)
def test_nothing_unsigned_is_loaded(world: World, way: Callable[[World], str]) -> None:
    modelpack.pull(world.evil, store=world.store)
    name = way(world)
    assert world.refused(name)
    preload = world.http.post("/api/generate", json={"model": name})
    assert preload.status_code == 403, preload.text


def test_nothing_unsigned_drafts(world: World, files: Path) -> None:
    modelpack.pull(world.good, store=world.store, remote=world.remote)
    modelpack.pull(world.evil, store=world.store)
    for settings in (
        {"speculative": {"draft_model": world.evil}},
        {"raw-runtime-flags": f"--draft-model {world.evil}"},
    ):
        done = world.http.post("/engines/_configure", json={"model": world.good, **settings})
        assert done.status_code == 202, done.text
        assert world.refused(world.good)
    opened = open_model(world.good, pull=False, store=world.store, remote=world.remote)
    for draft in (world.evil, files):
        config = EngineConfig(device="cpu", draft_model=draft)
        with pytest.raises(modelpack.errors.UntrustedError):
            opened.engine(config)


def test_an_import_is_taken_back(world: World) -> None:
    """The import already has the trust policy."""
    modelpack.pull(world.good, store=world.store, remote=world.remote)
    before = world.stored()
    other = LayoutStore(world.store.root.parent / "other")
    modelpack.pull(world.evil, to=world.good, store=other)
    modelpack.pull(world.evil, store=other)
    raw = b"".join(archives.archive_of(other, [world.good, world.evil], watching(None)).pieces)
    watch = watching(None)
    with (
        pytest.raises(modelpack.errors.UntrustedError),
        trusted_import(world.store, world.remote, watch),
    ):
        import_archive(world.store, io.BytesIO(raw), watch)
    assert world.stored() == before
    assert world.store.resolve(world.good).digest != other.resolve(world.good).digest


def test_a_trusted_import_stays(world: World) -> None:
    other = LayoutStore(world.store.root.parent / "other")
    modelpack.pull(world.good, store=other)
    raw = b"".join(archives.archive_of(other, [world.good], watching(None)).pieces)
    with trusted_import(world.store, world.remote, watching(None)):
        import_archive(world.store, io.BytesIO(raw), watching(None))
    assert world.stored() == {world.good}


def test_a_drafter_that_is_found_has_to_be_signed_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model runs without one that is not, unless the user asks for it."""
    head = tmp_path / "head"
    head.mkdir()
    write_head(head)
    modelpack.pull(world.good, store=world.store)
    made = {}
    for tag in ("v1-one", "v1-two"):  # of different digests
        name = f"{world.host}/team/good:{tag}"
        request = PackageRequest(annotations={"tag": tag})
        packaged = package_drafter(
            name, head, world.good, request=request, push=True, store=world.store
        )
        made[packaged.digest] = name
    opened = open_model(world.good, pull=False, store=world.store, remote=world.remote)
    config = replace(CONFIG, backend="mlx")
    read: list[ModelFiles] = []

    def noted(files: ModelFiles) -> EagleHead:
        read.append(files)
        return load_head(files)

    def chosen() -> str | Path | None:
        return with_drafter(config, opened.model, world.store, world.remote).draft_model

    monkeypatch.setattr(stored_models, "load_head", noted)
    assert isinstance(opened.engine(config), Engine)
    assert not read
    assert all(f"the drafter {digest} is not used: " in caplog.text for digest in made)
    for asked in ({"speculative_method": "eagle3"}, {"draft_model": next(iter(made.values()))}):
        with pytest.raises(modelpack.errors.UntrustedError, match="is not signed"):
            opened.engine(replace(config, **asked))  # type: ignore[arg-type]
    assert not read
    first, second = sorted(made, key=str)
    signatures.sign(made[second], world.key)
    assert chosen() == str(second)
    assert isinstance(opened.engine(config), Engine)
    assert len(read) == 1
    signatures.sign(made[first], world.key)
    assert chosen() == str(first)


def test_a_server_with_a_new_policy_runs_models_without_drafters_of_before(
    world: World, tmp_path: Path
) -> None:
    head = tmp_path / "head"
    head.mkdir()
    write_head(head)
    modelpack.pull(world.good, store=world.store)
    package_drafter(f"{world.host}/team/good:v1-eagle", head, world.good, push=True,
                    store=world.store)  # fmt: skip
    catalogue = StoreCatalogue(world.store, replace(CONFIG, backend="mlx"), remote=world.remote)
    found = catalogue.find(world.good)
    plain = ModelSettings(engine={"speculative_method": "none"})
    assert catalogue.needs(found, ModelSettings()) == catalogue.needs(found, plain)
    catalogue.load(found, ModelSettings(), Meter(), None).engine.close()
