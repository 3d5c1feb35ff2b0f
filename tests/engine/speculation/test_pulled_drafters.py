"""Models that are pulled to be served: the drafter beside them is pulled too, if it can be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Manifest
from modelpack.cli.options import Settings
from modelpack.errors import InterruptedTransferError, ModelpackError
from modelpack.operations import signatures
from modelpack.operations.adapters import package_adapter
from modelpack.operations.drafters import package_drafter, stored_drafters
from modelpack.operations.package import PackageRequest
from modelpack.operations.referrers import attach
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Action, Progress, Stop
from modelpack.registry import RetryPolicy
from modelpack.registry.referrers import fallback_tag
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack.trust.keys import PrivateKey, generate_key_pair, read_private_key
from modelpack.trust.policy import Trust
from modelpack_engine.config import EngineConfig
from modelpack_server.api import app
from modelpack_server.api.app import create_app
from modelpack_server.cli.model_sources import ModelSources
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import open_model
from tests.adapters import write_peft
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.engine.adapters.test_zoo import linears
from tests.engine.serving.tiny import tiny_model, write_tiny
from tests.engine.speculation.test_eagle import proposer_of, write_head
from tests.registry.faults import Fault, answering, cut_after, shortened
from tests.registry.faulty import FaultyRegistry

CONFIG = EngineConfig(
    device="cpu", backend="mlx", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False
)
ONCE = RemoteOptions(retry=RetryPolicy(tries=1), plain_http=True)


@dataclass
class World:
    """A registry with a model, its drafters and another referrer, and an empty store."""

    host: str
    heads: Path
    origin: LayoutStore
    store: LayoutStore
    faulty: FaultyRegistry | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.host}/team/tiny:v1"

    @property
    def model(self) -> Digest:
        return self.origin.resolve(self.name).digest

    def attach_drafter(self, tag: str = "v1-eagle", padding: int = 0) -> Digest:
        """Package one of several different heads, with a file of `padding` bytes."""
        directory = self.heads / tag
        directory.mkdir(parents=True)
        write_head(directory)
        if padding:
            (directory / "LICENSE").write_text(" " * padding)
        request = PackageRequest(annotations={"tag": tag})
        made = package_drafter(
            f"{self.host}/team/tiny:{tag}", directory, self.name, request=request, push=True,
            store=self.origin, remote=ONCE,
        )  # fmt: skip
        return made.digest

    def manifest(self, digest: Digest) -> Manifest:
        return Manifest.parse(self.origin.fetch_manifest(self.origin.resolve(str(digest))), "")

    def fault(self, method: str, path: str, fault: Fault) -> None:
        assert self.faulty is not None
        self.faulty.faults.add(method, path, fault, times=None)

    def open(self, remote: RemoteOptions = ONCE, *, drafter: bool = True) -> Digest | None:
        """Pull the model to serve it; return its stored drafter."""

        def note(progress: Progress) -> None:
            if progress.action is Action.NOTE:
                self.notes.append(progress.message)

        opened = open_model(
            self.name, drafter=drafter, store=self.store, remote=remote, progress=note
        )
        assert self.store.missing(opened.model.descriptor) == ()
        found = stored_drafters(opened.model.digest, self.store)
        assert len(found) <= 1
        return found[0] if found else None


@pytest.fixture(params=["api", "tags"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A registry with the referrers API, or one without."""
    api: Literal["api", "tags"] = request.param
    server = registry(tmp_path / "registry") if api == "api" else FaultyRegistry()
    with server as running:
        host = running.host
        stores = [LayoutStore(tmp_path / name) for name in ("origin", "store")]
        faulty = running if isinstance(running, FaultyRegistry) else None
        made = World(host, tmp_path / "heads", stores[0], stores[1], faulty)
        files = write_tiny(tmp_path / "files")
        request_ = PackageRequest(safetensors_dir=files)
        modelpack.package(made.name, request_, push=True, store=made.origin, remote=ONCE)
        report = tmp_path / "sbom.json"
        report.write_text("{}")
        attach(made.name, [report], artifact_type="application/x-sbom", remote=ONCE)
        yield made


api_only = pytest.mark.parametrize("world", ["api"], indirect=True)
tags_only = pytest.mark.parametrize("world", ["tags"], indirect=True)


def test_the_drafter_is_pulled_with_the_model(world: World) -> None:
    made = world.attach_drafter()
    assert world.open() == made
    assert not world.notes
    # No other referrer, and no name that would be a model in lists.
    assert [one.digest for one in world.store.referrers(world.model)] == [made]
    assert [str(name) for model in world.store.models() for name in model.names] == [world.name]
    opened = open_model(world.name, pull=False, store=world.store)
    assert proposer_of(opened.engine(CONFIG)).head  # type: ignore[arg-type]


def test_one_of_several_is_pulled_and_only_once(world: World) -> None:
    made = sorted((world.attach_drafter(str(n)) for n in range(3)), key=str)
    assert world.open() == made[0]
    modelpack.pull(world.name, drafter=True, store=world.store, remote=ONCE)
    assert [one.digest for one in world.store.referrers(world.model)] == [made[0]]


