"""Archive layers: unpacked with the other files, within limits, never outside the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Role
from modelpack.bundles.bundle import lay_out
from modelpack.bundles.links import Placement
from modelpack.errors import (
    DigestMismatchError,
    FormatError,
    ModelpackError,
    UnsafePathError,
    UnsupportedError,
)
from tests.unpacking.archived import GZIP, PACK, TAR, ZSTD, bundle_of
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
    zstandard_of,
)

FILES = {"config.json": b"{}", "sub/": b"", "sub/deep/a.txt": b"a" * 5000, "empty/": b""}


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
    """modctl and KitOps pack every layer as an archive."""
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
    model = stored.model(layers, media_types.CNCF_CONFIG, diff_ids=[b"x"])
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
        (media_types.DOCKER_SAFETENSORS, None, b"weights"),
        (
            media_types.DOCKER_VLLM_CONFIG_TAR,
            None,
            by_tarfile({"config.json": b"{}", "t.jinja": b"{{}}"}),
        ),
        (media_types.DOCKER_DIR_TAR, None, by_tarfile({"sub/": b"", "sub/a": b"a"})),
        (media_types.DOCKER_DIR_TAR, None, by_tarfile({"sub/": b"", "sub/b": b"b"})),
    ]
    model = stored.model(layers, ModelConfig(media_types.DOCKER_CONFIG_V01, format="safetensors"))
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
    """The reference opens existing files for writing, and through hard links changes its store."""
    with pytest.raises(UnsafePathError, match=r"'tiny\.gguf' already exists"):
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
