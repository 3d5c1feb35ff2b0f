"""The repositories of a registry: `GET /v2/_catalog`.

The distribution-spec has no such list; it is Docker's, and large registries answer it to few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from modelpack.errors import NotFoundError, RegistryError
from modelpack.gojson import decode_object
from modelpack.registry.manifests import Pages, next_page
from modelpack.registry.scopes import Scopes
from modelpack.registry.transport import Transport

#: More repositories are refused: somebody counts for ever.
MAX_REPOSITORIES: Final = 1_000_000
_SCOPES: Final[Scopes] = frozenset({("registry:catalog", "*")})
_PAGE: Final = 1000
_MAX_PAGE_BYTES: Final = 16 * 1024 * 1024
_NO_LIST: Final = (400, 405, 501)


def repositories(transport: Transport, host: str) -> Iterator[str]:
    """Yield the names, page by page, as the registry orders them; see `Registry.repositories`."""
    what = f"repositories of {host}"
    url: str | None = f"{transport.prefix}://{transport.origin.netloc}/v2/_catalog?n={_PAGE}"
    pages = Pages(what, MAX_REPOSITORIES)
    count = 0
    while url is not None:
        pages.check(url, count)
        try:
            response = transport.do_request(
                url, "GET", headers={}, what=what, scopes=_SCOPES, limit=_MAX_PAGE_BYTES
            )
        except RegistryError as error:
            if not isinstance(error, NotFoundError) and error.status_code not in _NO_LIST:
                raise
            raise RegistryError(
                f"{host} does not list its repositories",
                host=host,
                status_code=error.status_code,
                hint="name them",
            ) from None
        pages.add(response.content)
        value = decode_object(response.content, what, limit=_MAX_PAGE_BYTES)
        page = value.get("repositories") or []
        if not isinstance(page, list) or not all(isinstance(name, str) for name in page):
            raise RegistryError(f"{what}: 'repositories' is not an array of strings", host=host)
        count += len(page)
        yield from page
        url = next_page(transport, response, what)
