"""OpenSSF's own `model_signing` verifies our signatures, and we verify its signatures."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import FormatError, IntegrityError, UntrustedError
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect, model_in
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import read_blob, watching
from modelpack.trust.keyless import Identity, KeylessSigner, TrustedRoot
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import MANIFEST, check_model, files_of, model_statement
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import (
    MODEL_SIGNING,
    Bundle,
    Statement,
    Subject,
    bundle_manifest,
    signed_bundle,
)
from tests.models import package, tiny_gguf
from tests.supply.conftest import Published, publishing
from tests.supply.private_sigstore import ISSUER, PrivateSigstore, serving, token
from tests.supply.test_tampering import files_in


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    """A model whose config follows from its files."""
    with publishing(tmp_path, files_in(tmp_path)) as made:
        yield made


@pytest.fixture
def files(published: Published, tmp_path: Path) -> Path:
    """The unpacked files of the model."""
    laid_out = modelpack.bundle(
        published.reference, tmp_path / "bundle", store=published.origin, links="copy"
    )
    return laid_out.directory / "model"


def model_signing(verb: str, files: Path, **options: Path) -> subprocess.CompletedProcess[str]:
    named = [f"--{name}={path}" for name, path in options.items()]
    command = [sys.executable, "-m", "model_signing", verb, "key", str(files), *named]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.long
def test_theirs_verifies_ours(
    published: Published, files: Path, ours: PrivateKey, keys: Path, tmp_path: Path
) -> None:
    model = inspect(published.reference, store=published.origin)
    signature = tmp_path / "model.sig"
    statement = model_statement(model, "model")
    annotations = statement.subjects[0].annotations
    assert annotations == {"dev.modelpack.manifest": str(model.digest)}
    signature.write_bytes(signed_bundle(statement, ours))
    options = {"signature": signature, "public_key": keys / "ours.pub"}
    done = model_signing("verify", files, **options)
    assert done.returncode == 0, done.stderr
    done = model_signing("verify", files, **(options | {"public_key": keys / "theirs.pub"}))
    assert done.returncode != 0
    (files / "config.json").write_text('{"changed": 1}')
    done = model_signing("verify", files, **options)
    assert done.returncode != 0


def attach(reference: str, signature: bytes) -> None:
    """Attach a signature of the real tool to a model in its registry."""
    where = Reference.parse(reference)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        model = inspect(reference, from_registry=True)
        manifest, blobs = bundle_manifest(signature, MODEL_SIGNING, model.descriptor)
        signatures.put(repository, manifest, blobs, None, watching(None))


def pem_of(key: PrivateKey) -> bytes:
    assert isinstance(key.key, ec.EllipticCurvePrivateKey)
    return key.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def signed(files: Path, key: PrivateKey, *options: str, method: str = "key") -> bytes:
    """Return the signature of the real tool over a directory, which does not get it."""
    plain, signature = files.parent / "key.pem", files.parent / "model.sig"
    plain.write_bytes(pem_of(key))
    command = [sys.executable, "-m", "model_signing", "sign", method, str(files), *options]
    command += [f"--signature={signature}", f"--private_key={plain}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return signature.read_bytes()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_ours_verifies_theirs(
    published: Published, files: Path, theirs: PrivateKey, curve: ec.EllipticCurve
) -> None:
    ours = PrivateKey(ec.generate_private_key(curve), "ours")
    attach(published.reference, signed(files, ours))
    formats = [SignatureKind.FILES]
    _, found = signatures.verify(published.reference, [ours.public], formats=formats)
    assert [one.kind for one in found.signatures] == formats
    with pytest.raises(UntrustedError):
        signatures.verify(published.reference, [theirs.public], formats=formats)
    with pytest.raises(UntrustedError, match="covers the files and not the manifest"):
        signatures.verify(published.reference, [ours.public])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("ignored", "refused"),
    [
        ((), None),
        (("README.md",), None),
        (("docs",), None),
        (("config.json",), "the file config.json, which its signer ignored"),
    ],
    ids=["git's files", "a document", "a directory", "a configuration"],
)
def test_files_that_their_signer_ignored(
    tmp_path: Path, ours: PrivateKey, ignored: tuple[str, ...], refused: str | None
) -> None:
    """Git's files are left out by every signer, others by --ignore-paths."""
    files = files_in(tmp_path)
    (files / "docs").mkdir()
    (files / "docs" / "more.md").write_text("More.")
    with publishing(tmp_path, files) as published:
        for name in (".gitattributes", ".gitignore"):
            add_file(published.reference, name, b"*.safetensors filter=lfs")
            (files / name).write_bytes(b"*.safetensors filter=lfs")
        options = [word for name in ignored for word in ("--ignore-paths", str(files / name))]
        attach(published.reference, signed(files, ours, *options))
        formats = [SignatureKind.FILES]
        if refused is None:
            _, found = signatures.verify(published.reference, [ours.public], formats=formats)
            assert [one.kind for one in found.signatures] == formats
        else:
            with pytest.raises(UntrustedError, match=refused):
                signatures.verify(published.reference, [ours.public], formats=formats)
        add_file(published.reference, "other.md", b"Not signed, and not ignored.")
        attach(published.reference, (files.parent / "model.sig").read_bytes())
        with pytest.raises(UntrustedError, match=r"signs other files: other\.md"):
            signatures.verify(published.reference, [ours.public], formats=formats)


