"""What several threads that load models do at the same time."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from modelpack_engine.patches import modules
from modelpack_engine.patches.modules import parsed


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns after a microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.long
@pytest.mark.usefixtures("switching")
def test_one_source_is_parsed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.11, two at a time are a SystemError."""
    source, busy = Path(ast.__file__).read_bytes(), Lock()

    class Alone:
        @staticmethod
        def parse(text: bytes) -> ast.Module:
            assert busy.acquire(blocking=False), "two sources are parsed at the same time"
            try:
                return ast.parse(text)
            finally:
                busy.release()

    monkeypatch.setattr(modules, "ast", Alone)
    with ThreadPoolExecutor(4) as threads:
        trees = list(threads.map(parsed, [source] * 16))
    assert {type(tree) for tree in trees} == {ast.Module}
