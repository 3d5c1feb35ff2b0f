"""`RemoteOptions`, and the connections that the operations open to registries and mirrors."""

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

#: The default number of blobs transferred in parallel.
DEFAULT_CONCURRENCY = 4
#: The default number of parallel connections for a large blob.
DEFAULT_CONNECTIONS = 4
# A failing mirror has an alternative, so it gets fewer tries.
_MIRROR_TRIES = 2


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How to connect to a registry. None selects the default of `modelpack.registry`.

    `plain_http`: True uses http for any host, False https, None http for loopback hosts only.
    `concurrency` is the number of blobs transferred in parallel, `connections` the number of
    parallel connections for a large blob. `chunk_size` (bytes) uploads blobs in chunks.
    `limit_rate` is the limit of a registry's transfers in each direction, in bytes per second.
    `trust` is the policy that models must satisfy when they are pulled or read from the store.
    `variant` names the variant of an index to use; None selects the best one for this machine and,
    if given, `backend` (`mlx`, `llama.cpp` or `vllm`).
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
    """Yield the repository that `reference` names; its connections close with the context.

    Reads use its mirrors first, if it has any; `writes` disables mirrors.
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
    """Yield the registry at `host` without its mirrors; its connections close with the context."""
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
    """Return the manifest that `reference` names; if it has tag and digest, both must agree."""
    if reference.digest is not None and reference.tag is not None:
        tagged = repository.resolve(reference.tag)
        if tagged.digest != reference.digest:
            raise IntegrityError(
                f"{reference.name}: the tag {reference.tag!r} is {tagged.digest} there, "
                f"but {reference.digest} was asked for",
                expected=str(reference.digest),
                got=str(tagged.digest),
                hint=f"leave out the tag to use {reference.digest}",
            )
    return repository.fetch_manifest_by_name(reference.target)
