"""`modelpack keygen`, `sign`, `verify`, `sbom` and `lint`: signatures and checks of models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.help import command
from modelpack.cli.options import (
    REMOTE,
    Settings,
    authority_option,
    common_options_without,
    identity_options,
    model_argument,
    remote_options,
)
from modelpack.cli.output import note, plural, show, show_json, visible
from modelpack.cli.referrers import LOCAL, named_subject, subject_to_name
from modelpack.errors import ModelpackError, UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack.plugins import load_function

if TYPE_CHECKING:
    from modelpack.trust.keyless import Identity
    from modelpack.trust.keys import PrivateKey
    from modelpack.trust.signatures import Signature

#: The environment variable with the password of a private key; cosign reads it too.
PASSWORD = "COSIGN_PASSWORD"  # noqa: S105 - the name of a variable
_FORMATS = ("cosign", "bundle", "model-signing")
_ACCEPTED = (*_FORMATS, "model-signing-files")


def private_key(path: str) -> PrivateKey:
    """Return the private key in a file or a token; its password may come from a prompt."""
    from modelpack.trust.keys import PasswordNeededError, read_private_key
    from modelpack.trust.pkcs11 import SCHEME, read_token_key

    given = os.environ.get(PASSWORD)
    in_token = path.startswith(SCHEME)
    try:
        if in_token:  # whose PIN is in another variable
            return read_token_key(path)
        return read_private_key(path, None if given is None else os.fsencode(given))
    except PasswordNeededError:
        if not sys.stdin.isatty():
            raise
    what = "PIN" if in_token else "Password"
    asked = click.prompt(f"{what} of {path}", hide_input=True, default="", err=True)
    return read_token_key(path, asked) if in_token else read_private_key(path, asked.encode())


@command()
@click.argument("prefix", metavar="[PREFIX]", default="modelpack")
@common_options_without("store", "progress")
def keygen(settings: Settings, prefix: str) -> None:
    """Create a key pair for signing: PREFIX.key, encrypted as by cosign, and PREFIX.pub.

    The password is read from COSIGN_PASSWORD in the environment, or from a prompt.
    """
    from modelpack.trust.keys import generate_key_pair

    given = os.environ.get(PASSWORD)
    if given is None:
        if not sys.stdin.isatty():
            raise UsageError(
                f"cannot ask for the password of the new key: {PASSWORD} is not set and stdin is "
                "not a terminal",
                hint=f"set {PASSWORD}; an empty value makes a key without a password",
            )
        given = click.prompt(
            "Password of the new key",
            hide_input=True, confirmation_prompt=True, default="", show_default=False, err=True,
        )  # fmt: skip
    private, public = generate_key_pair(prefix, os.fsencode(given))
    note(settings, f"keep {private} secret; publish {public} to let others verify")
    show(settings, {"private": str(private), "public": str(public)}, str(public))


@command()
@model_argument("reference")
@click.option(
    "--key", metavar="KEY",
    help="Sign with this private key: PEM, a file written by cosign or `keygen`, or the URI of a "
    "key in a token, pkcs11:token=NAME;object=NAME?module-path=FILE.",
)  # fmt: skip
@click.option(
    "--certificate-chain", type=click.Path(path_type=Path, dir_okay=False), metavar="PEM",
    help="Add these certificates to a signature of the format model-signing: that of --key first, "
    "then those up to the authority.",
)  # fmt: skip
@click.option(
    "--keyless", is_flag=True,
    help="Sign with a certificate of sigstore for the identity of this CI job or of "
    "--identity-token. The identity becomes public in sigstore's log.",
)  # fmt: skip
@click.option(
    "--identity-token", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Read the OIDC token for --keyless from this file. [default: that of the CI job]",
)  # fmt: skip
@click.option(
    "--trust-config", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Sign with --keyless by the instance of sigstore in this client trust configuration. "
    "[default: the public instance]",
)  # fmt: skip
@click.option(
    "--format", "formats", type=click.Choice(_FORMATS), multiple=True,
    help="Write a signature in this format: cosign's tag, a sigstore bundle over the manifest, or "
    "OpenSSF model signing over the files and the manifest. May be repeated. "
    "[default: cosign and bundle]",
)  # fmt: skip
@LOCAL
@remote_options
@common_options_without("progress")
def sign(
    settings: Settings,
    reference: str,
    key: str | None,
    certificate_chain: Path | None,
    keyless: bool,
    identity_token: Path | None,
    trust_config: Path | None,
    formats: tuple[str, ...],
    local: bool,
    remote: RemoteOptions,
) -> None:
    """Sign the model REFERENCE in its registry with a key or keyless; print the model's digest.

    The signature covers the manifest, which holds the digests of all files. For a model with
    variants, the index and each variant are signed. COSIGN_PASSWORD in the environment is the
    password of the key, COSIGN_PKCS11_PIN the PIN of a token.
    """
    from modelpack.operations.signatures import sign as sign_model
    from modelpack.trust.certificates import CertifiedKey
    from modelpack.trust.keyless import KeylessSigner, read_token
    from modelpack.trust.signatures import SignatureKind

    if (key is not None) is keyless:
        raise click.UsageError("expected either --key or --keyless")
    if not keyless and (identity_token is not None or trust_config is not None):
        raise click.UsageError("--identity-token and --trust-config require --keyless")
    if keyless and certificate_chain is not None:
        raise click.UsageError("--certificate-chain requires --key")
    where = subject_to_name(settings, reference)
    signer: PrivateKey | CertifiedKey | KeylessSigner
    if key is not None:
        signer = private_key(key)
        if certificate_chain is not None:
            signer = CertifiedKey.of(signer, certificate_chain)
    else:
        token = read_token(identity_token) if identity_token is not None else None
        signer = KeylessSigner.open(trust_config, token)
    done = sign_model(
        where,
        signer,
        kinds=[SignatureKind(name) for name in formats],
        store=settings.existing_store() if local else None,
        remote=remote,
    )
    of = f" and {len(done.variants)} variants" if done.variants else ""
    certified = signer.certified if isinstance(signer, KeylessSigner) else None
    by = f" as {certified}" if certified is not None else ""
    kinds = ", ".join(done.manifests or done.variants[0].manifests)
    note(settings, f"signed {where}{of}{by}: {kinds}")
    value: dict[str, Any] = {
        "reference": str(where),
        "digest": str(done.digest),
        "signatures": {str(kind): str(digest) for kind, digest in done.manifests.items()},
    }
    if done.variants:
        value["variants"] = [str(one.digest) for one in done.variants]
    show(settings, value, str(done.digest))


@command()
@model_argument("reference")
@click.option(
    "--key", "keys", multiple=True, metavar="PUB",
    help="Require a signature by this public key: a file, or the URI of a key in a token. May be "
    "repeated: all are required.",
)  # fmt: skip
@authority_option
@identity_options
@click.option(
    "--format", "formats", type=click.Choice((*_ACCEPTED, "provenance")), multiple=True,
    help="Accept only signatures of this format. May be repeated. model-signing-files is the "
    "format of OpenSSF's tool, which covers only the files; provenance is that of `package`. "
    "[default: all that cover the manifest]",
)  # fmt: skip
@LOCAL
@remote_options
@common_options_without("progress")
def verify(
    settings: Settings,
    reference: str,
    keys: tuple[str, ...],
    authorities: tuple[str, ...],
    identity: Identity | None,
    formats: tuple[str, ...],
    local: bool,
    remote: RemoteOptions,
) -> None:
    """Check that the model REFERENCE is signed; print the model's digest.

    An id means the stored model.
    Verifies the signed digests without reading files; run `fsck` to verify stored files. Exit code
    5: the model is not signed, or not by that key, authority or identity.
    """
    from modelpack.operations.signatures import verify as verify_model
    from modelpack.trust.certificates import Authority
    from modelpack.trust.pkcs11 import public_key_of
    from modelpack.trust.signatures import SignatureKind, Signer

    if not keys and not authorities and identity is None:
        raise click.UsageError("expected --key, --certificate-authority or --certificate-identity")
    where, store = named_subject(settings, reference, local=local)
    signers: list[Signer] = [public_key_of(key) for key in keys]
    signers += [Authority.read(path) for path in authorities]
    if identity is not None:
        signers.append(identity)
    model, found = verify_model(
        where,
        signers,
        formats=[SignatureKind(name) for name in formats],
        store=store,
        remote=remote,
    )
    signatures = [
        {**_signer_of(one), "format": str(one.kind), "manifest": str(one.manifest.digest)}
        for one in found.signatures
    ]
    for one in found.signatures:
        note(settings, f"signed by {one.certified or one.signer.name}: {one.kind}")
    name = None if isinstance(where, str) else str(where)
    value = {"reference": name, "digest": str(model.digest), "signatures": signatures}
    show(settings, value, str(model.digest))


def _signer_of(signature: Signature) -> dict[str, Any]:
    """Return the fields of the signer of a signature, for --json."""
    if signature.certified is not None:
        return {"identity": signature.certified.identity, "issuer": signature.certified.issuer}
    from modelpack.trust.keys import PublicKey

    signer = signature.signer
    if isinstance(signer, PublicKey):
        return {"key": signer.name, "fingerprint": signer.fingerprint}
    return {"authority": signer.name}


@command()
@model_argument("model")
@click.option("--attach", is_flag=True, help="Attach the SBOM to the model.")
@REMOTE
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the SBOM to FILE. [default: print it, unless it is attached]",
)  # fmt: skip
@remote_options
@common_options_without("progress")
def sbom(
    settings: Settings,
    model: str,
    attach: bool,
    in_registry: bool,
    output: Path | None,
    remote: RemoteOptions,
) -> None:
    """Write the SBOM of MODEL as CycloneDX 1.6: files, digests, licence, base models.

    The same model gives the same bytes. With --attach, print the digest of the referrer.
    """
    from modelpack.operations.sbom import sbom as make_sbom

    done = make_sbom(
        model,
        attach=attach,
        store=None if in_registry else settings.existing_store(),
        remote=remote,
        from_registry=in_registry,
    )
    if output is not None:
        output.write_bytes(done.document)
    if done.attached is not None:
        note(settings, f"attached to {done.reference or done.digest}")
        value = {"subject": str(done.digest), "digest": str(done.attached)}
        show(settings, value, str(done.attached))
    elif output is None:
        click.echo(done.document.decode(), nl=False)


@command()
@model_argument("model")
@click.option(
    "--policy", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Check the rules of this TOML file. [default: all rules except names]",
)  # fmt: skip
@REMOTE
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "sarif"]), default="text",
    show_default=True, help="Print the findings in this format; --json is the same as json.",
)  # fmt: skip
@remote_options
@common_options_without("quiet", "progress")
def lint(
    settings: Settings,
    model: str,
    policy: Path | None,
    in_registry: bool,
    form: str,
    remote: RemoteOptions,
) -> int:
    """Check MODEL, or a directory, by the rules of a catalogue.

    Checks name, licence, metadata, chat template and context size, and the files for pickles,
    secrets and paths. Exit code 0: no errors, 1: errors found, 2: check failed.
    """
    from modelpack.lint.checks import to_sarif
    from modelpack.lint.policy import LintPolicy, read_policy
    from modelpack.operations.lint import lint as lint_model

    settings.failure_code = 2
    rules = read_policy(policy) if policy is not None else LintPolicy()
    report = lint_model(
        model,
        rules,
        _render,
        store=None if in_registry or Path(model).is_dir() else settings.existing_store(),
        remote=remote,
        from_registry=in_registry,
    )
    if form == "sarif":
        click.echo(json.dumps(to_sarif(report.name, report.findings), indent=2))
    elif form == "json" or settings.json:
        show_json(
            {
                "name": report.name,
                "passed": report.passed,
                "findings": [finding.to_json() for finding in report.findings],
            }
        )
    else:
        count = plural(len(report.findings), "finding")
        lines = [*(visible(str(finding)) for finding in report.findings), f"{report.name}: {count}"]
        show(settings, {}, "\n".join(lines))
    return 0 if report.passed else 1


def _render(source: str, variables: Mapping[str, Any]) -> str:
    try:
        chat_template = load_function("chat_template")
    except ModuleNotFoundError as error:
        raise ModelpackError(
            f"cannot render the chat template: {error.name} is not installed",
            hint="run pip install 'modelpack[engine]', or disable the rule `template`",
        ) from None
    assert chat_template is not None
    return str(chat_template(source).render(variables))
