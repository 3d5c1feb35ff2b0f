"""How the verbs reach a registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelpack.descriptor import Descriptor
from modelpack.errors import IntegrityError
from modelpack.reference import Reference
from modelpack.storage import Watch

if TYPE_CHECKING:
    from modelpack.registry import (
        CredentialSource,
        Registry,
        Repository,
        RetryPolicy,
        Timeouts,
        TlsOptions,
    )
    from modelpack.registry.mirrors import Mirror, Mirrors

#: Blobs transferred at a time, unless the caller says otherwise.
DEFAULT_CONCURRENCY = 4
# Another place is at hand: a mirror is not worth waiting for.
_MIRROR_TRIES = 2


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How to talk to a registry. None stands for the default that `modelpack.registry` chooses.

    `plain_http`: True is http to any host, False https to any, None http to loopback hosts only.
    """

    plain_http: bool | None = None
    credentials: CredentialSource | None = None
    timeouts: Timeouts | None = None
    retry: RetryPolicy | None = None
    tls: TlsOptions | None = None
    mirrors: Mirrors | None = None
    concurrency: int = DEFAULT_CONCURRENCY


@contextmanager
def open_repository(
    reference: Reference, options: RemoteOptions, watch: Watch, *, writes: bool = False
) -> Iterator[Repository]:
    """Yield the repository that `reference` names; its connections end with the context.

    Unless `writes`, it is read from its mirrors first, where it has some.
    """
    from modelpack.registry.mirrors import Mirror, read_mirrors

    mirrors = options.mirrors or read_mirrors()
    place = mirrors.place(reference.registry, reference.repository)
    own = Mirror(
        reference.registry, reference.repository, "all", options.plain_http, place.insecure
    )
    with ExitStack() as stack:
        registry = stack.enter_context(_connected(own, options, watch))
        if writes or not place.mirrors:
            yield registry.repository(reference.repository)
            return
        others = []
        for mirror in place.mirrors:
            there = stack.enter_context(_connected(mirror, options, watch, tries=_MIRROR_TRIES))
            others.append((mirror, there.repository(mirror.repository)))
        yield registry.mirrored_repository(reference.repository, others)


def _connected(
    place: Mirror, options: RemoteOptions, watch: Watch, *, tries: int | None = None
) -> Registry:
    from modelpack.registry import Registry, RetryPolicy, Timeouts, TlsOptions, default_credentials

    tls, retry = options.tls or TlsOptions(), options.retry or RetryPolicy()
    if place.insecure:
        tls = replace(tls, insecure=tls.insecure | {place.host})
    if tries is not None:
        retry = replace(retry, tries=min(retry.tries, tries))
    return Registry(
        place.host,
        plain_http=place.plain_http,
        credentials=options.credentials or default_credentials(place.repository),
        timeouts=options.timeouts or Timeouts(),
        retry=retry,
        stop=watch.stop,
        report=watch.report,
        tls=tls,
    )


def fetch_referenced_manifest(
    repository: Repository, reference: Reference
) -> tuple[Descriptor, bytes]:
    """Return the manifest that `reference` names; with tag and digest, both have to agree."""
    if reference.digest is not None and reference.tag is not None:
        tagged = repository.resolve(reference.tag)
        if tagged.digest != reference.digest:
            raise IntegrityError(
                f"{reference.name}: the tag {reference.tag!r} is {tagged.digest} there, "
                f"but {reference.digest} was asked for",
                expected=str(reference.digest),
                got=str(tagged.digest),
                hint=f"leave the tag out to have {reference.digest} whatever the tag says",
            )
    return repository.fetch_manifest_by_name(reference.target)
