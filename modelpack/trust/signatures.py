"""Find the signatures of a model in its registry or store, and verify them.

A signer is a public key, an authority that certifies keys, or the identity in the certificate of a
keyless signature.

Cosign's simple signatures are under its tag; sigstore bundles are attached to the model and sign
its manifest (cosign) or its files (OpenSSF model signing). A manifest contains the digests of all
files, which are verified when the model is transferred, so files are read only for signatures over
other digests. By default only formats that cover the manifest count: a model has more parts than
its files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
    UntrustedError,
)
from modelpack.storage import ReferrerSource, Source, read_blob
from modelpack.trust.certificates import Authority
from modelpack.trust.keyless import CertifiedSigner, Identity, certified_by
from modelpack.trust.keys import PublicKey
from modelpack.trust.model_signing import check_model, names_manifest
from modelpack.trust.provenance import SLSA_PROVENANCE, Provenance
from modelpack.trust.sigstore import (
    BUNDLE_TYPES,
    COSIGN_SIGN,
    MODEL_SIGNING,
    PAYLOAD,
    Bundle,
    SimpleSignature,
    signature_tag,
)

#: A limit, since anybody with write access to a repository can add signatures.
MAX_SIGNATURES: Final = 200
# Without a referrers API, cosign lists its bundles with the media type of their config.
_LISTED_AS: Final = (*BUNDLE_TYPES, media_types.OCI_EMPTY, None)


class SignatureKind(StrEnum):
    """The format of a signature."""

    COSIGN = "cosign"  # simple signing, under cosign's tag
    BUNDLE = "bundle"  # a sigstore bundle over the manifest
    MODEL_SIGNING = "model-signing"  # OpenSSF model signing over the files and the manifest
    FILES = "model-signing-files"  # the same over the files alone, as OpenSSF's own tool signs
    PROVENANCE = "provenance"  # how the model was packaged, which is no signature of the model


#: The formats that cover the manifest, and thus the whole model. They are accepted by default, and
#: Modelpack writes only these.
MANIFEST_FORMATS: Final = (
    SignatureKind.COSIGN,
    SignatureKind.BUNDLE,
    SignatureKind.MODEL_SIGNING,
)


#: A signer that a signature is required of.
Signer = PublicKey | Authority | Identity


@dataclass(frozen=True, slots=True)
class Signature:
    """A verified signature: who made it, its format and the manifest that contains it.

    `certified` is the signer in the certificate of a keyless signature. `provenance` is what a
    statement of that kind says.
    """

    signer: Signer
    kind: SignatureKind
    manifest: Descriptor
    certified: CertifiedSigner | None = None
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason why a signature does not count, and what the user can do about it."""

    reason: str
    hint: str | None = None

    @classmethod
    def of(cls, error: ModelpackError) -> Refusal:
        """Return the refusal of a signature whose check raised `error`."""
        return cls(str(error), error.hint)


@dataclass(frozen=True, slots=True)
class Findings:
    """The valid signatures by the given signers, and the refusals of other signatures."""

    signatures: tuple[Signature, ...]
    refused: tuple[Refusal, ...]

    @property
    def signers(self) -> frozenset[Signer]:
        """The signers that signed."""
        return frozenset(one.signer for one in self.signatures)


def find_signatures(
    source: ReferrerSource,
    subject: Descriptor,
    model: Callable[[], Model],
    signers: Collection[Signer],
    *,
    tagged: bool,
    formats: Collection[SignatureKind] = MANIFEST_FORMATS,
    contents: Source | None = None,
) -> Findings:
    """Return the signatures by `signers` over the manifest `subject` or the files of its `model`.

    With `tagged`, search cosign's tag, too. Signatures that are broken, by others or not of one
    of the `formats` do not count, without an effect on others. Files are read only from `contents`,
    for digests that are not in the manifest. Errors of the source are raised.
    """
    found: list[Signature] = []
    refused: list[Refusal] = []
    for one in _candidates(source, subject, model, refused, tagged, contents):
        if one.kind is SignatureKind.PROVENANCE and one.kind not in formats:
            continue
        if one.kind not in formats:
            why = "its format is not accepted"
            if one.kind is SignatureKind.FILES:
                why = (
                    "covers the files and not the manifest, and the format "
                    f"{one.kind} is not accepted"
                )
            refused.append(Refusal(f"{one.what}: {why}"))
            continue
        try:
            by = _made_by(one, signers)
            one.check()
        except (FormatError, IntegrityError) as error:
            refused.append(Refusal.of(error))
            continue
        found += [replace(made, provenance=one.provenance) for made in by]
    return Findings(tuple(found), tuple(refused))


