"""Kept bundles: a runtime never gets wrong bytes, and bundles are deleted with their models."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import modelpack
from modelpack.errors import LockedError, NotFoundError
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.resolve import kept_bundle
from modelpack.progress import Action, Progress
from modelpack.storage import watching
from modelpack.store import kept_bundles
from modelpack.store.filesystem import bytes_used
from modelpack.store.fsck import Fault, FsckReport
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import tiny_gguf, tiny_safetensors
from tests.operations.test_foreign import keep, kit_of
from tests.unpacking.tars import by_tarfile

KIT_TAR = "application/vnd.kitops.modelkit.model.v1.tar"
LINKED, PACKED = "docker.io/x/linked:v1", "docker.io/x/packed:v1"


@dataclass(frozen=True)
class World:
    """A store with a model of files, and a model whose files are in an archive."""

    store: modelpack.Store
    files: Path

    def again(self) -> None:
        """Restore the blobs of LINKED, as a pull does."""
        modelpack.package(
            LINKED, modelpack.PackageRequest(safetensors_dir=self.files), store=self.store
        )

    def contents(self, name: str) -> dict[str, bytes]:
        """Return the bytes that a runtime reads from the model."""
        model, directory = kept_bundle(name, store=self.store)
        assert directory == self.store.bundles.directory(model.digest) / "model"
        assert not directory.parent.is_symlink()
        for path in directory.parent.rglob("*"):
            assert not path.is_symlink()
        return {
            str(path.relative_to(directory.parent)): path.read_bytes()
            for path in directory.parent.rglob("*")
            if path.is_file() and path.name != "bundle.json"
        }

    def fsck(self) -> FsckReport:
        return modelpack.Store(self.store.root).fsck(watch=watching(None))


@pytest.fixture
def world(tmp_path: Path) -> World:
    files = tiny_safetensors(tmp_path)
    made = World(modelpack.Store(tmp_path / "store"), files)
    made.again()
    packed = by_tarfile({"weights/tiny.gguf": tiny_gguf(tmp_path).read_bytes(), "x.json": b"{}"})
    keep(made.store, kit_of({"path": "weights/tiny.gguf"}), [(KIT_TAR, packed)], PACKED)
    return made


def damage(path: Path) -> None:
    """Change a byte in place, like a failing disk, without changing size or times."""
    before = path.stat()
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def weight_of(world: World) -> Path:
    [weight] = modelpack.resolve(LINKED, store=world.store).files
    return weight.path


def test_damage_does_not_outlive_a_repair(world: World) -> None:
    """Corrupt a blob in place, run fsck, restore it, run fsck: the bundle has the new blob."""
    sound = world.contents(LINKED)
    blob = weight_of(world)
    damage(blob)
    found = {problem.kind for problem in world.fsck().problems}
    assert {Fault.CONTENT, Fault.BUNDLE} <= found
    assert world.store.bundles.all() == {}
    world.again()
    assert world.fsck().ok
    assert world.contents(LINKED) == sound
    _, directory = kept_bundle(LINKED, store=world.store)
    assert (directory / "model.safetensors").samefile(blob)
    assert world.fsck().ok


def test_damage_is_repaired_even_without_fsck(world: World) -> None:
    """The damaged blob was moved away, so its link in the bundle is not used."""
    sound = world.contents(LINKED)
    blob = weight_of(world)
    damage(blob)
    blob.unlink()
    world.again()
    assert world.contents(LINKED) == sound
    assert world.fsck().ok


def edited(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")


def replaced(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b"!")


def linked_elsewhere(path: Path) -> None:
    other = _record(path).parents[2] / "elsewhere"
    shutil.copyfile(path, other)
    path.unlink()
    path.symlink_to(other)


def added(path: Path) -> None:
    (path.parent / "tokenizer.json").write_text("{}")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def moved_away(path: Path) -> None:
    bundle = _record(path).parent
    other = bundle.parents[1] / "other"
    shutil.rmtree(other, ignore_errors=True)
    bundle.rename(other)
    bundle.symlink_to(other)


def without_record(path: Path) -> None:
    _record(path).unlink()


def with_garbage(path: Path) -> None:
    _record(path).write_text('{"boot": "", "files": [["x", "y"]]}')


def _record(path: Path) -> Path:
    return next(parent / "bundle.json" for parent in path.parents if (parent / "model").is_dir())


CHANGES: dict[str, Callable[[Path], None]] = {
    "damaged": damage,
    "edited": edited,
    "replaced": replaced,
    "a link": linked_elsewhere,
    "deleted": Path.unlink,
    "a directory": a_directory,
    "a file beside": added,
    "the whole bundle a link": moved_away,
    "no record": without_record,
    "another record": with_garbage,
}
#: Changes of the bytes of a file, which also change the blob of a hard link.
IN_PLACE = ("damaged", "edited")


@pytest.mark.sample(3)
@pytest.mark.parametrize("where", ["copy", "archive", "config.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_made_again(
    world: World, change: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "copy":
        monkeypatch.setattr(os, "link", _refusing)
    name = PACKED if where == "archive" else LINKED
    sound = world.contents(name)
    file = _file(world, name, where)
    CHANGES[change](file)
    assert world.contents(name) == sound
    assert world.fsck().ok

    CHANGES[change](_file(world, name, where))
    report = world.fsck()
    quiet = change in ("no record", "another record", "the whole bundle a link")
    assert [problem.kind for problem in report.problems] == ([] if quiet else [Fault.BUNDLE])
    assert quiet or "restart runtimes" in report.problems[0].message
    assert world.store.bundles.all() == {}
    assert world.fsck().ok
    assert world.contents(name) == sound


def _file(world: World, name: str, where: str) -> Path:
    _, directory = kept_bundle(name, store=world.store)
    at = {"copy": "model/model.safetensors", "archive": "model/weights/tiny.gguf"}
    return directory.parent / at.get(where, where)


def _refusing(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in IN_PLACE])
def test_what_is_changed_of_links_is_made_again(world: World, change: str) -> None:
    sound = world.contents(LINKED)
    _, directory = kept_bundle(LINKED, store=world.store)
    CHANGES[change](directory / "model.safetensors")
    assert world.contents(LINKED) == sound
    assert world.fsck().ok


def test_an_edit_through_a_link_is_detected(world: World, tmp_path: Path) -> None:
    """The blob is the same damaged file, so neither resolve nor a bundle may return it."""
    sound = world.contents(LINKED)
    _, directory = kept_bundle(LINKED, store=world.store)
    edited(directory / "model.safetensors")
    for use in (
        lambda: kept_bundle(LINKED, store=world.store),
        lambda: modelpack.resolve(LINKED, store=world.store),
    ):
        with pytest.raises((NotFoundError, modelpack.errors.PartialModelError)):
            use()
    world.again()
    assert world.contents(LINKED) == sound
    # A bundle outside the store belongs to the user, but the blobs do not.
    world.store.remove(LINKED)
    world.again()
    modelpack.bundle(LINKED, tmp_path / "mine", store=world.store)
    edited(tmp_path / "mine/model/model.safetensors")
    with pytest.raises((NotFoundError, modelpack.errors.PartialModelError)):
        modelpack.resolve(LINKED, store=modelpack.Store(world.store.root))


def test_a_sound_bundle_is_not_hashed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.contents(LINKED), world.contents(PACKED)
    inodes = [os.lstat(path).st_ino for path in world.store.bundles.all()]

    def fail(*_arguments: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr(kept_bundles, "hash_file", fail)
    assert (world.contents(LINKED), world.contents(PACKED)) == before
    assert [os.lstat(path).st_ino for path in world.store.bundles.all()] == inodes


@pytest.mark.parametrize("event", ["touched", "restarted"])
def test_a_copy_in_doubt_is_hashed_once(
    world: World, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    sound = world.contents(PACKED)
    [directory] = world.store.bundles.all()
    inode = os.lstat(directory).st_ino
    if event == "touched":
        os.utime(directory / "model/weights/tiny.gguf")
    else:
        monkeypatch.setattr(kept_bundles, "boot_id", lambda: "another")
    hashed: list[Path] = []
    hash_file = kept_bundles.hash_file

    def counting(path: Path, algorithm: str = "sha256") -> modelpack.artifacts.digest.Digest:
        hashed.append(path)
        return hash_file(path, algorithm)

    monkeypatch.setattr(kept_bundles, "hash_file", counting)
    assert world.contents(PACKED) == sound
    assert len(hashed) == (1 if event == "touched" else 3)
    assert world.contents(PACKED) == sound
    assert len(hashed) == (1 if event == "touched" else 3)
    assert os.lstat(directory).st_ino == inode


def test_a_copy_says_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refusing)
    notes: list[Progress] = []
    kept_bundle(LINKED, store=world.store, progress=notes.append)
    [said] = [note.message for note in notes if note.action is Action.NOTE and note.message]
    assert said.startswith("files are copied: hard links")
    assert os.strerror(errno.EXDEV) in said


# Removal


def used(world: World) -> int:
    return bytes_used(world.store.root / "blobs", world.store.root / "bundles")


def test_removing_a_model_frees_its_bundle(world: World) -> None:
    world.contents(LINKED)
    world.contents(PACKED)
    world.store.tag(LINKED, modelpack.Reference.parse("x/second:v1"))
    everything = used(world)
    assert world.store.remove(LINKED).bytes_freed == 0
    assert len(world.store.bundles.all()) == 2  # the model has another name
    first, second = world.store.remove("x/second:v1"), world.store.remove(PACKED)
    assert first.bytes_freed > 0
    assert second.bytes_freed > 0
    assert world.store.bundles.all() == {}
    assert used(world) == everything - first.bytes_freed - second.bytes_freed == 0
    assert world.store.gc(grace_seconds=0).bytes_freed == 0


def test_serving_again_makes_no_second_copy(world: World) -> None:
    for _ in range(3):
        world.contents(LINKED)
        beside = used(world) - bytes_used(world.store.root / "blobs")
        assert 0 < beside < 2000  # bundle.json and config.json
        world.store.remove(LINKED)
        world.again()


def test_a_variant_s_bundle_goes_with_the_index(world: World) -> None:
    create_index("x/all:v1", [NamedVariant("a", LINKED), NamedVariant("b", PACKED)],
                 store=world.store)  # fmt: skip
    world.store.remove(LINKED)
    world.store.remove(PACKED)
    kept_bundle("x/all:v1", store=world.store)
    assert len(world.store.bundles.all()) == 1
    assert world.store.remove("x/all:v1").bytes_freed > 0
    assert world.store.bundles.all() == {}
    assert used(world) == 0


def test_a_model_that_is_used_stays(world: World) -> None:
    """As with vLLM: a forced removal deletes the model; its files stay until the process ends."""
    with ExitStack() as until:
        _, directory = kept_bundle(LINKED, store=world.store, until=until)
        other = modelpack.Store(world.store.root)
        with pytest.raises(LockedError, match="in use"):
            other.remove(LINKED)
        other.remove(LINKED, force=True)
        other.gc(grace_seconds=0)
        assert (directory / "model.safetensors").is_file()
        assert world.fsck().ok
        assert (directory / "model.safetensors").is_file()
    before = used(world)
    planned = world.store.gc(grace_seconds=0, dry_run=True)
    report = world.store.gc(grace_seconds=0)
    assert report.bytes_freed == planned.bytes_freed == before - used(world) > 0
    assert report.partials == planned.partials != ()
    assert not directory.exists()


def test_a_collection_takes_what_kills_left(world: World) -> None:
    world.contents(LINKED)
    making = world.store.root / "ingest" / "bundles"
    (making / "dead").mkdir()
    (making / "dead" / "x").write_bytes(b"x" * 1000)
    (making / "dead.lock").touch()
    (making / "1.gone").mkdir()
    (making / "1.gone" / "y").write_bytes(b"y" * 100)
    model = modelpack.inspect(PACKED, store=world.store)
    with world.store.bundles.workspace(model.digest, modelpack.Stop(), print) as folder:
        assert world.store.gc(dry_run=True).bytes_freed == 1100
        assert world.store.gc().bytes_freed == 1100
        assert folder.is_dir()
    assert list(making.iterdir()) == []
    assert len(world.store.bundles.all()) == 1


def test_many_at_once_make_one(world: World) -> None:
    found: list[dict[str, bytes]] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            mine = World(modelpack.Store(world.store.root), world.files)
            for _ in range(3):
                found.append(mine.contents(PACKED if number % 2 else LINKED))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({tuple(sorted(contents.items())) for contents in found}) == 2
    assert world.fsck().ok
    assert list((world.store.root / "ingest" / "bundles").iterdir()) == []


def test_removal_beside_use_leaves_a_sound_store(world: World) -> None:
    """Remove and restore a model while other threads request its bundle."""
    stop, wrong = threading.Event(), []
    sound = world.contents(LINKED)["model/model.safetensors"]

    def ask() -> None:
        store = modelpack.Store(world.store.root)
        while not stop.is_set():
            try:
                _, directory = kept_bundle(LINKED, store=store)
                if (directory / "model.safetensors").read_bytes() != sound:
                    wrong.append("other bytes")
            except (modelpack.errors.ModelpackError, FileNotFoundError):
                continue
            except BaseException as error:
                wrong.append(repr(error))
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            try:
                world.store.remove(LINKED)
            except LockedError:  # a bundle of the model is being made
                continue
            world.again()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert world.fsck().ok
    world.store.remove(LINKED)
    world.store.remove(PACKED)
    world.store.gc(grace_seconds=0)
    assert used(world) == 0


def test_on_the_command_line(world: World) -> None:
    store = ["--store", world.store.root]
    world.contents(LINKED)
    damage(weight_of(world))
    result = command("fsck", *store)
    assert result.code != 0
    assert "the bundle" in result.out
    world.again()
    assert succeed("fsck", *store).code == 0
    world.contents(LINKED)
    freed = succeed("rm", LINKED, PACKED, "--json", *store).json["bytesFreed"]
    assert freed > weight_size(world)
    assert used(world) == 0


def weight_size(world: World) -> int:
    return (world.files / "model.safetensors").stat().st_size


def nest(top: Path, name: str, count: int) -> None:
    """Make `count` nested directories with a file in the last one.

    They are made from the inside out, since the path of the last one may be too long for one call.
    """
    inner = top / "made"
    inner.mkdir(parents=True)
    (inner / "file").write_bytes(b"x")
    for _ in range(count - 1):
        outer = top / "outer"
        outer.mkdir()
        inner.rename(outer / name)
        outer.rename(inner)
    inner.rename(top / name)


@pytest.mark.parametrize("name", ["d", "d" * 200], ids=["short", "longer than a path may be"])
def test_deep_directories_in_a_bundle_are_reported_and_deleted(world: World, name: str) -> None:
    world.contents(PACKED)
    _, directory = kept_bundle(PACKED, store=world.store)
    nest(directory, name, 1100)
    assert [problem.kind for problem in world.fsck().problems] == [Fault.BUNDLE]
    assert world.store.bundles.all() == {}
    assert os.listdir(world.store.root / "ingest" / "bundles") == []
    assert world.fsck().ok


@pytest.mark.long
@pytest.mark.parametrize("name", ["d", "d" * 200], ids=["short", "longer than a path may be"])
def test_a_collection_deletes_deep_directories(world: World, name: str) -> None:
    """Delete bundles without a model, bundles of killed processes, and abandoned uploads."""
    root = world.store.root
    places = [root / "bundles", root / "ingest" / "bundles" / "left", root / "ingest" / "uploads"]
    for place in places:
        nest(place, name, 1100)
    os.utime(root / "ingest" / "uploads" / name, (0, 0))
    report = world.store.gc(grace_seconds=0)
    assert {f"bundles/{name}", "bundles/left", f"uploads/{name}"} <= set(report.partials)
    assert [path for place in places if place.exists() for path in place.iterdir()] == []
    assert world.fsck().ok
