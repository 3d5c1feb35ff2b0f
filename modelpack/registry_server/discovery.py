"""Lists: tags, referrers, repositories (distribution-spec 1.1, "Content Discovery")."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES, encode
from modelpack.registry_server.content import Content
from modelpack.registry_server.errors import ApiError, Code
from modelpack.registry_server.names import Repository


class Discovery:
    """Endpoints that list things."""

    def __init__(self, content: Content) -> None:
        self._content = content

    async def tags(self, request: Request) -> Response:
        """GET the tags of a repository, in ASCII order."""
        name = request.path_params["name"]
        repository = Repository.parse(name)
        tags = await self._content.tags(repository)
        if tags is None:
            raise ApiError(404, Code.NAME_UNKNOWN, f"no repository {repository}")
        page, headers = _page(request, tags)
        return JSONResponse({"name": name, "tags": page}, headers=headers)

    async def referrers(self, request: Request) -> Response:
        """GET an index of the manifests whose subject is a digest."""
        repository = Repository.parse(request.path_params["name"])
        subject = Digest.parse(request.path_params["digest"])
        wanted = request.query_params.get("artifactType")
        found = await self._content.referrers(repository, subject)
        headers = {"Content-Type": media_types.OCI_INDEX}
        if wanted is not None:
            found = [one for one in found if one.artifact_type == wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        page = _referrers_page(found, request.query_params.get("last", ""))
        if page and page[-1] is not found[-1]:
            query = {"artifactType": wanted} if wanted is not None else {}
            headers |= _next(request, {**query, "last": str(page[-1].digest)})
        index = {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [descriptor.to_json() for descriptor in page],
        }
        return Response(encode(index), headers=headers)

    async def catalog(self, request: Request) -> Response:
        """GET the names of all repositories (Docker's extension)."""
        repositories = await run_in_threadpool(self._content.repositories)
        page, headers = _page(request, repositories.names())
        return JSONResponse({"repositories": page}, headers=headers)


def _page(request: Request, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names that `n` and `last` ask for and, if there are more, the `Link` to them."""
    last = request.query_params.get("last")
    rest = [name for name in names if last is None or name > last]
    asked = request.query_params.get("n")
    if asked is None:
        return rest, {}
    if not asked.isascii() or not asked.isdigit() or len(asked) > 18:
        raise ApiError(400, Code.UNSUPPORTED, f"n is {asked[:80]!r}, expected a number")
    page = rest[: int(asked)]
    if not page or len(page) == len(rest):
        return page, {}
    return page, _next(request, {"n": asked, "last": page[-1]})


def _referrers_page(found: Sequence[Descriptor], last: str) -> list[Descriptor]:
    """Return the descriptors after `last` that fit in a manifest of ordinary size, one at least."""
    page: list[Descriptor] = []
    room = MAX_DOCUMENT_BYTES - 1024
    for descriptor in found:
        if str(descriptor.digest) <= last:
            continue
        room -= len(encode(descriptor.to_json())) + 1
        if room < 0 and page:
            break
        page.append(descriptor)
    return page


def _next(request: Request, query: dict[str, str]) -> dict[str, str]:
    return {"Link": f'<{request.url.path}?{urlencode(query)}>; rel="next"'}
