"""Search the hub for models by name: `/api/models?search=TERM&limit=N`, most downloaded first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from modelpack.errors import RegistryError
from modelpack.hub.repository import decoded
from modelpack.registry.http_client import HttpClient

_MAX_ANSWER: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HubResult:
    """A repository of the hub; `downloads` are those of the last 30 days, None if unknown."""

    repository: str
    downloads: int | None


def search_hub(client: HttpClient, endpoint: str, term: str, limit: int) -> tuple[HubResult, ...]:
    """Return at most `limit` models that the hub finds for `term`; raises what a request raises."""
    what = f"search for {term!r} on the hub"
    query = urlencode({"search": term, "limit": limit, "sort": "downloads"})
    response = client.request(f"{endpoint}/api/models?{query}", what=what, limit=_MAX_ANSWER)
    found = []
    for entry in decoded(response.content, list, what)[:limit]:
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise RegistryError(f"{what}: a model without an id")
        downloads = entry.get("downloads")
        found.append(HubResult(name, downloads if type(downloads) is int else None))
    return tuple(found)
