"""Limits of archives: bytes, entries, headers, memory and disk space."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.bundles.bundle import lay_out
from modelpack.bundles.directory import Tree
from modelpack.bundles.tar import TarLimits
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InterruptedTransferError,
    NotFoundError,
    SizeMismatchError,
    StorageFullError,
)
from modelpack.progress import Action, Progress, Stop
from modelpack.storage import Watch
from tests.unpacking.archived import GZIP, PACK, TAR, WEIGHT, ZSTD, bundle_of
from tests.unpacking.stored import Stored, contents
from tests.unpacking.tars import END, by_tarfile, file, folder, gzipped, header, zstandard_bomb

FILES = {"config.json": b"{}", "sub/deep/a.txt": b"a" * 5000}
SMALL = TarLimits(max_bytes=1 << 20, free_bytes=1 << 16, ratio=10, max_entries=20)

LIMITED = {
    "one large file": file(b"a", bytes(100_000)),
    "many files": b"".join(file(b"%d" % i, bytes(9_000)) for i in range(10)),
    "a claim": header(b"a", 100 << 30),
    "a larger claim": header(b"a", size_field=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),
    "after the end": END + bytes(100_000),
    "an unread rest": file(b"a", b"x") + END + bytes(1 << 20),
}


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.scenario(25)
def test_bomb(stored: Stored, directory: Path, media_type: str, name: str) -> None:
    blob = PACK[media_type](LIMITED[name] + END)
    assert len(blob) < 3000
    with pytest.raises(IntegrityError, match="expands to more than 65536 bytes"):
        bundle_of(stored, directory, [(media_type, blob)], limits=SMALL)
    assert not directory.exists()


def test_limit_grows_with_the_blob(stored: Stored, directory: Path) -> None:
    data = random.Random(1).randbytes(50_000)
    limits = TarLimits(free_bytes=1, ratio=2)
    bundle_of(stored, directory, [(GZIP, gzipped(file(b"a", data) + END))], limits=limits)
    assert (directory / "model/a").read_bytes() == data


def test_limit_that_no_archive_passes(stored: Stored, directory: Path) -> None:
    limits = TarLimits(max_bytes=40_000)
    with pytest.raises(IntegrityError, match="more than 40000 bytes"):
        bundle_of(stored, directory, [(TAR, file(b"a", bytes(50_000)) + END)], limits=limits)


@pytest.mark.parametrize(
    "data",
    [
        b"".join(file(b"%d" % i) for i in range(21)),
        b"".join(folder(b"%d" % i) for i in range(21)),
        folder(b"same") * 21,
        folder(b"./") * 21,
        file(b"/".join([b"d"] * 21)),  # directories that are only implied count too
    ],
)
def test_too_many_entries(stored: Stored, directory: Path, data: bytes) -> None:
    with pytest.raises(IntegrityError, match="20 files and directories"):
        bundle_of(stored, directory, [(TAR, data + END)], limits=SMALL)
    assert not directory.exists()


def test_as_many_entries_as_may_be(stored: Stored, directory: Path) -> None:
    data = b"".join(file(b"%d" % i) for i in range(12)) + END
    other = b"".join(file(b"x%d" % i) for i in range(8)) + END
    bundle_of(stored, directory, [(TAR, data), (TAR, other)], limits=SMALL)
    assert len(contents(directory / "model")) == 21, "the weight is in no archive"


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_huge_header(stored: Stored, directory: Path, kind: bytes) -> None:
    blob = zstandard_bomb(header(b"x", 1 << 33, kind=kind), 32 << 20)
    with pytest.raises(FormatError, match="headers of one entry"):
        bundle_of(stored, directory, [(ZSTD, blob)])


@pytest.mark.parametrize(
    ("window_log", "limits"), [(30, TarLimits()), (24, TarLimits(max_window_bytes=1 << 23))]
)
def test_frame_that_asks_for_much_memory(
    stored: Stored, directory: Path, window_log: int, limits: TarLimits
) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, write_content_size=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = compressor.compress(by_tarfile(FILES) + bytes(200_000)) + compressor.flush()
    with pytest.raises(FormatError, match="memory"):
        bundle_of(stored, directory, [(ZSTD, blob)], limits=limits)


def test_no_room(stored: Stored, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "free_bytes", lambda _: (64 << 20) + 4096)
    with pytest.raises(StorageFullError) as caught:
        bundle_of(stored, directory, [(TAR, by_tarfile(FILES))])
    assert (caught.value.needed, caught.value.available) == (5000, 4094)
    assert not directory.exists()


def test_lost_and_cut_archives(stored: Stored, directory: Path) -> None:
    data = by_tarfile(FILES)
    model = stored.model([WEIGHT, (TAR, None, data)], media_types.CNCF_CONFIG, diff_ids=[b"x"])
    blob = stored.path(model.manifest.layers[1])
    blob.unlink()
    with pytest.raises(NotFoundError):
        lay_out(model, stored.path, directory)
    blob.write_bytes(data[:-512])
    with pytest.raises(SizeMismatchError):
        lay_out(model, stored.path, directory)
    assert not directory.exists()


def test_progress_and_stop(stored: Stored, directory: Path) -> None:
    data = by_tarfile({"big": bytes(12 << 20)})
    reports: list[Progress] = []
    bundle_of(stored, directory, [(TAR, data)], watch=Watch(reports.append, Stop()))
    digest = Digest.of(data)
    mine = [report for report in reports if report.digest == digest]
    assert len(mine) >= 3
    assert all(report.action is Action.UNPACK for report in mine)
    assert [report.completed for report in mine] == sorted(report.completed for report in mine)
    assert [report.finished for report in mine] == [False] * (len(mine) - 1) + [True]

    stop = Stop()
    stopping = Watch(lambda report: stop.request() if report.digest == digest else None, stop)
    with pytest.raises(InterruptedTransferError):
        bundle_of(stored, directory, [(TAR, data)], watch=stopping, overwrite=True)
    assert (directory / "model/big").stat().st_size == 12 << 20


MEASURED = """
import resource, sys
from pathlib import Path
from modelpack.errors import IntegrityError
from modelpack.bundles.bundle import lay_out
from modelpack.bundles.tar import TarLimits
from tests.unpacking.stored import Stored
from tests.unpacking.archived import WEIGHT, ZSTD
from tests.unpacking.tars import file, zstandard_bomb, zstandard_of
from modelpack.artifacts import media_types

