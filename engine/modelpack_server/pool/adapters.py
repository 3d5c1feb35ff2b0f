"""Adapters: the LoRA adapters that requests may name, and the stored models that they change.

The catalogue looks names up here, and adds the adapters of a model to its engine when it is loaded.
`AdapterLoading` opens those that requests load later.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from modelpack.artifacts.model import Model, Role
from modelpack.errors import NotFoundError, UntrustedError, UsageError
from modelpack.formats.adapter import Adapter, AdapterError
from modelpack.operations.adapters import base_name, package_adapter, stored_adapter
from modelpack.operations.lookup import stored_model
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from modelpack_engine.async_engine import AddAdapter, EngineClient
from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_server.pool.file_store import FileStore

#: The default of `--max-adapters`.
DEFAULT_MAX_ADAPTERS: Final = 8
#: Names without / and : cannot be confused with `BASE:NAME`.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter under the name by which requests choose it.

    `model` is its artifact in `store`, `base` the digest of the model that it changes. Without one
    that is `required`, its base does not load; others are forgotten then.
    """

    name: str
    model: Model
    store: LayoutStore
    base: str
    required: bool = True

    @property
    def key(self) -> str:
        """The digest of its artifact, which stands for its content in the prefix cache."""
        return str(self.model.digest)

    @property
    def size(self) -> int:
        """The bytes of its weights."""
        files = self.model.files()
        return sum(file.descriptor.size for file in files if file.role is Role.ADAPTER)

    def add_to(self, engine: EngineClient, remote: RemoteOptions) -> None:
        """Add it to the engine of its base, and wait until it is added.

        Raises `UntrustedError` if it does not satisfy `remote.trust`, and `ModelLoadError`, naming
        it, if it is invalid or does not fit the base.
        """
        try:
            engine.change(AddAdapter(self.name, self.verified(remote), self.key)).result()
        except AdapterError as error:
            raise self.misfit(error) from error
        except RequestError as error:
            raise ModelLoadError(
                f"adapter {self.name}: the engine runs no adapters with this model",
                hint="merge the adapter into its base",
            ) from error

    def misfit(self, error: AdapterError) -> ModelLoadError:
        """Return the error of a base that cannot be loaded with it."""
        return ModelLoadError(
            f"adapter {self.name}: {error.message}",
            hint=error.hint or "serve it with the model that it was trained on",
        )

    def discard(self) -> None:
        """Forget the files of a directory; an artifact stays in its store."""
        if isinstance(self.store, FileStore):
            with suppress(NotFoundError):
                self.store.remove(f"adapter:{self.name}")

    def verified(self, remote: RemoteOptions) -> Adapter:
        """Return its matrices' headers.

        Raises `UntrustedError` if it does not satisfy `remote.trust`, and `AdapterError`.
        """
        find_model(self.key, self.store, pull=False, remote=remote, watch=watching(None))
        return stored_adapter(self.model, self.store)


def open_artifact(
    name: str, reference: str, store: LayoutStore, remote: RemoteOptions,
    progress: ProgressCallback | None = None,
) -> ServedAdapter:  # fmt: skip
    """Return the adapter `reference` of a store, pulled if it is not stored, under `name`.

    Raises what `find_model` and `base_name` raise.
    """
    watch = watching(progress)
    model = find_model(reference, store, pull=True, remote=remote, watch=watch)
    return ServedAdapter(name, model, store, base_name(model).rpartition("@")[2])


def open_directory(
    name: str, path: Path, base: Model, base_store: LayoutStore, files: FileStore,
    progress: ProgressCallback | None = None,
) -> ServedAdapter:  # fmt: skip
    """Return the adapter in a directory under `name`, added to `files`.

    Raises what `package_adapter` raises.
    """
    reference = f"adapter:{name}"
    packaged = package_adapter(
        reference, path, str(base.digest), store=files, base_store=base_store, progress=progress
    )
    return ServedAdapter(name, stored_model(files, str(packaged.digest)), files, str(base.digest))


