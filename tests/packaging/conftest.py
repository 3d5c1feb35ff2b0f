"""Time zones and directories for the tests of packaging."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Change the machine's time zone for one test."""
    with monkeypatch.context() as patch:

        def change(zone: str) -> None:
            patch.setenv("TZ", zone)
            time.tzset()

        yield change
    time.tzset()


@pytest.fixture
def utc(time_zone: Callable[[str], None]) -> None:
    time_zone("UTC")


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that all users can access, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="modelpack-test-"))
    path.chmod(0o755)
    yield path
    for inside in path.rglob("*"):
        if inside.is_dir() and not inside.is_symlink():
            inside.chmod(0o755)
    shutil.rmtree(path)
