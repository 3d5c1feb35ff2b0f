"""Referrers: the manifests that say something about another one, which is their subject.

distribution-spec 1.1, "Listing Referrers" and "Referrers Tag Schema". A registry without the API
has a list of ours instead: an image index under a tag made of the subject's digest, which every
client keeps up by itself. Two that do so at once can lose an entry; so a writer takes turns with
others of its process, sends `If-Match` where the registry gives an ETag, and looks again after it
wrote, until its entry is there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Index
from modelpack.errors import ConflictError, NotFoundError, RegistryError, UnsupportedError
from modelpack.registry import manifests
from modelpack.registry.endpoint import Endpoint

#: More manifests about one model are refused: somebody else fills the list.
MAX_REFERRERS: Final = 100_000
_TRIES: Final = 20
# What registries without the API answer, besides 404.
_NO_API: Final = (400, 405, 501)
_ILLEGAL = re.compile(r"[^a-zA-Z0-9._-]")


class _Turn:
    """A lock that is forgotten when nobody holds or awaits it."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()


_turns: WeakValueDictionary[tuple[Any, str, str], _Turn] = WeakValueDictionary()
_turns_lock = threading.Lock()


class _Listed(NamedTuple):
    """What a fallback tag says; `etag` is empty where the registry gives none."""

    entries: tuple[Descriptor, ...]
    etag: str = ""


def fallback_tag(subject: Digest) -> str:
    """Return the tag that lists the referrers of `subject`."""
    return _ILLEGAL.sub("-", f"{subject.algorithm[:32]}-{subject.encoded[:64]}")


def listed(endpoint: Endpoint, subject: Digest, artifact_type: str | None) -> list[Descriptor]:
    """Return the referrers of `subject`, by the API or else by the fallback tag; by digest."""
    found: Sequence[Descriptor] | None = _by_api(endpoint, subject, artifact_type)
    if found is None:
        found = _read(endpoint, subject).entries
    # A registry may leave the filtering to us.
    wanted = (one for one in found if artifact_type in (None, one.artifact_type))
    return sorted({one.digest: one for one in wanted}.values(), key=lambda one: str(one.digest))


def add(endpoint: Endpoint, subject: Digest, referrer: Descriptor) -> None:
    """Have the fallback tag of `subject` list a manifest; see above on others that write too.

    Raises `ConflictError` if others keep undoing it, `UnsupportedError` if the tag is no list.
    """

    def added(entries: tuple[Descriptor, ...]) -> tuple[Descriptor, ...]:
        if any(entry.digest == referrer.digest for entry in entries):
            return entries
        return (*entries, referrer)

    _change(endpoint, subject, added)


def remove(endpoint: Endpoint, subject: Digest, digest: Digest) -> bool:
    """Take a manifest off the fallback tag of `subject`; return whether it was there."""
    return _change(
        endpoint,
        subject,
        lambda entries: tuple(entry for entry in entries if entry.digest != digest),
    )


def _by_api(
    endpoint: Endpoint, subject: Digest, artifact_type: str | None
) -> list[Descriptor] | None:
    """Return what the registry lists; None if it has no such API."""
    what = f"referrers of {endpoint.manifest_label(str(subject))}"
    url: str | None = endpoint.referrers_url(subject, artifact_type)
    pages = manifests.Pages(what, MAX_REFERRERS)
    first = url
    found: list[Descriptor] = []
    accept = {"Accept": media_types.OCI_INDEX}
    while url is not None:
        pages.check(url, len(found))
        try:
            response = endpoint.request(url, "GET", what, endpoint.pull, accept)
        except RegistryError as error:
            no_api = isinstance(error, NotFoundError) or error.status_code in _NO_API
            if no_api and url == first:
                return None
            raise
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        if media_type != media_types.OCI_INDEX:  # some page of a proxy or a web site
            return None
        pages.add(response.content)
        found += Index.parse(response.content, what).manifests
        url = manifests.next_page(endpoint.client, response, what)
    return found


def _change(
    endpoint: Endpoint,
    subject: Digest,
    change: Callable[[tuple[Descriptor, ...]], tuple[Descriptor, ...]],
) -> bool:
    """Have the fallback tag list what `change` makes of it; return whether that was a change."""
    tag = fallback_tag(subject)
    key = (endpoint.client.origin, endpoint.name, tag)
    with _turns_lock:
        turn = _turns.setdefault(key, _Turn())
    with turn.lock:
        for tries in range(_TRIES):
            endpoint.client.stop.check()
            before = _read(endpoint, subject)
            after = change(before.entries)
            if after == before.entries:
                return tries > 0
            _write(endpoint, tag, after, before.etag)
    raise ConflictError(
        f"{endpoint.manifest_label(tag)}: others keep changing the list of referrers",
        hint="try again when they are done",
    )


def _read(endpoint: Endpoint, subject: Digest) -> _Listed:
    """Return what the fallback tag lists; nothing if there is none."""
    tag = fallback_tag(subject)
    what = endpoint.manifest_label(tag)
    accept = {"Accept": ", ".join((*media_types.INDEX_TYPES, *media_types.MANIFEST_TYPES))}
    try:
        response = endpoint.request(endpoint.manifest_url(tag), "GET", what, endpoint.pull, accept)
    except NotFoundError:
        return _Listed(())
    media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if media_type != media_types.OCI_INDEX:
        raise UnsupportedError(
            f"is {media_type!r}, expected the index of referrers that belongs under this tag",
            path=what,
            hint="somebody gave something else that name; delete or rename it",
        )
    index = Index.parse(response.content, what)
    return _Listed(index.manifests, response.headers.get("ETag", ""))


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
        if error.status_code not in (409, 412):  # else somebody was faster: read again
            raise
