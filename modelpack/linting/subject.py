"""What is looked at: a model of a store or a registry, or files that are to become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from modelpack.config import ModelConfig
from modelpack.formats.gguf_metadata import MetadataValue
from modelpack.model import Role
from modelpack.reference import Reference

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
