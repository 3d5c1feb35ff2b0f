"""Open a model by the name that a user gives, in a registry or on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.reference import Reference
from modelpack.errors import UnsupportedError
from modelpack.hub.reference import HUB_REGISTRY, HubReference
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.transfer import run_all
from modelpack.progress import Action, Progress
from modelpack.storage import ReferrerSource, Watch

if TYPE_CHECKING:
    from modelpack.hub.client import HubSettings
    from modelpack.hub.model import HubModel
    from modelpack.hub.repository import HubFile, HubRepository
    from modelpack.registry.http_client import HttpClient


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A model to read: what was asked for, the name it goes by here, and its manifest."""

    asked: str
    local: Reference
    source: ReferrerSource
    descriptor: Descriptor
    raw: bytes


def named(text: str | Reference | HubReference) -> Reference | HubReference:
    """Return what a user names: a model of the hub, or of a registry.

    A reference to huggingface.co without a digest means the hub, where it is in lower case.
    """
    if isinstance(text, str):
        text = HubReference.parse(text) or Reference.parse(text)
    if isinstance(text, Reference) and text.registry == HUB_REGISTRY and text.digest is None:
        return HubReference.parse(str(text)) or text
    return text


def local_reference(text: str | Reference | HubReference) -> Reference:
    """Return the reference under which a store keeps what a user names."""
    found = named(text)
    return found.local if isinstance(found, HubReference) else found


@contextmanager
def open_source(
    name: str | Reference | HubReference, options: RemoteOptions, watch: Watch
) -> Iterator[OpenedSource]:
    """Yield the model that `name` names; its connections end with the context.

    Raises what the registry or the hub does: `NotFoundError`, `AuthError`, …
    """
    found = named(name)
    if isinstance(found, HubReference):
        with open_hub_model(found, options, watch) as model:
            descriptor = model.descriptor
            raw = model.manifest.raw
            yield OpenedSource(str(found), found.local, model, descriptor, raw)
        return
    if found.registry == HUB_REGISTRY:
        raise UnsupportedError(
            f"{found}: the Hugging Face Hub finds models by commit, not by digest",
            hint=f"write hf.co/{found.repository}@COMMIT, or copy it to a registry",
        )
    with open_repository(found, options, watch) as repository:
        descriptor, raw = fetch_referenced_manifest(repository, found)
        yield OpenedSource(str(found), found, repository, descriptor, raw)


@contextmanager
def open_hub_model(
    reference: HubReference, options: RemoteOptions, watch: Watch
) -> Iterator[HubModel]:
    """Yield a model of the hub, at the commit that its revision is now.

    Raises `NotFoundError`, `AuthError` for one that is gated or private, `DeniedError`,
    `RemoteUnavailableError`, `PackagingError` for a repository that holds no model.
    """
    from modelpack.hub.model import hub_model
    from modelpack.hub.selection import choose

    with ExitStack() as stack:
        repository = stack.enter_context(_open_repository(reference, options, watch))
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
    reference: HubReference, options: RemoteOptions, watch: Watch
) -> Iterator[HubRepository]:
    """Yield the files of a commit, without asking which it is or what it has."""
    with _hub_client(str(reference), options, watch) as (settings, client):
        from modelpack.hub.repository import HubRepository

        yield HubRepository(client, settings.endpoint, reference)


@contextmanager
def _open_repository(
    reference: HubReference, options: RemoteOptions, watch: Watch
) -> Iterator[HubRepository]:
    with _hub_client(str(reference), options, watch) as (settings, client):
        from modelpack.hub.repository import HubRepository, resolve_commit

        at_commit = resolve_commit(client, settings.endpoint, reference)
        yield HubRepository(client, settings.endpoint, at_commit)


@contextmanager
def _hub_client(
    what: str, options: RemoteOptions, watch: Watch
) -> Iterator[tuple[HubSettings, HttpClient]]:
    from modelpack.hub.client import HubSettings, hub_client
    from modelpack.registry import RetryPolicy, Timeouts, TlsOptions
    from modelpack.registry.limits import BlobOptions, RateLimit

    settings = HubSettings.from_environment()
    settings.check_online(what)
    rate = None if options.limit_rate is None else RateLimit(options.limit_rate)
    client = hub_client(
        settings,
        timeouts=options.timeouts or Timeouts(),
        retry=options.retry or RetryPolicy(),
        stop=watch.stop,
        report=watch.report,
        tls=options.tls or TlsOptions(),
        blobs=BlobOptions(options.chunk_size, options.connections, rate),
    )
    try:
        yield settings, client
    finally:
        client.close()
