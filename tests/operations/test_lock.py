"""Lock files: pins are written, checked and pulled, online and offline."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.lockfile import LockFile
from modelpack.artifacts.reference import Reference
from modelpack.errors import FormatError, NotFoundError, StoreError
from modelpack.operations.lock import check_lock, lock, pull_locked, read_lock, unlock, write_lock
from modelpack.operations.pull import Part, Selection
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.operations.conftest import Published


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "modelpack.lock"


def move_tag(published: Published) -> Digest:
    """Move the tag to another model in the registry."""
    request = modelpack.PackageRequest(context_size=77)
    return modelpack.package(
        published.reference, request, from_model=published.reference, push=True,
        store=published.origin,
    ).digest  # fmt: skip


def test_locking_is_reproducible(published: Published, path: Path) -> None:
    other = f"{published.server.host}/a/first:v1"
    modelpack.copy(published.reference, other)
    lock([published.reference], path=path)
    one = path.read_bytes()
    lock([other], path=path)
    both = path.read_bytes()
    path.unlink()
    assert len(lock([other, published.reference], path=path).digests) == 2
    assert path.read_bytes() == both
    assert set(read_lock(path).digests.values()) == {published.digest}
    unlock([other], path=path)
    assert path.read_bytes() == one
    with pytest.raises(NotFoundError):
        unlock([other], path=path)


def test_locking_what_is_not_there_changes_nothing(published: Published, path: Path) -> None:
    lock([published.reference], path=path)
    before = path.read_bytes()
    with pytest.raises(NotFoundError):
        lock([f"{published.server.host}/no/such:v1"], path=path)
    assert path.read_bytes() == before
    assert list(path.parent.glob(".modelpack.lock*")) == []


def test_a_tag_that_moves(published: Published, path: Path) -> None:
    lock([published.reference], path=path)
    assert check_lock(path=path) == ()
    moved = move_tag(published)
    [drift] = check_lock(path=path)
    assert (drift.locked, drift.found) == (published.digest, moved)
    # The pull fetches the locked digest under the locked name, although the tag has moved.
    [done] = pull_locked(path=path, store=published.store)
    assert done.digest == published.digest
    assert published.store.resolve(published.reference).digest == published.digest
    [again] = pull_locked(path=path, store=published.store)
    assert (again.digest, again.transfer.written) == (published.digest, 0)
    # Locking again accepts the moved tag.
    assert set(lock(path=path).digests.values()) == {moved}
    pull_locked(path=path, store=published.store)
    assert published.store.resolve(published.reference).digest == moved


def test_a_tag_that_goes(published: Published, path: Path) -> None:
    lock([published.reference], path=path)
    with modelpack.Registry(published.server.host) as registry:
        registry.repository("team/many").delete_manifest(str(published.digest))
    [drift] = check_lock(path=path)
    assert drift.found is None
    with pytest.raises(NotFoundError):
        pull_locked(path=path, store=published.store)


def test_offline(published: Published, path: Path) -> None:
    lock([published.reference], path=path)
    published.records.forget(published.server)
    with pytest.raises(NotFoundError, match="is locked to"):
        pull_locked(path=path, offline=True, store=published.store)
    [drift] = check_lock(path=path, offline=True, store=published.store)
    assert drift.found is None
    assert published.records.settled(published.server) == []
    modelpack.pull(
        published.reference, selection=Selection(only=Part.CONFIG), store=published.store
    )
    with pytest.raises(NotFoundError):
        pull_locked(path=path, offline=True, store=published.store)
    pull_locked(path=path, store=published.store)
    published.records.forget(published.server)
    [again] = pull_locked(path=path, offline=True, store=published.store)
    assert (again.digest, again.transfer.written) == (published.digest, 0)
    assert check_lock(path=path, offline=True, store=published.store) == ()
    assert published.records.settled(published.server) == []
    # A lost blob counts as missing.
    published.store.blob_path(Digest.parse(published.path_digest("LICENSE"))).unlink()
    with pytest.raises(NotFoundError):
        pull_locked(path=path, offline=True, store=published.store)


def test_offline_puts_the_tag_back(published: Published, path: Path) -> None:
    modelpack.pull(published.reference, store=published.store)
    lock([published.reference], path=path, offline=True, store=published.store)
    move_tag(published)
    modelpack.pull(published.reference, store=published.store)
    [drift] = check_lock(path=path, offline=True, store=published.store)
    assert drift.found != published.digest
    pull_locked(path=path, offline=True, store=published.store)
    assert published.store.resolve(published.reference).digest == published.digest


def test_names_are_chosen_from_the_lock(published: Published, path: Path) -> None:
    lock([published.reference], path=path)
    [done] = pull_locked([published.reference], path=path, store=published.store)
    assert done.digest == published.digest
    with pytest.raises(NotFoundError, match="is not in"):
        pull_locked(["other:v1"], path=path, store=published.store)


def test_files_that_cannot_be_used(tmp_path: Path, path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_lock(path)
    path.write_text("nonsense")
    with pytest.raises(FormatError):
        lock(["x:v1"], path=path)
    assert path.read_text() == "nonsense"
    with pytest.raises(StoreError):
        read_lock(tmp_path)
    with pytest.raises(StoreError):
        write_lock(LockFile(), tmp_path / "no" / "such" / "modelpack.lock")


def test_the_commands(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = published.reference
    assert succeed("lock", name).out == f"{Reference.parse(name)} {published.digest}"
    assert succeed("lock", "--check", "--json").json["drifts"] == []
    assert command("pull", "--locked", "--offline").code == 3
    assert succeed("pull", "--locked").out == str(published.digest)
    offline = ["pull", "--locked", "--offline", name]
    assert succeed(*offline).out == str(published.digest)
    done = succeed(*offline, "--json").json
    assert [one["digest"] for one in done["models"]] == [str(published.digest)]
    assert done["fetched"] == []
    move_tag(published)
    drifted = command("lock", "--check")
    assert drifted.code == 5
    assert "is locked to" in drifted.out
    succeed("lock", "--remove", name)
    assert command("pull", "--locked", name).code == 3
    assert "hint" not in command("lock", "--remove", name).err
    for wrong in (
        ["pull"], ["pull", "--offline", "a:v1"],
        ["pull", "--locked", "--only", "config"], ["lock", "--check", "--remove", "a:v1"],
        ["lock", "--remove"], ["lock", f"x@{published.digest}"],
    ):  # fmt: skip
        assert command(*wrong).code == 2, wrong
