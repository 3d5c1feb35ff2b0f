"""Exit codes of failures of the file system: 3 for missing files, 4 for denied access."""

from __future__ import annotations

import json
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
        ["package", "--safetensors-dir", "gone", "--quantize", "q4", "x:v1"],
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pull", "--json", "m:v1", "--nonsense"], "--nonsense"),
        (["pull", "--json", "--only", "all", "m:v1"], "--only"),
        (["--json", "push"], "REFERENCE"),
        (["nonsense", "--json"], "nonsense"),
        (["list", "--json", "--store"], "--store"),
        (["pull", "--json"], "expected a model"),
        (["pull", "--json", "--client-key", "pyproject.toml", "m:v1"], "--client-cert"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_usage_is_json_too(words: list[str], says: str) -> None:
    failed = modelpack(*words)
    assert (failed.code, failed.out) == (2, "")
    error = json.loads(failed.err)["error"]
    assert (error["type"], error["exitCode"]) == ("UsageError", 2)
    assert says in error["message"]


def test_json_after_the_options_is_an_argument() -> None:
    failed = modelpack("pull", "--only", "all", "--", "--json")
    assert failed.code == 2
    assert failed.err.startswith("Usage: modelpack pull")


def test_an_unexpected_error_is_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("modelpack.cli.store.summarize_models", fail)
    failed = modelpack("list", "--json")
    error = json.loads(failed.err)["error"]
    assert (failed.code, error["type"], error["message"]) == (
        1,
        "RuntimeError",
        "unexpected: broken",
    )
