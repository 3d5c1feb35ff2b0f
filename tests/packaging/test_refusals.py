"""Input that cannot be packaged, with the expected errors."""

from __future__ import annotations

import io
import os
import pickle
import socket
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelpack.builder.plan import plan, plan_extras
from modelpack.builder.request import PackageRequest
from modelpack.errors import ModelpackError, PackagingError, UsageError, WeightFormatError
from tests.packaging.trees import (
    DDUF,
    MIT,
    PAIR,
    PROJECTOR,
    SHARDS,
    TEMPLATE,
    TINY,
    as_nobody,
    package,
    write,
)

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:d1bdb851bdd707d5d2fc1e6dbb3db8a0e4489cdc42616f551c6eb0943e18b14b\n"
    b"size 256\n"
)
MODEL = {"model.safetensors": PAIR}


def refusal(request: PackageRequest, environ: dict[str, str] | None = None) -> ModelpackError:
    with pytest.raises(ModelpackError) as caught:
        plan(request, environ=environ or {})
    return caught.value


# files, request values (paths relative to the files), error, parts of its message
FILE_ROWS: dict[str, tuple[dict[str, bytes], dict[str, str], type[ModelpackError], list[str]]] = {
    "nothing-there": ({}, {"gguf": "x.gguf"}, PackagingError, ["x.gguf", "no such file"]),
    "no-directory": ({}, {"safetensors_dir": "d"}, PackagingError, ["/d", "no such file"]),
    "license-missing": (
        {"m.gguf": TINY},
        {"gguf": "m.gguf", "licenses": "LICENSE"},
        PackagingError,
        ["LICENSE", "no such file"],
    ),
    "directory-as-gguf": (
        {"d/m.gguf": TINY},
        {"gguf": "d"},
        PackagingError,
        ["/d is a directory", "--gguf"],
    ),
    "directory-as-dduf": (
        {"d/m": b""},
        {"dduf": "d"},
        PackagingError,
        ["is a directory", "--dduf"],
    ),
    "directory-as-license": (
        {"m.gguf": TINY, "d/x": b""},
        {"gguf": "m.gguf", "licenses": "d"},
        PackagingError,
        ["/d is a directory", "regular file"],
    ),
    "file-as-directory": (
        {"m.gguf": TINY},
        {"safetensors_dir": "m.gguf"},
        PackagingError,
        ["m.gguf is a file", "--safetensors-dir"],
    ),
    "path-through-a-file": (
        {"m.gguf": TINY},
        {"gguf": "m.gguf/x.gguf"},
        PackagingError,
        ["m.gguf/x.gguf", "Not a directory"],
    ),
    "unknown-ending": (
        {"model.onnx": b"x"},
        {"gguf": "model.onnx"},
        PackagingError,
        ["model.onnx", ".gguf, .safetensors or .dduf"],
    ),
    "nul-in-path": ({}, {"gguf": "a\0b.gguf"}, PackagingError, ["a\\x00b.gguf"]),
    "empty-gguf": ({"m.gguf": b""}, {"gguf": "m.gguf"}, WeightFormatError, ["m.gguf", "empty"]),
    "page-as-gguf": (
        {"m.gguf": b"<!DOCTYPE html>\n<html></html>"},
        {"gguf": "m.gguf"},
        WeightFormatError,
        ["m.gguf", "at byte 0", "HTML"],
    ),
    "cut-gguf": (
        {"m.gguf": TINY[:100]},
        {"gguf": "m.gguf"},
        WeightFormatError,
        ["m.gguf", "at byte"],
    ),
    "cut-safetensors": (
        {"d/model.safetensors": PAIR[:100]},
        {"safetensors_dir": "d"},
        WeightFormatError,
        ["d/model.safetensors"],
    ),
    "broken-second-weight": (
        {"d/a.safetensors": PAIR, "d/b/c.safetensors": b"\0" * 20},
        {"safetensors_dir": "d"},
        WeightFormatError,
        ["d/b/c.safetensors"],
    ),
    "pointer-as-gguf": (
        {"m.gguf": POINTER},
        {"gguf": "m.gguf"},
        WeightFormatError,
        ["m.gguf", "Git LFS pointer"],
    ),
    "pointer-as-weight": (
        {"d/model.safetensors": POINTER},
        {"safetensors_dir": "d"},
        WeightFormatError,
        ["model.safetensors", "Git LFS pointer"],
    ),
    "pointer-as-tokenizer": (
        {**{f"d/{k}": v for k, v in MODEL.items()}, "d/tokenizer.json": POINTER},
        {"safetensors_dir": "d"},
        PackagingError,
        ["d/tokenizer.json", "Git LFS pointer"],
    ),
    "shard-missing": (
        {k: v for k, v in SHARDS.items() if "00002-of" not in k},
        {"gguf": "tiny-00001-of-00003.gguf"},
        PackagingError,
        ["tiny-00002-of-00003.gguf", "missing"],
    ),
    "shard-missing-in-a-directory": (
        {"d/m-00001-of-00002.safetensors": PAIR},
        {"safetensors_dir": "d"},
        PackagingError,
        ["m-00002-of-00002.safetensors", "missing"],
    ),
    "shard-beyond-the-count": (
        {"m-00003-of-00002.gguf": TINY},
        {"gguf": "m-00003-of-00002.gguf"},
        PackagingError,
        ["m-00003-of-00002.gguf"],
    ),
    "empty-directory": ({"d/.x": b""}, {"safetensors_dir": "d"}, PackagingError, ["no weights"]),
    "no-weights": (
        {"d/config.json": b"{}"},
        {"safetensors_dir": "d"},
        PackagingError,
        ["no weights", "1 file"],
    ),
    "hidden-weights-only": (
        {"d/.m.gguf": TINY, "d/__pycache__/m.gguf": TINY},
        {"safetensors_dir": "d"},
        PackagingError,
        ["no weights"],
    ),
    "mixed-formats": (
        {"d/a.gguf": TINY, "d/b/model.safetensors": PAIR},
        {"safetensors_dir": "d"},
        PackagingError,
        ["gguf (a.gguf)", "safetensors (b/model.safetensors)"],
    ),
    "mixed-with-dduf": (
        {"d/a.dduf": DDUF, "d/model.safetensors": PAIR},
        {"safetensors_dir": "d"},
        PackagingError,
        ["has weights of several formats", "dduf (a.dduf)"],
    ),
    "pickles": (
        {**{f"d/{k}": v for k, v in MODEL.items()}, "d/x.BIN": b"", "d/sub/y.pth": b""},
        {"safetensors_dir": "d"},
        PackagingError,
        ["sub/y.pth", "x.BIN", "pickle"],
    ),
    "backslash": (
        {"d/model.safetensors": PAIR, "d/a\\b.txt": b""},
        {"safetensors_dir": "d"},
        PackagingError,
        ["a\\b.txt", "backslash"],
    ),
    "control-character": (
        {"d/model.safetensors": PAIR, "d/a\nb/c.txt": b""},
        {"safetensors_dir": "d"},
        PackagingError,
        ["a\\nb/c.txt", "control character"],
    ),
    "not-utf8": (
        {"d/model.safetensors": PAIR, "d/a\udcff.txt": b""},
        {"safetensors_dir": "d"},
        PackagingError,
        ["a\\xff.txt", "UTF-8"],
    ),
    "drive-letter": (
        {"c:m.gguf": TINY},
        {"gguf": "c:m.gguf"},
        PackagingError,
        ["c:m.gguf", "drive"],
    ),
    "two-licenses-of-one-name": (
        {"m.gguf": TINY, "a/LICENSE": MIT, "b/LICENSE": b"other\n"},
        {"gguf": "m.gguf", "licenses": "a/LICENSE b/LICENSE"},
        PackagingError,
        ["a/LICENSE", "b/LICENSE", "'LICENSE'"],
    ),
    "license-of-a-name-in-the-directory": (
        {"d/model.safetensors": PAIR, "d/LICENSE": MIT, "LICENSE": b"other\n"},
        {"safetensors_dir": "d", "licenses": "LICENSE"},
        PackagingError,
        ["d/LICENSE", "would both be"],
    ),
    "a-license-like-the-model": (
        {"m.gguf": TINY, "x/m.gguf": MIT},
        {"gguf": "m.gguf", "licenses": "x/m.gguf"},
        PackagingError,
        ["x/m.gguf", "would both be"],
    ),
    "the-model-as-its-own-projector": (
        {"m.gguf": TINY},
        {"gguf": "m.gguf", "mmproj": "m.gguf"},
        PackagingError,
        ["no weights are left"],
    ),
}


