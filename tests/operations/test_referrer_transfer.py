"""Transfers of models with their referrers, between registries with and without the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import ModelpackError, UnsupportedError
from modelpack.operations import transfer
from modelpack.operations.referrers import attach, referrers
from modelpack.testing import registry
from tests.contract.parts import Watcher
from tests.models import tiny_gguf
from tests.peers import docker_registry
from tests.registry.faults import answering
from tests.registry.faulty import FaultyRegistry

SBOM, SIGNATURE = "application/spdx+json", "application/vnd.example.signature"


@dataclass
class Signed:
    """A model with an SBOM, and a signature for each of both."""

    reference: str
    digest: Digest
    sbom: Digest
    signatures: tuple[Digest, Digest]

    @property
    def all(self) -> set[Digest]:
        return {self.sbom, *self.signatures}

    def check_at(self, reference: str, store: modelpack.Store | None = None) -> None:
        name = reference.rpartition(":")[0]
        about_model = {one.digest for one in referrers(reference, store=store)}
        about_sbom = [one.digest for one in referrers(f"{name}@{self.sbom}", store=store)]
        assert about_model == {self.sbom, self.signatures[0]}
        assert about_sbom == [self.signatures[1]]


def publish(host: str, tmp_path: Path) -> Signed:
    reference = f"{host}/{tmp_path.name.rstrip('_')}/model:v1"
    request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
    made = modelpack.package(
        reference, request, push=True, store=modelpack.Store(tmp_path / "origin")
    )
    report = tmp_path / "sbom.json"
    report.write_text("{}")
    sbom = attach(reference, [report], artifact_type=SBOM).digest
    signatures = []
    for target in (made.digest, sbom):
        path = tmp_path / f"{target.short}.sig"
        path.write_text(f"signature of {target}")
        where = f"{reference.rpartition(':')[0]}@{target}"
        signatures.append(attach(where, [path], artifact_type=SIGNATURE).digest)
    return Signed(reference, made.digest, sbom, (signatures[0], signatures[1]))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A registry with the referrers API and one without; each test has its own repositories."""
    with ExitStack() as stack:
        ours = stack.enter_context(registry(tmp_path_factory.mktemp("ours")))
        theirs = stack.enter_context(docker_registry(tmp_path_factory.mktemp("theirs")))
        yield {"api": ours.host, "tags": theirs}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("source", "target"), [("api", "tags"), ("tags", "api"), ("tags", "tags"), ("api", "api")]
)
def test_copy(hosts: dict[str, str], tmp_path: Path, source: str, target: str) -> None:
    signed = publish(hosts[source], tmp_path)
    where = f"{hosts[target]}/prod/{source}-{target}:v9"
    done = modelpack.copy(signed.reference, where, with_referrers=True)
    assert {one.descriptor.digest for one in done.referrers} == signed.all
    signed.check_at(where)
    again = modelpack.copy(signed.reference, where, with_referrers=True)
    assert sum(one.bytes_written for one in again.referrers) == 0
    signed.check_at(where)
    # Without the option, no referrers are transferred.
    plain = f"{hosts[target]}/plain/{source}-{target}:v9"
    assert modelpack.copy(signed.reference, plain).referrers == ()
    assert referrers(plain) == ()


@pytest.mark.parametrize("kind", ["api", "tags"])
def test_through_a_store(hosts: dict[str, str], tmp_path: Path, kind: str) -> None:
    signed = publish(hosts[kind], tmp_path)
    store = modelpack.Store(tmp_path / "store")
    done = modelpack.pull(signed.reference, with_referrers=True, store=store)
    assert {one.descriptor.digest for one in done.referrers} == signed.all
    signed.check_at(signed.reference, store)
    assert [model.digest for model in store.models()] == [signed.digest]
    assert store.gc(grace_seconds=0).removed == ()
    for target in hosts.values():
        where = f"{target}/back/{kind}:v1"
        sent = modelpack.push(signed.reference, to=where, with_referrers=True, store=store)
        assert len(sent.referrers) == 3
        signed.check_at(where)
    removal = store.remove(signed.reference)
    assert set(removal.deleted) == {signed.digest, *signed.all}


def test_the_tag_comes_last(tmp_path: Path) -> None:
    """A tag implies its signatures, so a copy that fails halfway sets no tag."""
    with registry(tmp_path / "ours") as ours, FaultyRegistry() as target:
        signed = publish(ours.host, tmp_path)
        where = f"{target.host}/team/model:v9"
        target.faults.add("PUT", f"/manifests/{signed.sbom}", answering(400), times=None)
        with pytest.raises(ModelpackError):
            modelpack.copy(signed.reference, where, with_referrers=True)
        assert target.count("PUT", "/manifests/v9") == 0
        target.faults.clear()
        modelpack.copy(signed.reference, where, with_referrers=True)
        puts = [request.path for request in target.seen("PUT", "/manifests/")]
        assert puts[-1].endswith("/manifests/v9")


@pytest.mark.long
def test_there_is_a_limit(
    hosts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = publish(hosts["api"], tmp_path)
    monkeypatch.setattr(transfer, "MAX_REFERRERS", 2)
    store = modelpack.Store(tmp_path / "store")
    watcher = Watcher()
    with pytest.raises(UnsupportedError, match="has more than 2 referrers"):
        modelpack.pull(
            signed.reference, with_referrers=True, store=store, progress=watcher.watch.report
        )
