"""Exit codes of failures of the file system: 3 for missing files, 4 for denied access."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf
from tests.packaging.conftest import open_dir as open_dir
from tests.packaging.trees import as_nobody


@pytest.mark.parametrize(
    "words",
    [
        ["package", "--gguf", "gone", "x:v1"],
        ["package", "--dduf", "gone", "x:v1"],
        ["package", "--safetensors-dir", "gone", "x:v1"],
        ["attach", "x:v1", "gone", "--artifact-type", "a/b", "--local"],
        ["sign", "x:v1", "--key", "gone", "--local"],
        ["verify", "x:v1", "--key", "gone", "--local"],
        ["lock", "--check", "--lock-file", "gone"],
    ],
    ids=lambda words: words[0],
)
def test_a_missing_file_is_not_found(words: list[str]) -> None:
    failed = modelpack(*words)
    assert failed.code == 3, failed.err
    assert "gone" in failed.err
    assert "o such file" in failed.err
    assert '"exitCode": 3' in modelpack(*words, "--json").err


def test_a_denied_file_is_a_permission(open_dir: Path) -> None:
    weights = tiny_gguf(open_dir)
    weights.chmod(0)
    (open_dir / "store").mkdir()
    (open_dir / "store").chmod(0o777)
    with as_nobody():
        for words in (
            ["package", "--gguf", weights, "x:v1"],
            ["sign", "x:v1", "--key", weights],
            ["lock", "--check", "--lock-file", weights],
        ):
            failed = modelpack("--store", open_dir / "store", *words)
            assert failed.code == 4, failed.err
            assert f"{weights}: cannot be read: Permission denied" in failed.err


def test_a_denied_store_is_a_permission(open_dir: Path) -> None:
    store = open_dir / "store"
    succeed("--store", store, "package", "--gguf", tiny_gguf(open_dir), "x:v1")
    (open_dir / "closed").mkdir(mode=0o700)
    for path in (store, *store.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with as_nobody():
        assert modelpack("--store", store, "tag", "x:v1", "x:v2").code == 4
        assert modelpack("--store", open_dir / "closed", "list").code == 4
        assert modelpack("--store", open_dir / "closed" / "below", "list").code == 4