def request_for(root: Path, values: dict[str, str]) -> PackageRequest:
    paths: dict[str, Any] = {key: root / value for key, value in values.items()}
    if "licenses" in values:
        paths["licenses"] = tuple(root / name for name in values["licenses"].split())
    return PackageRequest(**paths)


@pytest.mark.parametrize("name", FILE_ROWS)
def test_files_that_are_no_model(name: str, tmp_path: Path) -> None:
    files, values, kind, says = FILE_ROWS[name]
    error = refusal(request_for(write(tmp_path, files), values))
    assert type(error) is kind
    for text in says:
        assert text in str(error)
    assert str(error).isprintable()


def test_a_wrong_kind_of_path_has_a_hint(tmp_path: Path) -> None:
    write(tmp_path, {"d/m.gguf": TINY})
    assert "--safetensors-dir" in (refusal(PackageRequest(gguf=tmp_path / "d")).hint or "")
    error = refusal(PackageRequest(safetensors_dir=tmp_path / "d" / "m.gguf"))
    assert "--gguf" in (error.hint or "")


def test_a_relative_path_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) in (refusal(PackageRequest(gguf=Path("x.gguf"))).hint or "")


def test_special_files_do_not_block() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = write(Path(directory), {"m.gguf": TINY})
        os.mkfifo(root / "f.gguf")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(root / "s.gguf"))
        request = PackageRequest(gguf=root / "m.gguf")
        assert "is a FIFO" in str(refusal(replace(request, gguf=root / "f.gguf")))
        assert "is a socket" in str(refusal(replace(request, gguf=root / "s.gguf")))
        assert "is a FIFO" in str(refusal(replace(request, licenses=(root / "f.gguf",))))
        assert "is a device" in str(refusal(replace(request, licenses=(Path("/dev/null"),))))
        assert "is a FIFO" in str(refusal(PackageRequest(safetensors_dir=root / "f.gguf")))


