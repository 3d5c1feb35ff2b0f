"""The exceptions of Modelpack; callers need to catch only `ModelpackError`.

ModelpackError                      1   any other failure
├── UsageError                      2   an invalid argument or combination of arguments
│   └── InvalidReferenceError       2   an invalid model reference (also a ValueError)
├── FormatError                     1   bytes do not match their format (also a ValueError)
│   ├── WeightFormatError           1   a .gguf, .safetensors or .dduf does not parse
│   ├── ManifestError               1   a manifest, index or config does not parse
│   └── UnsupportedError            1   valid, but not supported by Modelpack
├── PackagingError                  1   the input files cannot be packaged as one model
├── StoreError                      1   the local store is unusable (not a layout, no permission)
│   └── StorageFullError            1   the disk or the quota is full
├── RegistryError                   1   any other error response of a registry
│   ├── NotFoundError               3   no such model, tag, blob or file (also locally)
│   │   └── PartialModelError       3   a stored model lacks layers after a partial pull
│   ├── AuthError                   4   the registry requires other credentials
│   │   └── DeniedError             4   the credentials lack the permission
│   └── RemoteUnavailableError      6   the network or the registry failed after all retries
│       └── RemoteTimeoutError      6
├── IntegrityError                  5   bytes differ from the expected bytes
│   ├── InvalidDigestError          5   an invalid digest (also a ValueError)
│   ├── DigestMismatchError         5
│   ├── SizeMismatchError           5
│   ├── SourceChangedError          5   a file changed while it was read
│   ├── UntrustedError              5   the model has no trusted signature
│   └── UnsafePathError             5   a path would leave its directory
├── ConflictError                   7   a conflict with existing data or another process
│   ├── LockedError                 7   another process holds a lock
│   └── AmbiguousError              7   a short name matches several models
└── InterruptedTransferError        130 the caller stopped the transfer

The number is the exit status of the command line, `ModelpackError.exit_code`. An error with the
code 1 has the status 3 if a missing file caused it, 4 if the file system denied access.
A message is `what failed: why`, with the value; `hint` tells the user what to do.
"""

from __future__ import annotations

from typing import ClassVar


class ModelpackError(Exception):
    """Any failure that Modelpack reports."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


def exit_status(error: ModelpackError) -> int:
    """Return the exit status of the command line for `error`, as the table above defines it."""
    if error.exit_code == 1 and isinstance(error.__cause__, FileNotFoundError):
        return NotFoundError.exit_code
    if error.exit_code == 1 and isinstance(error.__cause__, PermissionError):
        return AuthError.exit_code
    return error.exit_code


class UsageError(ModelpackError):
    """An argument, or a combination of arguments, is invalid."""

    exit_code = 2


class InvalidReferenceError(UsageError, ValueError):
    """A model reference is invalid; `reference` is the given text."""

    def __init__(self, message: str, *, reference: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reference = reference


class FormatError(ModelpackError, ValueError):
    """Bytes do not match their format.

    `path` names the file or document, `offset` the byte at which parsing failed.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        where = self.path or ""
        if self.offset is not None:
            where = f"{where} at byte {self.offset}".strip()
        return f"{where}: {self.message}" if where else self.message


class WeightFormatError(FormatError):
    """A weight file (GGUF, safetensors, DDUF) does not parse."""


class ManifestError(FormatError):
    """A manifest, index or config blob does not parse or breaks its schema."""


class UnsupportedError(FormatError):
    """A valid document or file that Modelpack does not support."""


class PackagingError(ModelpackError):
    """The input files cannot be packaged as one model."""


class StoreError(ModelpackError):
    """The local store cannot be used."""


class StorageFullError(StoreError):
    """The disk is full; `needed` and `available` are bytes."""

    def __init__(
        self,
        message: str,
        *,
        needed: int | None = None,
        available: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.available = available


class RegistryError(ModelpackError):
    """A registry returned an error.

    `host` is the registry, `status_code` the HTTP status (None without a response) and `code` the
    first code of its error body (distribution-spec, "Error Codes").
    """

    def __init__(
        self,
        message: str,
        *,
        host: str | None = None,
        status_code: int | None = None,
        code: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.host = host
        self.status_code = status_code
        self.code = code


class NotFoundError(RegistryError):
    """No such model, tag, blob or file, locally or in a registry."""

    exit_code = 3


class PartialModelError(NotFoundError):
    """A partially pulled model lacks layers; `missing` are their digests."""

    def __init__(
        self, message: str, *, missing: tuple[str, ...] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing


class AuthError(RegistryError):
    """The registry requires credentials, or other credentials."""

    exit_code = 4


class DeniedError(AuthError):
    """The registry accepts the credentials, but denies the request."""


class IntegrityError(ModelpackError):
    """Bytes differ from the expected bytes; `expected` and `got` identify both."""

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.expected = expected
        self.got = got


class InvalidDigestError(IntegrityError, ValueError):
    """A digest is not `algorithm:hex`, or its algorithm is not supported."""


class DigestMismatchError(IntegrityError):
    """Content does not match its digest."""


class SizeMismatchError(IntegrityError):
    """Content does not have the size of its descriptor."""


class SourceChangedError(IntegrityError):
    """A file changed while it was being read."""


class UntrustedError(IntegrityError):
    """A model lacks a required signature, or a policy rejects it."""


class UnsafePathError(IntegrityError):
    """A path in a model would leave its directory."""


class RemoteUnavailableError(RegistryError):
    """The network or the registry failed after all retries."""

    exit_code = 6


class RemoteTimeoutError(RemoteUnavailableError):
    """The registry did not respond in time."""


class ConflictError(ModelpackError):
    """A conflict with existing data or with another process."""

    exit_code = 7


class LockedError(ConflictError):
    """Another process holds a lock."""


class AmbiguousError(ConflictError):
    """A short name matches several models; `candidates` lists them."""

    def __init__(
        self, message: str, *, candidates: tuple[str, ...] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.candidates = candidates


class InterruptedTransferError(ModelpackError):
    """The caller stopped the transfer; partial downloads are kept."""

    exit_code = 130
