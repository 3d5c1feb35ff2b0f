"""The one exception tree of Modelpack; callers need to catch `ModelpackError` only.

ModelpackError                      1   anything else that went wrong
├── UsageError                      2   an argument or a combination of arguments makes no sense
│   └── InvalidReferenceError       2   a model reference breaks the grammar (also a ValueError)
├── FormatError                     1   bytes are not what their format promises (also a ValueError)
│   ├── WeightFormatError           1   a .gguf, .safetensors or .dduf does not parse
│   ├── ManifestError               1   a manifest, index or config does not parse
│   └── UnsupportedError            1   well formed, but not something that we can handle
├── PackagingError                  1   the input files cannot become one model
├── StoreError                      1   the local store is unusable (no such layout, no permission)
│   └── StorageFullError            1   the disk or the quota has no room
├── RegistryError                   1   a registry answered with an error that has no better name
│   ├── NotFoundError               3   no such model, tag, blob or file (locally too)
│   │   └── PartialModelError       3   a stored model lacks layers that were left out of its pull
│   ├── AuthError                   4   the registry wants other credentials
│   │   └── DeniedError             4   the credentials are fine, the permission is missing
│   └── RemoteUnavailableError      6   the network or the registry failed after all retries
│       └── RemoteTimeoutError      6
├── IntegrityError                  5   bytes are not the bytes that were promised
│   ├── InvalidDigestError          5   a digest breaks the grammar (also a ValueError)
│   ├── DigestMismatchError         5
│   ├── SizeMismatchError           5
│   ├── SourceChangedError          5   a file changed while it was read
│   ├── UntrustedError              5   nobody who is trusted signed the model
│   └── UnsafePathError             5   a path would leave its directory
├── ConflictError                   7   somebody else is in the way
│   ├── LockedError                 7   another process holds what is needed
│   └── AmbiguousError              7   a short name stands for several models
└── InterruptedTransferError        130 the caller asked to stop

The number is the exit status of the command line, `ModelpackError.exit_code`.
A message says what, where, expected and got; `hint` says what to do about it.
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


class UsageError(ModelpackError):
    """An argument, or a combination of arguments, makes no sense."""

    exit_code = 2


class InvalidReferenceError(UsageError, ValueError):
    """A model reference breaks the grammar; `reference` is the text as given."""

    def __init__(self, message: str, *, reference: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reference = reference


class FormatError(ModelpackError, ValueError):
    """Bytes are not what their format promises.

    `path` names the file (or what stands for it), `offset` the byte where it stopped making sense.
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
    """Well formed, but not something that Modelpack handles."""


class PackagingError(ModelpackError):
    """The input files cannot become one model."""


class StoreError(ModelpackError):
    """The local store cannot be used."""


class StorageFullError(StoreError):
    """The disk has no room; `needed` and `available` are bytes."""

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
    """A registry answered with an error.

    `host` is the registry, `status_code` the HTTP status (None where no answer came) and `code`
    the first code of its error body, as in distribution-spec "Error Codes".
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
    """A stored model lacks layers, since it was pulled in part; `missing` are their digests."""

    def __init__(
        self, message: str, *, missing: tuple[str, ...] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing


class AuthError(RegistryError):
    """The registry wants credentials, or other ones."""

    exit_code = 4


class DeniedError(AuthError):
    """The registry knows who asks and refuses."""


class IntegrityError(ModelpackError):
    """Bytes are not the bytes that were promised; `expected` and `got` name both."""

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
    """A digest breaks the grammar `algorithm:hex` or names an algorithm that we do not verify."""


class DigestMismatchError(IntegrityError):
    """Content does not hash to its digest."""


class SizeMismatchError(IntegrityError):
    """Content is longer or shorter than its descriptor says."""


class SourceChangedError(IntegrityError):
    """A file changed while it was being read."""


class UntrustedError(IntegrityError):
    """Nobody who has to have signed a model did, or a policy refuses it."""


class UnsafePathError(IntegrityError):
    """A path taken from a model would leave the directory it belongs to."""


class RemoteUnavailableError(RegistryError):
    """The network or the registry failed after all retries."""

    exit_code = 6


class RemoteTimeoutError(RemoteUnavailableError):
    """The registry did not answer in time."""


class ConflictError(ModelpackError):
    """Somebody or something else is in the way."""

    exit_code = 7


class LockedError(ConflictError):
    """Another process holds what is needed."""


class AmbiguousError(ConflictError):
    """A short name stands for several models; `candidates` lists them."""

    def __init__(
        self, message: str, *, candidates: tuple[str, ...] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.candidates = candidates


class InterruptedTransferError(ModelpackError):
    """The caller asked to stop; what was fetched so far is kept for a later try."""

    exit_code = 130