def test_plain_pulls_and_stored_models_have_none(world: World) -> None:
    world.attach_drafter()
    succeed("pull", world.name, "--store", world.store.root, "--plain-http")
    assert world.store.referrers(world.model) == []
    # A stored model is served without a request to its registry.
    if world.faulty is not None:
        world.faulty.requests.clear()
    assert world.open() is None
    assert not world.notes
    assert world.faulty is None or not world.faulty.requests


def test_a_model_without_drafters(world: World) -> None:
    assert world.open() is None
    assert not world.notes


def test_missing_layers_are_pulled_with_the_drafter(world: World) -> None:
    made = world.attach_drafter()
    succeed("pull", world.name, "--include", "config.json", "--store", world.store.root,
            "--plain-http")  # fmt: skip
    assert world.open() == made


@tags_only
@pytest.mark.parametrize(
    ("path", "fault", "says"),
    [
        ("/manifests/sha256-", answering(500), "drafters cannot be listed"),
        ("/manifests/sha256-", answering(401), "drafters cannot be listed"),
        ("/manifests/{drafter}", answering(404), "is not used"),
        ("/manifests/{drafter}", shortened(1), "is not used"),
        ("/blobs/{blob}", answering(404), "is not used"),
        ("/blobs/{blob}", cut_after(100), "is not used"),
        ("/blobs/{blob}", shortened(1), "is not used"),
    ],
)
def test_a_drafter_that_cannot_be_fetched(world: World, path: str, fault: Fault, says: str) -> None:
    made = world.attach_drafter()
    weights = max(world.manifest(made).blobs, key=lambda blob: blob.size)
    world.fault("GET", path.format(drafter=made, blob=weights.digest), fault)
    assert world.open() is None
    assert len(world.notes) == 1
    assert says in world.notes[0]
    opened = open_model(world.name, pull=False, store=world.store)
    assert opened.engine(CONFIG)


def test_a_drafter_that_is_larger_than_the_model(world: World) -> None:
    """Its manifest says its size, so none of its files is fetched."""
    most = world.manifest(world.model).total_size
    large = world.attach_drafter("large", padding=most)
    size = world.manifest(large).total_size
    assert world.open() is None
    says = f"@{large} is not used: it has {size} bytes, more than the model's {most}"
    [note] = world.notes
    assert note.endswith(says)
    for blob in world.manifest(large).layers:
        assert world.store.has_file(blob.digest) == (blob in world.manifest(world.model).layers)


@tags_only
def test_the_next_is_pulled_if_one_cannot_be(world: World) -> None:
    first, second = sorted((world.attach_drafter(str(n)) for n in range(2)), key=str)
    world.fault("GET", f"/manifests/{first}", answering(404))
    assert world.open() == second
    [note] = world.notes
    assert str(first) in note


@tags_only
@pytest.mark.parametrize(
    ("kind", "drafts_for", "says"),
    [
        ("application/x-other", None, "its manifest is not that of a drafter"),
        (media_types.DRAFTER, Digest.of(b"another model"), "it drafts for sha256:"),
    ],
)
def test_a_list_that_names_something_else(
    world: World, kind: str, drafts_for: Digest | None, says: str
) -> None:
    """Clients write the list, which may give any manifest the type of a drafter."""
    assert world.faulty is not None
    subject = Descriptor(media_types.OCI_MANIFEST, drafts_for or world.model, 7)
    empty = Descriptor(media_types.OCI_EMPTY, Digest.of(b"{}"), 2)
    other = Manifest.build(empty, [empty], artifact_type=kind, subject=subject)
    entry = {**other.descriptor.to_json(), "artifactType": media_types.DRAFTER}
    index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [entry]}
    for raw, tag in ((other.raw, None), (encode(index), fallback_tag(world.model))):
        kind = media_types.OCI_INDEX if tag else media_types.OCI_MANIFEST
        world.faulty.put_manifest(raw, *([tag] if tag else []), repository="team/tiny",
                                  media_type=kind)  # fmt: skip
    assert world.open() is None
    [note] = world.notes
    assert says in note
    assert not world.store.has_file(other.digest)


@tags_only
@pytest.mark.parametrize("others", [7, 8])
def test_a_drafter_behind_many_others(world: World, others: int) -> None:
    """A pull tries the eight drafters whose digests come first, and reports if there are more."""
    assert world.faulty is not None
    made = world.attach_drafter()
    real = world.manifest(made).descriptor
    first = [
        Descriptor(media_types.OCI_MANIFEST, Digest("sha256", f"{n:064x}"), 7)
        for n in range(others)
    ]
    entries = [{**one.to_json(), "artifactType": media_types.DRAFTER} for one in (*first, real)]
    index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries}
    world.faulty.put_manifest(encode(index), fallback_tag(world.model), repository="team/tiny",
                              media_type=media_types.OCI_INDEX)  # fmt: skip
    assert world.open() == (made if others == 7 else None)
    cut = [note for note in world.notes if "has 9 drafters; the first 8 are tried" in note]
    assert len(cut) == (others == 8)
    assert len(world.notes) == others + len(cut)


