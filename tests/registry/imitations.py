"""Imitations of public registries: one table of their documented quirks, over `FaultyRegistry`.

An imitation is not the service: it shows only how the client treats a quirk that a document or a
bug report describes. `source` says which one; "specification" is distribution-spec 1.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from modelpack.registry import Credential
from tests.registry.faults import Exchange, Fault, answering, changed, ignoring_range, redirecting
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth, BearerAuth
from tests.registry.faulty_content import Reply, error_reply

MIB: Final = 1024 * 1024
USER, PASSWORD = "ada", "s3cret"
UPLOADS, MANIFESTS, BLOBS = "/blobs/uploads/", "/manifests/", "/blobs/sha256:"


@dataclass
class Imitation:
    """A running imitation; `storage` is the host that serves its blobs, if that is another one."""

    registry: FaultyRegistry
    storage: FaultyRegistry
    credential: Credential | None = None

    @property
    def host(self) -> str:
        """The `host:port` of the registry."""
        return self.registry.host

    def always(self, method: str, path: str, fault: Fault) -> None:
        """Answer all such requests by `fault`, once they have the right credentials."""
        self.registry.faults.add(method, path, _authorised(fault), times=None)


Install = Callable[[Imitation], None]


@dataclass(frozen=True)
class Quirk:
    """One deviation from a registry that has all optional parts of the specification."""

    what: str
    source: str
    install: Install


@dataclass(frozen=True)
class Profile:
    """The quirks of one service; `throttled` is how it refuses too many requests."""

    quirks: tuple[Quirk, ...]
    throttled: Fault | None = None

    @contextmanager
    def run(self) -> Iterator[Imitation]:
        """Run the imitation."""
        with FaultyRegistry() as registry, FaultyRegistry() as storage:
            storage.content = registry.content
            imitation = Imitation(registry, storage)
            for quirk in self.quirks:
                quirk.install(imitation)
            yield imitation


def _authorised(fault: Fault) -> Fault:
    def checked(exchange: Exchange) -> None:
        auth = exchange.registry.auth
        refusal = auth.refusal(exchange) if auth else None
        if refusal is None:
            fault(exchange)
        else:
            exchange.receive()
            exchange.send(refusal)

    return checked


def _when(condition: Callable[[Exchange], bool], fault: Fault) -> Fault:
    """Apply `fault` if the condition holds, otherwise respond as a correct registry."""

    def conditional(exchange: Exchange) -> None:
        if condition(exchange):
            fault(exchange)
        else:
            exchange.send(exchange.reply())

    return conditional


def _refusing(status: int, code: str, message: str = "no details", **headers: str) -> Fault:
    reply = error_reply(status, code, message, **headers)
    return answering(reply.status, reply.body, **headers)


def _rule(method: str, path: str, fault: Fault) -> Install:
    return lambda imitation: imitation.always(method, path, fault)


# Credentials


def _bearer(imitation: Imitation) -> None:
    imitation.registry.auth = BearerAuth(USER, PASSWORD)
    imitation.credential = Credential(USER, PASSWORD, source="a test")


def _bearer_for_administrators(imitation: Imitation) -> None:
    _bearer(imitation)
    assert isinstance(imitation.registry.auth, BearerAuth)
    imitation.registry.auth.delete_action = "*"


def _basic_as_aws(imitation: Imitation) -> None:
    imitation.registry.auth = BasicAuth("AWS", PASSWORD)
    imitation.credential = Credential("AWS", PASSWORD, source="a test")


# Blobs


def _blobs_elsewhere(imitation: Imitation) -> None:
    imitation.always("GET", BLOBS, redirecting(imitation.storage, 307))


def _stuck_range(exchange: Exchange) -> None:
    """Keep the chunk, but report the end of the first one, with 201."""
    first = exchange.headers.get("content-range", "").startswith("0-")
    reply = exchange.reply()
    if not first and reply.status == 202:
        reply = replace(reply, headers=reply.headers | {"Range": f"0-{5 * MIB - 1}"})
    exchange.send(replace(reply, status=201) if reply.status == 202 else reply)


def _without_digest(reply: Reply) -> Reply:
    headers = {k: v for k, v in reply.headers.items() if k != "Docker-Content-Digest"}
    return replace(reply, headers=headers)


def _no_mount(exchange: Exchange) -> None:
    exchange.query.pop("mount")
    exchange.send(exchange.reply())


def _minimum(imitation: Imitation, size: int) -> None:
    def stated(reply: Reply) -> Reply:
        return replace(reply, headers=reply.headers | {"OCI-Chunk-Min-Length": str(size)})

    imitation.always("POST", UPLOADS, changed(stated))
    too_small = _refusing(416, "BLOB_UPLOAD_INVALID", "LayerPartTooSmall")
    imitation.always("PATCH", UPLOADS, _when(lambda e: e.length < size, too_small))


def _relative_locations(imitation: Imitation) -> None:
    imitation.registry.relative_locations = True


def _old_server(imitation: Imitation) -> None:
    """Leave out ranges and digests; manifests have no digest header either."""
    imitation.always("GET", BLOBS, ignoring_range)
    for method in ("GET", "HEAD"):
        imitation.always(method, MANIFESTS, changed(_without_digest))


# Tags, referrers and lists


def _names_a_tag(exchange: Exchange) -> bool:
    """Return whether a PUT names a tag that exists, even with the same content."""
    name, _, reference = exchange.path.removeprefix("/v2/").partition(MANIFESTS)
    return (name, reference) in exchange.registry.content.tags


def _immutable(fault: Fault) -> Install:
    """Apply `fault` to tags that exist in the repository team/retag, which has such a rule."""
    return _rule("PUT", f"/retag{MANIFESTS}", _when(_names_a_tag, fault))


def _referrers_api(imitation: Imitation) -> None:
    imitation.registry.referrers_api = True


def _see_other(imitation: Imitation) -> None:
    """Send clients to a web page of another host, which limits requests."""
    there = f"{imitation.storage.url}/-/v2/packages/container/package/team%2Fmodel"
    imitation.always("GET", "/referrers/", redirecting(there, 303))
    imitation.storage.faults.add("GET", "/-/v2/packages/", answering(429), times=None)


def _catalogue(exchange: Exchange) -> None:
    names = sorted({name for name, _ in exchange.registry.content.manifests})
    body = json.dumps({"repositories": names}).encode()
    exchange.send(Reply(200, {"Content-Type": "application/json"}, body))


def _refuse_scope(exchange: Exchange) -> None:
    """Ask for another token, however many the client has."""
    challenge = f'Bearer realm="{exchange.registry.url}/token",scope="registry:catalog:*"'
    exchange.send(error_reply(401, "UNAUTHORIZED", WWW_Authenticate=challenge))


BEARER = Quirk(
    "bearer tokens, each for the scopes that it was requested with",
    "distribution's token specification",
    _bearer,
)
NO_DELETE = Quirk(
    "405 to every DELETE of a manifest or blob",
    "specification, Deleting tags: a registry may disable deletion",
    _rule("DELETE", f"{MANIFESTS}|{BLOBS}", _refusing(405, "UNSUPPORTED")),
)
LISTED = Quirk("the catalogue", "Docker's extension", _rule("GET", "/v2/_catalog", _catalogue))
REFERRERS = Quirk("the referrers API", "specification, Listing referrers", _referrers_api)

_HUB = Profile(
    (
        BEARER,
        Quirk("307 to a CDN for blobs", "specification, Endpoints: redirects", _blobs_elsewhere),
        Quirk(
            "ratelimit headers on manifests",
            "docs.docker.com, Docker Hub pull usage and limits",
            _rule(
                "GET",
                MANIFESTS,
                changed(
                    lambda reply: replace(
                        reply,
                        headers=reply.headers
                        | {
                            "ratelimit-limit": "100;w=21600",
                            "ratelimit-remaining": "99;w=21600",
                            "docker-ratelimit-source": "192.0.2.1",
                        },
                    )
                ),
            ),
        ),
        Quirk(
            "403 to a tag that is immutable",
            "docker/hub-feedback#2466",
            _immutable(_refusing(403, "DENIED", "tag v1 is immutable")),
        ),
        Quirk(
            "401 to the catalogue, also with a token",
            "distribution's token specification: the scope registry:catalog:* is not granted",
            _rule("GET", "/v2/_catalog", _refuse_scope),
        ),
    ),
    throttled=_refusing(
        429,
        "TOOMANYREQUESTS",
        "You have reached your pull rate limit",
        Retry_After="7",
        ratelimit_limit="100;w=21600",
        ratelimit_remaining="0;w=21600",
    ),
)

_GHCR = Profile(
    (
        BEARER,
        Quirk(
            "416 to chunks above 4 MiB",
            "reports of 'request body too large' by chunking clients",
            _rule("PATCH", UPLOADS, _when(lambda e: e.length > 4 * MIB, answering(416))),
        ),
        Quirk(
            "303 from the referrers API to a page that limits requests",
            "artifacthub/hub#4785",
            _see_other,
        ),
        NO_DELETE,
    ),
    throttled=answering(429, b"too many requests", Content_Type="text/plain"),
)

_ECR = Profile(
    (
        Quirk("Basic for the user AWS", "AWS, Registry authentication", _basic_as_aws),
        Quirk(
            "201 to a chunk, and a Range that stays at the first one",
            "aws/containers-roadmap#2831",
            _rule("PATCH", UPLOADS, _stuck_range),
        ),
        Quirk(
            "400 TAG_INVALID to a tag that exists, even with the same content",
            "AWS, Image tag mutability; aws/containers-roadmap#2380; its error in kaniko#204",
            _immutable(
                _refusing(
                    400,
                    "TAG_INVALID",
                    "The image tag 'v1' already exists in the 'team/model' repository and "
                    "cannot be overwritten because the tag is immutable.",
                )
            ),
        ),
        REFERRERS,
    ),
    throttled=_refusing(429, "TOOMANYREQUESTS", "Rate exceeded"),
)

_HARBOR = Profile(
    (
        BEARER,
        Quirk(
            "412 to a tag that a rule makes immutable",
            "goharbor/harbor#9427",
            _immutable(_refusing(412, "PRECONDITION", "tag v1 is immutable, cannot be updated")),
        ),
        REFERRERS,
        LISTED,
        Quirk(
            "a session cookie, which a client must not return",
            "the cookie policy of oras-py's provider",
            _rule(
                "GET",
                "/tags/list",
                changed(lambda r: replace(r, headers=r.headers | {"Set-Cookie": "sid=1; Path=/"})),
            ),
        ),
    ),
)

_ARTIFACTORY = Profile(
    (
        BEARER,
        Quirk(
            "content by PATCH only: a PUT with a body is refused",
            "containerd/containerd#3533",
            _rule(
                "PUT", UPLOADS, _when(lambda e: e.length > 0, _refusing(400, "BLOB_UPLOAD_INVALID"))
            ),
        ),
        Quirk(
            "404 to the status of an upload",
            "artifact-keeper/artifact-keeper#3275 describes the same gap (405)",
            _rule("GET", UPLOADS, _refusing(404, "BLOB_UPLOAD_UNKNOWN")),
        ),
        LISTED,
    ),
)

_MINIMAL = Profile(
    (
        Quirk("relative upload locations", "specification, Pushing blobs", _relative_locations),
        Quirk(
            "no ranges and no Docker-Content-Digest",
            "specification, Pulling blobs and manifests: both are optional",
            _old_server,
        ),
        Quirk(
            "no chunks: 405 to PATCH",
            "Artifact Registry, Docker API: chunked uploads are not supported",
            _rule("PATCH", UPLOADS, _refusing(405, "UNSUPPORTED")),
        ),
        Quirk(
            "202 to a mount",
            "specification, Mounting a blob from another repository",
            _rule("POST", "mount=", _no_mount),
        ),
        NO_DELETE,
    ),
)

_CHUNKING = Profile(
    (
        Quirk(
            "bearer tokens, and the scope repository:NAME:* for a DELETE",
            "distribution 2.6.2, registry/handlers/app.go",
            _bearer_for_administrators,
        ),
        Quirk(
            "OCI-Chunk-Min-Length of 5 MiB, and smaller chunks refused",
            "specification, Pushing a blob in chunks; ECR's LayerPartTooSmall",
            lambda imitation: _minimum(imitation, 5 * MIB),
        ),
        LISTED,
    ),
)


PROFILES: Final[dict[str, Profile]] = {
    "docker-hub": _HUB,
    "ghcr": _GHCR,
    "ecr": _ECR,
    "harbor": _HARBOR,
    "artifactory": _ARTIFACTORY,
    "minimal": _MINIMAL,
    "chunk-minimum": _CHUNKING,
}
