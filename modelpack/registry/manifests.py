"""Manifests and tags of one repository.

distribution-spec "Pulling manifests", "Pushing manifests", "Listing tags". The bytes of a manifest
stay unchanged, and the registry's headers must agree with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import requests
from requests.utils import parse_header_links

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import check_document_size, decode_object
from modelpack.artifacts.manifest import parse_manifest_or_index
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InvalidDigestError,
    ManifestError,
    NotFoundError,
    RegistryError,
    UnsupportedError,
)
from modelpack.registry.auth import Scopes
from modelpack.registry.endpoint import Endpoint, checked_name
from modelpack.registry.http_client import HttpClient, stated_number
from modelpack.registry.urls import joined_url, origin_of

_ACCEPT: Final = {"Accept": ", ".join(media_types.MANIFEST_AND_INDEX_TYPES)}
#: Limit on the pages of a list, each of which usually has a hundred entries or more.
MAX_PAGES: Final = 10_000
_MAX_PAGE_BYTES: Final = 32 * 1024 * 1024
#: Bytes of all pages of one list: room for a million tags of the greatest length.
MAX_LIST_BYTES: Final = 160 * 1024 * 1024


def resolve(endpoint: Endpoint, name: str) -> Descriptor:
    """Return the descriptor of the manifest `name`, by HEAD if its headers suffice, else by GET."""
    what = endpoint.manifest_label(checked_name(name))
    try:
        response = _read(endpoint, "HEAD", name, what)
    except RegistryError as error:
        if error.status_code not in (400, 405, 501):
            raise
        return fetch_by_name(endpoint, name)[0]
    media_type, length = media_type_of(response), stated_number(response)
    digest = _stated_digest(response, what)
    if digest is None or media_type is None or length is None:
        return fetch_by_name(endpoint, name)[0]
    if ":" in name:
        Digest.parse(name).check_equal(digest, what)
    _check_known(media_type, what)
    check_document_size(length, what)
    return Descriptor(media_type, digest, length)


def fetch_by_name(endpoint: Endpoint, name: str) -> tuple[Descriptor, bytes]:
    """Return the manifest `name` and its descriptor, by one GET."""
    what = endpoint.manifest_label(checked_name(name))
    response = _read(endpoint, "GET", name, what)
    raw = response.content
    digest = Digest.parse(name) if ":" in name else None
    if digest is not None:
        digest.check(raw, what)
    stated = _stated_digest(response, what)
    if stated is not None:
        stated.check(raw, f"{what}: Docker-Content-Digest")
    media_type = _checked_media_type(response, raw, what)
    return Descriptor(media_type, digest or stated or Digest.of(raw), len(raw)), raw


def _read(endpoint: Endpoint, method: str, name: str, what: str) -> requests.Response:
    url = endpoint.manifest_url(name)
    try:
        return endpoint.client.request(
            url, method, what=what, scopes=endpoint.pull, headers=_ACCEPT
        )
    except NotFoundError as error:
        raise NotFoundError(
            f"no such manifest: {what} ({error.code or error.status_code})",
            host=error.host,
            status_code=error.status_code,
            code=error.code,
            hint="check the name and the tag",
        ) from None


def fetch(endpoint: Endpoint, descriptor: Descriptor) -> bytes:
    """Return the bytes of a manifest, verified against `descriptor`."""
    what = endpoint.manifest_label(str(descriptor.digest))
    check_document_size(descriptor.size, what)
    found, raw = fetch_by_name(endpoint, str(descriptor.digest))
    _check_bytes(raw, descriptor, what)
    if found.media_type != descriptor.media_type:
        raise ManifestError(
            f"was announced as {descriptor.media_type!r}, but is {found.media_type!r}", path=what
        )
    return raw


def write(
    endpoint: Endpoint,
    descriptor: Descriptor,
    raw: bytes,
    name: str | None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> bool:
    """Write a manifest under its digest, or under `name`.

    Returns whether the registry lists the manifest under its subject (`OCI-Subject`). If the
    registry refuses to change an immutable tag that names this manifest already, that is a success.
    """
    name = checked_name(name or str(descriptor.digest))
    what = endpoint.manifest_label(name)
    _check_bytes(raw, descriptor, what)
    parse_manifest_or_index(raw, what, media_type=descriptor.media_type)
    try:
        response = endpoint.client.request(
            endpoint.manifest_url(name),
            "PUT",
            what=what,
            scopes=endpoint.push,
            headers={**headers, "Content-Type": descriptor.media_type},
            data=raw,
        )
    except RegistryError as error:
        if ":" in name or not _is_about_a_tag(error):
            raise
        if _names(endpoint, name, descriptor.digest):
            return False
        raise type(error)(
            error.message,
            host=error.host,
            status_code=error.status_code,
            code=error.code,
            hint="the registry refused to move the tag: push to another one",
        ) from None
    stated = _stated_digest(response, what)
    if stated is not None and stated.algorithm == descriptor.digest.algorithm:
        shown = f"{what}: Docker-Content-Digest of the pushed manifest"
        descriptor.digest.check_equal(stated, shown)
    return "OCI-Subject" in response.headers


def _is_about_a_tag(error: RegistryError) -> bool:
    """Return whether a registry may have refused to change an immutable tag.

    ECR responds with TAG_INVALID, Harbor with 412, Docker Hub with 403 and a message.
    """
    said = error.message.partition(" answered ")[2]
    immutable = "immutable" in said.lower()
    return error.code == "TAG_INVALID" or error.status_code in (409, 412) or immutable


def _names(endpoint: Endpoint, tag: str, digest: Digest) -> bool:
    """Return whether the tag names this manifest in the registry."""
    try:
        return resolve(endpoint, tag).digest == digest
    except (RegistryError, IntegrityError, FormatError):
        return False  # the first error says more


def delete(endpoint: Endpoint, name: str) -> None:
    """Delete a tag, or a manifest with all its tags."""
    what = endpoint.manifest_label(checked_name(name))
    url = endpoint.manifest_url(name)
    endpoint.client.request(url, "DELETE", what=what, scopes=endpoint.delete)


def tags(endpoint: Endpoint) -> Iterator[str]:
    """Yield the tags, page by page, as the registry orders them."""
    what = f"tags of {endpoint.label}"
    return names(endpoint.client, endpoint.tags_url(), "tags", what, endpoint.pull)


def names(client: HttpClient, url: str, key: str, what: str, scopes: Scopes) -> Iterator[str]:
    """Yield the names in the array `key` of each page of a list."""
    pages = Pages(client, url, what, scopes=scopes, limit=_MAX_PAGE_BYTES)
    for response in pages:
        page = decode_object(response.content, what, limit=_MAX_PAGE_BYTES).get(key)
        page = [] if page is None else page
        if not isinstance(page, list) or not all(isinstance(name, str) for name in page):
            raise RegistryError(f"{what}: {key!r} is not an array of strings")
        pages.entries += len(page)
        yield from page


class Pages:
    """The pages of one list, limited so that a server cannot continue it without end.

    The caller counts the `entries`, of which there may be `most`; `options` are those of
    `HttpClient.request`. Iterating raises `RegistryError` for a list that is a loop or too long.
    """

    def __init__(
        self, client: HttpClient, url: str, what: str, *, most: int = 1_000_000, **options: Any
    ) -> None:
        self._client = client
        self._first = url
        self._what = what
        self._most = most
        self._options = options
        self.entries = 0

    def __iter__(self) -> Iterator[requests.Response]:
        url: str | None = self._first
        what, size = self._what, 0
        seen: set[str] = set()
        while url is not None:
            if url in seen:
                raise RegistryError(f"{what}: pagination loop: a page was already fetched")
            seen.add(url)
            too_long = f"{what}: the list is too long"
            if self.entries > self._most or len(seen) > MAX_PAGES:
                raise RegistryError(f"{too_long}: {self.entries} entries on {len(seen)} pages")
            response = self._client.request(url, what=what, **self._options)
            size += len(response.content)
            if size > MAX_LIST_BYTES:
                raise RegistryError(
                    f"{too_long}: more than {MAX_LIST_BYTES} bytes on {len(seen)} pages"
                )
            yield response
            url = _next_page(self._client, response, what)


def _next_page(client: HttpClient, response: requests.Response, what: str) -> str | None:
    """Return the URL of the next page of a list, by its `Link`; None at the end."""
    links: list[dict[str, Any]] = parse_header_links(response.headers.get("Link", ""))
    target = next((link["url"] for link in links if link.get("rel") == "next"), None)
    if target is None:
        return None
    url = joined_url(response.url, target, f"{what}: next page")
    if origin_of(url) != client.origin:
        raise RegistryError(f"{what}: the next page is on another host, {origin_of(url).netloc}")
    return url


def media_type_of(response: requests.Response) -> str | None:
    """Return the `Content-Type` without parameters, or None."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip() or None


