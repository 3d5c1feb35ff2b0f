"""Commands to be killed: what is there before, what is run, and what has to hold afterwards."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.operations.archives import archive_of
from modelpack.operations.resolve import kept_bundle
from modelpack.progress import Stop, silent
from modelpack.storage import Watch, watching
from modelpack.store.filesystem import bytes_used
from tests.faults.victim import forked
from tests.registry.faults import dripping
from tests.registry.faulty import FaultyRegistry
from tests.unpacking.tars import by_tarfile
from tests.weights import write_safetensors

MIB = 1024 * 1024
# Enough for direct writes, and for what is flushed on the way.
SIZE = 9 * MIB
OLD, NEW = "team/old:v1", "team/new:v1"
KIT_TAR = "application/vnd.kitops.modelkit.model.v1.tar"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: by a signal), output, seconds and calls."""

    code: int
    out: str
    seconds: float
    calls: int


class Place:
    """A directory with a store `here` that has the model OLD, and what commands need besides."""

    def __init__(self, root: Path, registry: FaultyRegistry, here: Path | None = None) -> None:
        self.root = root
        self.here = here or root / "store"
        self.registry = registry
        self.remote = f"{registry.host}/{NEW}"

    @property
    def store(self) -> modelpack.Store:
        return modelpack.Store(self.here)

    def model(self, name: str, seed: int, size: int = SIZE) -> Path:
        """Have the files of a model; return their directory."""
        folder = self.root / name
        write_safetensors(folder / "model.safetensors", random.Random(seed).randbytes(size))
        (folder / "config.json").write_text(f'{{"seed": {seed}}}')
        return folder

    def prepare(self) -> None:
        """Make the store and package OLD."""
        old = modelpack.PackageRequest(safetensors_dir=self.model("old", 1, MIB))
        modelpack.package(OLD, old, store=self.store)

    def run(self, *arguments: str | Path, last: int = 0, seconds: float | None = None) -> Ended:
        """Run a command; kill it at call number `last` or after `seconds`, if it still runs."""
        output, calls = self.root / "output", self.root / "calls"
        calls.unlink(missing_ok=True)
        words = ["--store", self.here, "--progress", "none", *arguments]
        started = time.monotonic()
        process = forked(words, last=last, output=output, calls=calls)
        process.join(seconds)
        if process.is_alive() and seconds is not None:
            process.kill()
        process.join(120)
        took = time.monotonic() - started
        code = process.exitcode
        assert code is not None, f"{arguments} hangs: {output.read_text()}"
        process.close()
        made = int(calls.read_text()) if calls.exists() else 0
        return Ended(code, output.read_text(), took, made)

    def staged(self) -> int:
        """The bytes of the blobs that are here, and of what is on its way."""
        blobs = (path for path in (self.here / "blobs").rglob("*") if path.is_file())
        there = sum(path.stat().st_size for path in blobs)
        return there + sum(map(_present, (self.here / "ingest").glob("*.part")))

    def check(self) -> None:
        """Assert that the store is clean, and that no tag lacks anything."""
        store = self.store
        report = store.fsck(watch=Watch(silent, Stop()))
        assert report.ok, report.problems
        assert OLD in {f"{r.repository}:{r.tag}" for m in store.models() for r in m.references}
        for model in store.models():
            for reference in model.references:
                for file in modelpack.resolve(str(reference), store=store).files:
                    assert file.path.stat().st_size > 0

    def whole(self, name: str) -> bool:
        """Return whether the model is in the store; `check` has seen that its parts are."""
        try:
            self.store.get(name)
        except modelpack.errors.NotFoundError:
            return False
        return True


class Command:
    """One command; subclasses say what is special about theirs."""

    def prepare(self, place: Place) -> None:
        """Make what is there before."""
        place.prepare()

    def arguments(self, place: Place) -> list[str | Path]:
        """The command line, which has to work the first, and any later time."""
        raise NotImplementedError

    def check_killed(self, place: Place) -> None:
        """Assert what holds after the kill."""
        place.check()

    def is_needed(self, place: Place) -> bool:
        """Return whether the command can be run again after a kill."""
        return True

    def check_done(self, place: Place) -> None:
        """Assert what holds after the command was run again."""
        place.check()
        assert place.whole(NEW)


