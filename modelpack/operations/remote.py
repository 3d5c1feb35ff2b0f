"""How the verbs reach a registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.reference import Reference
from modelpack.errors import IntegrityError
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
    from modelpack.registry.limits import BlobOptions
    from modelpack.registry.mirrors import Mirror, Mirrors
    from modelpack.trust.policy import Trust

#: Blobs transferred at a time, unless the caller says otherwise.
DEFAULT_CONCURRENCY = 4
#: Connections at a time over which a large blob is fetched, unless the caller says otherwise.
DEFAULT_CONNECTIONS = 4
# Another place is at hand: a mirror is not worth waiting for.
_MIRROR_TRIES = 2


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How to talk to a registry. None stands for the default that `modelpack.registry` chooses.

    `plain_http`: True is http to any host, False https to any, None http to loopback hosts only.
    `concurrency` is how many blobs are transferred at a time, `connections` over how many
    connections at a time a large one is fetched; `chunk_size` (bytes) sends blobs in chunks, and
    `limit_rate` holds all transfers of a registry together to so many bytes a second each way.
    With `trust`, a model that is pulled or taken from the store has to be signed as that says.
    Of a model that comes in variants, `variant` is the one to take, by name; None takes what this
    machine runs best, by `backend` (`mlx`, `llama.cpp`, `vllm`) if that is given.
    """

    plain_http: bool | None = None
    credentials: CredentialSource | None = None
    timeouts: Timeouts | None = None
    retry: RetryPolicy | None = None
    tls: TlsOptions | None = None
    mirrors: Mirrors | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    connections: int = DEFAULT_CONNECTIONS
    chunk_size: int | None = None
    limit_rate: float | None = None
    trust: Trust | None = None
    variant: str | None = None
    backend: str | None = None


@contextmanager
def open_repository(
    reference: Reference, options: RemoteOptions, watch: Watch, *, writes: bool = False
) -> Iterator[Repository]:
    """Yield the repository that `reference` names; its connections end with the context.

    Unless `writes`, it is read from its mirrors first, where it has some.
    """
    from modelpack.registry.limits import BlobOptions, RateLimit
    from modelpack.registry.mirrors import Mirror, read_mirrors

    rate = None if options.limit_rate is None else RateLimit(options.limit_rate)
    blobs = BlobOptions(options.chunk_size, options.connections, rate)
    mirrors = options.mirrors or read_mirrors()
    place = mirrors.place(reference.registry, reference.repository)
    own = Mirror(
        reference.registry, reference.repository, "all", options.plain_http, place.insecure
    )
    with ExitStack() as stack:
        registry = stack.enter_context(_connected(own, options, watch, blobs))
        if writes or not place.mirrors:
            yield registry.repository(reference.repository)
            return
        others = []
        for mirror in place.mirrors:
            there = stack.enter_context(
                _connected(mirror, options, watch, blobs, tries=_MIRROR_TRIES)
            )
            others.append((mirror, there.repository(mirror.repository)))
        yield registry.mirrored_repository(reference.repository, others)


@contextmanager
def open_registry(host: str, options: RemoteOptions, watch: Watch) -> Iterator[Registry]:
    """Yield the registry at `host` itself, not its mirrors; it ends with the context."""
    from modelpack.registry.limits import BlobOptions
    from modelpack.registry.mirrors import Mirror

    own = Mirror(host, "", "all", options.plain_http, False)
    with _connected(own, options, watch, BlobOptions()) as registry:
        yield registry


def _connected(
    place: Mirror,
    options: RemoteOptions,
    watch: Watch,
    blobs: BlobOptions,
    *,
    tries: int | None = None,
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
        blobs=blobs,
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
