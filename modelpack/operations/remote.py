"""`RemoteOptions`, and connections to registries, their mirrors and the Hugging Face Hub.

`open_source` opens a model by the name that a user gives, in a registry or on the hub.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.reference import Reference
from modelpack.errors import IntegrityError, UnsupportedError, UsageError
from modelpack.hub.reference import HUB_REGISTRIES, HUGGING_FACE, MODELSCOPE, HubReference, Site
from modelpack.operations.transfer import run_all
from modelpack.progress import Action, Progress
from modelpack.storage import ReferrerSource, Watch

if TYPE_CHECKING:
    from modelpack.hub.model import HubModel
    from modelpack.hub.repository import HubFile, HubRepository
    from modelpack.registry import (
        CredentialSource,
        Registry,
        Repository,
        RetryPolicy,
        Timeouts,
        TlsOptions,
    )
    from modelpack.registry.http_client import HttpClient
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
    from modelpack.registry.mirrors import Mirror, read_mirrors

    blobs = _blob_options(options)
    mirrors = options.mirrors or read_mirrors()
    place = mirrors.place(reference.registry, reference.repository)
    host, repository = reference.registry, reference.repository
    own = Mirror(host, repository, "all", options.plain_http, place.insecure)
    with ExitStack() as stack:
        registry = stack.enter_context(_connected(own, options, watch, blobs))
        if writes or not place.mirrors:
            yield registry.repository(repository)
            return
        others = []
        for mirror in place.mirrors:
            there = _connected(mirror, options, watch, blobs, tries=_MIRROR_TRIES)
            others.append((mirror, stack.enter_context(there).repository(mirror.repository)))
        yield registry.mirrored_repository(repository, others)


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
    """Return the manifest that `reference` names, as a descriptor and bytes.

    Raises `IntegrityError` if the reference has a tag and a digest that disagree.
    """
    if reference.digest is not None and reference.tag is not None:
        tagged = repository.resolve(reference.tag)
        if tagged.digest != reference.digest:
            raise IntegrityError(
                f"{reference.name}: the tag {reference.tag!r} points to {tagged.digest}, "
                f"expected {reference.digest}",
                expected=str(reference.digest),
                got=str(tagged.digest),
                hint=f"leave out the tag to use {reference.digest}",
            )
    return repository.fetch_manifest_by_name(reference.target)


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A model to read: `asked` is the name that the user gave, `local` its name in a store."""

    asked: str
    local: Reference
    source: ReferrerSource
    descriptor: Descriptor
    raw: bytes


def named(text: str | Reference | HubReference) -> Reference | HubReference:
    """Return the reference that a user's text means: to the hub or to a registry.

    A reference to huggingface.co or modelscope.cn without a digest means the hub.
    """
    if isinstance(text, str):
        text = HubReference.parse(text) or Reference.parse(text)
    if isinstance(text, Reference) and text.registry in HUB_REGISTRIES and text.digest is None:
        return HubReference.parse(str(text)) or text
    return text


def new_reference(text: str | Reference) -> Reference:
    """Return the reference to give to a new model; raise `UsageError` if it has a digest."""
    where = Reference.parse(text) if isinstance(text, str) else text
    if where.digest is not None:
        raise UsageError(
            f"{where}: a digest cannot be chosen, the content determines it",
            hint=f"write {where.without_digest()}",
        )
    return where


def local_reference(text: str | Reference | HubReference) -> Reference:
    """Return the reference under which a store keeps the model that a user names."""
    found = named(text)
    return found.local if isinstance(found, HubReference) else found


@contextmanager
def open_source(
    name: str | Reference | HubReference, options: RemoteOptions, watch: Watch
) -> Iterator[OpenedSource]:
    """Yield the model `name`; its connections close with the context.

    Raises `NotFoundError`, `AuthError`, `RemoteUnavailableError` and other errors of registries.
    """
    found = named(name)
    if isinstance(found, HubReference):
        with open_hub_model(found, options, watch) as model:
            raw = model.manifest.raw
            yield OpenedSource(str(found), found.local, model, model.descriptor, raw)
        return
    if found.registry in HUB_REGISTRIES:
        raise UnsupportedError(
            f"{found}: {HUB_REGISTRIES[found.registry].title} has no digests, only commits",
            hint=f"write {found.name}@COMMIT, or copy the model to a registry",
        )
    with open_repository(found, options, watch) as repository:
        descriptor, raw = fetch_referenced_manifest(repository, found)
        yield OpenedSource(str(found), found, repository, descriptor, raw)


@contextmanager
def open_hub_model(
    reference: HubReference, options: RemoteOptions, watch: Watch
) -> Iterator[HubModel]:
    """Yield a model of the hub, at the commit that its revision points to now.

    Raises `NotFoundError`, `AuthError` for a gated or private model, `DeniedError`,
    `RemoteUnavailableError`, and `PackagingError` for a repository without a model.
    """
    from modelpack.hub.model import hub_model
    from modelpack.hub.selection import choose

    with ExitStack() as stack:
        repository = stack.enter_context(open_commit(reference, options, watch, resolved=False))
        choice = choose(repository.files(), repository.reference)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelpack-hub-"))

        def fetch_all(tasks: Sequence[Callable[[], HubFile]]) -> list[HubFile]:
            return run_all(tasks, options.concurrency, watch.stop)

        model = hub_model(repository, choice, Path(directory), fetch_all)
        for note in model.notes:
            watch.report(Progress(Action.NOTE, message=note))
        yield model


@contextmanager
def open_commit(
    reference: HubReference, options: RemoteOptions, watch: Watch, *, resolved: bool = True
) -> Iterator[HubRepository]:
    """Yield the repository at the commit in `reference`, without requesting its list of files.

    If `resolved` is false, its revision may be a branch or a tag: the commit is requested.
    """
    from modelpack.hub.modelscope import open_modelscope
    from modelpack.hub.repository import HubRepository, resolve_commit

    with open_hub(str(reference), options, watch, reference.site) as (client, endpoint):
        if reference.site is MODELSCOPE:
            yield open_modelscope(client, endpoint, reference)
            return
        if not resolved:
            reference = resolve_commit(client, endpoint, reference)
        yield HubRepository(client, endpoint, reference)


@contextmanager
def open_hub(
    what: str, options: RemoteOptions, watch: Watch, site: Site = HUGGING_FACE
) -> Iterator[tuple[HttpClient, str]]:
    """Yield the client of the hub and the hub's address; an error that it is offline says `what`.

    Raises `UsageError` for an invalid address in the environment, `AuthError` and
    `RemoteUnavailableError`.
    """
    from modelpack.hub.client import HubSettings, hub_client
    from modelpack.registry import RetryPolicy, Timeouts, TlsOptions

    settings = HubSettings.from_environment(site=site)
    settings.check_online(what)
    client = hub_client(
        settings,
        timeouts=options.timeouts or Timeouts(),
        retry=options.retry or RetryPolicy(),
        stop=watch.stop,
        report=watch.report,
        tls=options.tls or TlsOptions(),
        blobs=_blob_options(options),
    )
    with closing(client):
        yield client, settings.endpoint


def _blob_options(options: RemoteOptions) -> BlobOptions:
    from modelpack.registry.limits import BlobOptions, RateLimit

    rate = None if options.limit_rate is None else RateLimit(options.limit_rate)
    return BlobOptions(options.chunk_size, options.connections, rate)
