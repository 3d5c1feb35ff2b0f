"""Find models by a part of their name: in the store, in registries and on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelpack.artifacts.reference import DEFAULT_ORGANISATION, DEFAULT_REGISTRY
from modelpack.operations.catalog import is_under, split_registry
from modelpack.operations.model_list import list_images, summarize_models
from modelpack.operations.remote import RemoteOptions, open_hub, open_registry
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Found:
    """A name that other commands accept, and the place that has it: "store", a host or "hub".

    `size` is in bytes, of stored models alone. Hubs count `downloads` and `likes`, and the Hugging
    Face Hub names the `licence`; see `HubResult`.
    """

    name: str
    where: str
    size: int | None = None
    downloads: int | None = None
    likes: int | None = None
    licence: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object without unknown values."""
        value = {"name": self.name, "where": self.where, "size": self.size,
                 "downloads": self.downloads, "likes": self.likes,
                 "licence": self.licence}  # fmt: skip
        return {key: item for key, item in value.items() if item is not None}


def search_store(store: LayoutStore, term: str) -> tuple[Found, ...]:
    """Return the names in the store that contain `term`, in any case, sorted."""
    models = summarize_models(store)
    images = list_images(store, known={model.digest for model in models})
    sizes = {
        reference: model.summary.size if model.summary else None
        for model in models
        for reference in model.references
    }
    sizes |= {reference: image.size for image in images for reference in image.references}
    found = [
        Found(reference.familiar, "store", size)
        for reference, size in sizes.items()
        if term.lower() in str(reference).lower()
    ]
    return tuple(sorted(found, key=lambda one: one.name))


def search_registry(name: str, term: str, remote: RemoteOptions | None = None) -> tuple[Found, ...]:
    """Return the repositories of `registry[/namespace]` that contain `term`, in any case, sorted.

    Docker Hub has no such list: its own API lists a namespace, by default `ai`, most pulled first.
    Raises `UsageError` for an invalid `name`, and the errors of registries, also for one that does
    not list its repositories.
    """
    host, namespace = split_registry(name)
    if host == DEFAULT_REGISTRY:
        return _search_docker_hub(namespace or DEFAULT_ORGANISATION, term, remote)
    with open_registry(host, remote or RemoteOptions(), watching(None)) as registry:
        names = sorted(one for one in registry.repositories() if is_under(one, namespace))
    return tuple(Found(f"{host}/{one}", host) for one in names if term.lower() in one.lower())


def search_hub(
    term: str, *, limit: int = 25, remote: RemoteOptions | None = None
) -> tuple[Found, ...]:
    """Return at most `limit` models that the Hugging Face Hub finds, most downloaded first.

    Raises `UsageError` for an invalid HF_ENDPOINT, `AuthError`, `RemoteUnavailableError`.
    """
    from modelpack.hub import search

    with open_hub(f"search for {term!r}", remote or RemoteOptions(), watching(None)) as opened:
        results = search.search_hub(*opened, term, limit)
    return tuple(
        Found(f"hf.co/{one.repository}", "hub", None, one.downloads, one.likes, one.licence or None)
        for one in results
    )


def _search_docker_hub(
    namespace: str, term: str, remote: RemoteOptions | None
) -> tuple[Found, ...]:
    from modelpack.hub import search

    what = f"search for {term!r}"
    with open_hub(what, remote or RemoteOptions(), watching(None), search.DOCKER_HUB) as opened:
        results = search.search_docker_hub(*opened, namespace, term)
    return tuple(
        Found(
            f"{DEFAULT_REGISTRY}/{one.repository}", DEFAULT_REGISTRY, None, one.downloads, one.likes
        )
        for one in results
    )
