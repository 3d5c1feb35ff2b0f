"""Referrers: manifests that refer to another one, their subject, such as signatures.

distribution-spec 1.1, "Listing Referrers" and "Referrers Tag Schema". For a registry without the
API, clients keep the list themselves: an image index under a tag made of the subject's digest. Two
clients that change it at once can lose an entry. So a writer excludes others of its process, sends
`If-Match` if the registry returns an ETag, and reads the list again after a write until its entry
is there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Index
from modelpack.errors import ConflictError, NotFoundError, RegistryError, UnsupportedError
from modelpack.registry import manifests
from modelpack.registry.endpoint import Endpoint

#: Limit on the referrers of one manifest: a longer list is an attack.
MAX_REFERRERS: Final = 100_000
_TRIES: Final = 20
# Statuses of registries without the API, besides 404. GHCR sends clients to a web page by 303.
_NO_API: Final = (303, 400, 405, 501)
_ILLEGAL = re.compile(r"[^a-zA-Z0-9._-]")
Entries: TypeAlias = tuple[Descriptor, ...]


class _Turn:
    """A lock that is deleted when no thread holds or awaits it."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()


_turns: WeakValueDictionary[tuple[Any, str, str], _Turn] = WeakValueDictionary()
_turns_lock = threading.Lock()


def fallback_tag(subject: Digest) -> str:
    """Return the tag that lists the referrers of `subject`."""
    return _ILLEGAL.sub("-", f"{subject.algorithm[:32]}-{subject.encoded[:64]}")


def listed(endpoint: Endpoint, subject: Digest, artifact_type: str | None) -> list[Descriptor]:
    """Return the referrers of `subject`, by the API or else the fallback tag, sorted by digest."""
    found: Sequence[Descriptor] | None = _by_api(endpoint, subject, artifact_type)
    if found is None:
        found = _read(endpoint, subject)[0]
    # The registry may not have filtered the list.
    wanted = (one for one in found if artifact_type in (None, one.artifact_type))
    return sorted({one.digest: one for one in wanted}.values(), key=lambda one: str(one.digest))


def add(endpoint: Endpoint, subject: Digest, referrer: Descriptor) -> None:
    """Add a manifest to the fallback tag of `subject`, also while other clients write it.

    Raises `ConflictError` if others keep undoing the change, `UnsupportedError` if the tag does not
    name a list of referrers.
    """

    def added(entries: Entries) -> Entries:
        is_listed = any(entry.digest == referrer.digest for entry in entries)
        return entries if is_listed else (*entries, referrer)

    _change(endpoint, subject, added)


def remove(endpoint: Endpoint, subject: Digest, digest: Digest) -> bool:
    """Remove a manifest from the fallback tag of `subject`; return whether it was listed."""

    def removed(entries: Entries) -> Entries:
        return tuple(entry for entry in entries if entry.digest != digest)

    return _change(endpoint, subject, removed)


def _by_api(
    endpoint: Endpoint, subject: Digest, artifact_type: str | None
) -> list[Descriptor] | None:
    """Return the list of the referrers API; None if the registry has no such API."""
    what = f"referrers of {endpoint.manifest_label(str(subject))}"
    pages = manifests.Pages(
        endpoint.client,
        endpoint.referrers_url(subject, artifact_type),
        what,
        most=MAX_REFERRERS,
        scopes=endpoint.pull,
        headers={"Accept": media_types.OCI_INDEX},
        see_other=False,
    )
    found: list[Descriptor] = []
    is_first = True
    try:
        for response in pages:
            is_first = False
            if manifests.media_type_of(response) != media_types.OCI_INDEX:
                return None  # a page of a proxy or a web site
            found += Index.parse(response.content, what).manifests
            pages.entries = len(found)
    except RegistryError as error:
        no_api = isinstance(error, NotFoundError) or error.status_code in _NO_API
        if is_first and no_api:
            return None
        raise
    return found


def _change(endpoint: Endpoint, subject: Digest, change: Callable[[Entries], Entries]) -> bool:
    """Apply `change` to the list under the fallback tag; return whether the list changed."""
    tag = fallback_tag(subject)
    key = (endpoint.client.origin, endpoint.name, tag)
    with _turns_lock:
        turn = _turns.setdefault(key, _Turn())
    with turn.lock:
        for tries in range(_TRIES):
            endpoint.client.stop.check()
            before, etag = _read(endpoint, subject)
            after = change(before)
            if after == before:
                return tries > 0
            _write(endpoint, tag, after, etag)
    raise ConflictError(
        f"{endpoint.manifest_label(tag)}: other clients keep changing the list of referrers",
        hint="try again later",
    )


def _read(endpoint: Endpoint, subject: Digest) -> tuple[Entries, str]:
    """Return the list under the fallback tag, empty if there is none, and its ETag, maybe ""."""
    tag = fallback_tag(subject)
    what = endpoint.manifest_label(tag)
    accept = {"Accept": ", ".join((*media_types.INDEX_TYPES, *media_types.MANIFEST_TYPES))}
    try:
        response = endpoint.client.request(
            endpoint.manifest_url(tag), what=what, scopes=endpoint.pull, headers=accept
        )
    except NotFoundError:
        return (), ""
    media_type = manifests.media_type_of(response)
    if media_type != media_types.OCI_INDEX:
        raise UnsupportedError(
            f"is {media_type or ''!r}, expected an index of referrers under this tag",
            path=what,
            hint="delete the tag, or rename what it names",
        )
    return Index.parse(response.content, what).manifests, response.headers.get("ETag", "")


def _write(endpoint: Endpoint, tag: str, entries: Sequence[Descriptor], etag: str) -> None:
    value = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_INDEX,
        "manifests": [entry.to_json() for entry in entries],
    }
    raw = encode(value)
    descriptor = Descriptor(media_types.OCI_INDEX, Digest.of(raw), len(raw))
    headers = {"If-Match": etag} if etag else {}
    try:
        manifests.write(endpoint, descriptor, raw, tag, headers)
    except RegistryError as error:
        # Another client was faster: read again. Without If-Match, a 412 means an immutable tag.
        if error.status_code != 409 and (error.status_code != 412 or not etag):
            raise