def test_dangling_and_looping_arguments(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("blobs/gone")
    (tmp_path / "l.gguf").symlink_to("l.gguf")
    assert "links to blobs/gone" in str(refusal(PackageRequest(gguf=tmp_path / "m.gguf")))
    assert "Too many levels" in str(refusal(PackageRequest(gguf=tmp_path / "l.gguf")))


def test_unreadable_files_are_named(open_dir: Path) -> None:
    write(open_dir, {"model.safetensors": PAIR, "x.txt": b"", "closed/y.gguf": TINY})
    (open_dir / "x.txt").chmod(0)
    (open_dir / "closed").chmod(0)
    with as_nobody():
        error = refusal(PackageRequest(gguf=open_dir / "closed" / "y.gguf"))
        assert "closed/y.gguf: cannot be read: Permission denied" in str(error)
        error = refusal(PackageRequest(safetensors_dir=open_dir / "closed"))
        assert "closed: cannot be read: Permission denied" in str(error)
    (open_dir / "closed" / "y.gguf").unlink()
    (open_dir / "closed").rmdir()
    with as_nobody():
        error = refusal(PackageRequest(safetensors_dir=open_dir))
        assert "x.txt: cannot be read: Permission denied" in str(error)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(PackageRequest(gguf=Path("~no-such-user-here/x.gguf")))
    assert type(error) is PackagingError


GGUF = {"gguf": Path("m.gguf")}


@pytest.mark.parametrize(
    ("values", "environ", "says"),
    [
        ({}, {}, "no weights to package"),
        ({**GGUF, "dduf": Path("x.dduf")}, {}, "--gguf, --dduf cannot be combined"),
        (
            {**GGUF, "safetensors_dir": Path("d")},
            {},
            "--gguf, --safetensors-dir cannot be combined",
        ),
        ({**GGUF, "context_size": -1}, {}, "context size -1"),
        ({**GGUF, "context_size": 2**31}, {}, "2147483647"),
        ({**GGUF, "context_size": 5, "format": "cncf"}, {}, "CNCF"),
        ({**GGUF, "context_size": 0, "format": "cncf"}, {}, "CNCF"),
        ({**GGUF, "format": "tar"}, {}, "docker or cncf"),
        ({**GGUF, "created": "yesterday"}, {}, "yesterday"),
        (GGUF, {"SOURCE_DATE_EPOCH": "soon"}, "SOURCE_DATE_EPOCH"),
        ({**GGUF, "annotations": {"": "x"}}, {}, "an annotation has no key"),
        ({**GGUF, "annotations": {"k": "\udcff"}}, {}, "UTF-8"),
    ],
)
def test_requests_that_make_no_sense(
    values: dict[str, Any], environ: dict[str, str], says: str
) -> None:
    error = refusal(PackageRequest(**values), environ)
    assert type(error) is UsageError
    assert says in str(error)


def test_extras_exclude_weights() -> None:
    with pytest.raises(UsageError, match="--gguf"):
        plan_extras(PackageRequest(gguf=Path("m.gguf")), environ={})


def test_documents_beyond_the_limit_are_refused_before_hashing(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": PAIR})
    deep = tmp_path.joinpath(*["x" * 250] * 12)
    deep.mkdir(parents=True)
    for i in range(1_300):
        (deep / f"{i}.txt").touch()
    error = refusal(PackageRequest(safetensors_dir=tmp_path))
    assert "1301 layers" in str(error)
    assert "4194304" in str(error)
    write(tmp_path, {"y/m.gguf": TINY})
    annotations = {"k": "x" * 2**22}
    error = refusal(PackageRequest(gguf=tmp_path / "y" / "m.gguf", annotations=annotations))
    assert "4194304" in str(error)


class Calls:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return os.getcwd, ()


def torch_file() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    return made.getvalue()


@pytest.mark.parametrize("name", ["state", "config.json", "weights.joblib", "w.bin "])
@pytest.mark.parametrize(
    "raw",
    [
        *(pickle.dumps(value, n) for n in range(6) for value in (Calls(), {"a": 1}, [1])),
        b"\x80\x04N0" + pickle.dumps(Calls(), 4)[2:],
        torch_file(),
    ],
)
def test_pickles_by_any_name(tmp_path: Path, name: str, raw: bytes) -> None:
    write(tmp_path, {**MODEL, name: raw})
    error = refusal(PackageRequest(safetensors_dir=tmp_path))
    assert f"holds Python pickles, which can run code when they are loaded: {name}" in str(error)
    package(PackageRequest(safetensors_dir=tmp_path, allow_pickle=True))


@pytest.mark.parametrize(
    "raw", [b"", b"cat\ndog\nqueen\n", b"c\nd\n(\n", b"PK\x03\x04" + bytes(600)]
)
def test_what_only_begins_like_a_pickle(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path, {**MODEL, "vocab.txt": raw})
    package(PackageRequest(safetensors_dir=tmp_path))


def test_pickles_on_request(tmp_path: Path) -> None:
    write(tmp_path, {**MODEL, "pytorch_model.bin": b"\x80\x02"})
    request = PackageRequest(safetensors_dir=tmp_path, allow_pickle=True)
    assert [layer.filepath for layer in package(request).manifest.layers] == [
        "model.safetensors",
        "pytorch_model.bin",
    ]


def test_only_projectors(tmp_path: Path) -> None:
    write(tmp_path, {"mmproj.gguf": PROJECTOR, "x.jinja": TEMPLATE})
    request = PackageRequest(safetensors_dir=tmp_path, mmproj=tmp_path / "mmproj.gguf")
    assert "no weights are left" in str(refusal(request))
