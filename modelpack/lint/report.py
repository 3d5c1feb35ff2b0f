"""What lint checks and finds: `LintSubject`, `Finding`, and findings as SARIF."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final
from urllib.parse import quote

from modelpack._version import __version__
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.model import Role
from modelpack.artifacts.reference import Reference
from modelpack.formats.gguf import MetadataValue

#: More of a text is not looked at: tokenizers of the largest vocabularies have 40 MB.
MAX_TEXT_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LintFile:
    """A file; `read` returns its first so many bytes."""

    path: str
    role: Role
    size: int
    format: str
    read: Callable[[int], bytes] = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the path, in lower case."""
        return self.path.rpartition("/")[2].lower()

    def text(self) -> str | None:
        """Return the text in it; None if it holds something else."""
        raw = self.read(min(self.size, MAX_TEXT_BYTES))
        if b"\x00" in raw[:4096]:
            return None
        return raw.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class LintSubject:
    """A model: its name if it has one, its config, its files, and the metadata of its GGUF."""

    name: str
    reference: Reference | None
    config: ModelConfig
    files: tuple[LintFile, ...]
    gguf: Mapping[str, MetadataValue] = field(default_factory=dict, hash=False)
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)

    def file(self, name: str) -> LintFile | None:
        """Return the file of this name that is nearest to the root."""
        found = [file for file in self.files if file.name == name]
        return min(found, key=lambda file: file.path.count("/"), default=None)

    def gguf_text(self, key: str) -> str:
        """Return a text of the GGUF metadata, empty if there is none."""
        found = self.gguf.get(key)
        return found.value if found is not None and isinstance(found.value, str) else ""


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


SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def to_sarif(name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the log of one run over the model `name`."""
    order = list(RULES)
    rules = [{"id": rule, "shortDescription": {"text": text}} for rule, text in RULES.items()]
    driver = {
        "name": "modelpack lint",
        "version": __version__,
        "rules": rules,
    }
    results = [_result(one, name, order.index(one.rule)) for one in findings]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _result(finding: Finding, name: str, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": name, "kind": "module"}]
    }
    if finding.path is not None:
        physical: dict[str, Any] = {"artifactLocation": {"uri": quote(finding.path)}}
        if finding.line is not None:
            physical["region"] = {"startLine": finding.line}
        location["physicalLocation"] = physical
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": str(finding.level),
        "message": {"text": finding.message},
        "locations": [location],
    }
