"""A hub in this process, set by the usual environment variables, and an empty store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import RetryPolicy
from tests.hub.hub import FakeHub
from tests.models import FIXTURES

#: Retries without waiting.
QUICK = RemoteOptions(retry=RetryPolicy(sleep=lambda _: None))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


def fixture(name: str) -> dict[str, bytes]:
    """Return the files of a model of `fixtures/`, by path."""
    root = FIXTURES / "models" / name
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def gguf() -> bytes:
    """Return the 256-byte GGUF."""
    return (FIXTURES / "models/tiny-gguf/tiny.gguf").read_bytes()


def padded_gguf(size: int) -> bytes:
    """Return a GGUF with that many bytes of padding behind its tensors, all different."""
    return gguf() + b"".join(at.to_bytes(4, "big") for at in range(size // 4))
