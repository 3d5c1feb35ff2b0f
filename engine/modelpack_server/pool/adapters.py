"""Adapters: the LoRA adapters that requests may name, and the stored models that they change.

The catalogue looks names up here, and adds the adapters of a model to its engine when it is loaded.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from modelpack.artifacts.model import Model, Role
from modelpack.errors import UsageError
from modelpack.formats.adapter import AdapterError
from modelpack.operations.adapters import stored_adapter
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import ModelLoadError, RequestError

if TYPE_CHECKING:
    from modelpack_engine.runner.base_engine import BaseEngine

#: The default of `--max-adapters`.
DEFAULT_MAX_ADAPTERS: Final = 8
#: Names without / and : cannot be confused with `BASE:NAME`.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter under the name by which requests choose it.

    `model` is its artifact in `store`, `base` the digest of the model that it changes.
    """

    name: str
    model: Model
    store: LayoutStore
    base: str

    @property
    def key(self) -> str:
        """The digest of its artifact, which stands for its content in the prefix cache."""
        return str(self.model.digest)

    @property
    def size(self) -> int:
        """The bytes of its weights."""
        files = self.model.files()
        return sum(file.descriptor.size for file in files if file.role is Role.ADAPTER)

    def add_to(self, engine: BaseEngine, remote: RemoteOptions) -> None:
        """Add it to the engine of its base.

        Raises `UntrustedError` if it does not satisfy `remote.trust`, and `ModelLoadError`, naming
        it, if it is invalid or does not fit the base.
        """
        watch = watching(None)
        find_model(self.key, self.store, pull=False, remote=remote, watch=watch)
        try:
            engine.add_adapter(self.name, stored_adapter(self.model, self.store), self.key)
        except AdapterError as error:
            raise ModelLoadError(
                f"adapter {self.name}: {error.message}",
                hint=error.hint or "serve it with the model that it was trained on",
            ) from error
        except RequestError as error:
            raise ModelLoadError(
                f"adapter {self.name}: the engine runs no adapters with this model",
                hint="merge the adapter into its base",
            ) from error


class Adapters:
    """Adapters by name; of each model, at most `max_loaded` are in memory. Safe for threads."""

    def __init__(self, max_loaded: int = DEFAULT_MAX_ADAPTERS) -> None:
        self.max_loaded = max_loaded
        #: Changes whenever a name may refer to another adapter.
        self.version = 0
        self._served: dict[str, ServedAdapter] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._served)

    def add(self, adapter: ServedAdapter) -> None:
        """Add an adapter; raises `UsageError` if its name is taken."""
        with self._lock:
            if adapter.name in self._served:
                raise UsageError(f"two adapters have the name {adapter.name}", hint="rename one")
            self._served[adapter.name] = adapter
            self.version += 1

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

    def bytes_of(self, base: str) -> int:
        """Return an estimate of the memory of a model's adapters, in bytes.

        The engine holds the matrices twice while rows of a step differ in their adapters.
        """
        sizes = sorted((one.size for one in self.of(base)), reverse=True)
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
