"""OpenSSF's own `model_signing` verifies our signatures, and we verify its signatures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import UntrustedError
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect, model_in
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import watching
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import model_statement
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import MODEL_SIGNING, bundle_manifest, signed_bundle
from tests.supply.conftest import Published, publishing
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
    assert statement.predicate["dev.modelpack.manifest"] == str(model.digest)
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


def signed(files: Path, key: PrivateKey, *options: str) -> bytes:
    """Return the signature of the real tool over a directory, which does not get it."""
    plain, signature = files.parent / "key.pem", files.parent / "model.sig"
    plain.write_bytes(key.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(files), *options]
    command += [f"--signature={signature}", f"--private_key={plain}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return signature.read_bytes()


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
