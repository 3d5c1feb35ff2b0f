"""PackageRequest: what somebody asks to be packaged, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from modelpack.artifacts.model import Role, preferred_template
from modelpack.errors import PackagingError, UsageError

Format = Literal["docker", "cncf"]

#: Configs hold the context size as a signed number of 32 bits.
MAX_CONTEXT_SIZE: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PackageRequest:
    """The input files and the choices that shape the bytes of a model.

    One of `gguf`, `safetensors_dir` and `dduf` for a new model, none to repackage an existing one.
    `context_size` is in tokens, and 0 is written as 0. `format` None is Docker's for a new model
    and unchanged for an existing one. `created` is `now`, RFC 3339 or a time with a zone; None is
    SOURCE_DATE_EPOCH, else 1970 (repackaging keeps what the model says).
    `preserve` writes what Docker Model Runner would: modes and local times of the files, its
    statistics, and files that occur twice; without it the same files give the same digest anywhere.
    """

    gguf: Path | None = None
    safetensors_dir: Path | None = None
    dduf: Path | None = None
    licenses: tuple[Path, ...] = ()
    chat_template: Path | None = None
    mmproj: Path | None = None
    context_size: int | None = None
    format: Format | None = None
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    created: str | datetime | None = None
    preserve: bool = False
    follow_symlinks: bool = False
    allow_pickle: bool = False

    def check(self) -> None:
        """Raise `UsageError` for a value that no model can have."""
        size = self.context_size
        if size is not None and not 0 <= size <= MAX_CONTEXT_SIZE:
            raise UsageError(f"context size {size}: expected 0 to {MAX_CONTEXT_SIZE} tokens")
        if self.format not in (None, "docker", "cncf"):
            raise UsageError(f"format {self.format!r}: expected docker or cncf")
        for key, text in self.annotations.items():
            if not key:
                raise UsageError(f"an annotation without a key, of value {text!r}")
            if not (_is_text(key) and _is_text(text)):
                raise UsageError(f"annotation {key!r}={text!r}: expected valid UTF-8")

    @property
    def sources(self) -> tuple[tuple[str, Path], ...]:
        """The flags that name weights, each with its path; a new model has exactly one."""
        named = (
            ("--gguf", self.gguf),
            ("--safetensors-dir", self.safetensors_dir),
            ("--dduf", self.dduf),
        )
        return tuple((flag, path) for flag, path in named if path is not None)


def check_context_size_fits(request: PackageRequest, *, cncf: bool) -> None:
    """Raise `UsageError` if the request has a context size that its format cannot hold."""
    if cncf and request.context_size is not None:
        raise UsageError(
            "a context size does not fit in the CNCF format, whose config has no field for it",
            hint="leave --context-size away, or use --format docker",
        )


def check_template_wins(request: PackageRequest, layers: Sequence[tuple[Role, str]]) -> None:
    """Raise `PackagingError` if the model would use another template than --chat-template.

    `layers` are all layers of the model, as `preferred_template` takes them.
    """
    at = preferred_template(layers)
    if request.chat_template is None or request.preserve or at is None:
        return
    name, used = request.chat_template.name, layers[at][1]
    if used != name:
        raise PackagingError(
            f"--chat-template {name}: the model has {used}, which runtimes would use instead",
            hint=f"remove {used} from the directory, or replace it with {name}",
        )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
