"""OpenSSF's own `model_signing` verifies our signatures, and we verify its signatures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.errors import UntrustedError
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect
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


def test_ours_verifies_theirs(
    published: Published, files: Path, ours: PrivateKey, theirs: PrivateKey, tmp_path: Path
) -> None:
    plain = tmp_path / "key.pem"
    plain.write_bytes(ours.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signature = tmp_path / "model.sig"
    done = model_signing("sign", files, signature=signature, private_key=plain)
    assert done.returncode == 0, done.stderr
    where = Reference.parse(published.reference)
    with open_repository(where, RemoteOptions(), watching(None), writes=True) as repository:
        model = inspect(published.reference, from_registry=True)
        manifest, blobs = bundle_manifest(signature.read_bytes(), MODEL_SIGNING, model.descriptor)
        signatures.put(repository, manifest, blobs, None, watching(None))
    formats = [SignatureKind.FILES]
    _, found = signatures.verify(published.reference, [ours.public], formats=formats)
    assert [one.kind for one in found.signatures] == formats
    with pytest.raises(UntrustedError):
        signatures.verify(published.reference, [theirs.public], formats=formats)
    with pytest.raises(UntrustedError, match="covers the files and not the manifest"):
        signatures.verify(published.reference, [ours.public])
