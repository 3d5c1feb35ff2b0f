"""Keyless signatures: certificates and log entries of a private Sigstore, good and tampered."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.cli.main import run
from modelpack.errors import FormatError, IntegrityError, UntrustedError
from modelpack.operations import signatures as signing
from modelpack.operations.lookup import model_in
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.registry import RetryPolicy
from modelpack.storage import watching
from modelpack.trust.keyless import (
    CertifiedSigner,
    Identity,
    TrustedRoot,
    certified_by,
    exact_or_pattern,
)
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import model_statement
from modelpack.trust.policy import Trust, read_policy
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import (
    COSIGN_SIGN,
    TEST_RESULT,
    Bundle,
    Envelope,
    Statement,
    Subject,
    bundle_manifest,
)
from tests.interop.go_tool import go_module_file
from tests.models import package, tiny_gguf
from tests.peers import require
from tests.supply.conftest import Published
from tests.supply.private_sigstore import (
    IDENTITY,
    ISSUER,
    PrivateSigstore,
    dsse_entry,
    new_key,
    text,
)

EMAIL = "release@team.example"
SIGNED = Digest.of(b"a manifest")
STATEMENT = Statement((Subject(SIGNED, "team/model"),), COSIGN_SIGN)
Value = dict[str, Any]


@pytest.fixture(scope="module")
def sigstore() -> PrivateSigstore:
    return PrivateSigstore()


@pytest.fixture(scope="module")
def root_file(sigstore: PrivateSigstore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sigstore.write_root(tmp_path_factory.mktemp("root") / "trusted_root.json")


@pytest.fixture(scope="module")
def root(root_file: Path) -> TrustedRoot:
    return TrustedRoot.read(root_file)


def check(bundle: Value, *wanted: Identity) -> CertifiedSigner:
    signer, matching = certified_by(Bundle.parse(json.dumps(bundle).encode(), "it"), "it", wanted)
    assert matching
    return signer


@pytest.mark.parametrize(
    ("identity", "issuer", "matches"),
    [
        ((IDENTITY, None), (ISSUER, None), True),
        ((IDENTITY + "x", None), (ISSUER, None), False),
        ((IDENTITY, None), (ISSUER + "/", None), False),
        ((None, "https://github.com/team/.*"), (ISSUER, None), True),
        ((None, "https://github.com/team/"), (ISSUER, None), False),
        ((None, "github.com/team/.*"), (ISSUER, None), False),
        ((None, "(?i)HTTPS://GITHUB.COM/TEAM/.*"), (None, "https://token[.].*[.]com"), True),
        ((None, ".*"), (None, "https://accounts.google.com"), False),
    ],
)
def test_whose_certificate_counts(
    sigstore: PrivateSigstore,
    root: TrustedRoot,
    identity: tuple[str | None, str | None],
    issuer: tuple[str | None, str | None],
    matches: bool,
) -> None:
    wanted = Identity(exact_or_pattern(*identity, "i"), exact_or_pattern(*issuer, "o"), root)
    bundle = sigstore.bundle(STATEMENT)
    if matches:
        assert check(bundle, wanted) == CertifiedSigner(IDENTITY, ISSUER)
    else:
        with pytest.raises(
            IntegrityError, match=r"its certificate is for https://github\.com/team"
        ):
            check(bundle, wanted)


@pytest.mark.parametrize(
    "certificate",
    [
        {"identity": EMAIL},
        {"identity": "spiffe://team.example/release"},
        {"identity": EMAIL, "older_issuer": None},
        {
            "identity": [
                x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.7"), b"\x0c\x04user")
            ]
        },
    ],
    ids=["email", "URI", "without the deprecated issuer", "other name"],
)
def test_certificates_of_all_kinds(
    sigstore: PrivateSigstore, root: TrustedRoot, certificate: Value
) -> None:
    identity = certificate["identity"]
    name = identity if isinstance(identity, str) else "user"
    signer = check(sigstore.bundle(STATEMENT, **certificate), Identity(name, ISSUER, root))
    assert signer == CertifiedSigner(name, ISSUER)


def test_older_bundles(sigstore: PrivateSigstore, root: TrustedRoot) -> None:
    bundle = sigstore.bundle(STATEMENT)
    material = bundle["verificationMaterial"]
    material["x509CertificateChain"] = {"certificates": [material.pop("certificate")]}
    for version in ("0.1", "0.2"):
        bundle["mediaType"] = f"application/vnd.dev.sigstore.bundle+json;version={version}"
        assert check(bundle, Identity(IDENTITY, ISSUER, root)).identity == IDENTITY


def test_a_certificate_that_has_expired_since(sigstore: PrivateSigstore, root: TrustedRoot) -> None:
    """The log says that the signature was made before."""
    start = datetime.now(UTC) - timedelta(days=20)
    bundle = sigstore.bundle(STATEMENT, start + timedelta(minutes=9), start=start)
    assert check(bundle, Identity(IDENTITY, ISSUER, root)).identity == IDENTITY


@pytest.mark.parametrize("rekor", [1, 2])
def test_time_stamps(sigstore: PrivateSigstore, root: TrustedRoot, rekor: int) -> None:
    """The public instance has them with Rekor 1; Rekor 2 says no times."""
    bundle = sigstore.bundle(STATEMENT, rekor=rekor)
    if rekor == 1:
        _stamped(sigstore, bundle)
    else:
        assert "integratedTime" not in _entry(bundle)
    assert check(bundle, Identity(IDENTITY, ISSUER, root)).identity == IDENTITY


def _stamped(made: PrivateSigstore, bundle: Value, at: datetime | None = None) -> None:
    """Give a bundle the one time stamp for its signature."""
    signature = base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"])
    stamp = text(made.stamp(hashlib.sha256(signature).digest(), at))
    stamps = {"rfc3161Timestamps": [{"signedTimestamp": stamp}]}
    bundle["verificationMaterial"]["timestampVerificationData"] = stamps


def _flip(encoded: str, at: int = -1) -> str:
    raw = bytearray(base64.b64decode(encoded))
    raw[at] ^= 1
    return text(bytes(raw))


def _entry(bundle: Value) -> Value:
    entry: Value = bundle["verificationMaterial"]["tlogEntries"][0]
    return entry


def _signature(made: PrivateSigstore, bundle: Value) -> None:
    signature = bundle["dsseEnvelope"]["signatures"][0]
    signature["sig"] = _flip(signature["sig"])


def _signature_logged(made: PrivateSigstore, bundle: Value) -> None:
    """The log accepts any signature here; Rekor would not."""
    _signature(made, bundle)
    pem = json.loads(base64.b64decode(_entry(bundle)["canonicalizedBody"]))
    verifier = pem["spec"]["signatures"][0]["verifier"]
    material = bundle["verificationMaterial"]
    material["tlogEntries"] = [made.log(dsse_entry(bundle["dsseEnvelope"], verifier))]


def _payload(made: PrivateSigstore, bundle: Value) -> None:
    other = Statement((Subject(Digest.of(b"another manifest")),), COSIGN_SIGN)
    bundle["dsseEnvelope"]["payload"] = text(other.encode())


def _path_hash(made: PrivateSigstore, bundle: Value) -> None:
    proof = _entry(bundle)["inclusionProof"]
    proof["hashes"][0] = _flip(proof["hashes"][0])


def _root_hash(made: PrivateSigstore, bundle: Value) -> None:
    proof = _entry(bundle)["inclusionProof"]
    proof["rootHash"] = _flip(proof["rootHash"])


def _position(made: PrivateSigstore, bundle: Value) -> None:
    proof = _entry(bundle)["inclusionProof"]
    proof["logIndex"] = str(int(proof["logIndex"]) - 1)


def _checkpoint(made: PrivateSigstore, bundle: Value) -> None:
    checkpoint = _entry(bundle)["inclusionProof"]["checkpoint"]
    note, _, signature = checkpoint["envelope"].rstrip("\n").rpartition(" ")
    checkpoint["envelope"] = f"{note} {_flip(signature)}\n"


def _no_checkpoint(made: PrivateSigstore, bundle: Value) -> None:
    del _entry(bundle)["inclusionProof"]["checkpoint"]


def _no_proof(made: PrivateSigstore, bundle: Value) -> None:
    del _entry(bundle)["inclusionProof"]


def _promise(made: PrivateSigstore, bundle: Value) -> None:
    promise = _entry(bundle)["inclusionPromise"]
    promise["signedEntryTimestamp"] = _flip(promise["signedEntryTimestamp"])


def _no_promise(made: PrivateSigstore, bundle: Value) -> None:
    del _entry(bundle)["inclusionPromise"]


def _time(made: PrivateSigstore, bundle: Value) -> None:
    entry = _entry(bundle)
    entry["integratedTime"] = str(int(entry["integratedTime"]) - 1)


def _not_logged(made: PrivateSigstore, bundle: Value) -> None:
    bundle["verificationMaterial"]["tlogEntries"] = []


def _logged_twice(made: PrivateSigstore, bundle: Value) -> None:
    bundle["verificationMaterial"]["tlogEntries"] *= 2


def _entry_of_another(made: PrivateSigstore, bundle: Value) -> None:
    other = made.bundle(STATEMENT)
    bundle["verificationMaterial"]["tlogEntries"] = [_entry(other)]


def _certificate_of_another(made: PrivateSigstore, bundle: Value) -> None:
    material = made.bundle(STATEMENT)["verificationMaterial"]
    bundle["verificationMaterial"]["certificate"] = material["certificate"]


def _no_certificate(made: PrivateSigstore, bundle: Value) -> None:
    material = bundle["verificationMaterial"]
    del material["certificate"]
    material["publicKey"] = {"hint": "any"}


def _bytes_of_no_certificate(made: PrivateSigstore, bundle: Value) -> None:
    bundle["verificationMaterial"]["certificate"]["rawBytes"] = text(b"no certificate")


def _certificate_changed(made: PrivateSigstore, bundle: Value) -> None:
    """Another identity of the same length, under the signature of the authority."""
    certificate = bundle["verificationMaterial"]["certificate"]
    raw = base64.b64decode(certificate["rawBytes"])
    assert b"/team/model/" in raw
    certificate["rawBytes"] = text(raw.replace(b"/team/model/", b"/evil/model/"))


def _no_stamp(made: PrivateSigstore, bundle: Value) -> None:
    del bundle["verificationMaterial"]["timestampVerificationData"]


def _broken_stamp(made: PrivateSigstore, bundle: Value) -> None:
    [stamp] = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    stamp["signedTimestamp"] = _flip(stamp["signedTimestamp"])


def _stamp_of_another(made: PrivateSigstore, bundle: Value) -> None:
    other = made.bundle(STATEMENT, rekor=2)["verificationMaterial"]
    material = bundle["verificationMaterial"]
    material["timestampVerificationData"] = other["timestampVerificationData"]


def _stamp_by_another(made: PrivateSigstore, bundle: Value) -> None:
    _stamped(PrivateSigstore(), bundle)


def _late_stamp(made: PrivateSigstore, bundle: Value) -> None:
    _stamped(made, bundle, datetime.now(UTC) + timedelta(minutes=11))


def _early_stamp(made: PrivateSigstore, bundle: Value) -> None:
    _stamped(made, bundle, datetime.now(UTC) - timedelta(minutes=11))


def _same_stamp_twice(made: PrivateSigstore, bundle: Value) -> None:
    bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"] *= 2


#: Changes of bundles with an entry of Rekor 2 and a time stamp.
STAMPED: dict[str, tuple[Callable[[PrivateSigstore, Value], None], str]] = {
    "stamped payload": (_payload, "DSSE: invalid signature"),
    "stamped entry of another signature": (
        lambda made, bundle: bundle["verificationMaterial"].update(
            tlogEntries=[_entry(made.bundle(STATEMENT, rekor=2))]
        ),
        "inconsistent with other materials",
    ),
    "entry of another kind": (
        lambda made, bundle: bundle["verificationMaterial"].update(
            tlogEntries=[made.log_untimed({"apiVersion": "0.0.2", "kind": "dsse", "spec": {}})]
        ),
        "Unsupported DSSE log entry type: dsse/0.0.2",
    ),
    "stamped checkpoint": (_checkpoint, "checkpoint: invalid signature"),
    "no stamp": (_no_stamp, "must contain an inclusion promise or signed timestamp"),
    "broken stamp": (_broken_stamp, "not enough sources of verified time"),
    "stamp of another signature": (_stamp_of_another, "not enough sources of verified time"),
    "stamp by another authority": (_stamp_by_another, "not enough sources of verified time"),
    "stamp after the certificate": (_late_stamp, "certificate chain|expired at time of signing"),
    "stamp before the certificate": (_early_stamp, "certificate chain|expired at time of signing"),
    "the same stamp twice": (_same_stamp_twice, "duplicate timestamp"),
}
TAMPERED: dict[str, tuple[Callable[[PrivateSigstore, Value], None], str]] = {
    "signature": (_signature, "log entry signatures do not match|DSSE: invalid signature"),
    "signature, logged": (_signature_logged, "DSSE: invalid signature"),
    "payload": (_payload, "DSSE: invalid signature"),
    "hash of the proof": (_path_hash, "invalid root hash"),
    "root of the proof": (_root_hash, "invalid root hash"),
    "position in the log": (_position, "inclusion proof"),
    "checkpoint": (_checkpoint, "checkpoint: invalid signature"),
    "no checkpoint": (_no_checkpoint, "with checkpoint"),
    "no proof": (_no_proof, "inclusionProof"),
    "promise": (_promise, "invalid inclusion promise"),
    "no promise": (_no_promise, "must contain an inclusion promise"),
    "time in the log": (_time, "invalid inclusion promise"),
    "not logged": (_not_logged, "exactly one log entry"),
    "logged twice": (_logged_twice, "exactly one log entry"),
    "entry of another signature": (_entry_of_another, "log entry signatures do not match"),
    "certificate of another signature": (_certificate_of_another, "invalid signature"),
    "no certificate": (_no_certificate, "made by a key without a certificate"),
    "bytes of no certificate": (_bytes_of_no_certificate, "certificate or log entry is invalid"),
    "changed certificate": (_certificate_changed, "certificate chain"),
}


@pytest.mark.parametrize("name", [*TAMPERED, *STAMPED])
def test_a_tampered_bundle(sigstore: PrivateSigstore, root: TrustedRoot, name: str) -> None:
    change, reason = (TAMPERED | STAMPED)[name]
    bundle = sigstore.bundle(STATEMENT, rekor=2 if name in STAMPED else 1)
    wanted = Identity(IDENTITY, ISSUER, root)
    check(bundle, wanted)
    change(sigstore, bundle)
    with pytest.raises((FormatError, IntegrityError), match=reason):
        check(bundle, wanted)


def _names(*names: x509.GeneralName) -> Value:
    return {"identity": list(names)}


EARLY = datetime.now(UTC) - timedelta(days=1)
CERTIFICATES: dict[str, tuple[Value, str]] = {
    "signed after it expired": (
        {"start": EARLY, "at": EARLY + timedelta(minutes=11)},
        "certificate chain|expired at time of signing",
    ),
    "signed before it was valid": (
        {"start": EARLY, "at": EARLY - timedelta(minutes=1)},
        "certificate chain|expired at time of signing",
    ),
    "bad timestamp of the log": ({"timestamp": "bad"}, "SCT verify failed"),
    "no timestamp of the log": ({"timestamp": "none"}, "signed certificate timestamp"),
    "two names": (
        _names(x509.UniformResourceIdentifier(IDENTITY), x509.RFC822Name(EMAIL)),
        "names 2 identities, expected 1",
    ),
    "a name of a host": (_names(x509.DNSName("team.example")), "names a DNSName"),
    "no issuer": ({"issuer": None}, "names 0 issuers, expected 1"),
    "two issuers": ({"older_issuer": "https://evil.example"}, "names 2 issuers, expected 1"),
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_certificates_that_do_not_count(
    sigstore: PrivateSigstore, root: TrustedRoot, name: str
) -> None:
    options, reason = CERTIFICATES[name]
    with pytest.raises(IntegrityError, match=reason):
        check(sigstore.bundle(STATEMENT, **options), Identity(IDENTITY, ISSUER, root))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("fulcio", "certificate chain"),
        ("certificates", "SCT verify failed"),
        ("rekor", "checkpoint: invalid signature"),
    ],
)
def test_a_key_of_another_instance(
    sigstore: PrivateSigstore, root: TrustedRoot, part: str, reason: str
) -> None:
    """All is as it should be, but for one key, which the trusted root does not have."""
    other = replace(sigstore, **{part: new_key(), "started": sigstore.started})
    bundle = other.bundle(STATEMENT)
    wanted = Identity(IDENTITY, ISSUER, root)
    with pytest.raises(IntegrityError, match=reason):
        check(bundle, wanted)


@pytest.fixture(scope="module")
def good(sigstore: PrivateSigstore) -> tuple[Value, Value]:
    return sigstore.bundle(STATEMENT), sigstore.bundle(STATEMENT, rekor=2)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in JSON, below the document itself."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from _places(child, (*path, key))


@given(data=st.data())
def test_any_other_bundle_is_refused_or_says_the_same(
    good: tuple[Value, Value], root: TrustedRoot, data: st.DataObject
) -> None:
    """No change of any value makes another error, or verifies another statement."""
    bundle = deepcopy(data.draw(st.sampled_from(good)))
    *parents, key = data.draw(st.sampled_from(sorted(_places(bundle), key=repr)))
    place: Any = bundle
    for parent in parents:
        place = place[parent]
    old = place[key]
    values = st.none() | st.integers() | st.text(max_size=20) | st.just([]) | st.just({})
    if isinstance(old, str) and old:
        at = data.draw(st.integers(0, len(old) - 1))
        values |= st.just(old[:at] + "A" + old[at + 1 :]) | st.just(old[:at])
    place[key] = data.draw(values)
    parsed = None
    try:
        parsed = Bundle.parse(json.dumps(bundle).encode(), "it")
        signer, _ = certified_by(parsed, "it", [Identity(IDENTITY, ISSUER, root)])
    except (FormatError, IntegrityError):
        return
    assert signer == CertifiedSigner(IDENTITY, ISSUER)
    assert parsed.statement == STATEMENT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a trusted root"),
        (b"{}", "is not a trusted root"),
        (b"[]", "is not a trusted root"),
        (b'{"mediaType": "application/json"}', "is not a trusted root"),
        (
            b'{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}',
            "is not a trusted root",
        ),
        (None, "cannot be read"),
    ],
)
def test_roots_that_are_wrong(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "root.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=says):
        TrustedRoot.read(path)


def attach(reference: str, bundle: Value, predicate: str = COSIGN_SIGN) -> None:
    """Attach a bundle to a model in its registry."""
    where = Reference.parse(reference)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        subject = model_in(repository, where).descriptor
        manifest, blobs = bundle_manifest(json.dumps(bundle).encode(), predicate, subject)
        signing.put(repository, manifest, blobs, None, watching(None))


def signed(published: Published) -> Statement:
    return Statement((Subject(published.digest, "team/model"),), COSIGN_SIGN)


@pytest.mark.long
def test_another_signature_does_not_keep_a_good_one_from_counting(
    published: Published, sigstore: PrivateSigstore, root: TrustedRoot, ours: PrivateKey
) -> None:
    wanted = Identity(IDENTITY, ISSUER, root)
    statement = signed(published)
    attach(published.reference, sigstore.bundle(statement, identity=EMAIL))
    with pytest.raises(UntrustedError, match=f"its certificate is for {EMAIL} "):
        signing.verify(published.reference, [wanted])
    attach(published.reference, sigstore.bundle(STATEMENT))
    attach(published.reference, PrivateSigstore().bundle(statement))
    broken = sigstore.bundle(statement)
    _bytes_of_no_certificate(sigstore, broken)
    attach(published.reference, broken)
    signing.sign(published.reference, ours)
    with pytest.raises(UntrustedError, match="another manifest"):
        signing.verify(published.reference, [wanted])
    attach(published.reference, sigstore.bundle(statement))
    _, found = signing.verify(published.reference, [wanted])
    [signature] = found.signatures
    assert signature.certified == CertifiedSigner(IDENTITY, ISSUER)
    assert (signature.signer, signature.kind) == (wanted, SignatureKind.BUNDLE)
    # All of several signers are required.
    _, found = signing.verify(published.reference, [wanted, ours.public])
    assert found.signers == {wanted, ours.public}
    with pytest.raises(UntrustedError, match=r"is not signed by other@team\.example"):
        signing.verify(published.reference, [wanted, Identity("other@team.example", ISSUER, root)])


def test_files_and_manifest_by_a_certificate(
    published: Published, sigstore: PrivateSigstore, root: TrustedRoot
) -> None:
    wanted = Identity(IDENTITY, ISSUER, root)
    model = modelpack.inspect(published.reference, from_registry=True)
    attach(published.reference, sigstore.bundle(model_statement(model, "model")))
    _, found = signing.verify(published.reference, [wanted])
    assert [one.kind for one in found.signatures] == [SignatureKind.MODEL_SIGNING]
    with pytest.raises(UntrustedError, match="its format is not accepted"):
        signing.verify(published.reference, [wanted], formats=[SignatureKind.BUNDLE])


def test_an_attestation_does_not_count(
    published: Published, sigstore: PrivateSigstore, root: TrustedRoot
) -> None:
    report = Statement((Subject(published.digest),), TEST_RESULT, {"result": "FAILED"})
    attach(published.reference, sigstore.bundle(report), TEST_RESULT)
    with pytest.raises(UntrustedError, match="it has no signatures"):
        signing.verify(published.reference, [Identity(IDENTITY, ISSUER, root)])


def test_a_moved_signature_does_not_count(
    published: Published, sigstore: PrivateSigstore, root: TrustedRoot, tmp_path: Path
) -> None:
    evil = f"{published.host}/team/model:evil"
    package(evil, tiny_gguf(tmp_path), published.origin, push=True)
    attach(evil, sigstore.bundle(signed(published)))
    with pytest.raises(UntrustedError, match="another manifest"):
        signing.verify(evil, [Identity(IDENTITY, ISSUER, root)])


def test_a_certificate_under_cosigns_tag(
    published: Published, root: TrustedRoot, ours: PrivateKey
) -> None:
    signing.sign(published.reference, ours, kinds=[SignatureKind.COSIGN])
    with pytest.raises(UntrustedError, match="under cosign's tag are not verified"):
        signing.verify(published.reference, [Identity(IDENTITY, ISSUER, root)])


POLICY = """
[publishers.ci]
keys = ["ours.pub"]
trusted_root = "trusted_root.json"
[[publishers.ci.identities]]
identity_regexp = "https://github.com/team/.*"
issuer = "https://token.actions.githubusercontent.com"
[publishers.people]
trusted_root = "trusted_root.json"
identities = [
    { identity = "a@team.example", issuer = "https://accounts.example" },
    { identity = "b@team.example", issuer = "https://accounts.example" },
]
[publishers.auditors]
trusted_root = "trusted_root.json"
identities = [{ identity = "c@audit.example", issuer = "https://accounts.example" }]
[[rules]]
models = ["*/team/*"]
publishers = ["ci"]
[[rules]]
models = ["*/both/*"]
publishers = ["people", "auditors"]
threshold = 2
"""


def trusting(keys: Path, sigstore: PrivateSigstore) -> RemoteOptions:
    sigstore.write_root(keys / "trusted_root.json")
    (keys / "keyless.toml").write_text(POLICY)
    trust = Trust.of(policy=keys / "keyless.toml")
    return RemoteOptions(trust=trust, retry=RetryPolicy(tries=1))


def test_a_policy(
    published: Published, keys: Path, sigstore: PrivateSigstore, theirs: PrivateKey
) -> None:
    remote, statement = trusting(keys, sigstore), signed(published)
    signing.sign(published.reference, theirs)
    attach(published.reference, sigstore.bundle(statement, identity=EMAIL))
    attach(published.reference, PrivateSigstore().bundle(statement))
    with pytest.raises(UntrustedError, match="is not signed by ci"):
        modelpack.pull(published.reference, store=published.store, remote=remote)
    blobs = published.store.root / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == []
    attach(published.reference, sigstore.bundle(statement))
    modelpack.pull(published.reference, store=published.store, remote=remote)
    # The bundle is stored with the model, and needs no registry afterwards.
    gone = Reference.parse("127.0.0.1:1/team/model:v1")
    published.store.tag(published.reference, gone)
    find_model(str(gone), published.store, pull=False, remote=remote, watch=watching(None))


def test_a_policy_counts_publishers(
    published: Published, keys: Path, sigstore: PrivateSigstore
) -> None:
    reference = published.reference.replace("/team/", "/both/")
    modelpack.copy(published.reference, reference)
    remote, statement = trusting(keys, sigstore), signed(published)
    for identity in ("a@team.example", "b@team.example"):
        bundle = sigstore.bundle(statement, identity=identity, issuer="https://accounts.example")
        attach(reference, bundle)
        with pytest.raises(UntrustedError, match="not signed by 2 of people or auditors"):
            modelpack.pull(reference, store=published.store, remote=remote)
    identity = "c@audit.example"
    attach(reference, sigstore.bundle(statement, identity=identity, issuer=ISSUER))
    with pytest.raises(UntrustedError, match=f"its certificate is for {identity} "):
        modelpack.pull(reference, store=published.store, remote=remote)
    bundle = sigstore.bundle(statement, identity=identity, issuer="https://accounts.example")
    attach(reference, bundle)
    modelpack.pull(reference, store=published.store, remote=remote)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('issuer = "https://token', 'issuers = "https://token', "unknown field 'issuers'"),
        ('issuer = "https://token.actions.githubusercontent.com"', "", "issuer, or a regular"),
        ("identity_regexp = ", 'identity = "x"\nidentity_regexp = ', "cannot be combined"),
        ('identity_regexp = "https://github.com/team/.*"', "", "identity, or a regular"),
        ('"https://github.com/team/.*"', '"("', "'(' is not a regular expression"),
        ('"https://github.com/team/.*"', '""', "identity is empty"),
        ('"https://github.com/team/.*"', "3", "identity_regexp: expected a string"),
        ('["ours.pub"]', "[]", "keys is not an array of at least one string"),
        ('"trusted_root.json"', '"none.json"', "none.json: cannot be read"),
        ('"trusted_root.json"', '"ours.pub"', "ours.pub: is not a trusted root"),
        ('"trusted_root.json"', "1", "trusted_root: expected the name of a file"),
        (
            '"c@audit.example", issuer = "https://accounts.example" }]',
            '"a@team.example", issuer = "https://accounts.example" }]',
            "share a key or identity",
        ),
        (
            'identity = "c@audit.example"',
            'identity_regexp = ".*@audit.example"',
            "'auditors' has a regular expression",
        ),
        (
            'identities = [{ identity = "c@audit.example", issuer = "https://accounts.example" }]',
            "keys = ['ours.pub']",
            "trusted_root requires identities",
        ),
        (
            'identities = [{ identity = "c@audit.example", issuer = "https://accounts.example" }]',
            "identities = []",
            "identities is not an array of at least one table",
        ),
        (
            'identities = [{ identity = "c@audit.example", issuer = "https://accounts.example" }]',
            "identities = ['c@audit.example']",
            "identities[0]: is not a table",
        ),
    ],
)
def test_policies_that_are_wrong(
    keys: Path, sigstore: PrivateSigstore, old: str, new: str, says: str
) -> None:
    trusting(keys, sigstore)
    assert old in POLICY
    path = keys / "wrong.toml"
    path.write_text(POLICY.replace(old, new))
    with pytest.raises(FormatError) as raised:
        read_policy(path)
    assert says in str(raised.value)


def options(root: Path, identity: str = IDENTITY, issuer: str = ISSUER) -> list[str]:
    return [
        "--certificate-identity", identity, "--certificate-oidc-issuer", issuer,
        "--trusted-root", str(root),
    ]  # fmt: skip


def test_the_command_line(
    published: Published,
    sigstore: PrivateSigstore,
    root_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verify, reference = ["verify", published.reference], published.reference
    assert run([*verify, *options(root_file)]) == 5
    attach(reference, sigstore.bundle(signed(published)))
    capsys.readouterr()
    assert run([*verify, *options(root_file), "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)["signatures"]
    assert (shown["identity"], shown["issuer"]) == (IDENTITY, ISSUER)
    assert shown["format"] == "bundle"
    patterns = ["--certificate-identity-regexp", ".*/release.yml@.*",
                "--certificate-oidc-issuer-regexp", "https://.*"]  # fmt: skip
    assert run([*verify, *patterns, "--trusted-root", str(root_file)]) == 0
    assert f"signed by {IDENTITY} (issuer {ISSUER}): bundle" in capsys.readouterr().err
    assert run([*verify, *options(root_file, EMAIL)]) == 5
    shown = capsys.readouterr().err
    assert f"is not signed by {EMAIL} (issuer {ISSUER})" in shown
    assert f"its certificate is for {IDENTITY}" in shown


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", ["pull", "serve", "run", "k8s"])
def test_commands_that_require_an_identity(
    published: Published,
    sigstore: PrivateSigstore,
    root_file: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    attach(published.reference, sigstore.bundle(signed(published), identity=EMAIL))
    more = {"run": ["prompt"], "serve": ["--port", "0"]}
    store = ["--store", str(published.store.root)]
    words = [*store, command, published.reference, *more.get(command, [])]
    assert run([*words, *options(root_file)]) == 5
    assert "is not signed by --certificate-identity: " in capsys.readouterr().err
    if command in ("pull", "k8s"):
        assert run([*words, *options(root_file, EMAIL)]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected --key, --certificate-authority or --certificate-identity"),
        (["--certificate-identity", "x"], "--certificate-oidc-issuer, or a regular expression"),
        (["--certificate-oidc-issuer", "x"], "--certificate-identity, or a regular expression"),
        (["--trusted-root", "ROOT"], "--trusted-root requires --certificate-identity"),
        (
            ["--certificate-identity", "x", "--certificate-identity-regexp", "y",
             "--certificate-oidc-issuer", "z"],
            "--certificate-identity cannot be combined with a regular expression",
        ),
        (
            ["--certificate-identity-regexp", "[", "--certificate-oidc-issuer", "z"],
            "'[' is not a regular expression",
        ),
    ],
)  # fmt: skip
def test_options_that_are_wrong(
    root_file: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(root_file) if word == "ROOT" else word for word in words]
    assert run(["verify", "registry.invalid/team/model", *words]) == 2
    assert says in capsys.readouterr().err


def test_without_the_library(
    root_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sigstore", None)
    assert run(["verify", "registry.invalid/team/model", *options(root_file)]) == 1
    shown = capsys.readouterr().err
    assert "need the package sigstore" in shown
    assert "pip install 'modelpack[signing]'" in shown


_COSIGN = ("github.com/sigstore/cosign/v2", "v2.6.1",
           "h1:7Wf67ENNCjg+1fLqHRPgKUNaCCnCavnEfCe1LApOoIo=")  # fmt: skip
_SIGSTORE_GO = ("github.com/sigstore/sigstore-go", "v1.1.3",
                "h1:5lKcbXZa5JC7wb/UVywyCulccfYTUju1D5h4tkn+fXE=")  # fmt: skip


@pytest.mark.peer("go")
@pytest.mark.long
def test_a_bundle_of_the_public_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real attestation that cosign tests with, by the root of sigstore-go and by the default."""
    require("go")
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    raw = go_module_file(*_COSIGN, "pkg/cosign/testdata/oci-attestation.sigstore.json")
    own = tmp_path / "public-good.json"
    path = "pkg/testing/data/trusted-roots/public-good.json"
    own.write_bytes(go_module_file(*_SIGSTORE_GO, path))
    envelope = Envelope.parse(json.loads(raw)["dsseEnvelope"], "it")
    bundle = Bundle(envelope, STATEMENT, raw, has_certificate=True)  # its statement is of v0.1
    for root in (TrustedRoot.read(), TrustedRoot.read(own)):
        wanted = Identity(re.compile("[a-z]+@[a-z]+[.]com"), "https://github.com/login/oauth", root)
        signer, matching = certified_by(bundle, "it", [wanted])
        assert matching == (wanted,)
        assert signer.issuer == "https://github.com/login/oauth"
        with pytest.raises(IntegrityError, match="its certificate is for"):
            certified_by(bundle, "it", [Identity(IDENTITY, ISSUER, root)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.peer("go")
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dsse", "expected https://in-toto.io/Statement/v1"),
        ("dsse-2sigs", "has 2 signatures, expected 1"),
        ("othername", "has no DSSE envelope"),
        ("sigstore.js@2.0.0-provenance", "only supported for dsse/hashedrekord"),
    ],
)
def test_other_bundles_of_the_public_instance(tmp_path: Path, name: str, says: str) -> None:
    """Bundles that sigstore-go tests with: older statements and entries of the log are refused."""
    require("go")
    root = tmp_path / "public-good.json"
    data = "pkg/testing/data"
    root.write_bytes(go_module_file(*_SIGSTORE_GO, f"{data}/trusted-roots/public-good.json"))
    raw = go_module_file(*_SIGSTORE_GO, f"{data}/bundles/{name}.sigstore.json")
    anyone = re.compile(".*", re.DOTALL)
    with pytest.raises((FormatError, IntegrityError), match=says):
        certified_by(
            Bundle.parse(raw, "it"), "it", [Identity(anyone, anyone, TrustedRoot.read(root))]
        )
