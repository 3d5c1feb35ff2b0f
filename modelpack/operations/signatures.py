"""Sign models, verify their signatures and attach signed statements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest, parse_manifest_or_index
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference, begins_id
from modelpack.errors import NotFoundError, UntrustedError, UsageError
from modelpack.operations.lookup import model_in, model_of, stored_model
from modelpack.operations.referrers import BlobsSource
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.transfer import TransferOptions, transfer_model
from modelpack.operations.variants import variants_of
from modelpack.progress import Stop
from modelpack.registry import Repository
from modelpack.storage import BytesBlob, Target, Watch, watching
from modelpack.store.layout import LayoutStore
from modelpack.trust.certificates import CertifiedKey
from modelpack.trust.keyless import KeylessSigner
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import model_statement
from modelpack.trust.signatures import (
    MANIFEST_FORMATS,
    Findings,
    SignatureKind,
    Signer,
    find_signatures,
    is_signed_under_tag,
)
from modelpack.trust.sigstore import (
    COSIGN_SIGN,
    Statement,
    Subject,
    bundle_manifest,
    sign_simply,
    signature_tag,
    signatures_manifest,
    signed_bundle,
)

#: The default formats: those that old and new releases of cosign read.
DEFAULT_KINDS = (SignatureKind.COSIGN, SignatureKind.BUNDLE)


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed model; `manifests` are the digests of the signatures' manifests.

    For an index, `digest` is that of the index, and `variants` are its signed variants.
    """

    reference: Reference
    digest: Digest
    manifests: Mapping[SignatureKind, Digest]
    variants: tuple[Signed, ...] = ()