@pytest.mark.parametrize("listed", [True, False], ids=["1.1", "1.0"])
def test_a_signature_that_is_a_file_of_the_model(
    published: Published, ours: PrivateKey, listed: bool
) -> None:
    """Publishers keep model.sig next to the weights; signatures of 1.0 do not list it."""
    good = model_statement(inspect(published.reference, store=published.origin), "model")
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    if listed:
        serialization["ignore_paths"] = ["model.sig"]
    statement = replace(
        good,
        subjects=(Subject(good.subjects[0].digest, "model"),),
        predicate={**good.predicate, "serialization": serialization},
    )
    signature, formats = signed_bundle(statement, ours), [SignatureKind.FILES]
    add_file(published.reference, "model.sig", signature)
    attach(published.reference, signature)
    _, found = signatures.verify(published.reference, [ours.public], formats=formats)
    assert [one.kind for one in found.signatures] == formats
    add_file(published.reference, "other.sig", b"{}")
    attach(published.reference, signature)
    with pytest.raises(UntrustedError, match=r"signs other files: other\.sig"):
        signatures.verify(published.reference, [ours.public], formats=formats)


def test_a_bundle_under_another_name_is_a_file_like_others(
    published: Published, ours: PrivateKey
) -> None:
    """A bundle may have more fields, such as those of a configuration."""
    good = model_statement(inspect(published.reference, store=published.origin), "model")
    statement = replace(good, subjects=(Subject(good.subjects[0].digest, "model"),))
    bundle = json.loads(signed_bundle(statement, ours))
    signature = json.dumps({**bundle, "chat_template": "{{ changed }}"}).encode()
    add_file(published.reference, "tokenizer_config.json", signature)
    attach(published.reference, signature)
    with pytest.raises(UntrustedError, match=r"signs other files: tokenizer_config\.json"):
        signatures.verify(published.reference, [ours.public], formats=[SignatureKind.FILES])


@pytest.mark.parametrize("hashing", [("files", "sha256", 0), ("shards", "sha256", 100)], ids=str)
def test_a_signature_over_one_file(
    tmp_path: Path, ours: PrivateKey, hashing: tuple[str, str, int]
) -> None:
    """The tool gives the name "." to a file that it signs."""
    file, store, name = tiny_gguf(tmp_path), modelpack.Store(tmp_path / "store"), "team/model:v1"
    package(name, file, store, format="cncf")
    model = inspect(name, store=store)
    signature = hashed_and_signed(file, ours, *hashing)
    statement = Bundle.parse(signature, "bundle").statement
    assert {one["name"][0] for one in statement.predicate["resources"]} == {"."}
    check_model(statement, model, store)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = Bundle.parse(hashed_and_signed(file, ours, *hashing), "bundle").statement
    licence = tmp_path / "LICENSE"
    licence.write_text("MIT")
    package(name, tiny_gguf(tmp_path), store, format="cncf", licenses=licence)
    for wrong, of in ((changed, model), (statement, inspect(name, store=store))):
        with pytest.raises(IntegrityError, match="signs other files"):
            check_model(wrong, of, store)


