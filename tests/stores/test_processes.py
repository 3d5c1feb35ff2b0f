"""Several processes with one store, and processes that are killed."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import InterruptedTransferError, LockedError, NotFoundError
from modelpack.progress import Action, Progress
from modelpack.storage import Outcome, Watch
from modelpack.store.filesystem import FileLock
from modelpack.store.layout import LayoutStore
from tests.contract.parts import BytesSource, Watcher, blob_of, content_of, small_model, write_model
from tests.stores.workers import Worker

pytestmark = pytest.mark.long

Start = Callable[..., Worker]
# Enough for a writing thread, and more than its buffers hold.
SIZE = 11 * 1024 * 1024


def files_under(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.scenario(20)
def test_two_processes_that_want_one_blob_download_it_once(
    store: LayoutStore, start: Start
) -> None:
    blob = blob_of(random.Random(20).randbytes(SIZE))
    first = start("download", store.root, SIZE, 20)
    first.expect("half")
    second = start("download", store.root, SIZE, 20)
    second.expect("waiting")
    first.go()

    assert "outcome written" in first.finish()
    assert second.finish() == ["outcome existed"]  # it never reported "opened"
    assert files_under(store.root / "blobs") == [f"sha256/{blob.digest.encoded}"]
    assert files_under(store.root / "ingest") == []


@pytest.mark.scenario(20)
def test_whoever_waits_takes_over_from_a_process_that_dies(
    store: LayoutStore, start: Start
) -> None:
    content = random.Random(20).randbytes(SIZE)
    first = start("download", store.root, SIZE, 20)
    first.expect("half")
    second = start("download", store.root, SIZE, 20)
    second.expect("waiting")
    first.kill()

    opened = int(second.expect("opened").split()[1])
    assert 0 < opened <= SIZE // 2, "what the first had fetched is kept"
    second.expect("half")
    second.go()
    assert second.finish() == ["outcome written"]
    assert content_of(store, blob_of(content)) == content


def test_a_stop_request_ends_the_wait_for_another_process(
    store: LayoutStore, start: Start, watcher: Watcher
) -> None:
    content = random.Random(20).randbytes(SIZE)
    first = start("download", store.root, SIZE, 20)
    first.expect("half")

    def stop_when_waiting(progress: Progress) -> None:
        assert progress.action is Action.NOTE
        watcher.stop.request()

    watch = Watch(stop_when_waiting, watcher.stop)
    with pytest.raises(InterruptedTransferError):
        store.write_blob(blob_of(content), BytesSource(content), watch)


def test_a_killed_download_shows_nothing_and_goes_on_where_it_was(
    store: LayoutStore, start: Start, watcher: Watcher
) -> None:
    content = random.Random(1).randbytes(SIZE)
    worker = start("download", store.root, SIZE, 1)
    worker.expect("half")
    worker.kill()

    assert files_under(store.root / "blobs") == []
    assert not store.has_blob(blob_of(content))
    source = BytesSource(content)
    assert store.write_blob(blob_of(content), source, watcher.watch) is Outcome.WRITTEN
    assert len(source.offsets) == 1
    assert 0 < source.offsets[0] <= SIZE // 2
    assert content_of(store, blob_of(content)) == content


def test_a_killed_import_shows_nothing_and_its_space_is_reclaimed(
    store: LayoutStore, start: Start, tmp_path: Path, watcher: Watcher
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    running = start("import", store.root, path)
    killed = start("import", store.root, path)
    running.expect("half")
    killed.expect("half")
    killed.kill()

    assert files_under(store.root / "blobs") == []
    assert len(list((store.root / "ingest").glob("import-*"))) == 2
    report = store.gc()
    assert len(report.partials) == 1
    assert report.bytes_freed == SIZE
    running.go()
    running.expect("outcome")
    running.finish()
    assert store.import_file(path, watcher.watch).outcome is Outcome.EXISTED


@pytest.mark.parametrize("use", ["import_file", "write_blob", "receive_blob", "adopt_file"])
def test_the_next_writer_sweeps_what_a_killed_import_left(
    store: LayoutStore, start: Start, tmp_path: Path, watcher: Watcher, use: str
) -> None:
    path, small = tmp_path / "weights", tmp_path / "small"
    path.write_bytes(os.urandom(SIZE))
    small.write_bytes(b"small")
    blob, source = blob_of(b"small"), BytesSource(b"small")
    killed, running = start("import", store.root, path), start("import", store.root, path)
    killed.expect("half")
    running.expect("half")
    left = set((store.root / "ingest").glob("import-*"))
    killed.kill()

    match use:
        case "import_file":
            store.import_file(small, watcher.watch)
        case "write_blob":
            store.write_blob(blob, source, watcher.watch)
        case "receive_blob":
            store.receive_blob(blob, io.BytesIO(b"small"), watcher.watch)
        case "adopt_file":
            store.adopt_file(small, blob, watcher.watch, link=False)
    [kept] = (store.root / "ingest").glob("import-*")
    assert kept in left
    running.go()
    running.expect("outcome")
    running.finish()
    assert store.has_file(Digest.of(path.read_bytes()))
    assert not list((store.root / "ingest").glob("import-*"))


@pytest.mark.scenario(21)
def test_eight_processes_tag_at_once(store: LayoutStore, start: Start) -> None:
    models = [small_model(bytes([number])) for number in range(8)]
    for model in models:
        write_model(store, model)
    names = [f"docker.io/ai/model-{number}:latest" for number in range(8)]
    workers = [
        start("tag", store.root, model.digest, name)
        for model, name in zip(models, names, strict=True)
    ]
    for worker in workers:
        worker.expect("ready")
    for worker in workers:
        worker.go()

    index = store.root / "index.json"
    reads = 0
    while any(worker.process.poll() is None for worker in workers):
        assert len(json.loads(index.read_bytes())["manifests"]) == 8
        reads += 1
    assert reads > 0
    for worker in workers:
        assert worker.finish() == ["done"]
    for model, name in zip(models, names, strict=True):
        assert store.resolve(name).digest == model.digest
    assert store.fsck(watch=Watcher().watch).ok


def test_eight_processes_move_one_tag(store: LayoutStore, start: Start) -> None:
    models = [small_model(bytes([number])) for number in range(8)]
    for model in models:
        write_model(store, model)
    workers = [start("tag", store.root, model.digest, "ai/x:v1") for model in models]
    for worker in workers:
        worker.expect("ready")
    for worker in workers:
        worker.go()
    for worker in workers:
        worker.finish()

    assert store.resolve("ai/x:v1").digest in {model.digest for model in models}
    assert [len(model.names) for model in store.models()] == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.scenario(22)
def test_a_collection_during_a_pull_takes_nothing_from_it(store: LayoutStore, start: Start) -> None:
    worker = start("pull", store.root, SIZE, 22)
    worker.expect("half")
    rubbish = store.write_bytes(b"rubbish", "text/plain")

    report = store.gc(grace_seconds=0)
    assert report.removed == (rubbish.digest,)
    assert len(report.kept) == 2  # the small layer and the config
    assert report.partials == ()

    worker.go()
    worker.expect("done")
    worker.finish()
    assert store.resolve("pulled").size > 0
    assert store.fsck(watch=Watcher().watch).ok
    assert store.gc(grace_seconds=0).removed == ()


def test_the_lease_of_a_dead_process_keeps_nothing(store: LayoutStore, start: Start) -> None:
    blob = store.write_bytes(b"weights", "text/plain")
    worker = start("lease", store.root, blob.digest)
    worker.expect("held")
    assert store.gc(grace_seconds=0).kept == (blob.digest,)
    worker.kill()
    assert store.gc(grace_seconds=0).removed == (blob.digest,)
    assert list((store.root / "ingest" / "leases").iterdir()) == []


def test_a_model_in_use_is_not_removed(store: LayoutStore, start: Start) -> None:
    model = small_model(b"weights")
    write_model(store, model, "docker.io/ai/x:latest")
    worker = start("lease", store.root, model.digest, *(b.digest for b in model.manifest.blobs))
    worker.expect("held")
    with pytest.raises(LockedError, match=f"process {worker.process.pid}") as caught:
        store.remove("x")
    assert caught.value.exit_code == 7

    removal = store.remove("x", force=True)
    assert removal.deleted == (model.digest,)
    assert removal.freed == ()
    for blob in model.manifest.blobs:
        assert store.has_blob(blob), "the process that uses it keeps it"
    worker.go()
    worker.finish()
    assert len(store.gc(grace_seconds=0).removed) == 3


def test_processes_that_make_one_store_at_once_agree(tmp_path: Path, start: Start) -> None:
    workers = [start("create", tmp_path / "new") for _ in range(4)]
    for worker in workers:
        worker.expect("ready")
    for worker in workers:
        worker.go()
    for worker in workers:
        assert worker.finish() == ["done"]
    assert LayoutStore(tmp_path / "new", create=False).models() == ()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path, start: Start) -> None:
    lock = FileLock(tmp_path / "lock")
    worker = start("lock", lock.path)
    worker.expect("held")
    assert not lock.is_free()
    with pytest.raises(LockedError, match=f"process {worker.process.pid}"), lock.held(patience=0):
        pass
    worker.kill()
    assert lock.is_free()
    with lock.held(patience=0):
        pass


def test_a_tag_survives_while_its_model_is_removed_elsewhere(
    store: LayoutStore, tmp_path: Path
) -> None:
    """Two objects behave as two processes: each reads the index under the lock."""
    other = LayoutStore(store.root)
    model = small_model(b"weights")
    write_model(store, model, "docker.io/ai/x:v1")
    assert other.resolve("x:v1").digest == model.digest
    other.tag("x:v1", Reference.parse("ai/x:v2"))
    assert store.remove("x:v1").deleted == ()
    other.remove("x:v2")
    for name in ("x:v1", "x:v2", str(model.digest)):
        with pytest.raises(NotFoundError):
            store.resolve(name)
