"""PackageRequest: the input files and options of `modelpack package`, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from modelpack.artifacts.config import MAX_CONTEXT_SIZE
from modelpack.artifacts.model import Role, preferred_template
from modelpack.errors import PackagingError, UsageError

Format = Literal["docker", "cncf"]


@dataclass(frozen=True, slots=True, init=False)
class PackageRequest:
    """The input files and the options that determine the bytes of a model.

    Set one of `gguf`, `safetensors_dir` and `dduf` for a new model, none to repackage an existing
    one. `context_size` is in tokens; 0 is written as 0. `format` None means Docker's format for a
    new model, and no change for an existing one. `created` is `now`, RFC 3339 or a datetime with a
    time zone; None means SOURCE_DATE_EPOCH or 1970 for a new model, and no change for an existing
    one. `preserve` writes the model as Docker Model Runner does, with the modes and local times of
    the files, its statistics and repeated files; otherwise equal files give equal digests on any
    machine.
    """

    gguf: Path | None
    safetensors_dir: Path | None
    dduf: Path | None
    licenses: tuple[Path, ...]
    chat_template: Path | None
    mmproj: Path | None
    context_size: int | None
    format: Format | None
    annotations: Mapping[str, str] = field(hash=False)
    created: str | datetime | None
    preserve: bool
    follow_symlinks: bool
    allow_pickle: bool

    def __init__(
        self,
        gguf: str | Path | None = None,
        safetensors_dir: str | Path | None = None,
        dduf: str | Path | None = None,
        licenses: str | Path | Sequence[str | Path] = (),
        chat_template: str | Path | None = None,
        mmproj: str | Path | None = None,
        context_size: int | None = None,
        format: Format | None = None,
        annotations: Mapping[str, str] | None = None,
        created: str | datetime | None = None,
        preserve: bool = False,
        follow_symlinks: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        several = [licenses] if isinstance(licenses, str | Path) else licenses
        values = {
            "gguf": _path(gguf),
            "safetensors_dir": _path(safetensors_dir),
            "dduf": _path(dduf),
            "licenses": tuple(Path(one) for one in several),
            "chat_template": _path(chat_template),
            "mmproj": _path(mmproj),
            "context_size": context_size,
            "format": format,
            "annotations": annotations or {},
            "created": created,
            "preserve": preserve,
            "follow_symlinks": follow_symlinks,
            "allow_pickle": allow_pickle,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def check(self) -> None:
        """Raise `UsageError` for an invalid value."""
        size = self.context_size
        if size is not None and not 0 <= size <= MAX_CONTEXT_SIZE:
            raise UsageError(f"context size {size}: expected 0 to {MAX_CONTEXT_SIZE} tokens")
        if self.format not in (None, "docker", "cncf"):
            raise UsageError(f"format {self.format!r}: expected docker or cncf")
        for key, text in self.annotations.items():
            if not key:
                raise UsageError(f"an annotation has no key; its value is {text!r}")
            try:
                f"{key}{text}".encode()
            except UnicodeEncodeError:
                raise UsageError(f"annotation {key!r}={text!r}: expected valid UTF-8") from None

    @property
    def sources(self) -> tuple[tuple[str, Path], ...]:
        """The weights as (flag, path); a new model needs exactly one."""
        named = (
            ("--gguf", self.gguf),
            ("--safetensors-dir", self.safetensors_dir),
            ("--dduf", self.dduf),
        )
        return tuple((flag, path) for flag, path in named if path is not None)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def check_context_size_fits(request: PackageRequest, *, cncf: bool) -> None:
    """Raise `UsageError` if the request sets a context size for a CNCF model."""
    if cncf and request.context_size is not None:
        raise UsageError(
            "the context size cannot be set: configs of the CNCF format have no field for it",
            hint="omit --context-size, or use --format docker",
        )


def check_template_wins(request: PackageRequest, layers: Sequence[tuple[Role, str]]) -> None:
    """Raise `PackagingError` if runtimes would not use the template of --chat-template.

    `layers` are all layers of the model as (role, path), as for `preferred_template`.
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