@pytest.mark.long
def test_keyless_both_ways(published: Published, files: Path, tmp_path: Path) -> None:
    """Certificates of a private Fulcio, entries in a private Rekor: `model_signing … sigstore`."""
    identity, formats = "me@team.example", [SignatureKind.FILES]
    signature, command = tmp_path / "model.sig", [sys.executable, "-m", "model_signing"]
    sigstore = PrivateSigstore()

    def theirs(verb: str, *options: str) -> int:
        words = [*command, verb, "sigstore", str(files), f"--trust_config={config}", *options]
        return subprocess.run([*words, f"--signature={signature}"], capture_output=True).returncode

    def verify(identity: str) -> int:
        return theirs("verify", f"--identity={identity}", f"--identity_provider={ISSUER}")

    with serving(sigstore) as served:
        config = served.write_config(tmp_path / "config.json")
        assert theirs("sign", f"--identity_token={token(identity)}") == 0
        signer = KeylessSigner.open(config, token(identity))
        done = signatures.sign(
            published.reference, signer, kinds=[SignatureKind.MODEL_SIGNING]
        )  # fmt: skip
    root = TrustedRoot.read(sigstore.write_root(tmp_path / "root.json"))
    wanted, other = (Identity(name, ISSUER, root) for name in (identity, "other@team.example"))
    attach(published.reference, signature.read_bytes())
    _, found = signatures.verify(published.reference, [wanted], formats=formats)
    assert [one.kind for one in found.signatures] == formats
    with pytest.raises(UntrustedError, match="its certificate is for me@team"):
        signatures.verify(published.reference, [other], formats=formats)
    signature.write_bytes(single_layer(published.reference, done.manifests))
    assert verify(identity) == 0
    assert verify("other@team.example") != 0
    (files / "config.json").write_text('{"changed": 1}')
    assert verify(identity) != 0


def single_layer(reference: str, manifests: Mapping[SignatureKind, Digest]) -> bytes:
    """Return the bundle of the only signature of a model in its registry."""
    [digest] = manifests.values()
    where = Reference.parse(reference)
    with open_repository(where, RemoteOptions(), watching(None)) as repository:
        raw = repository.fetch_manifest(repository.resolve(str(digest)))
        [layer] = Manifest.parse(raw, "signature").layers
        return read_blob(repository, layer)


def add_file(reference: str, path: str, content: bytes) -> None:
    """Add a layer with a document to a model in its registry."""
    where = Reference.parse(reference)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        model = model_in(repository, where)
        layer = Descriptor(
            media_types.DOCKER_MODEL_FILE, Digest.of(content), len(content),
            {media_types.FILEPATH: path},
        )  # fmt: skip
        manifest = Manifest.build(
            model.manifest.config,
            (*model.manifest.layers, layer),
            annotations=model.manifest.annotations,
        )
        signatures.put(repository, manifest, {layer: content}, where.tag, watching(None))


@pytest.mark.long
def test_a_certificate_is_its_public_key(
    published: Published, files: Path, ours: PrivateKey, theirs: PrivateKey
) -> None:
    """Chain and dates have no effect: whoever gives the key of a certificate trusts the key."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")])
    ended = datetime(2020, 1, 2, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder(name, name, ours.public.key, 1, ended - timedelta(1), ended)
        .sign(ours.key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    pem = files.parent / "certificate.pem"
    pem.write_bytes(certificate)
    options = (f"--signing_certificate={pem}", f"--certificate_chain={pem}")
    signature = signed(files, ours, *options, method="certificate")
    assert "x509CertificateChain" in json.loads(signature)["verificationMaterial"]
    attach(published.reference, signature)
    formats = [SignatureKind.FILES]
    signatures.verify(published.reference, [ours.public], formats=formats)
    with pytest.raises(UntrustedError, match="made by none of the keys"):
        signatures.verify(published.reference, [theirs.public], formats=formats)


#: How OpenSSF's library hashes: method, algorithm and size of the shards, and whether the digests
#: that it signs are in the manifest.
HASHING = {
    "shards": ("shards", "sha256", 100, False),
    "large shards": ("shards", "sha256", 1_000_000_000, True),
    "shards by blake2b": ("shards", "blake2", 64, False),
    "blake2b": ("files", "blake2", 0, False),
    "blake3": ("files", "blake3", 0, False),
}


def hashed_and_signed(
    files: Path, key: PrivateKey, method: str, algorithm: str, size: int
) -> bytes:
    """Return the signature of OpenSSF's library over a directory, with this hashing."""
    from model_signing import hashing, signing

    plain, signature = files.parent / "key.pem", files.parent / "model.sig"
    plain.write_bytes(pem_of(key))
    config = hashing.Config()
    if method == "shards":
        config.use_shard_serialization(hashing_algorithm=algorithm, shard_size=size)
    else:
        config.use_file_serialization(hashing_algorithm=algorithm)
    signer = signing.Config().use_elliptic_key_signer(private_key=plain)
    signer.set_hashing_config(config).sign(files, signature)
    return signature.read_bytes()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("method", "algorithm", "size", "in_manifest"), HASHING.values(), ids=HASHING
)
def test_other_digests_are_computed_from_stored_files(
    published: Published,
    files: Path,
    ours: PrivateKey,
    method: str,
    algorithm: str,
    size: int,
    in_manifest: bool,
) -> None:
    """Without the files, such signatures are refused."""
    attach(published.reference, hashed_and_signed(files, ours, method, algorithm, size))
    formats = [SignatureKind.FILES]
    if not in_manifest:
        with pytest.raises(UntrustedError, match="only the stored files verify") as caught:
            signatures.verify(published.reference, [ours.public], formats=formats)
        assert caught.value.hint is not None
        assert caught.value.hint.endswith("then `modelpack verify --local`")
    modelpack.pull(published.reference, store=published.store, with_referrers=True)
    _, found = signatures.verify(
        published.reference, [ours.public], formats=formats, store=published.store
    )
    assert [one.kind for one in found.signatures] == formats


