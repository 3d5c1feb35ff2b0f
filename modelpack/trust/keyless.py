"""Keyless signatures: sigstore bundles with a certificate of Fulcio and an entry in Rekor's log.

The certificate binds a key of minutes to an identity, which an issuer of OpenID Connect tokens has
confirmed; the log proves that the signature was made while the certificate was valid. sigstore's
own library verifies both against a `TrustedRoot`, without the network; an `Identity` says whose
certificates count.
Sources: sigstore/fulcio, docs/oid-info.md and certificate-specification.md (one name in a
certificate); sigstore/architecture-docs, client-spec.md, 4 (verification).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelpack.errors import FormatError, IntegrityError, ModelpackError, UsageError
from modelpack.trust.sigstore import PAYLOAD_TYPE, Bundle

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, ObjectIdentifier
    from sigstore.verify import Verifier

_OIDS: Final = "1.3.6.1.4.1.57264.1"
_ISSUER: Final = f"{_OIDS}.8"  # as a DER string
_OLD_ISSUER: Final = f"{_OIDS}.1"  # as bare bytes, deprecated
_OTHER_NAME: Final = f"{_OIDS}.7"
_MAX_REASON: Final = 300


@dataclass(frozen=True, slots=True)
class CertifiedSigner:
    """The identity in a certificate, and the issuer of the token that confirmed it."""

    identity: str
    issuer: str

    def __str__(self) -> str:
        return f"{self.identity} (issuer {self.issuer})"


@dataclass(frozen=True, slots=True, eq=False)
class TrustedRoot:
    """The certificates of a Fulcio and the keys of its logs; `name` is for messages."""

    name: str
    verifier: Verifier = field(repr=False)

    @classmethod
    def read(cls, path: Path | None = None) -> TrustedRoot:
        """Return the trusted root in a file or, without `path`, that of sigstore's public instance.

        The latter is read from the TUF cache of sigstore's library, which contains the root that
        came with it until a program updates it. The network is not used. Raises `FormatError`, and
        `ModelpackError` if the library is not installed.
        """
        _need_sigstore()
        from sigstore.errors import Error
        from sigstore.models import ClientTrustConfig
        from sigstore.models import TrustedRoot as Root
        from sigstore.verify import Verifier

        name = str(path) if path is not None else "the TUF cache of sigstore"
        try:
            if path is None:
                root = ClientTrustConfig.production(offline=True).trusted_root
            else:
                root = Root.from_file(str(path))
            return cls(name, Verifier(trusted_root=root))
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path=name) from error
        except (Error, ValueError, TypeError) as error:
            raise FormatError(
                f"is not a trusted root of sigstore: {_reason(error)}",
                path=name,
                hint="give the trusted_root.json of the instance that issued the certificates",
            ) from None


@dataclass(frozen=True, slots=True)
class Identity:
    """A signer whose certificates have this identity and issuer, by the root that issued them.

    A regular expression matches if it matches the whole text.
    """

    identity: str | re.Pattern[str]
    issuer: str | re.Pattern[str]
    root: TrustedRoot

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"{_shown(self.identity)} (issuer {_shown(self.issuer)})"

    @property
    def is_exact(self) -> bool:
        """Whether it matches one identity of one issuer only."""
        return isinstance(self.identity, str) and isinstance(self.issuer, str)

    def matches(self, signer: CertifiedSigner) -> bool:
        """Return whether the identity and the issuer of a certificate are these."""
        return _matches(self.identity, signer.identity) and _matches(self.issuer, signer.issuer)


def exact_or_pattern(exact: str | None, pattern: str | None, name: str) -> str | re.Pattern[str]:
    """Return the one of the two values that is given; `name` is that of the exact one.

    Raises `UsageError` if none or both are given, or if the pattern is not a regular expression.
    """
    if exact is not None and pattern is not None:
        raise UsageError(f"{name} cannot be combined with a regular expression for the same")
    if exact is None and pattern is None:
        raise UsageError(f"{name}, or a regular expression for it, is required")
    if exact == "" or pattern == "":
        raise UsageError(f"{name} is empty")
    if pattern is None:
        assert exact is not None
        return exact
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None


def certified_by(
    bundle: Bundle, what: str, wanted: Sequence[Identity]
) -> tuple[CertifiedSigner, tuple[Identity, ...]]:
    """Return the signer of a bundle and the `wanted` identities that match; they share a root.

    Raises `IntegrityError` if none matches, or if the certificate, its timestamp, the entry of the
    log or the signature is invalid. `what` names the bundle in errors.
    """
    root = wanted[0].root
    assert all(one.root is root for one in wanted)
    if not bundle.has_certificate:
        raise IntegrityError(f"{what}: made by a key without a certificate")
    from sigstore.errors import Error
    from sigstore.models import Bundle as SigstoreBundle

    policy = _AnyOf(wanted, what)
    try:
        verified = root.verifier.verify_dsse(SigstoreBundle.from_json(bundle.raw), policy)
    except _OtherSignerError as error:
        raise IntegrityError(str(error)) from None
    except Error as error:
        raise IntegrityError(f"{what}: not verified by {root.name}: {_reason(error)}") from None
    except Exception as error:
        kind = type(error).__name__
        raise IntegrityError(f"{what}: its certificate or log entry is invalid: {kind}") from error
    if verified != (PAYLOAD_TYPE, bundle.envelope.payload):
        raise IntegrityError(f"{what}: has another payload than the verified one")
    assert policy.signer is not None
    return policy.signer, policy.matching


class _OtherSignerError(Exception):
    """A certificate is for another identity than the wanted ones."""


class _AnyOf:
    """A policy of sigstore's library: the certificate is for one of the identities."""

    def __init__(self, wanted: Sequence[Identity], what: str) -> None:
        self.wanted = wanted
        self.what = what
        self.signer: CertifiedSigner | None = None
        self.matching: tuple[Identity, ...] = ()

    def verify(self, cert: Certificate) -> None:
        """Raise unless `cert`, which a trusted authority has issued, is for one of them."""
        self.signer = signer = _signer_in(cert)
        self.matching = tuple(one for one in self.wanted if one.matches(signer))
        if not self.matching:
            raise _OtherSignerError(f"{self.what}: its certificate is for {signer}")


