"""Safe and unsafe file paths of a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.paths import checked_path, path_problem
from modelpack.errors import UnsafePathError


@pytest.mark.parametrize(
    "text", ["a", "a/b", "model-00001-of-00002.gguf", ".hidden", "..a", "a..", "a b", "é/漢", "…"]
)
def test_safe(text: str) -> None:
    assert checked_path(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "../x", "../../x", "a/../b", "a/..", "./a", "a/.", "a//b", "a/", "/", "/abs",
        "//x", "a\0b", "a\nb", "a\x7f", "C:\\x", "C:x", "c:/x", "a\\b", "\\\\host\\share",
        "x" * 256, "a/" * 3000 + "a",
    ],
)  # fmt: skip
@pytest.mark.scenario(23)
def test_unsafe(text: str) -> None:
    with pytest.raises(UnsafePathError, match="unsafe file path"):
        checked_path(text)


@given(st.text("./\\ab:C\0\n~", max_size=20))
def test_what_is_safe_stays_inside(text: str) -> None:
    if path_problem(text) is None:
        root = Path("/root/of/it")
        joined = Path(os.path.normpath(root / text))
        assert joined.is_relative_to(root)
        assert joined != root