def test_a_signature_by_blake3_does_not_keep_others_from_counting(
    published: Published, files: Path, ours: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(published.reference, hashed_and_signed(files, ours, *HASHING["blake3"][:3]))
    modelpack.pull(published.reference, store=published.store, with_referrers=True)
    monkeypatch.setitem(sys.modules, "blake3", None)  # not installed
    with pytest.raises(UntrustedError, match="need the package blake3") as caught:
        signatures.verify(
            published.reference,
            [ours.public],
            formats=[SignatureKind.FILES],
            store=published.store,
        )
    assert caught.value.hint == "run pip install blake3"
    signatures.sign(published.reference, ours, store=published.store)
    _, found = signatures.verify(
        published.reference,
        [ours.public],
        formats=[SignatureKind.FILES, SignatureKind.BUNDLE],
        store=published.store,
    )
    assert [one.kind for one in found.signatures] == [SignatureKind.BUNDLE]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("method", "algorithm", "size", "in_manifest"), HASHING.values(), ids=HASHING
)
def test_a_changed_byte_is_found_by_any_digest(
    published: Published,
    files: Path,
    ours: PrivateKey,
    method: str,
    algorithm: str,
    size: int,
    in_manifest: bool,
) -> None:
    weights = files / "model-00001-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    attach(published.reference, hashed_and_signed(files, ours, method, algorithm, size))
    modelpack.pull(published.reference, store=published.store, with_referrers=True)
    with pytest.raises(UntrustedError, match=f"signs other files: {weights.name}"):
        signatures.verify(
            published.reference,
            [ours.public],
            formats=[SignatureKind.FILES],
            store=published.store,
        )


def in_shards(statement: Statement, files: dict[str, int], size: int) -> Statement:
    """Return the statement over shards of files of these sizes, with digests of zeros."""
    resources = [
        {"name": f"{path}:{at}:{min(at + size, end)}", "algorithm": "sha256", "digest": "0" * 64}
        for path, end in files.items()
        for at in range(0, end, size)
    ]
    serialization = {"method": "shards", "hash_type": "sha256", "shard_size": size}
    root = Digest.of(bytes(32 * len(resources)))
    predicate = {"resources": resources, "serialization": serialization}
    return replace(statement, subjects=(Subject(root, "model"),), predicate=predicate)


def test_shards_cover_every_byte(published: Published) -> None:
    """The names of shards are compared before a file is read."""
    model = inspect(published.reference, store=published.origin)
    good = model_statement(model, "model")
    sizes = {path: file.size for path, file in files_of(model).items()}
    name = max(sizes, key=lambda path: sizes[path])
    for other in (
        {**sizes, name: sizes[name] - 100},
        {**sizes, name: sizes[name] + 100},
        {path: size for path, size in sizes.items() if path != name},
        {**sizes, "more": 100},
    ):
        with pytest.raises(IntegrityError, match="signs other files"):
            check_model(in_shards(good, other, 100), model)
    shards = in_shards(good, sizes, 100).predicate["resources"]
    for left_out in [one for one in shards if one["name"].startswith(name)]:
        rest = [one for one in shards if one != left_out]
        predicate = {**in_shards(good, sizes, 100).predicate, "resources": rest}
        root = Subject(Digest.of(bytes(32 * len(rest))), "model")
        with pytest.raises(IntegrityError, match=f"signs other files: {name}"):
            check_model(replace(good, subjects=(root,), predicate=predicate), model)
    # Shards of one byte, of which only few are signed, are counted and not listed.
    with pytest.raises(IntegrityError, match="signs other files"):
        check_model(in_shards(good, {name: 10}, 1), model)