def peak():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024

root = Path(sys.argv[1])
stored = Stored(root / "store")
def lay(number, blob, **limits):
    layers = [WEIGHT, (ZSTD, None, blob)]
    model = stored.model(layers, media_types.CNCF_CONFIG, diff_ids=[b"x"])
    try:
        lay_out(model, stored.path, root / str(number), limits=TarLimits(**limits))
    except IntegrityError as error:
        print(type(error).__name__, str(error)[-80:])

lay(0, zstandard_of(file(b"a", b"x") + bytes(1024)))
bomb = zstandard_bomb(file(b"a", b"x") + bytes(1024), 100 << 30)
before = peak()
lay(1, bomb)
print(len(bomb), peak() - before)
"""


@pytest.mark.scenario(25)
def test_memory_stays_flat(tmp_path: Path) -> None:
    """3 MB stand for 100 GiB here; reading stops at 200 times the size of the blob."""
    root = Path(__file__).parent.parent.parent
    output = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert output[0].startswith("IntegrityError")
    size, growth = map(int, output[1].split())
    assert size < 4_000_000
    assert growth < 20_000_000


SHARED: dict[str, tuple[Callable[[int], bytes], str]] = {
    "bytes": (lambda n: file(b"%d" % n, bytes(40_000)), "expands to more than 2.... bytes"),
    "entries": (
        lambda n: b"".join(file(b"%d/%d" % (n, i)) for i in range(8)),
        "20 files and directories",
    ),
    "paths": (
        lambda n: b"".join(file(b"%d-%d" % (n, i) + b"p" * 90) for i in range(5)),
        "1000 bytes of paths",
    ),
}


@pytest.mark.parametrize("what", SHARED)
def test_archives_of_one_model_share_their_limits(
    stored: Stored, directory: Path, what: str
) -> None:
    """Otherwise a model of thousands of small archives could fill the disk."""
    made, limit = SHARED[what]
    limits = replace(SMALL, max_path_bytes=1000)
    archives = [(GZIP, PACK[GZIP](made(number) + END)) for number in range(3)]
    bundle_of(stored, directory, archives[:1], limits=limits)
    with pytest.raises(IntegrityError, match=limit):
        bundle_of(stored, directory / "all", archives, limits=limits)
    assert not (directory / "all").exists()