def is_signed_under_tag(source: ReferrerSource, subject: Descriptor, key: PublicKey) -> bool:
    """Return whether cosign's tag has a signature by `key` over the manifest `subject`."""
    return any(signature.is_signed_by(key) for _, signature in _under_tag(source, subject, []))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A signature that names the model; `check` raises if it does not cover the whole model."""

    manifest: Descriptor
    kind: SignatureKind
    content: Bundle | SimpleSignature
    check: Callable[[], None] = lambda: None
    provenance: Provenance | None = None

    @property
    def what(self) -> str:
        return f"{self.kind} signature {self.manifest.digest.short}"


def _made_by(one: _Candidate, signers: Collection[Signer]) -> list[Signature]:
    """Return a signature by each of the signers that made it; raise `IntegrityError` if none."""
    content, errors = one.content, list[FormatError | IntegrityError]()
    found = [
        Signature(key, one.kind, one.manifest)
        for key in signers
        if isinstance(key, PublicKey) and content.is_signed_by(key)
    ]
    if isinstance(content, Bundle):
        found += _certified(one, content, signers, errors)
    elif not all(isinstance(signer, PublicKey) for signer in signers):
        errors.append(
            IntegrityError(
                f"{one.what}: certificates under cosign's tag are not verified",
                hint="sign with `cosign sign --new-bundle-format`, or `modelpack sign`",
            )
        )
    if not found:
        raise next(iter(errors), IntegrityError(f"{one.what}: made by none of the keys"))
    return found


def _certified(
    one: _Candidate,
    bundle: Bundle,
    signers: Collection[Signer],
    errors: list[FormatError | IntegrityError],
) -> Iterator[Signature]:
    """Yield a signature by each of the signers that certificates in a bundle are for."""
    for authority in signers:
        if not isinstance(authority, Authority):
            continue
        try:
            if authority.has_signed(bundle, one.what):
                yield Signature(authority, one.kind, one.manifest)
        except (FormatError, IntegrityError) as error:
            errors.append(error)
    identities = [signer for signer in signers if isinstance(signer, Identity)]
    for root in dict.fromkeys(identity.root for identity in identities):
        wanted = [identity for identity in identities if identity.root is root]
        try:
            certified, matching = certified_by(bundle, one.what, wanted)
        except (FormatError, IntegrityError) as error:  # another root may verify it
            errors.append(error)
            continue
        for signer in matching:
            yield Signature(signer, one.kind, one.manifest, certified)


def _candidates(
    source: ReferrerSource,
    subject: Descriptor,
    model: Callable[[], Model],
    refused: list[Refusal],
    tagged: bool,
    contents: Source | None,
) -> Iterator[_Candidate]:
    attached = [one for one in source.referrers(subject.digest) if one.artifact_type in _LISTED_AS]
    if len(attached) > MAX_SIGNATURES:
        raise UntrustedError(
            f"{subject.digest} has {len(attached)} attached bundles, expected at most "
            f"{MAX_SIGNATURES}",
            hint="list them with `modelpack referrers`, and remove them with `modelpack detach`",
        )
    for referrer in attached:
        try:
            candidate = _bundle(source, referrer, subject, model, contents)
        except (FormatError, IntegrityError, NotFoundError) as error:
            refused.append(Refusal.of(error))
            continue
        if candidate is not None:
            yield candidate
    if tagged:
        for manifest, signature in _under_tag(source, subject, refused):
            yield _Candidate(manifest, SignatureKind.COSIGN, signature)


def _bundle(
    source: ReferrerSource,
    referrer: Descriptor,
    subject: Descriptor,
    model: Callable[[], Model],
    contents: Source | None,
) -> _Candidate | None:
    """Return the signature in an attached bundle, or None if it is not one."""
    what = f"bundle {referrer.digest.short}"
    manifest = Manifest.parse(source.fetch_manifest(referrer), what)
    if [layer.media_type in BUNDLE_TYPES for layer in manifest.layers] != [True]:
        return None
    bundle = Bundle.parse(read_blob(source, manifest.layers[0]), what)
    statement = bundle.statement
    if statement.predicate_type == COSIGN_SIGN:
        if not statement.is_about(subject.digest):
            raise IntegrityError(f"{what}: signs {statement.subjects[0].digest}, another manifest")
        return _Candidate(referrer, SignatureKind.BUNDLE, bundle)
    if statement.predicate_type == SLSA_PROVENANCE:
        if not statement.is_about(subject.digest):
            raise IntegrityError(f"{what}: is about {statement.subjects[0].digest}")
        said = Provenance.parse(statement.predicate, what)
        return _Candidate(referrer, SignatureKind.PROVENANCE, bundle, provenance=said)
    if statement.predicate_type != MODEL_SIGNING:
        return None

    def covers_files() -> None:
        check_model(statement, model(), contents, signature=Digest.of(bundle.raw))

    kind = SignatureKind.MODEL_SIGNING if names_manifest(statement) else SignatureKind.FILES
    return _Candidate(referrer, kind, bundle, covers_files)


def _under_tag(
    source: ReferrerSource, subject: Descriptor, refused: list[Refusal]
) -> Iterator[tuple[Descriptor, SimpleSignature]]:
    tag = signature_tag(subject.digest)
    try:
        descriptor = source.resolve(tag)
        manifest = Manifest.parse(source.fetch_manifest(descriptor), tag)
    except (NotFoundError, InvalidReferenceError):  # with SHA-512, it is too long for a tag
        return
    except (FormatError, IntegrityError) as error:
        refused.append(Refusal.of(error))
        return
    for layer in manifest.layers[:MAX_SIGNATURES]:
        if layer.media_type != PAYLOAD:
            continue
        what = f"cosign signature {layer.digest.short}"
        try:
            signature = SimpleSignature.parse(read_blob(source, layer), layer, what)
            if signature.digest != subject.digest:
                raise IntegrityError(f"{what}: signs {signature.digest}, another manifest")
        except (FormatError, IntegrityError, NotFoundError) as error:
            refused.append(Refusal.of(error))
            continue
        yield descriptor, signature
