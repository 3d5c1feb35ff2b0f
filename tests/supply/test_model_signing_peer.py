"""Models that were changed after signing: our verdict is that of OpenSSF's own `model_signing`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from model_signing import hashing, signing, verifying

import modelpack
from modelpack.errors import UntrustedError
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect
from modelpack.storage import watching
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import model_statement
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import MODEL_SIGNING, bundle_manifest, signed_bundle
from tests.models import package
from tests.supply.test_tampering import files_in

pytestmark = pytest.mark.long

NAME = "team/model:v1"
FORMATS = [SignatureKind.FILES]
WEIGHTS = "model-00001-of-00002.safetensors"
_Algorithm = Literal["sha256", "blake2", "blake3"]
#: What is signed: files or shards of a size, and the algorithm.
SERIALISATIONS: dict[str, tuple[_Algorithm, int]] = {
    "files by sha256": ("sha256", 0),
    "files by blake2b": ("blake2", 0),
    "files by blake3": ("blake3", 0),
    "shards by sha256": ("sha256", 100),
    "shards by blake2b": ("blake2", 64),
    "large shards": ("sha256", 1_000_000_000),
}


def _write(name: str, content: str = "More.") -> Callable[[Path], None]:
    def change(files: Path) -> None:
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_text(content)

    return change


def _flip(name: str) -> Callable[[Path], None]:
    def change(files: Path) -> None:
        content = bytearray((files / name).read_bytes())
        content[-1] ^= 1
        (files / name).write_bytes(content)

    return change


def _swap(files: Path) -> None:
    first, second = files / "sub" / "README.md", files / "LICENSE"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


#: A change of the signed directory, and whether its signature still holds.
CHANGES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "none": (lambda files: None, True),
    ".git": (_write(".git/HEAD", "ref: refs/heads/main"), True),
    ".github": (_write(".github/workflows/test.yml"), True),
    ".gitattributes": (_write(".gitattributes", "*.bin filter=lfs"), True),
    ".gitignore": (_write(".gitignore", "*.pyc"), True),
    "an ignored file changes": (_write("README.md", "Changed."), True),
    "an ignored file goes": (lambda files: (files / "README.md").unlink(), True),
    "a file of an ignored directory": (_write("docs/more.md"), True),
    "the signature changes": (_write("model.sig", "{}"), True),
    "a new document": (_write("NEWS.md"), False),
    "a new file in a directory": (_write("sub/NEWS.md"), False),
    "a name like an ignored one": (_write("docs.md"), False),
    "a file goes": (lambda files: (files / "LICENSE").unlink(), False),
    "a file of a directory goes": (lambda files: (files / "sub" / "README.md").unlink(), False),
    "a byte of weights": (_flip(WEIGHTS), False),
    "a byte of a document": (_flip("sub/README.md"), False),
    "a shorter file": (_write("sub/README.md", "M"), False),
    "a longer file": (_write("sub/README.md", "More. " * 100), False),
    "an empty file": (_write("sub/README.md", ""), False),
    "a new name": (lambda files: _moved(files, "LICENSE", "LICENCE"), False),
    "a name in another case": (lambda files: _moved(files, "LICENSE", "License"), False),
    "another directory": (lambda files: _moved(files, "sub/README.md", "sub/b/README.md"), False),
    "two files swapped": (_swap, False),
}


def _moved(files: Path, old: str, new: str) -> None:
    (files / new).parent.mkdir(parents=True, exist_ok=True)
    (files / old).rename(files / new)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrivateKey, Path]:
    """A key on P-384, and the directory of `private.pem` and `public.pem`."""
    private = ec.generate_private_key(ec.SECP384R1())
    made = PrivateKey(private, "ours")
    directory = tmp_path_factory.mktemp("key")
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "private.pem").write_bytes(pem)
    (directory / "public.pem").write_bytes(made.public.pem)
    return made, directory


def hashed(algorithm: _Algorithm, shard: int) -> hashing.Config:
    how = hashing.Config()
    if shard:
        how.use_shard_serialization(hashing_algorithm=algorithm, shard_size=shard)
    else:
        how.use_file_serialization(hashing_algorithm=algorithm)
    return how.set_ignored_paths(paths=["README.md", "docs", "model.sig"])


def signed_by_theirs(files: Path, keys: Path, how: hashing.Config) -> None:
    """Sign the directory as model.sig in it, without its README.md and docs."""
    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "private.pem")
    signer.set_hashing_config(how).sign(files, files / "model.sig")


def holds_for_theirs(
    files: Path, keys: Path, signature: Path, how: hashing.Config | None = None
) -> bool:
    """Verify the signature; `how` must be given for what 1.1.1 does not read in a signature."""
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys / "public.pem")
    if how is not None:
        verifier.set_hashing_config(how)
    try:
        verifier.verify(files, signature)
    except ValueError:
        return False
    return True


def holds_for_ours(
    files: Path, key: PrivateKey, signature: bytes, directory: Path, **how: bool
) -> bool:
    """Package the directory, attach the signature to the model, and verify it."""
    store = modelpack.Store(directory / "store")
    package(NAME, files, store, **how)
    model = inspect(NAME, store=store)
    manifest, blobs = bundle_manifest(signature, MODEL_SIGNING, model.descriptor)
    signatures.put(store, manifest, blobs, None, watching(None))
    try:
        signatures.verify(NAME, [key.public], formats=FORMATS, store=store)
    except UntrustedError:
        return False
    return True


@pytest.mark.parametrize("serialisation", SERIALISATIONS)
def test_verdicts_on_changed_models(
    tmp_path: Path, key: tuple[PrivateKey, Path], serialisation: str
) -> None:
    """Their signature over a directory, verified after each change by them and by us."""
    ours, keys = key
    (tmp_path / "signed").mkdir()
    origin = files_in(tmp_path / "signed")
    how = hashed(*SERIALISATIONS[serialisation])
    signed_by_theirs(origin, keys, how)
    signature = tmp_path / "model.sig"
    shutil.copy(origin / "model.sig", signature)
    wrong = {}
    for at, (name, (change, holds)) in enumerate(CHANGES.items()):
        files = tmp_path / str(at) / "model"
        shutil.copytree(origin, files)
        change(files)
        theirs = holds_for_theirs(files, keys, signature, how)
        verdict = holds_for_ours(files, ours, signature.read_bytes(), tmp_path / str(at))
        if (theirs, verdict) != (holds, holds):
            wrong[name] = {"expected": holds, "theirs": theirs, "ours": verdict}
    assert not wrong


def test_their_verdicts_on_our_signature(tmp_path: Path, key: tuple[PrivateKey, Path]) -> None:
    """Our signature has no ignored paths: only Git's files may change."""
    ours, keys = key
    (tmp_path / "signed").mkdir()
    origin = files_in(tmp_path / "signed")
    store = modelpack.Store(tmp_path / "store")
    package(NAME, origin, store)
    signature = tmp_path / "model.sig"
    signature.write_bytes(signed_bundle(model_statement(inspect(NAME, store=store), "model"), ours))
    wrong = {}
    for at, (name, (change, _)) in enumerate(CHANGES.items()):
        files = tmp_path / str(at)
        shutil.copytree(origin, files)
        change(files)
        holds = name == "none" or name.startswith(".git")
        if holds_for_theirs(files, keys, signature) is not holds:
            wrong[name] = not holds
    assert not wrong


def test_a_directory_of_links(tmp_path: Path, key: tuple[PrivateKey, Path]) -> None:
    """The cache of the Hugging Face Hub: a signature over links is one over what they point to."""
    ours, keys = key
    (tmp_path / "signed").mkdir()
    origin, snapshot = files_in(tmp_path / "signed"), tmp_path / "snapshot"
    for path in origin.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(origin)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    with pytest.raises(ValueError, match="allow_symlinks"):
        signed_by_theirs(snapshot, keys, hashed("sha256", 0))
    how = hashed("sha256", 0).set_allow_symlinks(True)
    signed_by_theirs(snapshot, keys, how)
    signature = snapshot / "model.sig"
    for name, change in (("same", lambda: None), ("changed", lambda: _flip(WEIGHTS)(origin))):
        change()
        assert holds_for_theirs(snapshot, keys, signature, how) == (name == "same")
        verdict = holds_for_ours(
            snapshot, ours, signature.read_bytes(), tmp_path / name, follow_symlinks=True
        )
        assert verdict == (name == "same")
