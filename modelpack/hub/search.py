"""Search hubs for models by name.

The Hugging Face Hub: `/api/models?search=TERM&limit=N`, most downloaded first. Docker Hub, whose
registry has no catalogue: `/v2/repositories/NAMESPACE/?page=N`, the list that `docker model search`
reads (docker/model-runner, cmd/cli/search).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from modelpack.errors import RegistryError
from modelpack.hub.reference import Site
from modelpack.hub.repository import MAX_PAGE, decoded
from modelpack.registry.http_client import HttpClient

#: Docker Hub's own API, of which only public lists are read: it has no variables.
DOCKER_HUB: Final = Site(
    "Docker Hub",
    "docker.io",
    (),
    (),
    "",
    "https://hub.docker.com",
    "",
    "",
    "name another namespace",
)
#: The largest number of pages of 100 repositories that are read.
MAX_PAGES: Final = 100
_PAGE: Final = 100
_LICENSE_TAG: Final = "license:"


@dataclass(frozen=True, slots=True)
class HubResult:
    """A repository of a hub; unknown values are None or empty.

    `downloads` are those of the last 30 days on the Hugging Face Hub, and all pulls on Docker Hub.
    `likes` are Docker Hub's stars. `licence` is the hub's name for it, often an SPDX identifier.
    """

    repository: str
    downloads: int | None
    likes: int | None = None
    licence: str = ""


def search_hub(client: HttpClient, endpoint: str, term: str, limit: int) -> tuple[HubResult, ...]:
    """Return at most `limit` models that the hub finds for `term`; raises what a request raises."""
    what = f"search for {term!r} on the hub"
    query = urlencode({"search": term, "limit": limit, "sort": "downloads"})
    response = client.request(f"{endpoint}/api/models?{query}", what=what, limit=MAX_PAGE)
    found = []
    for entry in decoded(response.content, list, what)[:limit]:
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise RegistryError(f"{what}: a model without an id")
        found.append(
            HubResult(name, _count(entry, "downloads"), _count(entry, "likes"), _licence(entry))
        )
    return tuple(found)


def search_docker_hub(
    client: HttpClient, endpoint: str, namespace: str, term: str
) -> tuple[HubResult, ...]:
    """Return the repositories of a namespace with `term` in their names, most pulled first.

    Case does not matter. Raises what a request raises, and `RegistryError` for more than
    `MAX_PAGES` pages.
    """
    what = f"search for {term!r} in docker.io/{namespace}"
    found = []
    for entry in _docker_hub_entries(client, f"{endpoint}/v2/repositories/{namespace}/", what):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise RegistryError(f"{what}: a repository without a name")
        if term.lower() in name.lower():
            pulls, stars = _count(entry, "pull_count"), _count(entry, "star_count")
            found.append(HubResult(f"{namespace}/{name}", pulls, stars))
    return tuple(sorted(found, key=lambda one: (-(one.downloads or 0), one.repository)))


def _docker_hub_entries(client: HttpClient, url: str, what: str) -> Iterator[Any]:
    for page in range(1, MAX_PAGES + 1):
        query = urlencode({"page": page, "page_size": _PAGE})
        response = client.request(f"{url}?{query}", what=what, limit=MAX_PAGE)
        value = decoded(response.content, dict, what, "hub.docker.com")
        results = value.get("results")
        if not isinstance(results, list):
            raise RegistryError(f"{what}: a page without results")
        yield from results
        if not value.get("next"):
            return
    raise RegistryError(f"{what}: the list is longer than {MAX_PAGES} pages")


def _count(entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    return value if type(value) is int else None


def _licence(entry: Mapping[str, Any]) -> str:
    tags = entry.get("tags")
    named = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    found = [tag for tag in named if tag.startswith(_LICENSE_TAG)]
    return found[0].removeprefix(_LICENSE_TAG) if found else ""
