"""OpenSSF model signing 1.0: a statement over the digests of a model's files.

The layers of a model are its files as they are, so that digests that a registry and the store have
verified already are compared with the statement: nothing is read a second time.
Source: sigstore/model-transparency, model_signing/_signing/signing.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelpack.digest import Digest
from modelpack.errors import FormatError, IntegrityError, InvalidDigestError, UnsupportedError
from modelpack.model import Model
from modelpack.supply.statements import MODEL_SIGNING, Statement, Subject
from modelpack.unpacking.names import arrange

_SERIALIZATION: Final = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [],
}


def files_of(model: Model) -> Mapping[str, Digest]:
    """Return the digests of the files as `modelpack bundle` lays them out, by path.

    Raises `UnsupportedError` for archives and digests other than SHA-256.
    """
    arrangement = arrange(model)
    what = str(model.reference or model.digest)
    if arrangement.archives:
        raise UnsupportedError(
            "has layers that are archives, and their files have no digests",
            path=what,
            hint="sign its manifest instead: without --format model-signing",
        )
    files = {placed.path: placed.file.descriptor.digest for placed in arrangement.files}
    for path, digest in files.items():
        if digest.algorithm != "sha256":
            raise UnsupportedError(f"{path} has a digest by {digest.algorithm}", path=what)
    return files


def model_statement(model: Model, name: str) -> Statement:
    """Return the statement over the files of `model`, which is called `name` in it."""
    files = files_of(model)
    resources = [
        {"name": path, "algorithm": "sha256", "digest": files[path].encoded}
        for path in sorted(files)
    ]
    predicate = {"serialization": _SERIALIZATION, "resources": resources}
    return Statement((Subject(_root(resources), name),), MODEL_SIGNING, predicate)


def check_model(statement: Statement, model: Model) -> None:
    """Raise `IntegrityError` unless the statement is about the very files of `model`.

    One file more, or less, is another model. Raises `FormatError` for a statement whose digest is
    not that of the files it lists, or that was made in a way we do not compute.
    """
    what = f"model signature of {model.reference or model.digest}"
    resources = statement.predicate.get("resources")
    serialization = statement.predicate.get("serialization")
    if not isinstance(serialization, dict) or serialization.get("method") != "files":
        raise FormatError("is not made of whole files", path=what)
    signed: dict[str, Digest] = {}
    try:
        for one in resources or []:
            signed[str(one["name"])] = Digest.parse(f"{one['algorithm']}:{one['digest']}")
        root = _root(resources or [])
    except (KeyError, TypeError, ValueError, InvalidDigestError):
        raise FormatError("lists what are no files with digests", path=what) from None
    if not signed or len(signed) != len(resources or []):
        raise FormatError("lists no files, or one of them twice", path=what)
    if statement.subjects[0].digest != root:
        raise FormatError("its digest is not that of the files it lists", path=what)
    files = files_of(model)
    wrong = sorted(path for path in signed.keys() & files.keys() if signed[path] != files[path])
    wrong += sorted(signed.keys() ^ files.keys())
    if wrong:
        raise IntegrityError(f"{what}: signs other files: {', '.join(wrong[:8])}")


def _root(resources: Any) -> Digest:
    return Digest.of(b"".join(bytes.fromhex(one["digest"]) for one in resources))