@tags_only
def test_a_stop_is_no_failure_of_the_drafter(world: World) -> None:
    made = world.attach_drafter()
    stop = Stop()

    def stopping(progress: Progress) -> None:
        if world.faulty is not None and world.faulty.seen("GET", f"/manifests/{made}"):
            stop.request()

    with pytest.raises(InterruptedTransferError):
        modelpack.pull(world.name, drafter=True, store=world.store, remote=ONCE,
                       progress=stopping, stop=stop)  # fmt: skip
    assert stored_drafters(world.model, world.store) == []


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    path = tmp_path_factory.mktemp("keys") / "ours"
    generate_key_pair(path, b"")
    return read_private_key(path.with_suffix(".key"), b"")


@api_only
def test_a_policy_holds_for_the_drafter(world: World, key: PrivateKey) -> None:
    """One that is not signed is not fetched, and does not hide one that is."""
    trusting = replace(ONCE, trust=Trust.of([key.public]))
    signatures.sign(world.name, key)
    made = sorted((world.attach_drafter(str(n)) for n in range(2)), key=str)
    assert world.open(trusting) is None
    assert len(world.notes) == 2
    assert all("is not signed" in note for note in world.notes)
    assert not any(world.store.has_file(digest) for digest in made)
    world.store.remove(world.name)
    signatures.sign(f"{world.host}/team/tiny@{made[1]}", key)
    assert world.open(trusting) == made[1]
    opened = open_model(world.name, pull=False, store=world.store, remote=trusting)
    assert proposer_of(opened.engine(CONFIG)).head  # type: ignore[arg-type]


@api_only
def test_the_base_of_an_adapter_is_pulled_with_its_drafter(world: World, tmp_path: Path) -> None:
    made = world.attach_drafter()
    files = write_peft(tmp_path / "peft", linears(tiny_model()), rank=2, seed=1)
    package_adapter(f"{world.host}/team/one:v1", files, world.name, push=True, store=world.origin)
    settings = Settings(store_root=str(world.store.root), quiet=True)
    with ModelSources(settings, ONCE, drafter=True) as sources:
        sources.open(f"{world.host}/team/one:v1")
    assert stored_drafters(world.model, world.store) == [made]


@api_only
@pytest.mark.parametrize(
    ("command", "options", "fetched"),
    [
        ("run", (), True),
        ("run", ("--speculative-method", "none"), False),
        ("smoke", (), True),
        ("serve", (), True),
        ("serve", ("--speculative-method", "none"), False),
        ("serve", ("--runtime-flags", "--speculative-method ngram"), False),
        ("serve", ("--tensor-parallel-size", "2"), False),
    ],
)
@pytest.mark.long
def test_commands(
    world: World, monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[str, ...],
    fetched: bool,
) -> None:  # fmt: skip
    made = world.attach_drafter()

    def served(*_: object, **__: object) -> None:
        raise ModelpackError("served")

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(app, "ModelServer", served)
    monkeypatch.setattr("modelpack_server.cli.serve.join_ranks", served)
    given = {"run": ("hi", "--max-tokens", "2"), "smoke": ("--max-tokens", "2"), "serve": ()}
    done = run(
        command, world.name, *given[command], *options, "--backend", "mlx", "--device", "cpu",
        "--kv-cache-bytes", "1000000", "--store", world.store.root, "--plain-http",
    )  # fmt: skip
    assert done.code in (0, 1), done.err  # smoke finds the response of random weights empty
    assert "served" in done.err if command == "serve" else "error: " not in done.err
    assert stored_drafters(world.model, world.store) == ([made] if fetched else [])


@api_only
@pytest.mark.parametrize(
    ("path", "body"),
    [("/api/pull", {"model": "{name}", "stream": False}), ("/models/create", {"from": "{name}"})],
)
@pytest.mark.parametrize("speculates", [True, False])
def test_requests_that_pull(
    world: World, path: str, body: dict[str, object], speculates: bool
) -> None:
    made = world.attach_drafter()
    catalogue = StoreCatalogue(world.store, CONFIG, remote=ONCE)
    settings = ModelSettings(engine={} if speculates else {"speculative_method": "none"})
    pool = ModelPool(catalogue, settings=settings, memory=2**32, grace=0.0)
    filled = {k: v.format(name=world.name) if isinstance(v, str) else v for k, v in body.items()}
    with TestClient(create_app(pool)) as http:
        reply = http.post(path, json=filled)
    assert reply.status_code == 200, reply.text
    assert stored_drafters(world.model, world.store) == ([made] if speculates else [])


@tags_only
@pytest.mark.parametrize("path", ["/api/pull", "/models/create"])
def test_servers_log_why_there_is_no_drafter(
    world: World, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = world.attach_drafter()
    world.fault("GET", f"/manifests/{made}", answering(404))
    pool = ModelPool(StoreCatalogue(world.store, CONFIG, remote=ONCE), memory=2**32, grace=0.0)
    body = {"model": world.name, "from": world.name, "stream": False}
    with TestClient(create_app(pool)) as http:
        assert http.post(path, json=body).status_code == 200
    assert f"@{made} is not used" in caplog.text