def _signer_in(certificate: Certificate) -> CertifiedSigner:
    """Return the identity and the issuer in a certificate; raise `VerificationError`."""
    from cryptography import x509
    from cryptography.hazmat import asn1
    from sigstore.errors import VerificationError

    names = []
    for one in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value:
        if isinstance(one, x509.RFC822Name | x509.UniformResourceIdentifier):
            names.append(one.value)
        elif isinstance(one, x509.OtherName) and one.type_id == _oid(_OTHER_NAME):
            names.append(asn1.decode_der(str, one.value))
        else:
            raise VerificationError(f"the certificate names a {type(one).__name__}")
    if len(names) != 1:
        raise VerificationError(f"the certificate names {len(names)} identities, expected 1")
    issuers = set()
    for extension in certificate.extensions:
        if not isinstance(extension.value, x509.UnrecognizedExtension):
            continue
        if extension.oid == _oid(_ISSUER):
            issuers.add(asn1.decode_der(str, extension.value.value))
        elif extension.oid == _oid(_OLD_ISSUER):
            issuers.add(extension.value.value.decode())
    if len(issuers) != 1:
        raise VerificationError(f"the certificate names {len(issuers)} issuers, expected 1")
    return CertifiedSigner(names[0], issuers.pop())


def _oid(text: str) -> ObjectIdentifier:
    from cryptography.x509 import ObjectIdentifier

    return ObjectIdentifier(text)


def _matches(wanted: str | re.Pattern[str], text: str) -> bool:
    if isinstance(wanted, str):
        return wanted == text
    return wanted.fullmatch(text) is not None


def _shown(wanted: str | re.Pattern[str]) -> str:
    return wanted if isinstance(wanted, str) else f"/{wanted.pattern}/"


def _reason(error: BaseException) -> str:
    """Return the message of an error of sigstore's library, in one short line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}…"


def _need_sigstore() -> None:
    try:
        import sigstore  # noqa: F401 - only checks that it is installed
    except ImportError:
        raise ModelpackError(
            "keyless signatures need the package sigstore, which is not installed",
            hint="pip install 'modelpack[signing]'",
        ) from None
    # Without a handler of the program's, Python would print warnings of the library.
    logging.getLogger("sigstore").addHandler(logging.NullHandler())
