"""Lint a model or a directory: collect what the rules of `modelpack.lint` check, and run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.model import Model, Role, format_of, role_of
from modelpack.artifacts.reference import Reference
from modelpack.builder.files import Found, walk
from modelpack.errors import ModelpackError, UsageError
from modelpack.formats.gguf import GGUFHeader, MetadataValue, read_gguf_header
from modelpack.formats.reader import WeightFile
from modelpack.formats.statistics import read_statistics
from modelpack.lint.checks import Finding, LintFile, LintSubject, Render, check
from modelpack.lint.policy import Level, LintPolicy
from modelpack.operations.headers import FileHeader, read_headers
from modelpack.operations.lookup import check_whole, model_in, stored_model, with_projectors
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.progress import Stop
from modelpack.storage import Source, fill, read_blob, watching
from modelpack.store.layout import LayoutStore


@contextmanager
def open_subject(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    stop: Stop | None = None,
) -> Iterator[tuple[Model, LintSubject]]:
    """Yield the model `name`, from the store or its registry, and the data that rules check."""
    if from_registry:
        where = Reference.parse(name)
        with open_repository(where, remote or RemoteOptions(), watching(None, stop)) as repository:
            model = with_projectors(repository, model_in(repository, where))
            headers = _headers(name, model, None, remote, stop)
            yield model, model_subject(model, repository, headers)
        return
    store = store or LayoutStore()
    model = with_projectors(store, stored_model(store, name))
    check_whole(store, model)
    yield model, model_subject(model, store, _headers(name, model, store, remote, stop))


def _headers(
    name: str,
    model: Model,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    stop: Stop | None,
) -> tuple[FileHeader, ...]:
    """Return the header of the first GGUF file; rules read nothing from safetensors headers."""
    weights = [file for file in model.files() if file.role is Role.WEIGHT and file.format == "gguf"]
    paths = [file.filepath for file in weights[:1] if file.filepath is not None]
    if not weights:
        return ()
    return read_headers(
        name, files=paths, store=store, remote=remote, from_registry=store is None, stop=stop
    )


def model_subject(model: Model, source: Source, headers: tuple[FileHeader, ...]) -> LintSubject:
    """Return the data that rules check for a model; `headers` are those of its weights."""

    def reader(descriptor: Descriptor) -> Callable[[int], bytes]:
        return lambda count: _read(source, descriptor, count)

    files = tuple(
        LintFile(
            file.filepath or f"layer {file.descriptor.digest.short}",
            file.role,
            file.descriptor.size,
            file.format,
            reader(file.descriptor),
        )
        for file in model.files()
    )
    return LintSubject(
        str(model.reference or model.digest),
        model.reference,
        model.config,
        files,
        _metadata([one.header for one in headers if one.file.role is Role.WEIGHT]),
        model.manifest.annotations,
    )


def _read(source: Source, descriptor: Descriptor, count: int) -> bytes:
    """Return the first `count` bytes of a blob; they are verified if they are the whole blob."""
    if count >= descriptor.size:
        return read_blob(source, descriptor, limit=descriptor.size)
    content = bytearray(count)
    with source.blob(descriptor).open() as stream:
        filled = fill(stream, memoryview(content))
    return bytes(content[:filled])


def directory_subject(root: Path) -> LintSubject:
    """Return the data that rules check for the files of a directory, and a config made from them.

    Raises `PackagingError`, `WeightFormatError` for invalid weights, and `UsageError` for an empty
    directory.
    """
    found = [one for one in walk(root, follow_symlinks=False) if isinstance(one, Found)]
    if not found:
        raise UsageError(f"{root} contains no files")
    files, weights = [], []
    for one in found:
        role = role_of("", one.filepath)
        kind = format_of("", one.filepath) if role in (Role.WEIGHT, Role.PROJECTOR) else ""
        if role is Role.WEIGHT:
            weights.append((one.path, kind))
        size = one.path.stat().st_size
        files.append(LintFile(one.filepath, role, size, kind, _reader(one.path)))
    statistics = read_statistics([path for path, _ in weights]) if weights else None
    config = ModelConfig("")
    if statistics is not None:
        config = config.with_changes(
            format=statistics.format,
            quantization=statistics.quantization,
            parameters=statistics.parameters,
            architecture=statistics.architecture,
            context_size=statistics.context_size,
        )
    headers = [_gguf_header(path) for path, kind in weights if kind == "gguf"]
    return LintSubject(str(root), None, config, tuple(files), _metadata(headers))


def _reader(path: Path) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        try:
            with path.open("rb") as stream:
                return stream.read(count)
        except OSError as error:
            raise ModelpackError(f"{path}: cannot be read: {error.strerror}") from error

    return read


def _gguf_header(path: Path) -> GGUFHeader:
    with WeightFile.open(path) as weights:
        return read_gguf_header(weights)


def _metadata(headers: Sequence[object]) -> Mapping[str, MetadataValue]:
    """Return the metadata of the first GGUF file; for shards, it is complete there."""
    found = next((one for one in headers if isinstance(one, GGUFHeader)), None)
    return found.metadata if found is not None else {}


@dataclass(frozen=True, slots=True)
class LintReport:
    """The findings for the model `name`; the model passes if no finding is an error."""

    name: str
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)


def lint(
    name: str,
    policy: LintPolicy,
    render: Render,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    stop: Stop | None = None,
) -> LintReport:
    """Check the model `name`, in the store or its registry, or the files of the directory `name`.

    `render` renders chat templates. Only the headers of weights are read. Raises `NotFoundError`,
    and `PackagingError` for a directory that cannot be read.
    """
    if not from_registry and Path(name).is_dir():
        subject = directory_subject(Path(name))
        return LintReport(subject.name, check(subject, policy, render))
    with open_subject(name, store=store, remote=remote, from_registry=from_registry, stop=stop) as (
        _,
        subject,
    ):
        return LintReport(subject.name, check(subject, policy, render))
