"""TLS: the trusted certificate authorities and the client certificates for each host.

The directories are those of Docker and podman: `certs.d/<host[:port]>/` with `*.crt` (authorities)
and `*.cert` with `*.key` (a client certificate), see containers-certs.d(5).
"""

from __future__ import annotations

import functools
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import certifi

from modelpack.errors import UsageError


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Certificates and hosts to trust beyond the defaults; paths are of PEM files.

    `ca_file`: authorities that are trusted besides the system's. `client_certificate`: sent to the
    registry itself and to no other host; its key may be in the same file. `insecure`: hosts
    (`host[:port]`) whose certificate is not checked, and that may get credentials over plain http.
    `allow_private`: private hosts (`host` or `host:port`) that registries on public addresses may
    send clients to (see `urls.Reach`).
    """

    ca_file: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    insecure: frozenset[str] = frozenset()
    allow_private: frozenset[str] = frozenset()


class TlsContexts:
    """The TLS contexts of one client by host; `own` is the registry's host[:port]."""

    def __init__(self, options: TlsOptions, own: str) -> None:
        self._options = options
        self._own = own
        self._lock = threading.Lock()
        self._made: dict[str, ssl.SSLContext] = {}

    def context(self, netloc: str) -> ssl.SSLContext:
        """Return the TLS context for `netloc`; raise `UsageError` for unusable files."""
        with self._lock:
            if netloc not in self._made:
                self._made[netloc] = self._make(netloc)
            return self._made[netloc]

    def _make(self, netloc: str) -> ssl.SSLContext:
        options = self._options
        folder = next((d for d in _certificate_folders(netloc) if d.is_dir()), None)
        authorities = sorted(folder.glob("*.crt")) if folder else []
        if options.ca_file:
            authorities.append(options.ca_file)
        pairs = (
            [(c, c.with_suffix(".key")) for c in sorted(folder.glob("*.cert"))] if folder else []
        )
        if options.client_certificate and netloc == self._own:
            key = options.client_key or options.client_certificate
            pairs = [(options.client_certificate, key)]
        insecure = netloc in options.insecure
        if not authorities and not pairs and not insecure:
            return default_context()
        context = _new_context()
        for path in authorities:
            with _naming(path):
                context.load_verify_locations(path)
        for certificate, key in pairs:
            with _naming(certificate):
                context.load_cert_chain(certificate, key, password=_no_password)
        if insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def default_context() -> ssl.SSLContext:
    """Return the TLS settings: the system's trusted roots and certifi's.

    SSL_CERT_FILE or SSL_CERT_DIR in the environment replace both, as in other programs with
    OpenSSL.
    """
    return _default_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.cache
def _default_context(file: str | None, directory: str | None) -> ssl.SSLContext:
    return _new_context()


def _new_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not os.environ.get("SSL_CERT_FILE") and not os.environ.get("SSL_CERT_DIR"):
        context.load_verify_locations(certifi.where())
    return context


def _certificate_folders(netloc: str) -> Iterator[Path]:
    """Yield the directories for certificates of `netloc`, the user's own first."""
    docker = os.environ.get("DOCKER_CONFIG")
    config = os.environ.get("XDG_CONFIG_HOME")
    roots = (
        Path(docker) if docker else Path.home() / ".docker",
        (Path(config) if config else Path.home() / ".config") / "containers",
        Path("/etc/containers"),
        Path("/etc/docker"),
    )
    for root in roots:
        yield root / "certs.d" / netloc


def _no_password() -> str:
    raise ValueError("the key is encrypted, and only keys without a password are supported")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        why = (error.reason or "not PEM").replace("_", " ").lower()
        raise UsageError(f"cannot use {path} as a certificate with its key: {why}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path} or its key: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
