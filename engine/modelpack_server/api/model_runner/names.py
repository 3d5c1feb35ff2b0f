"""Model lookup by the names that Docker's clients use, and the JSON objects of models.

Source: Docker Model Runner, pkg/inference/models (api.go, adapter.go, http_handler.go).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import DEFAULT_REGISTRY, Reference
from modelpack.errors import InvalidReferenceError, NotFoundError
from modelpack.operations.lookup import stored_model
from modelpack.operations.model_list import list_models
from modelpack.store.layout import LayoutStore
from modelpack.store.lookup import StoredModel

_TEXTS = ("format", "quantization", "parameters", "architecture", "size")
_FACTS = ("gguf", "safetensors", "diffusers")


def find_stored(store: LayoutStore, name: str) -> tuple[str, StoredModel]:
    """Return the store's name of the model that a client calls `name`, and the model.

    A client's name is a reference, a digest, a short id, or the last part of a repository's name
    without organisation and tag. Raises `NotFoundError`.
    """
    try:
        return name, store.get(name)
    except InvalidReferenceError as error:
        raise NotFoundError(str(error)) from error
    except NotFoundError:
        for model in store.models():
            for reference in model.references:
                if reference.repository.rpartition("/")[2] == name:
                    return str(reference), model
        raise


def tag_shown(reference: Reference) -> str:
    """Return a reference with organisation and tag, but without Docker's registry.

    `docker model list NAME` and `docker model compose` compare such texts.
    """
    short = str(reference).removeprefix(DEFAULT_REGISTRY + "/")
    try:
        same = Reference.parse(short, default_registry=DEFAULT_REGISTRY) == reference
    except InvalidReferenceError:
        same = False
    return short if same else str(reference)


def name_shown(name: str) -> str:
    """Return a name from the store as `tag_shown` does; a digest is unchanged."""
    try:
        return tag_shown(Reference.parse(name, default_registry=DEFAULT_REGISTRY))
    except InvalidReferenceError:
        return name


def listed(store: LayoutStore, seen: Mapping[str, Collection[str]]) -> list[dict[str, Any]]:
    """Return the objects of all readable models; `seen` has the names to show, by model id."""
    return [
        model_object(
            found.model, [r for r in found.references if r.familiar in seen[str(found.digest)]]
        )
        for found in list_models(store)
        if found.model is not None and str(found.digest) in seen
    ]


def stored_object(store: LayoutStore, name: str) -> dict[str, Any]:
    """Return the object of the model that a client calls `name`; raise `NotFoundError`."""
    _, found = find_stored(store, name)
    return model_object(stored_model(store, str(found.digest)), found.references)


def model_object(model: Model, references: Sequence[Reference] = ()) -> dict[str, Any]:
    """Return the object of a model; without `references`, as for a remote model, it has no tags."""
    tags = [tag_shown(reference) for reference in references]
    return {
        "id": str(model.digest),
        **({"tags": tags} if tags else {}),
        "created": _seconds(model.config.created),
        "config": config_object(model.config),
    }


def config_object(config: ModelConfig) -> dict[str, Any]:
    """Return a config in Docker's format, regardless of the stored format."""
    shown: dict[str, Any] = {key: getattr(config, key) for key in _TEXTS if getattr(config, key)}
    shown |= {key: dict(getattr(config, key)) for key in _FACTS if getattr(config, key)}
    if config.context_size is not None:
        shown["context_size"] = config.context_size
    return shown


def _seconds(created: str | None) -> int:
    """Return the Unix time of an RFC 3339 timestamp, or 0 if it is missing or invalid."""
    try:
        return int(datetime.fromisoformat(created).timestamp()) if created else 0
    except ValueError:
        return 0
