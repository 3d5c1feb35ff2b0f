"""How the verbs reach a registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelpack.descriptor import Descriptor
from modelpack.errors import IntegrityError
from modelpack.reference import Reference
from modelpack.storage import Watch

if TYPE_CHECKING:
    from modelpack.registry import (
        CredentialSource,
        Repository,
        RetryPolicy,
        Timeouts,
        TlsOptions,
    )

#: Blobs transferred at a time, unless the caller says otherwise.
DEFAULT_CONCURRENCY = 4


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
    concurrency: int = DEFAULT_CONCURRENCY


@contextmanager
def open_repository(
    reference: Reference, options: RemoteOptions, watch: Watch
) -> Iterator[Repository]:
    """Yield the repository that `reference` names; its connections end with the context."""
    from modelpack.registry import (
        Registry,
        RetryPolicy,
        Timeouts,
        TlsOptions,
        default_credentials,
    )

    with Registry(
        reference.registry,
        plain_http=options.plain_http,
        credentials=options.credentials or default_credentials(reference.repository),
        timeouts=options.timeouts or Timeouts(),
        retry=options.retry or RetryPolicy(),
        tls=options.tls or TlsOptions(),
        stop=watch.stop,
        report=watch.report,
    ) as registry:
        yield registry.repository(reference.repository)


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
