"""Make and verify keyless signatures: bundles with a certificate of Fulcio, logged by Rekor.

The certificate binds a key of minutes to an identity, which an issuer of OpenID Connect tokens has
confirmed; the log proves that the signature was made while the certificate was valid. sigstore's
own library verifies both against a `TrustedRoot`, without the network; an `Identity` says whose
certificates count. A `KeylessSigner` makes such signatures with the token of its user.
Sources: sigstore/fulcio, docs/oid-info.md and certificate-specification.md (one name in a
certificate); sigstore/architecture-docs, client-spec.md, 4 (verification).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelpack.errors import (
    AuthError,
    FormatError,
    IntegrityError,
    ModelpackError,
    RemoteUnavailableError,
    UsageError,
)
from modelpack.trust.sigstore import PAYLOAD_TYPE, Bundle, Statement

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, ObjectIdentifier
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken
    from sigstore.sign import Signer
    from sigstore.verify import Verifier

_OIDS: Final = "1.3.6.1.4.1.57264.1"
_ISSUER: Final = f"{_OIDS}.8"  # as a DER string
_OLD_ISSUER: Final = f"{_OIDS}.1"  # as bare bytes, deprecated
_OTHER_NAME: Final = f"{_OIDS}.7"
_SILENT: Final = logging.NullHandler()
_MAX_REASON: Final = 300
_MAX_TOKEN: Final = 64 * 1024
#: Seconds for a certificate and an entry of the log; Rekor 2 answers after it has sealed a batch.
_PATIENCE: Final = 120


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
    except Exception as error:  # of parsers of certificates and time stamps, which have many
        kind = type(error).__name__
        raise IntegrityError(f"{what}: its certificate or log entry is invalid: {kind}") from error
    if verified != (PAYLOAD_TYPE, bundle.envelope.payload):
        raise IntegrityError(f"{what}: has another payload than the verified one")
    assert policy.signer is not None
    return policy.signer, policy.matching


class KeylessSigner:
    """Signs statements by a key of minutes, which Fulcio certifies for the identity in a token.

    The certificate is requested with the first statement. `certified` is the signer in it, None
    before.
    """

    def __init__(self, config: ClientTrustConfig, token: IdentityToken, name: str) -> None:
        """Make a signer of an instance of sigstore; `open` reads the configuration and the token.

        `name` names the instance in errors.
        """
        from sigstore.verify import Verifier

        self.certified: CertifiedSigner | None = None
        self._root = TrustedRoot(name, Verifier(trusted_root=config.trusted_root))
        self._config = config
        self._token = token
        self._signer: Signer | None = None

    @classmethod
    def open(cls, config: Path | None = None, token: str | None = None) -> KeylessSigner:
        """Return a signer for an identity `token`, or without one for that of this CI job.

        `config` is a client trust configuration: the addresses of an instance, and its trusted
        root. Without it, that of sigstore's public instance is fetched and kept in the TUF cache.
        Raises `FormatError` for the file, `AuthError` for the token, `RemoteUnavailableError` if
        the public configuration cannot be fetched.
        """
        _need_sigstore()
        from sigstore.errors import Error
        from sigstore.models import ClientTrustConfig

        name = str(config) if config is not None else "the public instance of sigstore"
        identity = _identity_token(token)
        try:
            if config is None:
                return cls(ClientTrustConfig.production(), identity, name)
            made = ClientTrustConfig.from_json(config.read_text(encoding="utf-8"))
            return cls(made, identity, name)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path=name) from error
        except (Error, ValueError, TypeError) as error:
            if config is None:
                raise RemoteUnavailableError(
                    f"cannot fetch the configuration of {name}: {_reason(error)}"
                ) from error
            raise FormatError(
                f"is not a client trust configuration of sigstore: {_reason(error)}", path=name
            ) from None

    def bundle(self, statement: Statement) -> bytes:
        """Return the bytes of a bundle with the statement, certified and logged.

        The identity and the digest of the statement become public with the log. Raises `AuthError`
        for a token that has expired or that Fulcio refuses, `RemoteUnavailableError` if Fulcio or
        Rekor fails or is silent, and `IntegrityError` for a bundle that the trusted root of the
        instance does not verify.
        """
        from sigstore.dsse import Statement as SigstoreStatement

        def sign() -> bytes:
            if self._signer is None:
                self._signer = self._new_signer()
            made = self._signer.sign_dsse(SigstoreStatement(statement.encode()))
            return made.to_json().encode()

        with _translated(self._root.name):
            raw = _within(_PATIENCE, sign)
        anyone = re.compile(".*", re.DOTALL)
        what = f"the bundle of {self._root.name}"
        parsed = Bundle.parse(raw, what)
        self.certified, _ = certified_by(parsed, what, [Identity(anyone, anyone, self._root)])
        return raw

    def _new_signer(self) -> Signer:
        """Request a certificate."""
        from sigstore.sign import SigningContext

        try:
            # The context manager only makes the signer: there is nothing to close.
            with SigningContext.from_trust_config(self._config).signer(self._token) as signer:
                return signer
        except Exception as error:  # the client of Fulcio publishes none
            refusal = _refusal(error, str(self._token))
            if refusal is None:
                raise
            raise AuthError(
                f"{self._root.name} refused a certificate for the identity token of "
                f"{self._token.issuer}: {refusal}",
                hint="give a current token of an issuer that this instance accepts",
            ) from None


def read_token(path: Path) -> str:
    """Return the identity token in a file; raise `FormatError`. It is a secret."""
    try:
        with path.open(encoding="ascii") as stream:
            token = stream.read(_MAX_TOKEN).strip()
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from error
    except ValueError:
        token = ""
    if token.count(".") != 2:
        raise FormatError("is not an identity token (a JWT)", path=str(path))
    return token


def _identity_token(given: str | None) -> IdentityToken:
    from sigstore.oidc import IdentityError, IdentityToken, detect_credential

    hint = "give a current token for the audience sigstore with --identity-token"
    try:
        token = given if given is not None else detect_credential()
    except IdentityError as error:
        raise AuthError(
            f"cannot get the identity token of this CI job: {_reason(error)}",
            hint="in GitHub Actions, set `permissions: id-token: write`; elsewhere, give the token "
            "with --identity-token",
        ) from None
    if token is None:
        raise AuthError("no identity token: this is not a CI job that has one", hint=hint)
    try:
        return IdentityToken(token)
    except IdentityError as error:
        raise AuthError(f"the identity token is not valid: {_reason(error)}", hint=hint) from None


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """Return the result of a call; raise `TimeoutError` if it takes longer.

    The library's clients of Fulcio and Rekor wait forever for a response. The thread of such a call
    stays until the process ends.
    """
    done: Future[bytes] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            done.set_exception(error)

    threading.Thread(target=run, name="sigstore", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(f"no response within {seconds:g} seconds") from None


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Translate the errors of sigstore's library and its clients of Fulcio and Rekor."""
    from sigstore.errors import VerificationError
    from sigstore.oidc import ExpiredIdentity

    try:
        yield
    except ModelpackError:
        raise
    except ExpiredIdentity:
        raise AuthError("the identity token has expired", hint="request a new one") from None
    except VerificationError as error:
        raise IntegrityError(f"the certificate of {name} is not valid: {_reason(error)}") from None
    except Exception as error:  # the clients of Fulcio and Rekor publish no common error
        reason = _reason(error if str(error) else error.__cause__ or error)
        raise RemoteUnavailableError(f"{name} did not sign: {reason}") from error


def _refusal(error: Exception, secret: str) -> str | None:
    """Return the message of Fulcio, without `secret`, if it refused a request, else None."""
    response = getattr(error.__cause__, "response", None)
    if response is None or response.status_code not in (400, 401, 403):
        return None
    try:
        message = str(response.json()["message"]).replace(secret, "***")
    except (ValueError, LookupError, TypeError):
        message = ""
    return _reason(ValueError(message or f"HTTP status {response.status_code}"))


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
    line = " ".join(str(error).split()).partition(" [type=")[0]  # pydantic's further details
    line = line or type(error).__name__
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}…"


def _need_sigstore() -> None:
    try:
        import sigstore  # noqa: F401 - only checks that it is installed
    except ImportError:
        raise ModelpackError(
            "keyless signatures need the package sigstore, which is not installed",
            hint="run pip install 'modelpack[signing]'",
        ) from None
    # Without a handler of the program's, Python would print warnings of the library.
    logging.getLogger("sigstore").addHandler(_SILENT)
