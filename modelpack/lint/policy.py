"""Lint policies: the rules, their levels and their parameters, read from a TOML file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.reference import Reference
from modelpack.errors import FormatError
from modelpack.trust.policy import check_fields


class Level(StrEnum):
    """The severity of a rule's findings; `OFF` switches the rule off."""

    ERROR = "error"
    WARNING = "warning"
    OFF = "off"


#: The rules, each with its requirement.
RULES: Final = {
    "name": "the repository and tag follow the catalogue's pattern and match the config",
    "licence": "the model has a licence, and it is allowed",
    "metadata": "the config has the required fields",
    "template": "a model that generates text has a chat template, and it renders",
    "pickle": "no file is a pickle, which runs code when it is loaded",
    "secrets": "no file contains a token, a password or a private key",
    "paths": "no configuration contains an absolute path of a machine",
    "context": "the context size is within the limits of the policy and the model",
}


# The regular expression of each part. Repositories and tags allow no other characters.
_PARTS: Final = {
    "family": r"[a-z0-9]+(?:[._-][a-z0-9]+)*",
    "params": r"\d+(?:\.\d+)?(?:x\d+(?:\.\d+)?)?[KMBTkmbt](?:-[Aa]\d+(?:\.\d+)?[KMBTkmbt])?",
    "quant": r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*",
    "context": r"\d+[KMkm]?",
    "variant": r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*",
    "version": r"v?\d+(?:\.\d+)*",
}
_PLACE = re.compile(r"<([a-z]+)>")
_CONTEXT = re.compile(r"(\d+)([KMkm]?)\Z")
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A compiled pattern of names, such as `<family>:<params>-<quant>-<context>`."""

    text: str
    regex: re.Pattern[str]

    @classmethod
    def parse(cls, text: str, what: str) -> NamePattern:
        """Return the pattern; raise `FormatError` for a part that is unknown or repeated."""
        pieces, used, at = [], set(), 0
        for match in _PLACE.finditer(text):
            name = match[1]
            if name not in _PARTS or name in used:
                expected = ", ".join(f"<{part}>" for part in _PARTS)
                raise FormatError(
                    f"name: {match[0]} is not one of {expected}, once each",
                    path=what,
                )
            used.add(name)
            pieces += [re.escape(text[at : match.start()]), f"(?P<{name}>{_PARTS[name]})"]
            at = match.end()
        if text.count(":") != 1 or not used:
            raise FormatError(
                f"name is {text!r}, expected a pattern like <family>:<params>-<quant>", path=what
            )
        return cls(text, re.compile("".join(pieces) + re.escape(text[at:]) + r"\Z"))

    def problems(self, reference: Reference, config: ModelConfig) -> list[str]:
        """Return the problems of a name: a wrong form, and parts that contradict the config."""
        name = f"{reference.repository.rpartition('/')[2]}:{reference.tag or ''}"
        match = self.regex.match(name)
        if match is None:
            return [f"{name} does not follow {self.text}"]
        said, found = match.groupdict(), []
        for part, fact in (("quant", config.quantization), ("params", config.parameters)):
            text = said.get(part)
            if text and fact and not _agree(part, text, fact):
                found.append(f"{name}: its {part} is {text}, but the config has {fact}")
        size = _tokens(said["context"]) if said.get("context") else None
        if size and config.context_size and not _about(size, config.context_size):
            found.append(f"{name}: its context is {size}, but the config has {config.context_size}")
        return found


def _agree(part: str, said: str, fact: str) -> bool:
    if part == "quant":
        plain = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in (said, fact)]
        return plain[0] in plain[1] or plain[1] in plain[0]
    mine, theirs = _count(said), _count(fact)
    # Names have rounded numbers: a model with 7.24 billion parameters is called 7B.
    return mine is None or theirs is None or abs(mine - theirs) <= 0.25 * theirs


def _count(text: str) -> float | None:
    match = re.match(r"\s*(\d+(?:\.\d+)?)(?:x(\d+(?:\.\d+)?))?\s*([KMBT])", text, re.IGNORECASE)
    if match is None or match[2]:
        return None
    return float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[3].lower()]


def _tokens(text: str) -> int:
    match = _CONTEXT.match(text)
    assert match is not None
    return int(match[1]) * _UNITS[match[2].lower()]


def _about(said: int, fact: int) -> bool:
    # 128K may mean 131072 or 128000.
    return abs(said - fact) <= 0.05 * fact


METADATA: Final = ("format", "architecture", "parameters", "quantization", "context_size")
_REQUIRED: Final = ("format", "architecture", "parameters", "quantization")


@dataclass(frozen=True, slots=True)
class LintPolicy:
    """The requirements on models; an empty `allowed` accepts every licence.

    `levels` has the rules whose level is not ERROR by default, `required` the fields of the config,
    and `ignore` patterns of files whose text is not searched. Context sizes are in tokens.
    """

    name: NamePattern | None = None
    levels: Mapping[str, Level] = field(default_factory=dict, hash=False)
    allowed: tuple[str, ...] = ()
    required: tuple[str, ...] = _REQUIRED
    min_context: int = 1
    max_context: int = 16 * 1024 * 1024
    ignore: tuple[str, ...] = ()

    def level(self, rule: str) -> Level:
        """Return the level of a rule's findings."""
        return self.levels.get(rule, Level.ERROR)

    def searches(self, path: str) -> bool:
        """Return whether the text of the file at `path` is searched."""
        return not any(fnmatchcase(path, pattern) for pattern in self.ignore)


def read_policy(path: Path) -> LintPolicy:
    """Return the policy in a file; raise `FormatError` with the invalid place."""
    try:
        return parse_policy(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from error
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8", path=str(path)) from None


def parse_policy(text: str, what: str) -> LintPolicy:
    """Return the policy in `text`; `what` names it in errors."""
    try:
        value = tomllib.loads(text)
    except ValueError as error:
        raise FormatError(f"is not TOML: {error}", path=what) from None
    tables = {"rules", "licence", "metadata", "context", "files"}
    check_fields(value, {"name", *tables}, what)
    rules = _table(value, "rules", set(RULES), what)
    context = _table(value, "context", {"min", "max"}, what)
    pattern = value.get("name")
    if pattern is not None and not isinstance(pattern, str):
        raise FormatError("name is not a string", path=what)
    default = LintPolicy()
    low, high = context.get("min", default.min_context), context.get("max", default.max_context)
    if type(low) is not int or type(high) is not int or not 1 <= low <= high:
        raise FormatError(f"context is {low!r} to {high!r}, expected numbers of tokens", path=what)
    required = _texts(_table(value, "metadata", {"required"}, what), "required", _REQUIRED, what)
    for name in required:
        if name not in METADATA:
            expected = ", ".join(METADATA)
            raise FormatError(f"metadata.required: {name!r} is not one of {expected}", path=what)
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
    check_fields(found, known, f"{what}: {key}")
    return found


def _texts(value: dict[str, Any], key: str, default: tuple[str, ...], what: str) -> tuple[str, ...]:
    found = value.get(key, list(default))
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise FormatError(f"{key} is not an array of strings", path=what)
    return tuple(found)
