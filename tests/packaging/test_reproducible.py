"""Without `preserve`, equal files give equal digests on any machine and at any time."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.artifacts import media_types
from modelpack.builder.files import LayerMetadata
from modelpack.builder.request import PackageRequest
from tests.packaging.trees import MIT, PAIR, SHARDS, TINY, TINY_DIRECTORY, package, write

FILES = {**TINY_DIRECTORY, "a-b.txt": b"1", "a/x.txt": b"2", "a.txt": b"3", "run.sh": b"4"}


def directory_digest(root: Path, **values: object) -> str:
    request = PackageRequest(safetensors_dir=root, **values)  # type: ignore[arg-type]
    return str(package(request).manifest.digest)


@pytest.fixture(scope="module")
def reference() -> str:
    with tempfile.TemporaryDirectory() as directory:
        return directory_digest(write(Path(directory), FILES))


@settings(deadline=None)  # the disk and the machine are shared
@given(
    order=st.permutations(list(FILES)),
    umask=st.sampled_from([0o000, 0o022, 0o027, 0o077]),
    seed=st.randoms(use_true_random=False),
    zone=st.sampled_from(["UTC", "Asia/Kathmandu", "America/St_Johns"]),
)
def test_place_order_umask_time_and_zone_do_not_count(
    reference: str, order: list[str], umask: int, seed: random.Random, zone: str
) -> None:
    before = os.umask(umask)
    try:
        with tempfile.TemporaryDirectory(suffix=zone.replace("/", " ")) as directory:
            root = Path(directory) / "models" / str(seed.random())
            for name in order:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(FILES[name])
                moment = seed.randrange(2**33 * 10**9)
                os.utime(root / name, ns=(moment, moment))
            assert directory_digest(root) == reference
    finally:
        os.umask(before)


def test_the_time_zone_does_not_count(tmp_path: Path, time_zone: Callable[[str], None]) -> None:
    write(tmp_path, FILES)
    time_zone("UTC")
    plain, preserved = directory_digest(tmp_path), directory_digest(tmp_path, preserve=True)
    time_zone("Asia/Kathmandu")
    assert directory_digest(tmp_path) == plain
    assert directory_digest(tmp_path, preserve=True) != preserved  # as in the reference


def test_touch_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    plain, preserved = directory_digest(tmp_path), directory_digest(tmp_path, preserve=True)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert directory_digest(tmp_path) == plain
    assert directory_digest(tmp_path, preserve=True) != preserved


@pytest.mark.parametrize(
    ("mode", "written"),
    [
        (0o600, 0o644),
        (0o444, 0o644),
        (0o666, 0o644),
        (0o700, 0o755),
        (0o645, 0o755),
        (0o4711, 0o755),
    ],
)
def test_modes(tmp_path: Path, mode: int, written: int) -> None:
    write(tmp_path, {"tiny.gguf": TINY}, mode=mode)
    for preserve, expected in ((False, written), (True, mode & 0o777)):
        built = package(PackageRequest(gguf=tmp_path / "tiny.gguf", preserve=preserve))
        metadata = LayerMetadata.parse(
            built.manifest.layers[0].annotations[media_types.FILE_METADATA]
        )
        assert metadata.mode == expected


def times_of(request: PackageRequest, environ: dict[str, str]) -> tuple[str | None, str]:
    built = package(request, environ)
    layer = built.manifest.layers[0]
    created = json.loads(built.config_bytes)["descriptor"].get("created")
    return created, LayerMetadata.parse(layer.annotations[media_types.FILE_METADATA]).mtime


def test_times_come_from_the_environment_or_the_epoch(tmp_path: Path) -> None:
    request = PackageRequest(gguf=write(tmp_path, {"tiny.gguf": TINY}) / "tiny.gguf")
    epoch = "1970-01-01T00:00:00Z"
    assert times_of(request, {}) == (epoch, epoch)
    given_time = "2001-09-09T01:46:40Z"
    assert times_of(request, {"SOURCE_DATE_EPOCH": "1000000000"}) == (given_time, given_time)


def test_created_is_not_the_time_of_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"tiny.gguf": TINY}) / "tiny.gguf"
    request = PackageRequest(gguf=path, created="2030-01-01T00:00:00Z")
    assert times_of(request, {}) == ("2030-01-01T00:00:00Z", "1970-01-01T00:00:00Z")
    assert times_of(request, {"SOURCE_DATE_EPOCH": "1"})[1] == "1970-01-01T00:00:01Z"


@pytest.mark.usefixtures("utc")
def test_preserved_times_are_those_of_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"tiny.gguf": TINY}) / "tiny.gguf"
    request = PackageRequest(gguf=path, preserve=True)
    environ = {"SOURCE_DATE_EPOCH": "1000000000"}
    assert times_of(request, environ) == ("2001-09-09T01:46:40Z", "2025-01-02T03:04:05Z")


def test_links_and_their_targets_are_the_same_files(tmp_path: Path, reference: str) -> None:
    repository = tmp_path / "models--o--n"
    snapshot = repository / "snapshots" / "rev"
    for i, (name, content) in enumerate(FILES.items()):
        write(repository, {f"blobs/{i}": content})
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(repository / "blobs" / str(i))
    assert directory_digest(snapshot) == reference


def test_content_and_names_do_count(tmp_path: Path, reference: str) -> None:
    write(tmp_path, FILES)
    (tmp_path / "a.txt").write_bytes(b"4")
    changed = directory_digest(tmp_path)
    (tmp_path / "a.txt").write_bytes(FILES["a.txt"])
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({reference, changed, directory_digest(tmp_path)}) == 3


@pytest.mark.parametrize("name", sorted(SHARDS))
def test_any_shard_names_the_model(tmp_path: Path, name: str) -> None:
    write(tmp_path, SHARDS)
    built = package(PackageRequest(gguf=tmp_path / name))
    assert [layer.filepath for layer in built.manifest.layers] == sorted(SHARDS)
    assert (
        built.manifest.digest
        == package(PackageRequest(gguf=tmp_path / min(SHARDS))).manifest.digest
    )


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"d/tiny.gguf": TINY, "LICENSE": MIT, "m/model.safetensors": PAIR})
    absolute = package(
        PackageRequest(gguf=tmp_path / "d" / "tiny.gguf", licenses=(tmp_path / "LICENSE",))
    ).manifest.digest
    monkeypatch.chdir(tmp_path / "d")
    relative = PackageRequest(gguf=Path("tiny.gguf"), licenses=(Path("../LICENSE"),))
    assert package(relative).manifest.digest == absolute
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = PackageRequest(gguf=Path("~/d/tiny.gguf"), licenses=(Path("~/LICENSE"),))
    assert package(at_home).manifest.digest == absolute
    from_home = directory_digest(Path("~/m"))
    monkeypatch.chdir(tmp_path / "m")
    assert directory_digest(Path(".")) == from_home
