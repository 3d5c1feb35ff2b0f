"""Validation of the file paths in a model.

A layer names its file in the annotation `org.cncf.model.filepath`. The path is untrusted: it may
try to leave the directory that the model is unpacked into.
"""

from __future__ import annotations

import re
import unicodedata

from modelpack.errors import UnsafePathError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_PATH_BYTES = 4096
_MAX_COMPONENT_BYTES = 255


def checked_path(text: str) -> str:
    """Return `text` if it is a safe relative path with slashes, else raise `UnsafePathError`.

    A safe path is not absolute and has no drive letter, `..`, `.`, empty component, backslash or
    control character, and no component that is too long for a file system.
    """
    problem = path_problem(text)
    if problem:
        raise UnsafePathError(f"unsafe file path {text[:200]!r} in the model: {problem}", got=text)
    return text


def path_problem(text: str) -> str | None:
    """Return why `text` is not a safe relative path, or None if it is one."""
    if not text:
        return "it is empty"
    if _CONTROL.search(text):
        return "it contains a control character"
    if "\\" in text:
        return "it contains a backslash, which separates directories on some systems"
    if text.startswith("/"):
        return "it is absolute"
    if _DRIVE.match(text):
        return "it starts with a drive letter"
    encoded = text.encode(errors="surrogateescape")
    if len(encoded) > _MAX_PATH_BYTES:
        return f"it is longer than {_MAX_PATH_BYTES} bytes"
    for part in text.split("/"):
        if part == "..":
            return "it leaves the directory with '..'"
        if part in ("", "."):
            return "it has an empty or '.' component"
        if len(part.encode(errors="surrogateescape")) > _MAX_COMPONENT_BYTES:
            return f"a component is longer than {_MAX_COMPONENT_BYTES} bytes"
    return None


def folded(path: str) -> str:
    """Return a key of `path` that is equal for paths that are the same on some file system.

    macOS ignores case and the composition of accents (Unicode "canonical caseless matching").
    """
    once = unicodedata.normalize("NFD", path).casefold()
    return unicodedata.normalize("NFD", once)