def sign(
    reference: str | Reference,
    key: PrivateKey | CertifiedKey | KeylessSigner,
    *,
    kinds: Sequence[SignatureKind] = (),
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> Signed:
    """Sign the model `reference` in its registry or, with `store`, in that store.

    `kinds` are the formats of the signatures. By default there are two, cosign's tag and a sigstore
    bundle; in a store or without a key, only the bundle, which `push --with-referrers` pushes; with
    certificates, that of OpenSSF model signing. For an index, the index and each variant are
    signed, since variants are pulled and loaded by their own digests. Raises the errors of a push
    and, without a key, those of `KeylessSigner.bundle`.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    wanted = tuple(dict.fromkeys(kinds or DEFAULT_KINDS))
    if isinstance(key, CertifiedKey):
        if {*kinds} - {SignatureKind.MODEL_SIGNING}:
            raise UsageError(
                "certificates of an authority can only be written with the format model-signing",
                hint="give --format model-signing",
            )
        wanted = (SignatureKind.MODEL_SIGNING,)
    if isinstance(key, KeylessSigner):
        if SignatureKind.COSIGN in kinds:
            raise UsageError(
                "keyless signatures cannot be written under cosign's tag",
                hint="give --format bundle, which cosign verifies with --new-bundle-format",
            )
        wanted = tuple(kind for kind in wanted if kind is not SignatureKind.COSIGN)
    if store is not None:
        if SignatureKind.COSIGN in kinds:
            raise UsageError(
                "cosign's tag cannot be written to a store, only to a registry",
                hint="sign the model in its registry, or give --format bundle",
            )
        wanted = tuple(kind for kind in wanted if kind is not SignatureKind.COSIGN)
    if SignatureKind.FILES in wanted:
        raise UsageError(
            f"signatures of the format {SignatureKind.FILES} can be verified, but not written",
            hint="give --format model-signing, which covers the files and the manifest",
        )
    watch = watching(None, stop)
    with _opened(where, store, remote, watch, writes=True) as place:
        return _sign(_Signing(place, where, key, wanted, watch))


def verify(
    reference: str | Reference,
    signers: Sequence[Signer],
    *,
    formats: Sequence[SignatureKind] = (),
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[Model, Findings]:
    """Return the model `reference` and its signatures; require one by each of `signers`.

    With `store`, `reference` may also be the id of a stored model or a unique prefix of one. Only
    signatures of the `formats` count (default: all formats that cover the manifest). From an
    index, the variant for this machine is verified. Raises `UntrustedError` if the signature of a
    signer is missing.
    """
    where = reference
    if isinstance(where, str) and not (store is not None and begins_id(where)):
        where = Reference.parse(where)
    if not signers:
        raise UsageError("expected at least one key or identity")
    watch = watching(None, stop)
    with opened_model(where, store, remote, watch) as (place, model):
        formats = formats or MANIFEST_FORMATS
        found = find_signatures(
            place, model.descriptor, lambda: model, signers,
            tagged=store is None, formats=formats, contents=store,
        )  # fmt: skip
    lacking = [signer for signer in signers if signer not in found.signers]
    if lacking:
        shown = found.refused[:5]
        why = "; ".join(one.reason for one in shown) or "it has no signatures"
        raise UntrustedError(
            f"{where}: {model.digest} is not signed by {lacking[0].name}: {why}",
            expected=f"a signature by {lacking[0].name}",
            got=why,
            hint=next((one.hint for one in shown if one.hint), None),
        )
    return model, found


def attach_statement(
    place: Target,
    subject: Descriptor,
    statement: Statement,
    key: PrivateKey | CertifiedKey | KeylessSigner,
    watch: Watch,
) -> Digest:
    """Sign a statement and attach it to `subject`; return the digest of its manifest."""
    bundle = signed_bundle(statement, key) if isinstance(key, PrivateKey) else key.bundle(statement)
    manifest, blobs = bundle_manifest(bundle, statement.predicate_type, subject)
    put(place, manifest, blobs, None, watch)
    return manifest.digest


def put(
    place: Target,
    manifest: Manifest,
    blobs: Mapping[Descriptor, bytes],
    tag: str | None,
    watch: Watch,
) -> None:
    """Write a new manifest and its blobs to `place`."""
    source = BlobsSource({blob.digest: BytesBlob(content) for blob, content in blobs.items()})
    how = TransferOptions(watch)
    transfer_model(source, place, manifest.descriptor, manifest.raw, tag, how)


@contextmanager
def opened_model(
    where: Reference | str,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    watch: Watch,
    *,
    writes: bool = False,
) -> Iterator[tuple[LayoutStore | Repository, Model]]:
    """Yield the model `where` and the place that it is in: `store` or else its registry.

    A text is the id of a model in the store.
    """
    if isinstance(where, str):
        assert store is not None
        with store.lease(()):
            yield store, stored_model(store, where)
        return
    with _opened(where, store, remote, watch, writes=writes) as place:
        if isinstance(place, LayoutStore):
            yield place, replace(stored_model(place, str(where)), reference=where)
        else:
            yield place, model_in(place, where)


@contextmanager
def _opened(
    where: Reference,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    watch: Watch,
    *,
    writes: bool,
) -> Iterator[LayoutStore | Repository]:
    if store is not None:
        with store.lease(()):
            yield store
        return
    with open_repository(where, remote or RemoteOptions(), watch, writes=writes) as repository:
        yield repository


@dataclass(frozen=True, slots=True)
class _Signing:
    """Where and how to sign a model."""

    place: LayoutStore | Repository
    where: Reference
    key: PrivateKey | CertifiedKey | KeylessSigner
    kinds: tuple[SignatureKind, ...]
    watch: Watch


def _sign(signing: _Signing) -> Signed:
    """Sign the model of the reference, or its index and each variant."""
    place, where = signing.place, signing.where
    if isinstance(place, LayoutStore):
        descriptor = place.resolve(str(where))
        raw = place.fetch_manifest(descriptor)
    else:
        descriptor, raw = fetch_referenced_manifest(place, where)
    document = parse_manifest_or_index(raw, str(where), media_type=descriptor.media_type)
    if isinstance(document, Manifest):
        return _sign_manifest(signing, model_of(place, descriptor, document, where))
    variants = []
    for variant in variants_of(document):
        found = replace(variant.descriptor, annotations={}, platform=None)
        what = f"{where}: variant {variant.name}"
        manifest = Manifest.parse(place.fetch_manifest(found), what)
        variants.append(_sign_manifest(signing, model_of(place, found, manifest, where)))
    kinds = [kind for kind in signing.kinds if kind is not SignatureKind.MODEL_SIGNING]
    done: dict[SignatureKind, Digest]
    done = {kind: _write(signing, kind, descriptor, None) for kind in kinds}
    return Signed(where, descriptor.digest, done, tuple(variants))


def _sign_manifest(signing: _Signing, model: Model) -> Signed:
    done = {kind: _write(signing, kind, model.descriptor, model) for kind in signing.kinds}
    return Signed(signing.where, model.digest, done)


def _write(
    signing: _Signing, kind: SignatureKind, subject: Descriptor, model: Model | None
) -> Digest:
    """Write a signature of `subject`; `model` is None for an index."""
    if kind is SignatureKind.COSIGN:
        return _sign_simply(signing, subject)
    if kind is SignatureKind.MODEL_SIGNING:
        assert model is not None, "an index has no files"
        statement = model_statement(model, signing.where.repository.rpartition("/")[2])
    else:
        statement = Statement((Subject(subject.digest, signing.where.name),), COSIGN_SIGN)
    return attach_statement(signing.place, subject, statement, signing.key, signing.watch)


def _sign_simply(signing: _Signing, subject: Descriptor) -> Digest:
    """Add a signature to the manifest of cosign's tag, unless the key has signed it already."""
    place, key, digest = signing.place, signing.key, subject.digest
    assert isinstance(key, PrivateKey), "`sign` writes no keyless signatures under the tag"
    tag = signature_tag(digest)
    layer, payload = sign_simply(signing.where.name, digest, key)
    try:
        before = Manifest.parse(place.fetch_manifest(place.resolve(tag)), tag)
    except NotFoundError:
        layers: tuple[Descriptor, ...] = ()
    else:
        if is_signed_under_tag(place, subject, key.public):
            return before.digest
        layers = before.layers
    manifest, blobs = signatures_manifest((*layers, layer))
    put(place, manifest, {**blobs, layer: payload}, tag, signing.watch)
    return manifest.digest


def attest(
    model: Model,
    predicate_type: str,
    predicate: Mapping[str, Any],
    key: PrivateKey,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> Digest:
    """Sign an in-toto statement about `model` and attach it as a sigstore bundle.

    The subject is the manifest with the model's digest, in its registry or, with `store`, there.
    Return the digest of the referrer. Raises the errors of a push, and `UsageError` for a model
    without a reference to a registry.
    """
    watch, reference = watching(None, stop), model.reference
    name = reference.name if reference is not None else ""
    statement = Statement((Subject(model.digest, name),), predicate_type, predicate)
    if store is not None:
        with store.lease(()):
            return attach_statement(store, model.descriptor, statement, key, watch)
    if reference is None:
        raise UsageError(
            f"{model.digest} is not a reference to a registry", hint="name the model by reference"
        )
    where = reference.with_digest(model.digest)
    with opened_model(where, None, remote, watch, writes=True) as (place, there):
        return attach_statement(place, there.descriptor, statement, key, watch)
