"""Findings: what is wrong with a model, by which rule, and how bad that is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class Level(StrEnum):
    """How bad a finding is; `OFF` switches a rule off."""

    ERROR = "error"
    WARNING = "warning"
    OFF = "off"


#: The rules, each with what it asks for.
RULES: Final = {
    "name": "the repository and tag follow the catalogue's pattern, and say what the model is",
    "licence": "the licence is there and is one that is allowed",
    "metadata": "the config says what the model is",
    "template": "the chat template is there and renders",
    "pickle": "no file is a pickle, which runs code when it is loaded",
    "secrets": "no file holds a token, a password or a private key",
    "paths": "no configuration holds a path of somebody's machine",
    "context": "the context size is one that the model has",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found; `path` is the file, `line` (from 1) the place in it, if there is one."""

    rule: str
    message: str
    path: str | None = None
    line: int | None = None
    level: Level = Level.ERROR

    def to_json(self) -> dict[str, Any]:
        """Return the finding for programs."""
        value: dict[str, Any] = {"rule": self.rule, "level": str(self.level)}
        if self.path is not None:
            value["path"] = self.path
        if self.line is not None:
            value["line"] = self.line
        return value | {"message": self.message}

    def __str__(self) -> str:
        line = f":{self.line}" if self.line is not None else ""
        where = f"{self.path}{line}: " if self.path is not None else ""
        return f"{self.level}: {where}{self.message} [{self.rule}]"