class Package(Command):
    def arguments(self, place: Place) -> list[str | Path]:
        return ["package", "--safetensors-dir", place.root / "new", NEW]

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        place.model("new", 2)


class Pull(Command):
    """What was fetched is not fetched again."""

    size = SIZE
    #: Bytes that a registry may have sent and nobody read.
    unread = 0

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        request = modelpack.PackageRequest(safetensors_dir=place.model("new", 2, self.size))
        origin = modelpack.Store(place.root / "origin")
        modelpack.package(place.remote, request, push=True, store=origin)

    def arguments(self, place: Place) -> list[str | Path]:
        return ["pull", place.remote]

    def check_killed(self, place: Place) -> None:
        super().check_killed(place)
        self._before = place.staged()
        place.registry.requests.clear()

    def check_done(self, place: Place) -> None:
        place.check()
        assert place.whole(place.remote)
        fetched = sum(request.sent_size for request in place.registry.seen("GET", "/blobs/"))
        needed = place.staged() - self._before
        assert fetched <= needed + self.unread, "what was here was fetched again"


class PullInSegments(Pull):
    """A registry that is slow, and a blob that is worth several connections."""

    size = 44 * MIB
    unread = 8 * MIB  # of the stream that was found slow, in the buffers of its connection

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        slow = dripping(MIB, 0.012)  # less than 85 MB/s
        place.registry.faults.add("GET", "/blobs/", slow, times=None)


class Push(Command):
    """What the registry has is not sent again."""

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        request = modelpack.PackageRequest(safetensors_dir=place.model("new", 2))
        modelpack.package(place.remote, request, store=place.store)

    def arguments(self, place: Place) -> list[str | Path]:
        return ["push", place.remote]

    def check_killed(self, place: Place) -> None:
        super().check_killed(place)
        content = place.registry.content
        for (repository, _), digest in content.tags.items():
            raw = content.manifests[repository, digest][1]
            for blob in modelpack.Manifest.parse(raw, "the manifest").blobs:
                assert (repository, str(blob.digest)) in content.blobs
        self._before = sum(map(len, content.blobs.values()))
        place.registry.requests.clear()

    def check_done(self, place: Place) -> None:
        place.check()
        content = place.registry.content
        assert ("team/new", "v1") in content.tags
        sent = sum(request.body_size for request in place.registry.seen("PUT", "/blobs/"))
        assert sent <= sum(map(len, content.blobs.values())) - self._before, "sent again"


class Collect(Command):
    """Rubbish goes, everything else stays."""

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        store = place.store
        for number in range(12):
            store.write_bytes(b"%d" % number * 1000, "text/plain")
        gone = Digest.of(b"gone").encoded
        (place.here / "ingest" / f"sha256-{gone}.part").write_bytes(b"half of it")
        (place.here / "ingest" / f"import-{gone[:32]}.tmp").write_bytes(b"half of it")

    def arguments(self, place: Place) -> list[str | Path]:
        return ["gc", "--grace", "0"]

    def check_done(self, place: Place) -> None:
        place.check()
        store = place.store
        needed = {blob.digest for blob in modelpack.inspect(OLD, store=store).manifest.blobs}
        assert {path.name for path in (place.here / "blobs" / "sha256").iterdir()} == {
            store.resolve(OLD).digest.encoded,
            *(digest.encoded for digest in needed),
        }


class Import(Command):
    def prepare(self, place: Place) -> None:
        super().prepare(place)
        origin = modelpack.Store(place.root / "origin")
        request = modelpack.PackageRequest(safetensors_dir=place.model("new", 2))
        modelpack.package(NEW, request, store=origin)
        docker = modelpack.DockerStore(place.root / "docker", create=True)
        modelpack.export_to_docker([NEW], docker=docker, store=origin)

    def arguments(self, place: Place) -> list[str | Path]:
        return ["import", "--copy", "--docker-store", place.root / "docker", "--all"]


