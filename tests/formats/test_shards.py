from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpack.errors import NotFoundError, PackagingError, WeightFormatError
from modelpack.formats import shards
from modelpack.formats.shards import (
    check_complete,
    find_shards,
    indexed_files,
    read_index,
    shard_set,
)
from tests.formats.vectors import put


def touch(directory: Path, *names: str) -> list[Path]:
    return [put(directory, name, b"") for name in names]


NAMES = [
    ("m-00001-of-00003.gguf", ("m", 3, "gguf")),
    ("m-00003-of-00003.gguf", ("m", 3, "gguf")),
    ("a-00001-of-00002-00002-of-00009.gguf", ("a-00001-of-00002", 9, "gguf")),
    ("-00001-of-00001.gguf", ("", 1, "gguf")),
    ("model-00002-of-00002.safetensors", ("model", 2, "safetensors")),
    ("model.fp16-00001-of-00002.safetensors", ("model.fp16", 2, "safetensors")),
    # Not shards by their name:
    ("-00001-of-00001.safetensors", None),
    ("m-00001-of-00003.GGUF", None),
    ("m-0001-of-0003.gguf", None),
    ("m-000001-of-00003.gguf", None),
    ("m-00001-of-00003.gguf.part", None),
    ("m-00001-of-00003.gguf\n", None),
    ("m-٠٠٠٠١-of-00003.gguf", None),
    ("m-00001-of-00003.bin", None),
    ("m.gguf", None),
]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_names(name: str, expected: tuple[str, int, str] | None) -> None:
    found = shard_set(Path("dir") / name)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.prefix, found.count, found.ending) == expected
        assert found.directory == Path("dir")
        assert Path("dir") / name in found.paths()


@pytest.mark.parametrize("name", ["m-00000-of-00003.gguf", "m-00004-of-00003.safetensors"])
def test_numbers_outside_the_set(name: str) -> None:
    with pytest.raises(PackagingError, match=r"\d of 3 is not a valid shard number"):
        shard_set(name)


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_any_shard_finds_all(tmp_path: Path, ending: str) -> None:
    paths = touch(tmp_path, *(f"m-{at:05d}-of-00003.{ending}" for at in (2, 3, 1)))
    touch(tmp_path, f"m-00001-of-00004.{ending}", f"other-00001-of-00003.{ending}")
    for path in paths:
        assert find_shards(path) == tuple(sorted(paths))


def test_a_whole_file_is_its_only_shard(tmp_path: Path) -> None:
    assert find_shards(tmp_path / "m.gguf") == (tmp_path / "m.gguf",)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (path,) = touch(tmp_path, "m-00002-of-00003.gguf")
    with pytest.raises(PackagingError) as caught:
        find_shards(path)
    assert str(caught.value) == (
        f"{tmp_path}: missing m-00001-of-00003.gguf, m-00003-of-00003.gguf (expected by 3 shards)"
    )
    (path,) = touch(tmp_path, "n-00001-of-99999.gguf")
    with pytest.raises(PackagingError, match=r"n-00006-of-99999\.gguf and 99993 more"):
        find_shards(path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        find_shards(tmp_path / "none" / "m-00001-of-00002.gguf")


def index(directory: Path, *names: str, stem: str = "model") -> Path:
    weight_map = {f"tensor {at}": name for at, name in enumerate(names * 3)}
    text = json.dumps({"metadata": {"total_size": 123}, "weight_map": weight_map}, indent=2)
    return put(directory, f"{stem}.safetensors.index.json", text.encode())


def test_an_index(tmp_path: Path) -> None:
    assert read_index(index(tmp_path, "a.safetensors", "b.safetensors")) == {
        "a.safetensors",
        "b.safetensors",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"weight_map":{"t":"../x.safetensors"}}', "the file of 't' is not a name"),
        (b'{"weight_map":{"t":"sub/x.safetensors"}}', "the file of 't' is not a name"),
        (b'{"weight_map":{"t":"/x.safetensors"}}', "the file of 't' is not a name"),
        (b'{"weight_map":{"t":1}}', "the file of 't' is not a name"),
        (b'{"weight_map":{"t":"x"}', "the JSON text ends too early"),
        (b'{"weight_map":[]}', "expected an object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"", "is an empty file"),
    ],
)
def test_broken_indexes(tmp_path: Path, text: bytes, message: str) -> None:
    path = put(tmp_path, "model.safetensors.index.json", text)
    with pytest.raises(WeightFormatError, match=message) as caught:
        check_complete(touch(tmp_path, "a.safetensors"))
    assert caught.value.path == str(path)


def test_an_index_of_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_INDEX_TENSORS", 2)
    with pytest.raises(WeightFormatError, match="more tensors than the limit of 2"):
        read_index(index(tmp_path, "a.safetensors"))


def test_a_complete_directory(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    paths = touch(tmp_path, *names, "sub/consolidated.safetensors")
    index(tmp_path, *names)
    check_complete(paths)
    assert indexed_files(tmp_path, [*names, "consolidated.safetensors"]) == frozenset(names)
    assert indexed_files(tmp_path / "sub", ["consolidated.safetensors"]) is None


def test_shards_that_the_index_names_are_missing(tmp_path: Path) -> None:
    paths = touch(tmp_path, "a.safetensors")
    index(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(PackagingError, match=r"missing b\.safetensors \(expected by model\.safe"):
        check_complete(paths)


def test_a_stale_index_beside_the_whole_file(tmp_path: Path) -> None:
    paths = touch(tmp_path, "model.safetensors")
    index(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    check_complete(paths)
    assert indexed_files(tmp_path, ["model.safetensors"]) is None


def test_shards_that_the_names_promise_are_missing(tmp_path: Path) -> None:
    paths = touch(tmp_path, "m-00001-of-00002.safetensors", "other.safetensors")
    with pytest.raises(PackagingError, match=r"missing m-00002-of-00002\.safetensors"):
        check_complete(paths)
    # The file exists, but is not one of the packaged files.
    touch(tmp_path, "m-00002-of-00002.safetensors")
    with pytest.raises(PackagingError, match=r"missing m-00002-of-00002\.safetensors"):
        check_complete(paths)


def test_an_index_knows_better_than_names(tmp_path: Path) -> None:
    paths = touch(tmp_path, "m-00001-of-00033.safetensors", "m-00002-of-00033.safetensors")
    index(tmp_path, *(path.name for path in paths))
    check_complete(paths)