@dataclass(frozen=True, slots=True)
class AdapterLoading:
    """Opens the adapters that requests add to `adapters`: artifacts, and those in `directories`.

    `remote` has the options for registries and the trust policy. `files` stores what the
    directories contain.
    """

    adapters: Adapters
    store: LayoutStore
    remote: RemoteOptions
    files: FileStore
    directories: tuple[Path, ...] = ()

    def open(self, name: str, source: str, base: str) -> ServedAdapter:
        """Return the adapter `source` under `name`; `base` is the model of directories, by digest.

        It is not `required`. An absolute path is a directory, any other text a reference. Raises
        `NotFoundError` with the same text for each path that is not a directory in `directories`,
        so that it does not reveal which files exist, and what `open_artifact` and `open_directory`
        raise.
        """
        if not source.startswith("/"):
            return replace(open_artifact(name, source, self.store, self.remote), required=False)
        path = self._allowed(source)
        if self.remote.trust is not None:
            raise UntrustedError(
                f"{source}: files on disk have no signatures",
                hint="package the adapter, sign it, and load that",
            )
        store: LayoutStore = self.files
        try:
            model = stored_model(store, base)
        except NotFoundError:
            store = self.store
            model = stored_model(store, base)
        adapter = open_directory(name, path, model, store, self.files)
        return replace(adapter, required=False)

    def _allowed(self, source: str) -> Path:
        """Return the directory `source` without links, if it and its files may be read."""
        with suppress(OSError, RuntimeError, ValueError):
            path = Path(source).resolve(strict=True)
            for root in (directory.resolve(strict=True) for directory in self.directories):
                if not path.is_relative_to(root) or not path.is_dir():
                    continue
                if all(entry.resolve().is_relative_to(root) for entry in path.iterdir()):
                    return path
        raise NotFoundError(
            f"no such directory, or not allowed: {source}",
            hint="start the server with --adapter-directory for a directory above it",
        )


class Adapters:
    """Adapters by name; of each model, at most `max_loaded` are in memory. Safe for threads.

    With `grows`, adapters can be added later: models that MLX runs anyway are loaded so, others
    once their first adapter is `expected`. With `merges`, a model has at most one, which is merged
    into its weights as they are loaded: only requests that name the adapter may use the model.
    """

    def __init__(
        self,
        max_loaded: int = DEFAULT_MAX_ADAPTERS,
        *,
        grows: bool = False,
        merges: bool = False,
    ) -> None:
        self.max_loaded = max_loaded
        self.grows = grows
        self.merges = merges
        #: Changes whenever a name may refer to another adapter.
        self.version = 0
        #: The digests of models that get an adapter after they are loaded.
        self.expected: set[str] = set()
        self._served: dict[str, ServedAdapter] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._served)

    def add(self, adapter: ServedAdapter) -> None:
        """Add an adapter.

        Raises `UsageError` if its name is taken, or if another is merged into its base.
        """
        other = self.merged_into(adapter.base)
        if other is not None:
            raise UsageError(
                f"--merge takes one adapter for each MODEL, got {other.name} and {adapter.name}",
                hint="leave out --merge",
            )
        with self._lock:
            if adapter.name in self._served:
                raise UsageError(f"two adapters have the name {adapter.name}", hint="rename one")
            self._served[adapter.name] = adapter
            self.version += 1

    def remove(self, adapter: ServedAdapter) -> None:
        """Forget an adapter, and its files if they are in a `FileStore`."""
        with self._lock:
            self._served.pop(adapter.name, None)
            self.version += 1
        adapter.discard()

    def named(self, name: str) -> ServedAdapter | None:
        """Return the adapter of this name or digest."""
        with self._lock:
            found = self._served.get(name)
            return found or next((one for one in self._served.values() if one.key == name), None)

    def names(self, key: str) -> tuple[str, ...]:
        """Return the names of the adapter with this digest."""
        with self._lock:
            return tuple(one.name for one in self._served.values() if one.key == key)

    def of(self, base: str) -> tuple[ServedAdapter, ...]:
        """Return the adapters of the model with this digest."""
        with self._lock:
            return tuple(one for one in self._served.values() if one.base == base)

    def merged_into(self, base: str) -> ServedAdapter | None:
        """Return the adapter that is merged into the model with this digest, or None."""
        return next(iter(self.of(base)), None) if self.merges else None

    def to_merge(self, base: str) -> Adapter | None:
        """Return the headers of the adapter that is merged into the model with this digest."""
        served = self.merged_into(base)
        return None if served is None else stored_adapter(served.model, served.store)

    def bytes_of(self, base: str, *more: ServedAdapter) -> int:
        """Return an estimate of the memory of a model's adapters and of `more`, in bytes.

        The engine holds the matrices twice while rows of a step differ in their adapters. Merged
        ones take none.
        """
        if self.merges:
            return 0
        sizes = sorted((one.size for one in (*self.of(base), *more)), reverse=True)
        return 2 * sum(sizes[: self.max_loaded])


def check_adapter_name(name: str) -> None:
    """Raise `UsageError` unless `name` can be the name of an adapter."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:100]!r} is not a valid name of an adapter",
            hint="use up to 128 letters, digits, dots, hyphens and underscores",
        )


def base_of(name: str) -> tuple[str, str]:
    """Return BASE and NAME of the text `BASE:NAME`; both are empty if it has no colon."""
    base, _, adapter = name.rpartition(":")
    return (base, adapter) if base else ("", "")
