"""Signatures of models: written, found, and rejected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    FormatError,
    IntegrityError,
    UnsupportedError,
    UntrustedError,
    UsageError,
)
from modelpack.operations import signatures as signing
from modelpack.operations.lookup import inspect, model_in
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import watching
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import check_model, model_statement
from modelpack.trust.signatures import MANIFEST_FORMATS, SignatureKind
from modelpack.trust.sigstore import (
    COSIGN_SIGN,
    TEST_RESULT,
    Bundle,
    Statement,
    Subject,
    bundle_manifest,
    signature_tag,
    signed_bundle,
)
from tests.models import package, tiny_gguf
from tests.supply.conftest import Published

KINDS = list(MANIFEST_FORMATS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_is_found(
    published: Published, ours: PrivateKey, theirs: PrivateKey, kind: SignatureKind
) -> None:
    done = signing.sign(published.reference, ours, kinds=[kind])
    assert done.digest == published.digest
    model, found = signing.verify(published.reference, [ours.public])
    assert model.digest == published.digest
    [signature] = found.signatures
    assert (signature.kind, signature.signer) == (kind, ours.public)
    assert signature.manifest.digest == done.manifests[kind]
    with pytest.raises(UntrustedError, match=r"is not signed by .*theirs\.key: .*by none of"):
        signing.verify(published.reference, [theirs.public])
    with pytest.raises(UntrustedError):
        signing.verify(published.reference, [ours.public, theirs.public])


def test_both_ways_of_cosign_are_the_default(published: Published, ours: PrivateKey) -> None:
    done = signing.sign(published.reference, ours)
    assert list(done.manifests) == [SignatureKind.COSIGN, SignatureKind.BUNDLE]


def test_several_sign_under_one_tag(
    published: Published, ours: PrivateKey, theirs: PrivateKey
) -> None:
    kinds = [SignatureKind.COSIGN]
    signing.sign(published.reference, ours, kinds=kinds)
    second = signing.sign(published.reference, theirs, kinds=kinds)
    again = signing.sign(published.reference, ours, kinds=kinds)
    assert again.manifests == second.manifests  # no signature was added
    _, found = signing.verify(published.reference, [ours.public, theirs.public])
    assert found.signers == {ours.public, theirs.public}


def test_nothing_is_signed(published: Published, ours: PrivateKey) -> None:
    with pytest.raises(UntrustedError, match="it has no signatures"):
        signing.verify(published.reference, [ours.public])
    with pytest.raises(UsageError, match="expected at least one key or identity"):
        signing.verify(published.reference, [])


@pytest.mark.parametrize("kind", [SignatureKind.BUNDLE, SignatureKind.MODEL_SIGNING])
def test_a_store_holds_bundles(published: Published, ours: PrivateKey, kind: SignatureKind) -> None:
    signing.sign(published.reference, ours, kinds=[kind], store=published.origin)
    signing.verify(published.reference, [ours.public], store=published.origin)
    with pytest.raises(UntrustedError):
        signing.verify(published.reference, [ours.public])  # not in the registry yet
    modelpack.push(published.reference, store=published.origin, with_referrers=True)
    signing.verify(published.reference, [ours.public])


def test_a_store_has_no_place_for_the_tag(published: Published, ours: PrivateKey) -> None:
    with pytest.raises(UsageError, match="only to a registry"):
        signing.sign(
            published.reference, ours, kinds=[SignatureKind.COSIGN], store=published.origin
        )


@pytest.mark.parametrize("kind", [SignatureKind.BUNDLE, SignatureKind.COSIGN])
def test_a_signature_of_another_model_does_not_count(
    published: Published, ours: PrivateKey, tmp_path: Path, kind: SignatureKind
) -> None:
    """A signature is moved to a model that was not signed."""
    signing.sign(published.reference, ours, kinds=[kind])
    evil = f"{published.host}/team/model:evil"
    other = package(evil, tiny_gguf(tmp_path), published.origin, push=True)
    where = Reference.parse(published.reference)
    watch = watching(None)
    with open_repository(where, RemoteOptions(), watch, writes=True) as repository:
        if kind is SignatureKind.COSIGN:
            moved = repository.fetch_manifest(repository.resolve(signature_tag(published.digest)))
            descriptor = Descriptor(
                "application/vnd.oci.image.manifest.v1+json", Digest.of(moved), len(moved)
            )
            repository.write_manifest(descriptor, moved, signature_tag(other.digest))
        else:
            statement = Statement((Subject(published.digest),), COSIGN_SIGN)
            subject = model_in(repository, Reference.parse(evil)).descriptor
            manifest, blobs = bundle_manifest(signed_bundle(statement, ours), COSIGN_SIGN, subject)
            signing.put(repository, manifest, blobs, None, watch)
    with pytest.raises(UntrustedError, match="another manifest"):
        signing.verify(evil, [ours.public])


def test_an_attestation_is_no_signature(published: Published, ours: PrivateKey) -> None:
    """The report of a failed test is signed, too."""
    where = Reference.parse(published.reference)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        model = model_in(repository, where)
        statement = Statement((Subject(model.digest),), TEST_RESULT, {"result": "FAILED"})
        signing.attach_statement(repository, model.descriptor, statement, ours, watching(None))
    with pytest.raises(UntrustedError, match="no signatures"):
        signing.verify(published.reference, [ours.public])


def test_what_is_broken_keeps_nothing_from_counting(published: Published, ours: PrivateKey) -> None:
    where = Reference.parse(published.reference)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        model = model_in(repository, where)
        for broken in (b"{}", b"not JSON", b'{"mediaType": "application/x"}'):
            manifest, blobs = bundle_manifest(broken, COSIGN_SIGN, model.descriptor)
            signing.put(repository, manifest, blobs, None, watching(None))
    with pytest.raises(UntrustedError, match="is not JSON"):
        signing.verify(published.reference, [ours.public])
    signing.sign(published.reference, ours)
    _, found = signing.verify(published.reference, [ours.public])
    assert len(found.refused) == 3


@pytest.mark.parametrize("count", [0, 2])
def test_a_bundle_has_one_signature(published: Published, ours: PrivateKey, count: int) -> None:
    """The format requires one signature; checking thousands would take minutes."""
    value = json.loads(signed_bundle(Statement((Subject(published.digest),), COSIGN_SIGN), ours))
    value["dsseEnvelope"]["signatures"] *= count
    with pytest.raises(FormatError, match=f"has {count} signatures, expected 1"):
        Bundle.parse(json.dumps(value).encode(), "bundle")


def test_a_bundle_that_was_changed(published: Published, ours: PrivateKey) -> None:
    statement = Statement((Subject(published.digest),), COSIGN_SIGN)
    value = json.loads(signed_bundle(statement, ours))
    bundle = Bundle.parse(json.dumps(value).encode(), "bundle")
    assert bundle.envelope.is_signed_by(ours.public)
    changed = replace(bundle.envelope, payload=bundle.envelope.payload + b" ")
    assert not changed.is_signed_by(ours.public)
    retyped = replace(bundle.envelope, payload_type="text/plain")
    assert not retyped.is_signed_by(ours.public)


def test_files_are_compared_by_name_and_digest(published: Published) -> None:
    model = inspect(published.reference, store=published.origin)
    good = model_statement(model, "model")
    check_model(good, model)
    resources = list(good.predicate["resources"])

    def with_resources(changed: list[dict[str, str]], digest: Digest | None = None) -> Statement:
        raw = b"".join(bytes.fromhex(one["digest"]) for one in changed)
        subject = Subject(digest or Digest.of(raw))
        predicate = {**good.predicate, "resources": changed}
        return Statement((subject,), good.predicate_type, predicate)

    other = resources[0] | {"digest": "0" * 64}
    for changed in ([other, *resources[1:]], resources[1:], [*resources, other | {"name": "more"}]):
        with pytest.raises(IntegrityError, match="signs other files"):
            check_model(with_resources(changed), model)
    for bad in (
        with_resources(resources, published.digest),
        with_resources([]),
        with_resources([*resources, resources[0]]),
        Statement((good.subjects[0],), good.predicate_type, {"resources": resources}),
    ):
        with pytest.raises(FormatError):
            check_model(bad, model)


def test_archives_have_no_digests_of_files(published: Published) -> None:
    model = inspect(published.reference, store=published.origin)
    tar = Descriptor(media_types.DOCKER_DIR_TAR, Digest.of(b""), 0, {media_types.FILEPATH: "more"})
    manifest = Manifest.build(model.manifest.config, (*model.manifest.layers, tar))
    with pytest.raises(UnsupportedError, match="archive layers"):
        model_statement(replace(model, manifest=manifest), "tar")
