"""Sign and verify: who stands for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import NotFoundError, UntrustedError, UsageError
from modelpack.manifest import Manifest
from modelpack.model import Model
from modelpack.operations.attached_files import BytesSource
from modelpack.operations.find import model_in, stored_model
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.transfer import transfer
from modelpack.operations.watching import watching
from modelpack.progress import Stop
from modelpack.reference import Reference
from modelpack.registry import Repository
from modelpack.storage import Target, Watch
from modelpack.stores.layout import LayoutStore
from modelpack.supply.bundles import bundle_manifest, signed_bundle
from modelpack.supply.keys import PrivateKey, PublicKey
from modelpack.supply.model_signing import model_statement
from modelpack.supply.signatures import Findings, SignatureKind, find_signatures
from modelpack.supply.simple_signing import (
    sign_simply,
    signature_tag,
    signatures_manifest,
)
from modelpack.supply.statements import COSIGN_SIGN, Statement, Subject

#: What is written unless the caller chooses: what old and new releases of cosign look for.
DEFAULT_KINDS = (SignatureKind.COSIGN, SignatureKind.BUNDLE)


@dataclass(frozen=True, slots=True)
class Signed:
    """A model that was signed; `manifests` hold the signatures."""

    reference: Reference
    digest: Digest
    manifests: Mapping[SignatureKind, Digest]


def sign(
    reference: str | Reference,
    key: PrivateKey,
    *,
    kinds: Sequence[SignatureKind] = (),
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> Signed:
    """Sign the model `reference` in its registry or, with `store`, in that store.

    `kinds` are how; without, as cosign does, under its tag and as a bundle; a store has no place
    for the tag. `push --with-referrers` brings bundles along. Raises what a push raises.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    wanted = tuple(dict.fromkeys(kinds or DEFAULT_KINDS))
    if store is not None:
        if SignatureKind.COSIGN in kinds:
            raise UsageError(
                "a signature under cosign's tag is one of a registry",
                hint="sign there, or use --format bundle",
            )
        wanted = tuple(kind for kind in wanted if kind is not SignatureKind.COSIGN)
    watch = watching(None, stop)
    with opened_model(where, store, remote, watch, writes=True) as (place, model):
        done = {kind: _SIGNING[kind](place, model, where, key, watch) for kind in wanted}
    return Signed(where, model.digest, done)


def verify(
    reference: str | Reference,
    keys: Sequence[PublicKey],
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[Model, Findings]:
    """Return the model `reference` and its signatures by `keys`, every one of which signed it.

    Raises `UntrustedError` if one did not.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    if not keys:
        raise UsageError("there is no key to verify with")
    watch = watching(None, stop)
    with opened_model(where, store, remote, watch) as (place, model):
        tagged = store is None
        found = find_signatures(place, model.descriptor, lambda: model, keys, tagged=tagged)
    lacking = [key for key in keys if key not in found.keys]
    if lacking:
        why = "; ".join(found.refused[:5]) or "it has no signatures"
        raise UntrustedError(
            f"{where}: {model.digest} is not signed by {lacking[0].name}: {why}",
            expected=f"a signature by {lacking[0].name}",
            got=why,
        )
    return model, found


def attach_statement(
    place: Target, model: Model, statement: Statement, key: PrivateKey, watch: Watch
) -> Digest:
    """Sign a statement and attach it to `model`; return the digest of its manifest."""
    manifest, blobs = bundle_manifest(
        signed_bundle(statement, key), statement.predicate_type, model.descriptor
    )
    put(place, manifest, blobs, None, watch)
    return manifest.digest


def put(
    place: Target,
    manifest: Manifest,
    blobs: Mapping[Descriptor, bytes],
    tag: str | None,
    watch: Watch,
) -> None:
    """Write a manifest that was made here, and its blobs."""
    source = BytesSource({blob.digest: content for blob, content in blobs.items()})
    transfer(source, place, manifest.descriptor, manifest.raw, tag, concurrency=1, watch=watch)


@contextmanager
def opened_model(
    where: Reference,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    watch: Watch,
    *,
    writes: bool = False,
) -> Iterator[tuple[LayoutStore | Repository, Model]]:
    """Yield where a model is, its registry or `store`, and the model there."""
    if store is not None:
        with store.lease(()):
            yield store, replace(stored_model(store, str(where)), reference=where)
        return
    with open_repository(where, remote or RemoteOptions(), watch, writes=writes) as repository:
        yield repository, model_in(repository, where)


def _sign_bundle(
    place: LayoutStore | Repository, model: Model, where: Reference, key: PrivateKey, watch: Watch
) -> Digest:
    statement = Statement((Subject(model.digest, where.name),), COSIGN_SIGN)
    return attach_statement(place, model, statement, key, watch)


def _sign_files(
    place: LayoutStore | Repository, model: Model, where: Reference, key: PrivateKey, watch: Watch
) -> Digest:
    name = where.repository.rpartition("/")[2]
    return attach_statement(place, model, model_statement(model, name), key, watch)


def _sign_simply(
    place: LayoutStore | Repository, model: Model, where: Reference, key: PrivateKey, watch: Watch
) -> Digest:
    """Add a layer to what is under cosign's tag; a second one by the same key adds nothing."""
    tag = signature_tag(model.digest)
    layer, payload = sign_simply(where.name, model.digest, key)
    try:
        before = Manifest.parse(place.fetch_manifest(place.resolve(tag)), tag)
    except NotFoundError:
        layers: tuple[Descriptor, ...] = ()
    else:
        found = find_signatures(place, model.descriptor, lambda: model, [key.public], tagged=True)
        if any(one.kind is SignatureKind.COSIGN for one in found.signatures):
            return before.digest
        layers = before.layers
    manifest, blobs = signatures_manifest((*layers, layer))
    put(place, manifest, {**blobs, layer: payload}, tag, watch)
    return manifest.digest


_SIGNING = {
    SignatureKind.COSIGN: _sign_simply,
    SignatureKind.BUNDLE: _sign_bundle,
    SignatureKind.MODEL_SIGNING: _sign_files,
}
