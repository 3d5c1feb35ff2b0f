"""Layers that are archives: unpacked beside the other files, within limits, never outside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from modelpack import mediatypes as mt
from modelpack.config import ModelConfig
from modelpack.digest import Digest
from modelpack.errors import (
    DigestMismatchError,
    FormatError,
    IntegrityError,
    InterruptedTransferError,
    ModelpackError,
    NotFoundError,
    SizeMismatchError,
    StorageFullError,
    UnsafePathError,
    UnsupportedError,
)
from modelpack.model import Role
from modelpack.progress import Action, Progress, Stop
from modelpack.storage import Watch
from modelpack.unpacking.bundle import Bundle, TarLimits, lay_out
from modelpack.unpacking.links import Placement
from modelpack.unpacking.tree import Tree
from tests.unpacking.stored import CNCF, Layer, Stored, contents, everything
from tests.unpacking.tars import (
    END,
    by_tarfile,
    file,
    folder,
    gnu_name,
    gzipped,
    header,
    pax,
    zstandard_bomb,
    zstandard_of,
)

WEIGHT: Layer = (mt.CNCF_WEIGHT_RAW, "tiny.gguf", b"weights")
TAR, GZIP, ZSTD = (f"{CNCF}weight.config.v1.{form}" for form in ("tar", "tar+gzip", "tar+zstd"))
PACK: dict[str, Callable[[bytes], bytes]] = {TAR: bytes, GZIP: gzipped, ZSTD: zstandard_of}
FILES = {"config.json": b"{}", "sub/": b"", "sub/deep/a.txt": b"a" * 5000, "empty/": b""}
SMALL = TarLimits(max_bytes=1 << 20, free_bytes=1 << 16, ratio=10, max_entries=20)


def bundle_of(
    stored: Stored,
    directory: Path,
    archives: Sequence[tuple[str, bytes]],
    *,
    diff_ids: Sequence[bytes] = (b"not checked: one too few",),
    **options: Any,
) -> Bundle:
    layers = [WEIGHT, *((media_type, None, blob) for media_type, blob in archives)]
    model = stored.model(layers, mt.CNCF_CONFIG, diff_ids=diff_ids)
    return lay_out(model, stored.path, directory, **options)


@pytest.mark.parametrize("media_type", [TAR, GZIP, ZSTD])
def test_unpacked_beside_the_files(stored: Stored, directory: Path, media_type: str) -> None:
    data = by_tarfile(FILES)
    blob = PACK[media_type](data)
    bundle = bundle_of(stored, directory, [(media_type, blob)], diff_ids=[b"weights", data])
    assert contents(directory / "model") == {
        "tiny.gguf": b"weights",
        "config.json": b"{}",
        "sub/deep/a.txt": b"a" * 5000,
    }
    assert (directory / "model/empty").is_dir()
    assert [(file.path, file.role, file.digest, file.linked) for file in bundle.files[1:]] == [
        ("model/config.json", Role.CONFIG, Digest.of(blob), Placement.EXTRACTED),
        ("model/sub/deep/a.txt", Role.CONFIG, Digest.of(blob), Placement.EXTRACTED),
    ]


@pytest.mark.parametrize("form", ["tar", "tar+gzip", "tar+zstd"])
def test_a_model_of_archives_alone(stored: Stored, directory: Path, form: str) -> None:
    """As modctl and KitOps pack: every layer is an archive."""
    pack = PACK[f"{CNCF}weight.config.v1.{form}"]
    shards = {f"./t-0000{n}-of-00002.safetensors": b"w%d" % n for n in (2, 1)}
    layers: list[Layer] = [
        (f"{CNCF}weight.v1.{form}", "weights/", pack(by_tarfile({"./": b"", **shards}))),
        (f"{CNCF}weight.v1.{form}", "p", pack(by_tarfile({"mmproj-f16.gguf": b"p"}))),
        (f"{CNCF}weight.config.v1.{form}", ".", pack(by_tarfile({"chat_template.jinja": b"{{}}"}))),
        (f"{CNCF}doc.v1.{form}", None, pack(by_tarfile({"LICENSE": b"MIT", "README.md": b"#"}))),
        (f"{CNCF}code.v1.{form}", None, pack(by_tarfile({"src/x.py": b""}))),
        (f"{CNCF}dataset.v1.{form}", None, pack(by_tarfile({"data/x.csv": b","}))),
    ]
    model = stored.model(layers, mt.CNCF_CONFIG, diff_ids=[b"x"])
    bundle = lay_out(model, stored.path, directory)
    assert bundle.weight == directory / "model/t-00001-of-00002.safetensors"
    assert bundle.weight.read_bytes() == b"w1"
    assert bundle.mmproj == directory / "model/mmproj-f16.gguf"
    assert bundle.chat_template == directory / "model/chat_template.jinja"
    assert {file.path.removeprefix("model/"): file.role for file in bundle.files} == {
        "t-00002-of-00002.safetensors": Role.WEIGHT,
        "t-00001-of-00002.safetensors": Role.WEIGHT,
        "mmproj-f16.gguf": Role.PROJECTOR,
        "chat_template.jinja": Role.CHAT_TEMPLATE,
        "LICENSE": Role.LICENSE,
        "README.md": Role.DOC,
        "src/x.py": Role.CODE,
        "data/x.csv": Role.DATASET,
    }


def test_dockers_older_archives(stored: Stored, directory: Path) -> None:
    layers: list[Layer] = [
        (mt.DOCKER_SAFETENSORS, None, b"weights"),
        (mt.DOCKER_VLLM_CONFIG_TAR, None, by_tarfile({"config.json": b"{}", "t.jinja": b"{{}}"})),
        (mt.DOCKER_DIR_TAR, None, by_tarfile({"sub/": b"", "sub/a": b"a"})),
        (mt.DOCKER_DIR_TAR, None, by_tarfile({"sub/": b"", "sub/b": b"b"})),
    ]
    model = stored.model(layers, ModelConfig(mt.DOCKER_CONFIG_V01, format="safetensors"))
    bundle = lay_out(model, stored.path, directory)
    assert contents(directory) == {
        "config.json": b'{"format":"safetensors"}\n',
        "model/model.safetensors": b"weights",
        "model/config.json": b"{}",
        "model/t.jinja": b"{{}}",
        "model/sub/a": b"a",
        "model/sub/b": b"b",
    }
    assert bundle.chat_template == directory / "model/t.jinja"


def test_modes_and_owners_are_left_behind(stored: Stored, directory: Path) -> None:
    data = (
        file(b"plain", mode=b"0000666\0")
        + file(b"run", mode=b"0006755\0")
        + header(b"sub", kind=b"5", mode=b"0001777\0")
        + file(b"sub/none", mode=b"0000000\0")
        + END
    )
    bundle_of(stored, directory, [(TAR, data)])
    modes = {path: mode for path, (_, mode, _) in everything(directory / "model").items()}
    assert modes == {
        "tiny.gguf": 0o444,
        "plain": 0o644,
        "run": 0o755,
        "sub": 0o755,
        "sub/none": 0o644,
    }


def test_a_file_of_the_store_is_never_written_to(stored: Stored, directory: Path) -> None:
    """The reference opens what is there for writing: through a hard link, into its store."""
    with pytest.raises(UnsafePathError, match=r"'tiny\.gguf' was made already"):
        bundle_of(stored, directory, [(TAR, by_tarfile({"tiny.gguf": b"other"}))])
    assert (stored.root / Digest.of(b"weights").encoded).read_bytes() == b"weights"
    assert not directory.exists()


LINK_THEN_FILE = (
    header(b"out", kind=b"2", link=b"../../..") + file(b"out/planted", b"x") + END,
    header(b"out", kind=b"2", link=b".") + file(b"out/planted", b"x") + END,
)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        *((data, UnsafePathError) for data in LINK_THEN_FILE),
        (header(b"passwd", kind=b"1", link=b"/etc/passwd") + END, UnsafePathError),
        (header(b"x", kind=b"1", link=b"../../../secret") + END, UnsafePathError),
        (file(b"a") + header(b"b", kind=b"1", link=b"a") + END, UnsafePathError),
        (header(b"null", kind=b"3") + END, UnsafePathError),
        (header(b"sda", kind=b"4") + END, UnsafePathError),
        (header(b"pipe", kind=b"6") + END, UnsafePathError),
        (header(b"sparse", kind=b"S", magic=b"ustar  \0") + END, UnsupportedError),
        (file(b"../planted") + END, UnsafePathError),
        (file(b"a/../../planted") + END, UnsafePathError),
        (file(b"/planted") + END, UnsafePathError),
        (file(b".//planted") + END, UnsafePathError),
        (file(b"./../planted") + END, UnsafePathError),
        (file(b"a\\planted") + END, UnsafePathError),
        (file(b"C:planted") + END, UnsafePathError),
        (file(b"a/./planted") + END, UnsafePathError),
        (file(b"") + END, UnsafePathError),
        (file(b".") + END, UnsafePathError),
        (file(b"planted", prefix=b"/etc") + END, UnsafePathError),
        (file(b"planted", prefix=b"..") + END, UnsafePathError),
        (pax({b"path": b"../planted"}) + file(b"a") + END, UnsafePathError),
        (pax({b"path": b"a\0b"}) + file(b"a") + END, UnsafePathError),
        (gnu_name(b"../planted") + file(b"a") + END, UnsafePathError),
        (folder(b"..") + END, UnsafePathError),
        (folder(b"../planted/") + END, UnsafePathError),
        (folder(b"/") + END, UnsafePathError),
        (folder(b"a//") + END, UnsafePathError),
        (file(b"a") + file(b"a") + END, UnsafePathError),
        (file(b"a") + file(b"A") + END, UnsafePathError),
        (file(b"a") + file(b"a/b") + END, UnsafePathError),
        (file(b"a") + folder(b"a") + END, UnsafePathError),
        (folder(b"a") + file(b"a") + END, UnsafePathError),
        (folder(b"tiny.gguf") + END, UnsafePathError),
        (file(b"TINY.gguf") + END, UnsafePathError),
        (gnu_name(b"/".join([b"d"] * 65)) + folder(b"d") + END, UnsafePathError),
        (file(b"x" * 100, b"data")[:-1], FormatError),
    ],
)
@pytest.mark.parametrize("media_type", [TAR, ZSTD])
def test_refused(
    stored: Stored,
    directory: Path,
    data: bytes,
    error: type[ModelpackError],
    media_type: str,
) -> None:
    with pytest.raises(error):
        bundle_of(stored, directory, [(media_type, PACK[media_type](data))])
    assert not directory.exists()


@pytest.mark.parametrize("name", [b".", b"./", b"./.", b"././"])
def test_the_directory_itself_is_no_entry(stored: Stored, directory: Path, name: bytes) -> None:
    bundle_of(stored, directory, [(TAR, folder(name) + file(b"./a", b"x") + END)])
    assert set(contents(directory / "model")) == {"tiny.gguf", "a"}


@pytest.mark.parametrize(
    ("media_type", "blob"),
    [
        (TAR, gzipped(by_tarfile(FILES))),
        (TAR, b""),
        (GZIP, by_tarfile(FILES)),
        (GZIP, b""),
        (GZIP, gzipped(by_tarfile(FILES))[:-20]),
        (GZIP, gzipped(by_tarfile(FILES))[:-1] + b"\xff"),  # the size in the trailer
        (GZIP, gzipped(by_tarfile(FILES)) + b"garbage"),
        (GZIP, gzipped(by_tarfile(FILES))[:40] + bytes(100)),
        (ZSTD, by_tarfile(FILES)),
        (ZSTD, b""),
        (ZSTD, zstandard_of(by_tarfile(FILES))[:60]),
        (ZSTD, zstandard_of(by_tarfile(FILES)) + b"garbage"),
        (ZSTD, zstandard_of(b"no tar" * 200)),
    ],
)
def test_damaged_archives(stored: Stored, directory: Path, media_type: str, blob: bytes) -> None:
    with pytest.raises(FormatError, match="layer "):
        bundle_of(stored, directory, [(media_type, blob)])
    assert not directory.exists()


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
def test_several_members_or_frames_are_one_archive(
    stored: Stored, directory: Path, media_type: str
) -> None:
    data = by_tarfile(FILES)
    blob = b"".join(PACK[media_type](data[i : i + 3000]) for i in range(0, len(data), 3000))
    bundle_of(stored, directory, [(media_type, blob)], diff_ids=[b"weights", data])
    assert (directory / "model/sub/deep/a.txt").read_bytes() == b"a" * 5000


@pytest.mark.parametrize("media_type", [TAR, GZIP, ZSTD])
def test_diff_id(stored: Stored, directory: Path, media_type: str) -> None:
    data = by_tarfile(FILES)
    with pytest.raises(DigestMismatchError) as caught:
        bundle_of(
            stored, directory, [(media_type, PACK[media_type](data))], diff_ids=[b"weights", b"?"]
        )
    assert caught.value.got == str(Digest.of(data))
    assert not directory.exists()


def test_diff_id_covers_what_follows_the_end(stored: Stored, directory: Path) -> None:
    data = by_tarfile(FILES)
    with pytest.raises(DigestMismatchError):
        bundle_of(
            stored, directory, [(GZIP, gzipped(data + bytes(512)))], diff_ids=[b"weights", data]
        )


LIMITED = {
    "one large file": file(b"a", bytes(100_000)),
    "many files": b"".join(file(b"%d" % i, bytes(9_000)) for i in range(10)),
    "a claim": header(b"a", 100 << 30),
    "a larger claim": header(b"a", size_field=b"\x80" + b"\xff" * 11),
    "after the end": END + bytes(100_000),
    "an unread rest": file(b"a", b"x") + END + bytes(1 << 20),
}


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
@pytest.mark.parametrize("name", LIMITED)
def test_bomb(stored: Stored, directory: Path, media_type: str, name: str) -> None:
    blob = PACK[media_type](LIMITED[name] + END)
    assert len(blob) < 3000
    with pytest.raises(IntegrityError, match="expands to more than 65536 bytes"):
        bundle_of(stored, directory, [(media_type, blob)], limits=SMALL)
    assert not directory.exists()


def test_limit_grows_with_the_blob(stored: Stored, directory: Path) -> None:
    import random

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
    data = b"".join(file(b"%d" % i) for i in range(20)) + END
    # Each archive is counted for itself.
    other = b"".join(file(b"x%d" % i) for i in range(20)) + END
    bundle_of(stored, directory, [(TAR, data), (TAR, other)], limits=SMALL)
    assert len(contents(directory / "model")) == 41


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
    model = stored.model([WEIGHT, (TAR, None, data)], mt.CNCF_CONFIG, diff_ids=[b"x"])
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
from modelpack.unpacking.bundle import TarLimits, lay_out
from tests.unpacking.stored import Stored
from tests.unpacking.tars import file, header, zstandard_bomb, zstandard_of
from tests.unpacking.test_archives import WEIGHT, ZSTD, CNCF
from modelpack import mediatypes as mt

def peak():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024

root = Path(sys.argv[1])
stored = Stored(root / "store")
def lay(number, blob, **limits):
    layers = [WEIGHT, (ZSTD, None, blob)]
    model = stored.model(layers, mt.CNCF_CONFIG, diff_ids=[b"x"])
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
