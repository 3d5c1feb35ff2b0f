"""The MODEL arguments of run and serve: stored models, short names of these, and files on disk."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, Role
from modelpack.artifacts.reference import Reference
from modelpack.builder.request import PackageRequest
from modelpack.cli.options import Settings
from modelpack.cli.output import note, shown_progress
from modelpack.errors import (
    AmbiguousError,
    InvalidReferenceError,
    NotFoundError,
    RemoteUnavailableError,
    UntrustedError,
    UsageError,
)
from modelpack.formats.adapter import AdapterError
from modelpack.formats.projector import gguf_role
from modelpack.hub.reference import local_name
from modelpack.operations.adapters import base_name, compare, find_base, stored_adapter
from modelpack.operations.lookup import stored_model
from modelpack.operations.package import package
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from modelpack_server.pool.adapters import (
    DEFAULT_MAX_ADAPTERS,
    AdapterLoading,
    Adapters,
    ServedAdapter,
    check_adapter_name,
    open_artifact,
    open_directory,
)
from modelpack_server.pool.file_store import FileStore

if TYPE_CHECKING:
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.distributed.leader import Ranks
    from modelpack_server.pool.store_catalogue import StoreCatalogue

_PATH = re.compile(r"(?:\.{0,2}|~)/.*|\.{1,2}", re.DOTALL)
_UNNAMEABLE = re.compile(r"[^a-z0-9]+")
_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class Found:
    """A model, its name in the catalogue, and (or None) a further name that the user typed."""

    model: Model
    name: str
    alias: str | None = None


class ModelSources:
    """Finds the models that a user names; as a context manager, it forgets the files at the end.

    With `drafter`, models are pulled with their drafters.
    """

    def __init__(
        self,
        settings: Settings,
        remote: RemoteOptions,
        max_adapters: int = DEFAULT_MAX_ADAPTERS,
        *,
        loads_adapters: bool = False,
        merges_adapters: bool = False,
        drafter: bool = False,
    ) -> None:
        self.adapters = Adapters(max_adapters, grows=loads_adapters, merges=merges_adapters)
        self._settings = settings
        self._remote = remote
        self._drafter = drafter
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._files: list[FileStore] = []  # at most one, made for the first path

    def __enter__(self) -> ModelSources:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    def catalogue(
        self, config: EngineConfig, ranks: Ranks | None = None, *, engine_process: bool = False
    ) -> StoreCatalogue:
        """Return the models of the store, and all files that were opened or will be."""
        from modelpack_server.pool.store_catalogue import StoreCatalogue

        return StoreCatalogue(
            self._settings.store(), config, ranks, self._remote, self._files, self.adapters,
            engine_process=engine_process,
        )  # fmt: skip

    def open(self, typed: str) -> Found:
        """Return the model at the path `typed` or of this name, pulled if it is not stored.

        If it is an adapter, its base is pulled too, and requests may name the adapter.

        Raises `NotFoundError` for a path without a model, `UntrustedError` for any path under a
        trust policy, `AmbiguousError` for the last path element of several stored models, and what
        `open_model` and `package` raise.
        """
        if (path := path_in(typed)) is not None:
            return self._open_file(path)
        from modelpack_server.stored_models import stored_files

        store = self._settings.store()
        name = stored_name(store, typed)
        if name != typed:
            note(self._settings, f"{typed} is {name}")
        with shown_progress(self._settings) as progress:
            watch = watching(progress)
            try:
                model = find_model(
                    name, store, pull=True, remote=self._remote, watch=watch, drafter=self._drafter
                )
            except (NotFoundError, RemoteUnavailableError) as error:
                if os.path.exists(typed):
                    error.hint = f"if you mean the files, write ./{typed}"
                raise
            if model.is_adapter:
                base = find_base(
                    model, store, pull=True, remote=self._remote, watch=watch, drafter=self._drafter
                )
                stored_files(base, store)
                served = ServedAdapter(local_name(name), model, store, str(base.digest))
                self._check_fits(served, typed, base)
                if self.adapters.named(served.name) is None:
                    self.adapters.add(served)
            else:
                stored_files(model, store)
        local = local_name(name)
        if store.resolve(local).digest != model.digest:  # the name may stand for several variants
            return Found(model, str(model.digest), typed if name != typed else local)
        return Found(model, local, typed if name != typed else None)

    def add_adapter(self, name: str, typed: str, models: Sequence[Found]) -> None:
        """Let requests name the adapter `typed`, a path or a stored or pulled artifact, as `name`.

        An artifact names its base, which has to be one of `models`; files are for the first of
        these. Raises `UsageError` for an invalid name and for another base, `AdapterError` for an
        adapter that is invalid or does not fit, and what `open` raises.
        """
        check_adapter_name(name)
        if not models:
            raise UsageError("--adapter requires a MODEL", hint="name the adapter's base")
        with suppress(NotFoundError, InvalidReferenceError):
            taken = self._settings.store().resolve(name).digest
            raise UsageError(
                f"--adapter {name}={typed}: {name} is a stored model, {taken}",
                hint="give the adapter another name",
            )
        path = Path(typed) if Path(typed).exists() else path_in(typed)
        with shown_progress(self._settings) as progress:
            if path is None:
                store = self._settings.store()
                adapter = open_artifact(name, typed, store, self._remote, progress)
            else:
                base = models[0].model
                files = self._file_store(path)
                if base.is_adapter:
                    raise UsageError(
                        f"--adapter {name}={typed}: {models[0].name} is an adapter itself",
                        hint="name the base as the first MODEL",
                    )
                adapter = open_directory(name, path, base, self._store_of(base), files, progress)
        bases = {str(found.model.digest): found.model for found in models}
        if adapter.base not in bases:
            wanted = base_name(adapter.model)
            raise UsageError(
                f"--adapter {name}={typed}: its base is {wanted}, which is not a MODEL",
                hint=f"add {wanted} to the MODELs",
            )
        self._check_fits(adapter, f"--adapter {name}={typed}", bases[adapter.base])
        self.adapters.add(adapter)

    def _check_fits(self, adapter: ServedAdapter, typed: str, base: Model) -> None:
        """Raise `AdapterError`, naming what was typed, unless the adapter fits its base.

        Other tools than ours may have packaged it, without a check.
        """
        try:
            read = stored_adapter(adapter.model, adapter.store)
            compare(read, adapter.base, base, self._store_of(base), self._remote)
        except AdapterError as error:
            raise AdapterError(f"{typed}: {error.message}", hint=error.hint) from error

    def is_merged(self, found: Found) -> bool:
        """Return whether a model is served only with an adapter merged into its weights."""
        return self.adapters.merged_into(str(found.model.digest)) is not None

    def adapter_loading(self, directories: Sequence[Path]) -> AdapterLoading:
        """Return what opens the adapters that requests load, from `directories` or by reference."""
        store, files = self._settings.store(), self._files_on_disk()
        remote = replace(self._remote, variant=None)
        return AdapterLoading(self.adapters, store, remote, files, tuple(directories))

    def _open_file(self, path: Path) -> Found:
        files = self._file_store(path)
        with shown_progress(self._settings) as progress:
            reference = add_file(files, path, progress)
        return Found(stored_model(files, str(reference)), reference.familiar)

    def _file_store(self, path: Path) -> FileStore:
        """Return the store for files at `path`; raise `UntrustedError` under a trust policy."""
        if self._remote.trust is not None:
            raise UntrustedError(
                f"{path}: files on disk have no signatures",
                hint="package them, sign the model, and name that",
            )
        return self._files_on_disk()

    def _files_on_disk(self) -> FileStore:
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="modelpack-files-")
            self._files.append(FileStore(self._directory.name))
        return self._files[0]

    def _store_of(self, model: Model) -> LayoutStore:
        """Return the store of an opened model."""
        for files in self._files:
            with suppress(NotFoundError):
                stored_model(files, str(model.digest))
                return files
        return self._settings.store()


def path_in(text: str) -> Path | None:
    """Return the path that `text` is, or None if it names a model.

    A path begins with a slash, ./, ../ or ~/, or is that of an existing GGUF file. Raises
    `NotFoundError` for one that does not exist.
    """
    path = Path(text).expanduser()
    if _PATH.fullmatch(text):
        if not path.exists():
            raise NotFoundError(f"no such file or directory: {text}")
        return path
    return path if path.suffix == ".gguf" and path.is_file() else None


def add_file(files: FileStore, path: Path, progress: ProgressCallback | None = None) -> Reference:
    """Add a GGUF file, or a directory of GGUF or safetensors, to `files`; return its name there.

    A directory may have a projector beside the GGUF file, which its architecture says. Raises
    `UsageError` for other files, and what `package` raises.
    """
    path = weights = Path(os.path.abspath(path))
    projectors: list[Path] = []
    if path.is_dir() and not any(path.glob("*.safetensors")):
        shards = sorted(path.glob("*.gguf"))
        projectors = [file for file in shards if gguf_role(file, Role.WEIGHT) is Role.PROJECTOR]
        shards = [file for file in shards if file not in projectors]
        if len(shards) == 1 or (shards and "-00001-of-" in shards[0].name):
            weights = shards[0]
    if weights.is_dir():
        request = PackageRequest(safetensors_dir=weights)
    elif weights.suffix == ".gguf":
        request = PackageRequest(gguf=weights, mmproj=projectors[0] if projectors else None)
    elif weights.suffix == ".dduf":
        raise UsageError(
            f"{path} is a DDUF file, a model that generates images, which is not supported",
            hint="open it with diffusers",
        )
    else:
        raise UsageError(
            f"{path} is not a model", hint="give a GGUF file, or a directory of safetensors files"
        )
    words = path.stem if path.is_file() else path.name
    name = _UNNAMEABLE.sub("-", words.lower()).strip("-") or "model"
    return package(f"{name}:latest", request, store=files, progress=progress).reference


def stored_name(store: LayoutStore, typed: str) -> str:
    """Return the full name of the stored model whose last path element is `typed`.

    Without a tag in `typed`, any tag counts. Returns `typed` if it names a stored model itself,
    if it is not a bare name, or if no model has it. Raises `AmbiguousError` for several models.
    """
    if "/" in typed or "@" in typed:
        return typed
    try:
        store.resolve(typed)
    except NotFoundError:
        found = _with_last_element(store, typed)
    except InvalidReferenceError:
        return typed
    else:
        return typed
    if len(set(found.values())) > 1:
        names = sorted(found)
        shown = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
        raise AmbiguousError(
            f"{typed} is the last part of several names: {shown}",
            candidates=tuple(names),
            hint="write one of them",
        )
    return min(found, default=typed)


def _with_last_element(store: LayoutStore, typed: str) -> Mapping[str, Digest]:
    last, _, tag = typed.partition(":")
    return {
        reference.familiar: model.digest
        for model in (*store.models(), *store.indexes())
        for reference in model.references
        if reference.repository.rpartition("/")[2] == last and tag in ("", reference.tag)
    }
