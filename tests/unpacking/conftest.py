"""Fixtures of the unpacking tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unpacking.stored import Stored, everything


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """An empty store of blobs."""
    return Stored(tmp_path / "store")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """The path of a bundle, which does not exist yet; files beside it must not change."""
    surroundings = tmp_path / "outside"
    surroundings.mkdir()
    (surroundings / "secret").write_bytes(b"not yours")
    (surroundings / "secret").chmod(0o600)
    work = surroundings / "work"
    work.mkdir()
    before = everything(surroundings)
    yield work / "bundle"
    after = {
        path: entry
        for path, entry in everything(surroundings).items()
        if path != "work/bundle" and not path.startswith("work/bundle/")
    }
    assert after == before, "something outside the bundle was touched"
