"""`modelpack keygen`, `sign` and `verify`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.options import Settings, common_options, model_argument, remote_options
from modelpack.cli.output import note, note_reference, show
from modelpack.cli.referrers import LOCAL
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack.reference import Reference

if TYPE_CHECKING:
    from modelpack.supply.keys import PrivateKey

#: Where cosign, too, takes the password of a private key from.
PASSWORD = "COSIGN_PASSWORD"  # noqa: S105 - the name of a variable
_FORMATS = ("cosign", "bundle", "model-signing")
_ACCEPTED = (*_FORMATS, "model-signing-files")


def private_key(path: Path) -> PrivateKey:
    """Return the private key in a file; its password comes from the environment or a prompt."""
    from modelpack.supply.keys import PasswordNeededError, read_private_key

    given = os.environ.get(PASSWORD)
    try:
        return read_private_key(path, None if given is None else os.fsencode(given))
    except PasswordNeededError:
        if not sys.stdin.isatty():
            raise
    asked = click.prompt(f"Password of {path}", hide_input=True, default="", err=True)
    return read_private_key(path, asked.encode())


@click.command()
@click.argument("prefix", metavar="[PREFIX]", default="modelpack")
@common_options
def keygen(settings: Settings, prefix: str) -> None:
    """Make a key pair to sign with: PREFIX.key, encrypted as cosign does, and PREFIX.pub.

    The password comes from the environment's COSIGN_PASSWORD, or is asked for.
    """
    from modelpack.supply.keys import generate_key_pair

    given = os.environ.get(PASSWORD)
    if given is None:
        if not sys.stdin.isatty():
            raise UsageError(
                f"the new key needs a password: {PASSWORD} is not set, and nobody can be asked",
                hint=f"an empty {PASSWORD} makes a key without one",
            )
        given = click.prompt(
            "Password of the new key",
            hide_input=True, confirmation_prompt=True, default="", show_default=False, err=True,
        )  # fmt: skip
    private, public = generate_key_pair(prefix, os.fsencode(given))
    note(settings, f"keep {private} to yourself; {public} is for those who verify")
    show(settings, {"private": str(private), "public": str(public)}, str(public))


@click.command()
@model_argument("reference")
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), metavar="KEY",
    help="The private key: PEM, or as cosign and `keygen` write it.",
)  # fmt: skip
@click.option(
    "--format", "formats", type=click.Choice(_FORMATS), multiple=True,
    help="How to write it: under cosign's tag, as a sigstore bundle over the manifest, or as "
    "OpenSSF model signing does, over the files and the manifest. May be repeated. "
    "[default: cosign and bundle]",
)  # fmt: skip
@LOCAL
@remote_options
@common_options
def sign(
    settings: Settings,
    reference: str,
    key: Path,
    formats: tuple[str, ...],
    local: bool,
    remote: RemoteOptions,
) -> None:
    """Sign the model REFERENCE in its registry with a key; print the model's digest.

    What is signed is its manifest, which holds the digests of all files. Of a model in variants,
    the index and each variant are signed. COSIGN_PASSWORD in the environment is the password of the
    key.
    """
    from modelpack.operations import signing
    from modelpack.supply.signatures import SignatureKind

    where = Reference.parse(reference)
    note_reference(settings, reference, where)
    done = signing.sign(
        where,
        private_key(key),
        kinds=[SignatureKind(name) for name in formats],
        store=settings.store() if local else None,
        remote=remote,
    )
    of = f" and {len(done.variants)} variants" if done.variants else ""
    note(settings, f"signed {where}{of}: {', '.join(done.manifests or done.variants[0].manifests)}")
    value: dict[str, Any] = {
        "reference": str(where),
        "digest": str(done.digest),
        "signatures": {str(kind): str(digest) for kind, digest in done.manifests.items()},
    }
    if done.variants:
        value["variants"] = [str(one.digest) for one in done.variants]
    show(settings, value, str(done.digest))


@click.command()
@model_argument("reference")
@click.option(
    "--key", "keys", required=True, multiple=True, metavar="PUB",
    help="The public key of who has to have signed it. May be repeated: all of them.",
)  # fmt: skip
@click.option(
    "--format", "formats", type=click.Choice(_ACCEPTED), multiple=True,
    help="Accept signatures of this format only. May be repeated. model-signing-files are those of "
    "OpenSSF's own tool, over the files alone. [default: all that cover the manifest]",
)  # fmt: skip
@LOCAL
@remote_options
@common_options
def verify(
    settings: Settings,
    reference: str,
    keys: tuple[str, ...],
    formats: tuple[str, ...],
    local: bool,
    remote: RemoteOptions,
) -> None:
    """Check that the model REFERENCE is signed by a key; print the model's digest.

    No file of the model is read: the digests that are signed are those by which it is kept. Exit
    code 5: it is not signed, or not by that key. Whether stored files are intact, `fsck` says.
    """
    from modelpack.operations import signing
    from modelpack.supply.keys import read_public_key
    from modelpack.supply.signatures import SignatureKind

    where = Reference.parse(reference)
    note_reference(settings, reference, where)
    model, found = signing.verify(
        where,
        [read_public_key(key) for key in keys],
        formats=[SignatureKind(name) for name in formats],
        store=settings.store() if local else None,
        remote=remote,
    )
    signatures: list[dict[str, Any]] = [
        {
            "key": one.key.name,
            "fingerprint": one.key.fingerprint,
            "format": str(one.kind),
            "manifest": str(one.manifest.digest),
        }
        for one in found.signatures
    ]
    for one in found.signatures:
        note(settings, f"signed by {one.key.name}: {one.kind}")
    value = {"reference": str(where), "digest": str(model.digest), "signatures": signatures}
    show(settings, value, str(model.digest))
