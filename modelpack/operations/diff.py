"""Compare two models layer by layer, in the store or in registries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, ModelFile
from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import NotFoundError
from modelpack.operations.lookup import remote_model, stored_model
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Stop
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore


class Change(StrEnum):
    """How a layer differs between the first model and the second."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"  # the same path, but other bytes or another media type
    RENAMED = "renamed"  # the same bytes under another path


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A layer that differs: `before` is None for an added one, `after` for a removed one."""

    kind: Change
    before: ModelFile | None
    after: ModelFile | None

    @property
    def growth(self) -> int:
        """The size in the second model minus the size in the first."""
        sizes = [file.descriptor.size if file else 0 for file in (self.before, self.after)]
        return sizes[1] - sizes[0]


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A field that differs, by its dotted name; None if a model does not have the field."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class ModelDiff:
    """The differences of two models.

    `unchanged` counts the layers with the same bytes, path and media type. `config` compares the
    parsed configs, `manifest` the artifact types, the media types and the annotations.
    """

    before: Model
    after: Model
    layers: tuple[LayerChange, ...]
    unchanged: int
    config: tuple[FieldChange, ...]
    manifest: tuple[FieldChange, ...]

    @property
    def identical(self) -> bool:
        """Whether both are the same model, byte for byte."""
        return self.before.digest == self.after.digest

    @property
    def bytes_new(self) -> int:
        """The bytes to fetch for the second model if the first one is stored."""
        held = {blob.digest for blob in self.before.manifest.blobs}
        blobs = self.after.manifest.unique_blobs
        return sum(blob.size for blob in blobs if blob.digest not in held)


def diff(
    before: str | Reference,
    after: str | Reference | None = None,
    *,
    from_registry: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> ModelDiff:
    """Compare two models: from the store if they are there, else from their registries.

    Without `after`, the stored model is compared with the registry's model of the same name. With
    `from_registry`, both are read from registries. No layer is read. Raises `NotFoundError`.
    """
    store = store or LayoutStore()
    before = str(before)
    if after is None:
        first = _remote(before, remote, stop) if from_registry else stored_model(store, before)
        return compare(first, _remote(before, remote, stop))
    found = [
        _remote(name, remote, stop) if from_registry else _anywhere(name, store, remote, stop)
        for name in (before, str(after))
    ]
    return compare(found[0], found[1])


def compare(before: Model, after: Model) -> ModelDiff:
    """Return the differences of two models."""
    old, new = before.files(), after.files()
    changes, unchanged = _layers(old, new)
    return ModelDiff(
        before,
        after,
        changes,
        unchanged,
        _fields(_facts(before.config), _facts(after.config)),
        _fields(_manifest_facts(before), _manifest_facts(after)),
    )


def _anywhere(
    name: str, store: LayoutStore, remote: RemoteOptions | None, stop: Stop | None
) -> Model:
    try:
        return stored_model(store, name)
    except NotFoundError:
        if is_model_id(name.strip()):
            raise
    return _remote(name, remote, stop)


def _remote(name: str, remote: RemoteOptions | None, stop: Stop | None) -> Model:
    return remote_model(Reference.parse(name), remote, watching(None, stop))


def _layers(
    old: Iterable[ModelFile], new: Iterable[ModelFile]
) -> tuple[tuple[LayerChange, ...], int]:
    """Pair layers by path, then the others by content; return the differences, sorted by path."""
    before, after = _by_path(old), _by_path(new)
    changes: list[LayerChange] = []
    unchanged = 0
    for key in before.keys() & after.keys():
        one, other = before.pop(key), after.pop(key)
        if (one.descriptor.digest, one.media_type) == (other.descriptor.digest, other.media_type):
            unchanged += 1
        else:
            changes.append(LayerChange(Change.CHANGED, one, other))
    added: dict[Digest, list[ModelFile]] = {}
    for file in after.values():
        added.setdefault(file.descriptor.digest, []).append(file)
    for file in before.values():
        same = added.get(file.descriptor.digest)
        if same:
            changes.append(LayerChange(Change.RENAMED, file, same.pop(0)))
        else:
            changes.append(LayerChange(Change.REMOVED, file, None))
    changes += [LayerChange(Change.ADDED, None, file) for files in added.values() for file in files]
    return tuple(sorted(changes, key=_shown_order)), unchanged


def _by_path(files: Iterable[ModelFile]) -> dict[tuple[str, int], ModelFile]:
    """Return files by key: the path, else the media type, and a number for repeated ones."""
    found: dict[tuple[str, int], ModelFile] = {}
    counts: dict[str, int] = {}
    for file in files:
        path = file.filepath if file.filepath is not None else f"\0{file.media_type}"
        counts[path] = counts.get(path, 0) + 1
        found[path, counts[path]] = file
    return found


def _shown_order(change: LayerChange) -> tuple[str, str]:
    file = change.before or change.after
    assert file is not None, "a change has at least one of both"
    return file.filepath or "", str(file.descriptor.digest)


def _facts(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a config by dotted name, without the digests of layers."""
    facts: dict[str, Any] = {
        "format": config.format,
        "quantization": config.quantization,
        "parameters": config.parameters,
        "architecture": config.architecture,
        "size": config.size,
        "contextSize": config.context_size,
        "created": config.created,
    }
    for name in ("gguf", "safetensors", "diffusers", "cncf_descriptor", "cncf_config"):
        held: Mapping[str, Any] | None = getattr(config, name)
        for key, value in (held or {}).items():
            facts[f"{name}.{key}"] = value
    return {name: value for name, value in facts.items() if value not in ("", None)}


def _manifest_facts(model: Model) -> dict[str, Any]:
    manifest = model.manifest
    facts: dict[str, Any] = {
        "mediaType": manifest.media_type,
        "artifactType": manifest.artifact_type,
        "config.mediaType": manifest.config.media_type,
    }
    facts |= {f"annotations.{key}": value for key, value in manifest.annotations.items()}
    return {name: value for name, value in facts.items() if value is not None}


def _fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    return tuple(
        FieldChange(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )
