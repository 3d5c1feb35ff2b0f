"""Any list of paths is laid out exactly or rejected, and nothing outside changes."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelpack.artifacts import media_types
from modelpack.artifacts.paths import path_problem
from modelpack.bundles.bundle import lay_out
from modelpack.errors import FormatError, ModelpackError, UnsafePathError
from tests.unpacking.stored import Layer, Stored, contents, everything
from tests.unpacking.tars import END, file, header, padded, pax

WEIGHT: Layer = (media_types.DOCKER_GGUF, "model.gguf", b"weights")
COMPONENTS = (
    *("a", "A", "b", "c", "sub", "model", "caf\u00e9", "cafe\u0301", "model.gguf", " ", "~", "x y"),
    *("config.json", "$HOME", "-rf", "...", "\u2024\u2024", "\ufeff", "x" * 255, "\U0001f600"),
    *("..", ".", "", "C:", "a\\b", "a\0b", "\n", "x" * 256),
)
any_paths = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=4).map("/".join)
sound_paths = st.lists(st.sampled_from(COMPONENTS[:20]), min_size=1, max_size=3).map("/".join)


def expected(paths: Sequence[str]) -> dict[str, bytes] | None:
    """Return the expected files, each with its number as content, or None for a rejection."""
    files = ["model.gguf", *paths]
    if any(path_problem(path) for path in files) or len(set(files)) < len(files):
        return None
    parents = {path[:i] for path in files for i, letter in enumerate(path) if letter == "/"}
    if parents & set(files):
        return None
    spellings = parents | set(files)
    if len({unicodedata.normalize("NFC", path.casefold()) for path in spellings}) < len(spellings):
        return None
    return {"model.gguf": b"weights"} | {path: b"%d" % i for i, path in enumerate(paths)}


def check(plain: Sequence[str], archived: Sequence[str]) -> None:
    """Lay out these paths as separate layers and as one archive, and check the outside."""
    layers, archive = [WEIGHT], b""
    for i, path in enumerate(plain):
        layers.append((media_types.DOCKER_MODEL_FILE, path, b"%d" % i))
    for i, path in enumerate(archived, start=len(plain)):
        archive += pax({b"path": path.encode()}) + file(b"x", b"%d" % i)
    layers.append((media_types.DOCKER_DIR_TAR, None, archive + END))
    wanted = expected([*plain, *(re.sub(r"\A(\./)+", "", path) for path in archived)])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        stored = Stored(root / "store")
        model = stored.model(layers)
        before = everything(root)
        try:
            bundle = lay_out(model, stored.path, root / "sub" / "bundle")
        except (UnsafePathError, FormatError):  # "a/" is a directory, which has no content
            assert wanted is None, "sound paths were refused"
            assert everything(root) == before
            return
        assert wanted is not None, "unsafe paths were laid out"
        found = contents(bundle.directory)
        assert found.pop("config.json") == b"{}\n"
        assert found == {f"model/{path}": content for path, content in wanted.items()}
        outside = {p: entry for p, entry in everything(root).items() if p.split("/")[0] != "sub"}
        assert outside == before


@settings(max_examples=80, deadline=None)
@given(plain=st.lists(any_paths, max_size=3), archived=st.lists(any_paths, max_size=3))
@example(plain=[], archived=[])
@example(plain=["../../x"], archived=[])
@example(plain=[], archived=["../../x"])
@example(plain=["sub/a"], archived=["SUB/b"])
def test_any_paths(plain: list[str], archived: list[str]) -> None:
    check(plain, archived)


@pytest.mark.long
@settings(max_examples=80, deadline=None)
@given(plain=st.lists(sound_paths, max_size=4), archived=st.lists(sound_paths, max_size=4))
@example(plain=["a/b", "a/c"], archived=["a/sub/b", "b"])
@example(plain=["a", "b"], archived=["c", "sub"])
def test_paths_that_are_sound_alone(plain: list[str], archived: list[str]) -> None:
    check(plain, archived)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_archive(data: st.DataObject) -> None:
    """Entries of every type and name, links first, are unpacked only inside the target."""
    archive = b""
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L"]))
        name = data.draw(any_paths)
        target = data.draw(st.sampled_from([b"..", b"/tmp", b"a", b"../../store"]))
        content = b"planted" if kind in (b"0", b"7") else b""
        archive += pax({b"path": name.encode()}) if data.draw(st.booleans()) else b""
        archive += header(name.encode()[:100], len(content), kind, link=target) + padded(content)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        stored = Stored(root / "store")
        model = stored.model([WEIGHT, (media_types.DOCKER_DIR_TAR, None, archive + END)])
        before = everything(root)
        with suppress(ModelpackError):
            lay_out(model, stored.path, root / "sub" / "bundle")
        after = everything(root)
        assert {p: entry for p, entry in after.items() if p.split("/")[0] != "sub"} == before
        assert not [p for p, (kind, _, _) in after.items() if kind == "link"]