def _stated_digest(response: requests.Response, what: str) -> Digest | None:
    """Return the `Docker-Content-Digest`, or None: old servers do not send it."""
    text = response.headers.get("Docker-Content-Digest")
    if not text:
        return None
    try:
        return Digest.parse(text)
    except InvalidDigestError as error:
        message = f"{what}: Docker-Content-Digest: {error}"
        raise InvalidDigestError(message, got=text[:200]) from None


def _checked_media_type(response: requests.Response, raw: bytes, what: str) -> str:
    """Return the media type, which the response and the manifest must agree on."""
    served = media_type_of(response)
    value = decode_object(raw, what)
    own = value.get("mediaType")
    if own is not None and served is not None and own != served:
        raise ManifestError(f"its mediaType is {own!r}, but it was served as {served!r}", path=what)
    default = media_types.OCI_INDEX if "manifests" in value else media_types.OCI_MANIFEST
    media_type = own or served or default
    _check_known(media_type, what)
    return str(media_type)


def _check_known(media_type: Any, what: str) -> None:
    if media_type not in media_types.MANIFEST_AND_INDEX_TYPES:
        raise UnsupportedError(
            f"media type {media_type!r} is neither a manifest nor an index", path=what
        )


def _check_bytes(raw: bytes, descriptor: Descriptor, what: str) -> None:
    check_document_size(len(raw), what)
    descriptor.check_size(len(raw), what)
    descriptor.digest.check(raw, what)