class ImportArchive(Command):
    """What arrived of an archive that was cut off is freed by a collection."""

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        origin = modelpack.Store(place.root / "origin")
        request = modelpack.PackageRequest(safetensors_dir=place.model("new", 2))
        modelpack.package(NEW, request, store=origin)
        archive = archive_of(origin, [NEW], watching(None))
        (place.root / "new.tar").write_bytes(b"".join(archive.pieces))

    def arguments(self, place: Place) -> list[str | Path]:
        return ["import", place.root / "new.tar"]

    def check_killed(self, place: Place) -> None:
        super().check_killed(place)
        place.store.gc(grace_seconds=0)
        place.check()
        if not place.whole(NEW):
            assert place.staged() < 2 * MIB, "blobs of the archive are left"


class Resolve(Command):
    """A model whose weights are in an archive, which has to be unpacked."""

    bundles = 1

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        store, folder = place.store, place.model("new", 3, MIB)
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        config = store.write_bytes(
            json.dumps({"manifestVersion": "1.0", "model": {"path": "."}}).encode(),
            media_types.KITOPS_CONFIG,
        )
        layer = store.write_bytes(by_tarfile(content), KIT_TAR)
        manifest = Manifest.build(config, [layer])
        name = str(modelpack.Reference.parse(NEW))
        store.write_manifest(manifest.descriptor, manifest.raw, name)

    def arguments(self, place: Place) -> list[str | Path]:
        return ["resolve", NEW]

    def check_done(self, place: Place) -> None:
        """Assert that a collection leaves what the models need, and nothing else."""
        place.check()
        store = place.store
        store.gc(grace_seconds=0)
        place.check()
        assert list((place.here / "ingest" / "bundles").glob("*")) == []
        assert len(store.bundles.all()) == self.bundles
        used = bytes_used(place.here / "blobs", place.here / "bundles")
        assert used < (3.5 * MIB if self.bundles else 1.5 * MIB)


class Remove(Resolve):
    """A model that has an unpacked bundle."""

    bundles = 0

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        kept_bundle(NEW, store=place.store)

    def arguments(self, place: Place) -> list[str | Path]:
        return ["rm", NEW]

    def is_needed(self, place: Place) -> bool:
        return place.whole(NEW)


COMMANDS = {
    "package": Package, "pull": Pull, "pull in segments": PullInSegments, "push": Push,
    "gc": Collect, "import": Import, "import an archive": ImportArchive,
    "resolve": Resolve, "rm": Remove,
}  # fmt: skip


@contextmanager
def prepared(command: Command, root: Path) -> Iterator[Place]:
    """Prepare a place; the registry keeps its content for as long as the block."""
    root.mkdir()
    with FaultyRegistry() as registry:
        place = Place(root, registry)
        command.prepare(place)
        yield place


@contextmanager
def unchanged(place: Place) -> Iterator[None]:
    """Have store and registry at the end as they were at the beginning."""
    before = place.root / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(place.here, before, symlinks=True)
    content = place.registry.content
    kept = [dict(part) for part in (content.blobs, content.manifests, content.tags)]
    try:
        yield
    finally:
        shutil.rmtree(place.here)
        before.rename(place.here)
        content.blobs, content.manifests, content.tags = kept  # type: ignore[assignment]
        content.sessions.clear()


def _present(part: Path) -> int:
    """The bytes that are there of a download; its journal says it of one in several places."""
    with suppress(OSError, ValueError, KeyError):
        journal = json.loads(part.with_suffix(".json").read_text())
        return sum(end - start for start, end in journal["present"])
    return part.stat().st_size


def died(ended: Ended) -> bool:
    """Return whether the process was killed, and not done before that; assert nothing else."""
    assert ended.code in (0, -signal.SIGKILL), (ended.code, ended.out)
    return ended.code != 0
