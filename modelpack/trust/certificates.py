"""Signers with certificates of an authority: OpenSSF model signing 1.0, method `certificate`.

The bundle contains the certificate of the key and the certificates up to the authority. Nothing
proves when it was signed, so all have to be valid now.
Sources: ossf/model-signing-spec, spec/v1.0.md, 4.1; RFC 5280, 6 (paths) and 4.2.1.12 (usage).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelpack.artifacts.json_document import decode_object
from modelpack.errors import FormatError, IntegrityError, UsageError
from modelpack.trust.keys import PrivateKey, PublicKey, parse_public_key, read_file
from modelpack.trust.sigstore import Bundle, Statement, signed_bundle

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_MAX_CERTIFICATES: Final = 8


@dataclass(frozen=True, slots=True)
class Authority:
    """A signer with any certificate for code signing that an authority issued."""

    certificates: tuple[Certificate, ...]
    name: str

    @classmethod
    def read(cls, path: Path | str) -> Authority:
        """Return the authority whose certificates are in the PEM file; raise `FormatError`."""
        return cls(read_certificates(path), str(path))

    def has_signed(self, bundle: Bundle, what: str) -> bool:
        """Return whether the bundle is signed with a certificate of this authority.

        Raises `IntegrityError` for a bundle without certificates, or with certificates that are not
        of this authority, not valid now, or not for signing. `what` names the bundle.
        """
        key = self._key_in(_chain(bundle, what), what)
        return bundle.is_signed_by(key)

    def _key_in(self, chain: tuple[Certificate, ...], what: str) -> PublicKey:
        """Return the key of the first certificate of a chain, which is verified."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
        from cryptography.x509 import ExtendedKeyUsage, UnsupportedGeneralNameType
        from cryptography.x509.verification import (
            Criticality,
            ExtensionPolicy,
            PolicyBuilder,
            Store,
            VerificationError,
        )

        leaf, *others = chain
        # The authority's certificates are checked as those of the web; a certificate for signing
        # needs no name of a host, and its usage is checked below.
        authorities = ExtensionPolicy.webpki_defaults_ca().may_be_present(
            ExtendedKeyUsage, Criticality.AGNOSTIC, None
        )
        verifier = (
            PolicyBuilder()
            .store(Store(list(self.certificates)))
            .time(datetime.now(UTC))
            .extension_policies(ca_policy=authorities, ee_policy=ExtensionPolicy.permit_all())
            .build_client_verifier()
        )
        try:
            verifier.verify(leaf, others)
        except (VerificationError, UnsupportedGeneralNameType, ValueError) as error:
            raise IntegrityError(f"{what}: not certified by {self.name}: {error}") from None
        if not _is_for_signing(leaf):
            raise IntegrityError(f"{what}: its certificate is not for signing")
        pem = leaf.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return parse_public_key(pem, what)


def read_certificates(path: Path | str) -> tuple[Certificate, ...]:
    """Return the certificates in a PEM file; raise `FormatError`."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return tuple(load_pem_x509_certificates(read_file(Path(path))))
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("contains no certificates in PEM", path=str(path)) from None


@dataclass(frozen=True, slots=True)
class CertifiedKey:
    """A key with the certificates up to its authority, that of the key first."""

    key: PrivateKey
    chain: tuple[Certificate, ...]

    @classmethod
    def of(cls, key: PrivateKey, path: Path | str) -> CertifiedKey:
        """Return the key with the certificates in a PEM file.

        Raises `FormatError` if the file has none, `UsageError` if the first is of another key.
        """
        chain = read_certificates(path)
        if chain[0].public_key() != key.key.public_key():
            raise UsageError(
                f"the first certificate in {path} is not for the key {key.name}",
                hint="write the certificate of the key first, then those up to the authority",
            )
        return cls(key, chain)

    def bundle(self, statement: Statement) -> bytes:
        """Return the bytes of a bundle with the signed statement and the certificates."""
        from cryptography.hazmat.primitives.serialization import Encoding

        listed = [base64.b64encode(one.public_bytes(Encoding.DER)).decode() for one in self.chain]
        certificates = [{"rawBytes": raw} for raw in listed]
        material = {"x509CertificateChain": {"certificates": certificates}, "tlogEntries": []}
        return signed_bundle(statement, self.key, material)


def _chain(bundle: Bundle, what: str) -> tuple[Certificate, ...]:
    from cryptography.x509 import load_der_x509_certificate

    material = decode_object(bundle.raw, what).get("verificationMaterial")
    try:
        listed = material["x509CertificateChain"]["certificates"] if material else []
        if not 1 <= len(listed) <= _MAX_CERTIFICATES:
            raise IntegrityError(
                f"{what}: has {len(listed)} certificates, expected 1 to {_MAX_CERTIFICATES}"
            )
        raw = [base64.b64decode(one["rawBytes"], validate=True) for one in listed]
        return tuple(load_der_x509_certificate(one) for one in raw)
    except (KeyError, TypeError):
        raise IntegrityError(f"{what}: has no chain of certificates") from None
    except ValueError:
        raise IntegrityError(f"{what}: has an invalid certificate") from None


def _is_for_signing(certificate: Certificate) -> bool:
    """Return whether a certificate is for signing code, or for any signatures."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        return ExtendedKeyUsageOID.CODE_SIGNING in usage
    except x509.ExtensionNotFound:
        pass
    try:
        signs = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        return signs.digital_signature
    except x509.ExtensionNotFound:
        return False
