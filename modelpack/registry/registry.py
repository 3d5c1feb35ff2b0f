"""Registry: the client of one registry host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from modelpack.errors import NotFoundError, RegistryError
from modelpack.progress import ProgressCallback, Stop, serialized, silent
from modelpack.registry.blob_options import BlobOptions
from modelpack.registry.chain import default_credentials
from modelpack.registry.credentials import CredentialSource
from modelpack.registry.retry import RetryPolicy
from modelpack.registry.timeouts import Timeouts
from modelpack.registry.tls import TlsOptions

if TYPE_CHECKING:
    from modelpack.registry.mirrors import Mirror
    from modelpack.registry.repository import Repository

DEFAULT_TIMEOUTS: Final = Timeouts()
DEFAULT_RETRY: Final = RetryPolicy()
DEFAULT_TLS: Final = TlsOptions()
DEFAULT_BLOBS: Final = BlobOptions()


class Registry:
    """A registry, by `host[:port]`; docker.io stands for Docker Hub. Threads may share it.

    `credentials` are `default_credentials` by default, looked up only once the registry wants some.
    `stop` ends what is under way within two seconds, with `InterruptedTransferError`;
    `report` is told of retries.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool | None = None,
        credentials: CredentialSource | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        retry: RetryPolicy = DEFAULT_RETRY,
        stop: Stop | None = None,
        report: ProgressCallback = silent,
        tls: TlsOptions = DEFAULT_TLS,
        blobs: BlobOptions = DEFAULT_BLOBS,
    ) -> None:
        # Here, so that naming this class does not load an HTTP client.
        from modelpack.registry.transport import Transport

        self.host = host
        self._transport = Transport(
            host,
            plain_http=plain_http,
            credentials=credentials or default_credentials(),
            timeouts=timeouts,
            retry=retry,
            stop=stop or Stop(),
            report=serialized(report),
            tls=tls,
            blobs=blobs,
        )

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Registry({self.host!r})"

    def repository(self, name: str) -> Repository:
        """Return the repository `name`, which need not exist; raise `InvalidReferenceError`."""
        from modelpack.registry.endpoint import Endpoint
        from modelpack.registry.repository import Repository

        return Repository(self, Endpoint(self._transport, self.host, name))

    def mirrored_repository(
        self, name: str, mirrors: Sequence[tuple[Mirror, Repository]]
    ) -> Repository:
        """Return the repository `name`, read from `mirrors` first, which outlive it."""
        from modelpack.registry.endpoint import Endpoint
        from modelpack.registry.mirrored import MirroredRepository

        return MirroredRepository(self, Endpoint(self._transport, self.host, name), mirrors)

    def repositories(self) -> Iterator[str]:
        """Yield the names of the repositories, where the registry lists them (Docker's extension).

        Raises `RegistryError` where it does not, `AuthError` where it lists them to others.
        """
        from modelpack.registry.listing import repositories

        return repositories(self._transport, self.host)

    def ping(self) -> None:
        """Raise unless the host is a registry that lets us in (distribution-spec "Probe")."""
        origin = self._transport.origin
        try:
            self._transport.do_request(f"{origin.scheme}://{origin.netloc}/v2/", what="ping")
        except NotFoundError as error:
            raise RegistryError(
                f"{self.host} is no OCI registry: it has no /v2/",
                host=self.host,
                status_code=error.status_code,
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()
