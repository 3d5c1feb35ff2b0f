"""Endpoints of manifests, tags, referrers and the catalog.

distribution-spec 1.1, "Pulling manifests", "Pushing manifests" and "Content Discovery".
"""

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
from modelpack.artifacts.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.artifacts.reference import check_tag
from modelpack.errors import FormatError, IntegrityError, InvalidReferenceError
from modelpack.registry_server.content import Content, Repository
from modelpack.registry_server.errors import ApiError, Code, Problem

#: distribution-spec: "SHOULD support pushing at least 10 tags per request".
_MAX_TAGS = 100
# Layers that a registry may refuse to hold; clients fetch them from their `urls`.
_ELSEWHERE = (
    "application/vnd.oci.image.layer.nondistributable.v1.",
    "application/vnd.docker.image.rootfs.foreign.",
)


class Manifests:
    """Endpoints of manifests; any image manifest or index is accepted, with its exact bytes."""

    def __init__(self, content: Content, limit: int = MAX_DOCUMENT_BYTES) -> None:
        self._content = content
        self._limit = limit

    async def get(self, request: Request) -> Response:
        """GET and HEAD, by tag or digest. `Accept` is ignored: there is one representation."""
        repository = Repository.parse(request.path_params["name"])
        reference = request.path_params["reference"]
        try:
            target = _target(reference)
        except ApiError:  # an invalid tag is a tag that does not exist
            raise _unknown(repository, reference) from None
        found = await self._content.manifest(repository, target)
        if found is None:
            raise _unknown(repository, target)
        descriptor, raw = found
        headers = {
            "Content-Type": descriptor.media_type,
            "Docker-Content-Digest": str(descriptor.digest),
            "ETag": f'"{descriptor.digest}"',
        }
        return Response(raw, headers=headers)

    async def put(self, request: Request) -> Response:
        """PUT by tag, or by digest with any number of tags."""
        name = request.path_params["name"]
        repository = Repository.parse(name)
        target = _target(request.path_params["reference"])
        tags = _asked_tags(request, target)
        raw = await _body(request, self._limit)
        digest = target if isinstance(target, Digest) else Digest.of(raw)
        digest.check(raw, f"the manifest pushed to {name}")
        manifest = _parsed(raw, request.headers.get("content-type"))
        descriptor = Descriptor(
            manifest.media_type, digest, len(raw), artifact_type=manifest.artifact_type
        )
        missing = await run_in_threadpool(
            self._content.put_manifest, repository, descriptor, raw, tags, _needed_by(manifest)
        )
        if missing:
            raise _blobs_unknown(missing)
        headers = {"Docker-Content-Digest": str(digest)}
        headers["Location"] = f"/v2/{name}/manifests/{target}"
        if manifest.subject is not None:
            headers["OCI-Subject"] = str(manifest.subject.digest)
        if tags and isinstance(target, Digest):
            headers["OCI-Tag"] = ", ".join(tags)
        return Response(status_code=201, headers=headers)

    async def delete(self, request: Request) -> Response:
        """DELETE a tag, or a manifest with all its tags."""
        repository = Repository.parse(request.path_params["name"])
        target = _target(request.path_params["reference"])
        if not await run_in_threadpool(self._content.delete_manifest, repository, target):
            raise _unknown(repository, target)
        return Response(status_code=202)


def _needed_by(manifest: Manifest | Index) -> tuple[Descriptor, ...]:
    """Return the blobs that must exist before the manifest; its subject may come later."""
    if isinstance(manifest, Index):
        return manifest.manifests
    here = [blob for blob in manifest.blobs if not blob.media_type.startswith(_ELSEWHERE)]
    # Not by digest alone: of two sizes for one blob, one is wrong.
    return tuple({(blob.digest, blob.size): blob for blob in here}.values())


def _target(text: str) -> Digest | str:
    """Return the digest or the tag that a URL names."""
    if ":" in text:
        return Digest.parse(text)
    try:
        return check_tag(text, text)
    except InvalidReferenceError as error:
        # The specification has no code for this.
        raise ApiError(400, Code.MANIFEST_INVALID, str(error)) from None


def _asked_tags(request: Request, target: Digest | str) -> tuple[str, ...]:
    if isinstance(target, str):
        return (target,)
    tags = tuple(dict.fromkeys(request.query_params.getlist("tag")))
    if len(tags) > _MAX_TAGS:
        raise ApiError(
            414, Code.MANIFEST_INVALID, f"{len(tags)} tags are more than the limit of {_MAX_TAGS}"
        )
    for tag in tags:
        if isinstance(_target(tag), Digest):
            raise ApiError(400, Code.MANIFEST_INVALID, f"{tag[:140]!r} is not a tag")
    return tags


async def _body(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "0")
    if int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _parsed(raw: bytes, content_type: str | None) -> Manifest | Index:
    media_type = content_type.partition(";")[0].strip() if content_type else None
    try:
        return parse_manifest_or_index(raw, "the manifest", media_type=media_type or None)
    except (FormatError, IntegrityError) as error:
        raise ApiError(400, Code.MANIFEST_INVALID, str(error)) from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, Code.SIZE_INVALID, f"the manifest exceeds the limit of {limit} bytes")


def _unknown(repository: Repository, target: Digest | str) -> ApiError:
    between = "@" if isinstance(target, Digest) else ":"
    shown = f"{repository}{between}{str(target)[:140]}"
    return ApiError(404, Code.MANIFEST_UNKNOWN, f"no manifest {shown}")


def _blobs_unknown(missing: tuple[Descriptor, ...]) -> ApiError:
    first, *others = (
        Problem(
            Code.MANIFEST_BLOB_UNKNOWN,
            f"the manifest needs {blob.digest} with {blob.size} bytes, which is not here",
            {"digest": str(blob.digest), "size": blob.size},
        )
        for blob in missing
    )
    return ApiError(404, first.code, first.message, detail=first.detail, more=others)


class Discovery:
    """Endpoints that list tags, referrers and repositories."""

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
    """Return the names that `n` and `last` select and, if there are more, the `Link` to them."""
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
    """Return the descriptors after `last` that fit in an index of the usual size, at least one."""
    page: list[Descriptor] = []
    room = MAX_DOCUMENT_BYTES - 1024
    for descriptor in (one for one in found if str(one.digest) > last):
        room -= len(encode(descriptor.to_json())) + 1
        if room < 0 and page:
            break
        page.append(descriptor)
    return page


def _next(request: Request, query: dict[str, str]) -> dict[str, str]:
    return {"Link": f'<{request.url.path}?{urlencode(query)}>; rel="next"'}