def test_an_empty_file_has_no_shards(tmp_path: Path, ours: PrivateKey) -> None:
    """A signature over shards does not list it, so it must not change how the model runs."""
    formats = [SignatureKind.FILES]
    with publishing(tmp_path, files_in(tmp_path)) as published:
        directory = tmp_path / "bundle"
        modelpack.bundle(published.reference, directory, store=published.origin, links="copy")
        signature = hashed_and_signed(directory / "model", ours, "shards", "sha256", 1_000_000_000)
        add_file(published.reference, "empty.md", b"")
        attach(published.reference, signature)
        _, found = signatures.verify(published.reference, [ours.public], formats=formats)
        assert [one.kind for one in found.signatures] == formats
        add_file(published.reference, "generation_config.json", b"")
        attach(published.reference, signature)
        with pytest.raises(UntrustedError, match=r"the file generation_config\.json"):
            signatures.verify(published.reference, [ours.public], formats=formats)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("material", "problem"),
    [
        ({"publicKey": {"hint": "e8450dec"}, "tlogEntries": []}, None),
        ({"publicKey": {"rawBytes": "AA=="}}, None),
        ({"x509CertificateChain": {"certificates": [{"rawBytes": "AA=="}]}}, None),
        ({"certificate": {"rawBytes": "AA=="}, "tlogEntries": [{"logIndex": "1"}]}, None),
        ({"certificate": {"rawBytes": "AA=="}}, "has no verification material"),
        ({"certificate": {"rawBytes": "AA=="}, "tlogEntries": []}, "has no verification material"),
        ({"publicKey": {}}, "has no verification material"),
        (None, "has no verification material"),
    ],
)
def test_the_material_of_a_bundle(
    published: Published, ours: PrivateKey, material: object, problem: str | None
) -> None:
    """The cases of OpenSSF's test vectors for 1.0, and the older form of a key."""
    model = inspect(published.reference, store=published.origin)
    value = json.loads(signed_bundle(model_statement(model, "model"), ours))
    del value["verificationMaterial"]
    if material is not None:
        value["verificationMaterial"] = material
    raw = json.dumps(value).encode()
    if problem is None:
        assert Bundle.parse(raw, "bundle").envelope.is_signed_by(ours.public)
    else:
        with pytest.raises(FormatError, match=problem):
            Bundle.parse(raw, "bundle")
    del value["dsseEnvelope"]
    for broken in (json.dumps(value).encode(), b""):
        with pytest.raises(FormatError):
            Bundle.parse(broken, "bundle")


def test_ours_have_only_the_fields_of_the_schemas(published: Published, ours: PrivateKey) -> None:
    """Bundle, envelope, statement and predicate of the specification allow no other fields."""
    model = inspect(published.reference, store=published.origin)
    bundle = json.loads(signed_bundle(model_statement(model, "model"), ours))
    assert bundle.keys() == {"mediaType", "verificationMaterial", "dsseEnvelope"}
    assert bundle["dsseEnvelope"].keys() == {"payload", "payloadType", "signatures"}
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert statement["predicate"].keys() == {"resources", "serialization"}
    names = [one["name"] for one in statement["predicate"]["resources"]]
    assert names == sorted(names)


def test_statements_that_name_the_manifest_in_the_predicate(published: Published) -> None:
    """Modelpack wrote it there before; wherever it is, it must be the model's."""
    model = inspect(published.reference, store=published.origin)
    good = model_statement(model, "model")
    (subject,) = good.subjects
    predicate = {**good.predicate, MANIFEST: str(model.digest)}
    check_model(replace(good, subjects=(Subject(subject.digest),), predicate=predicate), model)
    other = {**good.predicate, MANIFEST: str(subject.digest)}
    for subjects in (good.subjects, (Subject(subject.digest),)):
        with pytest.raises(IntegrityError, match="another manifest"):
            check_model(replace(good, subjects=subjects, predicate=other), model)
    twice = replace(good, subjects=(subject, subject))
    with pytest.raises(FormatError, match="has 2 subjects"):
        check_model(twice, model)
