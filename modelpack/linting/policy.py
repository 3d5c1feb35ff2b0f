"""The policy of a catalogue, in TOML; a rule that it does not name keeps its default.

name = "<family>:<params>-<quant>-<context>"   # the repository's last part, and the tag

[rules]                                        # "error", "warning" or "off"
name = "error"                                 # "error" once there is a pattern
licence = "warning"

[licence]
allowed = ["Apache-2.0", "MIT"]                # SPDX identifiers; any without

[metadata]
required = ["format", "architecture", "parameters", "quantization"]

[context]                                      # in tokens
min = 2048
max = 1048576

[files]
ignore = ["docs/*"]                            # not looked into for secrets and paths
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from modelpack.errors import FormatError
from modelpack.linting.findings import RULES, Level
from modelpack.linting.naming import NamePattern

METADATA: Final = ("format", "architecture", "parameters", "quantization", "context_size")
_REQUIRED: Final = ("format", "architecture", "parameters", "quantization")


@dataclass(frozen=True, slots=True)
class LintPolicy:
    """What is asked for; an empty `allowed` takes every licence that is there."""

    name: NamePattern | None = None
    levels: Mapping[str, Level] = field(default_factory=dict, hash=False)
    allowed: tuple[str, ...] = ()
    required: tuple[str, ...] = _REQUIRED
    min_context: int = 1
    max_context: int = 16 * 1024 * 1024
    ignore: tuple[str, ...] = ()

    def level(self, rule: str) -> Level:
        """Return how bad what a rule finds is."""
        return self.levels.get(rule, Level.ERROR)

    def looks_into(self, path: str) -> bool:
        """Return whether a file is looked into."""
        return not any(fnmatchcase(path, pattern) for pattern in self.ignore)


def read_policy(path: Path) -> LintPolicy:
    """Return the policy in a file; raise `FormatError`, which says where it is wrong."""
    try:
        return parse_policy(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from error
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8", path=str(path)) from None


def parse_policy(text: str, what: str) -> LintPolicy:
    """Return the policy in `text`, which `what` stands for in errors."""
    try:
        value = tomllib.loads(text)
    except ValueError as error:
        raise FormatError(f"is not TOML: {error}", path=what) from None
    tables = {"rules", "licence", "metadata", "context", "files"}
    _known(value, {"name", *tables}, what)
    rules = _table(value, "rules", set(RULES), what)
    context = _table(value, "context", {"min", "max"}, what)
    pattern = value.get("name")
    if pattern is not None and not isinstance(pattern, str):
        raise FormatError("name is not a text", path=what)
    default = LintPolicy()
    low, high = context.get("min", default.min_context), context.get("max", default.max_context)
    if type(low) is not int or type(high) is not int or not 1 <= low <= high:
        raise FormatError(f"context is {low!r} to {high!r}, expected numbers of tokens", path=what)
    required = _texts(_table(value, "metadata", {"required"}, what), "required", _REQUIRED, what)
    for name in required:
        if name not in METADATA:
            expected = ", ".join(METADATA)
            raise FormatError(f"metadata.required: {name!r} is none of {expected}", path=what)
    return LintPolicy(
        NamePattern.parse(pattern, what) if pattern is not None else None,
        {rule: _level(level, f"{what}: rules.{rule}") for rule, level in rules.items()},
        _texts(_table(value, "licence", {"allowed"}, what), "allowed", (), what),
        required,
        low,
        high,
        _texts(_table(value, "files", {"ignore"}, what), "ignore", (), what),
    )


def _level(value: Any, where: str) -> Level:
    try:
        return Level(value)
    except ValueError:
        raise FormatError(
            f'is {value!r}, expected "error", "warning" or "off"', path=where
        ) from None


def _table(value: dict[str, Any], key: str, known: set[str], what: str) -> dict[str, Any]:
    found = value.get(key, {})
    if not isinstance(found, dict):
        raise FormatError(f"{key} is not a table", path=what)
    _known(found, known, f"{what}: {key}")
    return found


def _known(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(value.keys() - known)
    if unknown:
        expected = ", ".join(sorted(known))
        raise FormatError(f"has an unknown field {unknown[0]!r}: expected {expected}", path=where)


def _texts(value: dict[str, Any], key: str, default: tuple[str, ...], what: str) -> tuple[str, ...]:
    found = value.get(key, list(default))
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise FormatError(f"{key} is not an array of texts", path=what)
    return tuple(found)
