"""Repairs fetch only damaged and missing blobs, from the origins of their models."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.operations.referrers import attach
from modelpack.operations.repair import repair
from modelpack.registry import RetryPolicy
from tests.cli.running import modelpack as command
from tests.contract.parts import Watcher
from tests.operations.conftest import Published


def damage(store: modelpack.Store, digest: Digest | str) -> None:
    path = store.root / "blobs" / "sha256" / str(digest).removeprefix("sha256:")
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def lose(store: modelpack.Store, digest: Digest | str) -> None:
    (store.root / "blobs" / "sha256" / str(digest).removeprefix("sha256:")).unlink()


@pytest.fixture
def pulled(published: Published) -> Published:
    modelpack.pull(published.reference, store=published.store)
    published.records.settled(published.server)
    published.records.forget(published.server)
    return published


def test_a_sound_store_asks_nobody(pulled: Published) -> None:
    done = repair(pulled.store)
    assert (done.before.problems, done.after.problems, done.restored) == ((), (), ())
    assert pulled.records == []


@pytest.mark.parametrize("harm", [damage, lose])
def test_only_the_bad_blobs_are_fetched(pulled: Published, harm: object) -> None:
    bad = pulled.path_digest("model.safetensors")
    harm(pulled.store, bad)  # type: ignore[operator]
    done = repair(pulled.store)
    assert [str(problem.digest) for problem in done.before.problems] == [bad]
    assert done.after.ok
    assert pulled.blobs_fetched() == {bad}
    sent = sum(record.sent for record in pulled.records.settled(pulled.server))
    assert sent == done.bytes_fetched == done.restored[0].size
    assert pulled.store.fsck(watch=Watcher().watch).ok
    assert not list(pulled.store.root.glob("quarantine/*"))


def test_a_manifest_and_what_it_hid(pulled: Published) -> None:
    bad = pulled.path_digest("config.json")
    damage(pulled.store, bad)
    damage(pulled.store, pulled.digest)
    lose(pulled.store, pulled.manifest.config.digest)
    done = repair(pulled.store)
    assert done.after.ok
    want = {bad, str(pulled.digest), str(pulled.manifest.config.digest)}
    assert {str(blob.digest) for blob in done.restored} == want
    assert pulled.blobs_fetched() == want - {str(pulled.digest)}


def test_the_place_is_remembered_and_can_be_given(pulled: Published) -> None:
    """The name of a model that was pulled by digest does not contain its origin."""
    store = modelpack.Store(pulled.store.root.parent / "by-digest")
    modelpack.pull(pulled.by_digest, store=store)
    bad = pulled.path_digest("LICENSE")
    lose(store, bad)
    assert repair(store).after.ok
    # Packaged here and never pushed: the repository in the name does not exist.
    request = modelpack.PackageRequest(context_size=5)
    made = modelpack.package(
        "127.0.0.1:1/x/y:v1", request, from_model=str(pulled.digest), store=store
    )
    lose(store, bad)
    store.remove(str(pulled.digest))
    options = modelpack.RemoteOptions(retry=RetryPolicy(tries=1))
    done = repair(store, remote=options)
    assert [str(failure.digest) for failure in done.failures] == [bad]
    assert not done.after.ok
    assert repair(store, source=pulled.reference).after.ok
    assert store.resolve("127.0.0.1:1/x/y:v1").digest == made.digest


def test_a_registry_that_has_it_no_more(pulled: Published) -> None:
    bad = pulled.path_digest("config.json")
    lose(pulled.store, bad)
    lose(modelpack.Store(pulled.server.store.root), bad)
    done = repair(pulled.store)
    assert not done.after.ok
    [failure] = done.failures
    assert str(failure.digest) == bad


def test_what_is_attached_is_repaired_too(pulled: Published, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("{ }")
    digest = attach(pulled.reference, [report], artifact_type="application/x-note").digest
    modelpack.pull(pulled.reference, with_referrers=True, store=pulled.store)
    lose(pulled.store, Digest.of(b"{ }"))
    damage(pulled.store, digest)
    assert repair(pulled.store).after.ok


def test_the_command(pulled: Published) -> None:
    store = ["--store", pulled.store.root]
    bad = pulled.path_digest("model.safetensors")
    damage(pulled.store, bad)
    refused = command("fsck", *store)
    assert refused.code == 5
    assert "fsck --repair" in refused.err
    done = command("fsck", "--repair", "--json", *store)
    assert done.code == 0
    assert [blob["digest"] for blob in done.json["restored"]] == [bad]
    assert command("fsck", *store).code == 0
    assert command("fsck", "--from", "x/y:v1", *store).code == 2
    lose(pulled.store, bad)
    lose(modelpack.Store(pulled.server.store.root), bad)
    assert command("fsck", "--repair", *store).code == 5
