"""Options that commands share: store, JSON, progress, registries, trust, TLS of servers, sizes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from modelpack.errors import UsageError

if TYPE_CHECKING:
    from modelpack.operations.remote import RemoteOptions
    from modelpack.store.layout import LayoutStore
    from modelpack.trust.keyless import Identity

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes of a size like 24GiB (powers of 1024), 8G (of 1000) or 4096."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is not a size", hint="give a size like 24GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


class _Size(click.ParamType[int]):
    """A number of bytes, like 64MiB, 10MB or 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_size(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)
        if size < 1:
            self.fail(f"{value!r} is less than one byte", param, ctx)
        return size


SIZE = _Size()


F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


class SharedOption(click.Option):
    """An option that several commands have; in help, it is listed under `heading`."""

    def __init__(self, *arguments: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.heading = heading


REGISTRIES: Final = "Registries"
SIGNATURES: Final = "Signatures and variants"
ALL_COMMANDS: Final = "All commands"

_registry_option = partial(click.option, cls=SharedOption, heading=REGISTRIES)
_trust_option = partial(click.option, cls=SharedOption, heading=SIGNATURES)
_common_option = partial(click.option, cls=SharedOption, heading=ALL_COMMANDS)


@dataclass(slots=True)
class Settings:
    """Values of the common options, merged from the group and the command."""

    store_root: str | None = None
    json: bool = False
    debug: bool = False
    quiet: bool = False
    progress: str = "auto"
    #: The exit code of "any other failure", for commands whose exit code 1 has another meaning.
    failure_code: int = 1
    #: Whether the command, after an interrupt, continues where it stopped if it is run again.
    resumes: bool = False
    #: The options of the command as typed, by their names in Python, if these have several words.
    options: dict[str, str] = field(default_factory=dict)

    def store(self) -> LayoutStore:
        """Return the local store; create it if it does not exist."""
        from modelpack.store.layout import LayoutStore

        return LayoutStore(self.store_root)

    def existing_store(self) -> LayoutStore:
        """Return the local store for a command that adds nothing to it.

        A missing store raises `StoreError` if --store names it; the default store is empty then.
        """
        from modelpack.store.layout import LayoutStore

        if self.store_root is None:
            return LayoutStore(lazy=True)
        return LayoutStore(self.store_root, create=False)


_COMMON: Final = {
    "store": _common_option(
        "--store", metavar="DIR", type=click.Path(file_okay=False, readable=False),
        help="Use this local store. [env: MODELPACK_STORE; default: in the user's data directory]",
    ),
    "json": _common_option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    "quiet": _common_option("-q", "--quiet", is_flag=True, help="Do not show progress or notes."),
    "progress": _common_option(
        "--progress", type=click.Choice(["auto", "bars", "plain", "none"]),
        help="Show progress in this form. [default: bars on a terminal, else a line every 5 s]",
    ),
    "debug": _common_option("--debug", is_flag=True, help="Show tracebacks."),
}  # fmt: skip


def common_options_without(*left_out: str) -> Callable[[F], F]:
    """Return a decorator that adds the common options that act; the command gets `settings`.

    `left_out` names those that do not: "store", "json", "quiet" or "progress".
    """
    unknown = set(left_out) - _COMMON.keys()
    assert not unknown, unknown

    def decorate(command: F) -> F:
        @click.pass_obj
        @functools.wraps(command)
        def wrapped(settings: Settings, /, debug: bool, **arguments: Any) -> Any:
            given = {name: arguments.pop(name, None) for name in _VALUES}
            settings.store_root = given["store"] or settings.store_root
            settings.json |= bool(given["as_json"])
            settings.quiet |= bool(given["quiet"])
            settings.debug |= debug
            settings.progress = given["progress"] or settings.progress
            settings.options = {
                param.name: typed_name(param)
                for param in click.get_current_context().command.params
                if isinstance(param, click.Option) and param.name and "_" in param.name
            }
            if "context_size" in settings.options:  # whose name in the engine is this
                settings.options["max_model_len"] = settings.options["context_size"]
            return command(settings, **arguments)

        made: Any = wrapped
        for name in reversed(_COMMON):
            if name not in left_out:
                made = _COMMON[name](made)
        return made  # type: ignore[no-any-return]

    return decorate


#: Add the options of a command with a store, a result, notes and progress.
common_options = common_options_without()
_VALUES: Final = ("store", "as_json", "quiet", "progress")


def checked(check: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that gives an option's value to `check`, whose errors then name the option.

    The value that `check` returns is dropped: the library checks again, and converts.
    """

    def callback(_: click.Context, option: click.Parameter, value: Any) -> Any:
        if value:
            try:
                check(value)
            except UsageError as error:
                raise UsageError(f"{typed_name(option)}: {error}", hint=error.hint) from error
        return value

    return callback


def typed_name(option: click.Parameter) -> str:
    """Return the name of an option as help shows it first: --url of --url/--host."""
    return next((name for name in option.opts if name.startswith("--")), option.opts[0])


def remote_options(command: F) -> F:
    """Add the options of registry connections; the command gets `remote`, a `RemoteOptions`."""

    @_registry_option(
        "--plain-http/--https",
        default=None,
        help="Use http or https. [default: http for loopback addresses; env: INSECURE_REGISTRY]",
    )
    @_registry_option(
        "--insecure", metavar="HOST", multiple=True,
        help="Skip the certificate check of HOST[:PORT], and allow credentials over plain http. "
        "May be repeated.",
    )  # fmt: skip
    @_registry_option(
        "--allow-private", metavar="HOST", multiple=True,
        help="Let redirects, upload locations and token servers of public registries use "
        "HOST[:PORT] on a private address. May be repeated. "
        "[env: MODELPACK_ALLOW_PRIVATE]",
    )  # fmt: skip
    @_registry_option(
        "--ca-file",
        type=_FILE,
        help="Trust the certificate authorities in this file, besides the system's.",
    )
    @_registry_option(
        "--client-cert", type=_FILE, help="Authenticate with this client certificate."
    )
    @_registry_option(
        "--client-key", type=_FILE, help="Read the key of --client-cert from this file."
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        insecure: tuple[str, ...],
        allow_private: tuple[str, ...],
        ca_file: Path | None,
        client_cert: Path | None,
        client_key: Path | None,
        plain_http: bool | None,
        **arguments: Any,
    ) -> Any:
        from modelpack.operations.remote import RemoteOptions

        if client_key and not client_cert:
            raise click.UsageError("--client-key requires --client-cert")
        tls = None
        if insecure or allow_private or ca_file or client_cert:
            from modelpack.registry import TlsOptions

            hosts = frozenset(insecure), frozenset(allow_private)
            tls = TlsOptions(ca_file, client_cert, client_key, *hosts)
        return command(*args, remote=RemoteOptions(plain_http, tls=tls), **arguments)

    return wrapped  # type: ignore[return-value]


#: Names for `transfer_options`.
DOWNLOAD: Final = ("concurrency", "connections", "limit_rate")
UPLOAD: Final = ("concurrency", "chunk_size", "limit_rate")
BOTH: Final = ("concurrency", "connections", "chunk_size", "limit_rate")


def transfer_options(*names: str) -> Callable[[F], F]:
    """Return a decorator that adds the options of transfers; they set fields of `remote`.

    Apply it below `remote_options`; `names` are those of the fields.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def wrapped(*args: Any, remote: RemoteOptions, **arguments: Any) -> Any:
            given = {name: arguments.pop(name) for name in names}
            return command(*args, remote=replace(remote, **given), **arguments)

        made: Any = wrapped
        table = _transfer_table()
        for name in reversed(names):
            made = table[name](made)
        return made  # type: ignore[no-any-return]

    return decorate


def _transfer_table() -> dict[str, Callable[[Any], Any]]:
    from modelpack.operations.remote import DEFAULT_CONCURRENCY, DEFAULT_CONNECTIONS

    return {
        "concurrency": _registry_option(
            "--concurrency", type=click.IntRange(1, 64), default=DEFAULT_CONCURRENCY,
            show_default=True,
            help="Transfer this many blobs in parallel.",
        ),
        "connections": _registry_option(
            "--connections", type=click.IntRange(1, 32), default=DEFAULT_CONNECTIONS,
            show_default=True,
            help="Use up to this many connections for a large blob, if one is slow.",
        ),
        "chunk_size": _registry_option(
            "--chunk-size", metavar="SIZE", type=SIZE,
            help="Upload blobs in chunks of SIZE, like 64MiB. [default: upload whole blobs, unless "
            "the registry requires chunks]",
        ),
        "limit_rate": _registry_option(
            "--limit-rate", metavar="SIZE", type=SIZE,
            help="Limit uploads and downloads to SIZE per second, like 10MB.",
        ),
    }  # fmt: skip


#: Add `--certificate-authority`; the command gets the files as `authorities`.
authority_option = _trust_option(
    "--certificate-authority", "authorities", metavar="PEM", multiple=True,
    help="Require a signature with a certificate that this authority issued, by OpenSSF model "
    "signing. May be repeated, like keys.",
)  # fmt: skip


def identity_options(command: F) -> F:
    """Add the options of a keyless signer; the command gets an `Identity` or None as `identity`."""

    @_trust_option(
        "--certificate-identity", metavar="ID",
        help="Require a keyless signature whose certificate is for this identity: an email address "
        "or a URI, such as that of a workflow. Needs an issuer.",
    )  # fmt: skip
    @_trust_option(
        "--certificate-identity-regexp", metavar="REGEXP",
        help="The same for all identities that this regular expression matches as a whole.",
    )  # fmt: skip
    @_trust_option(
        "--certificate-oidc-issuer", metavar="URL",
        help="Require that this issuer of OIDC tokens has confirmed the identity.",
    )  # fmt: skip
    @_trust_option(
        "--certificate-oidc-issuer-regexp", metavar="REGEXP",
        help="The same for all issuers that this regular expression matches as a whole.",
    )  # fmt: skip
    @_trust_option(
        "--trusted-root", type=_FILE, metavar="FILE",
        help="Verify certificates and log entries by this trusted_root.json. [default: the TUF "
        "cache of sigstore's library, for the public instance]",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        certificate_identity: str | None,
        certificate_identity_regexp: str | None,
        certificate_oidc_issuer: str | None,
        certificate_oidc_issuer_regexp: str | None,
        trusted_root: Path | None,
        **arguments: Any,
    ) -> Any:
        identity: Identity | None = None
        who = certificate_identity, certificate_identity_regexp
        issuer = certificate_oidc_issuer, certificate_oidc_issuer_regexp
        if {*who, *issuer} != {None}:
            from modelpack.trust.keyless import Identity, TrustedRoot, exact_or_pattern

            identity = Identity(
                exact_or_pattern(*who, "--certificate-identity"),
                exact_or_pattern(*issuer, "--certificate-oidc-issuer"),
                TrustedRoot.read(trusted_root),
            )
        elif trusted_root is not None:
            raise click.UsageError("--trusted-root requires --certificate-identity")
        return command(*args, identity=identity, **arguments)

    return wrapped  # type: ignore[return-value]


def trust_options(command: F) -> F:
    """Add the options that require signatures; they set `trust` in `remote`.

    Apply it below `remote_options`.
    """

    @_trust_option(
        "--verify-key", "keys", metavar="PUB", multiple=True,
        help="Require a signature by this public key. May be repeated: any one is enough.",
    )  # fmt: skip
    @_trust_option(
        "--verify-format", "formats", multiple=True,
        type=click.Choice(["cosign", "bundle", "model-signing", "model-signing-files"]),
        help="Accept only signatures of this format for keys, authorities and identities. "
        "May be repeated. [default: all that cover the manifest, so not model-signing-files]",
    )  # fmt: skip
    @authority_option
    @identity_options
    @_trust_option(
        "--policy", type=_FILE, envvar="MODELPACK_POLICY", metavar="FILE", show_envvar=True,
        help="Require the signatures that this policy file specifies.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        keys: tuple[str, ...],
        formats: tuple[str, ...],
        authorities: tuple[str, ...],
        identity: Identity | None,
        policy: Path | None,
        remote: RemoteOptions,
        **arguments: Any,
    ) -> Any:
        named = bool(keys or authorities or identity is not None)
        if formats and not named:
            raise click.UsageError(
                "--verify-format requires --verify-key, --certificate-authority or "
                "--certificate-identity"
            )
        if named or policy is not None:
            from modelpack.trust.certificates import Authority
            from modelpack.trust.pkcs11 import public_key_of
            from modelpack.trust.policy import Trust
            from modelpack.trust.signatures import SignatureKind, Signer

            accepted = [SignatureKind(name) for name in formats]
            signers: list[Signer] = [public_key_of(key) for key in keys]
            signers += [Authority.read(path) for path in authorities]
            if identity is not None:
                signers.append(identity)
            remote = replace(remote, trust=Trust.of(signers, policy, accepted))
        return command(*args, remote=remote, **arguments)

    return wrapped  # type: ignore[return-value]


def variant_option(command: F) -> F:
    """Add `--variant`, which sets `variant` in `remote`; apply it below `remote_options`."""

    @_trust_option(
        "--variant",
        metavar="NAME",
        help="Use this variant of a model with several. [default: the best for this machine]",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, variant: str | None, remote: RemoteOptions, **arguments: Any) -> Any:
        if variant is not None:
            remote = replace(remote, variant=variant)
        return command(*args, remote=remote, **arguments)

    return wrapped  # type: ignore[return-value]


def tls_options(command: F) -> F:
    """Add the TLS options of a server; the command gets the certificate and key files as `tls`."""

    @click.option(
        "--tls-cert", type=_FILE, metavar="FILE", help="Serve https with this certificate."
    )
    @click.option(
        "--tls-key", type=_FILE, metavar="FILE", help="Read the key of --tls-cert from this file."
    )
    @functools.wraps(command)
    def wrapped(*args: Any, tls_cert: Path | None, tls_key: Path | None, **arguments: Any) -> Any:
        if tls_key and not tls_cert:
            raise click.UsageError("--tls-key requires --tls-cert")
        tls = (tls_cert, tls_key or tls_cert) if tls_cert else None
        return command(*args, tls=tls, **arguments)

    return wrapped  # type: ignore[return-value]


def stop_options(command: F) -> F:
    """Add the options of how a server stops; the command gets seconds as `drain` and `grace`."""
    for option in (
        click.option(
            "--stop-timeout", "grace", type=click.IntRange(min=0), metavar="SECONDS", default=30,
            show_default=True, help="Give running requests this long to finish on a stop.",
        ),
        click.option(
            "--drain", type=click.IntRange(min=0), metavar="SECONDS", default=0, show_default=True,
            help="Go on accepting requests this long after SIGTERM, each on a new connection.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def model_names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of stored models that start with `incomplete`, for shell completion."""
    from modelpack.errors import ModelpackError
    from modelpack.store.layout import LayoutStore

    root = ctx.params.get("store") or (ctx.parent.params.get("store") if ctx.parent else None)
    try:
        models = LayoutStore(root, create=False).models()
    except ModelpackError:
        return []
    names = {ref.familiar for model in models for ref in model.references}
    names |= {str(ref) for model in models for ref in model.references}
    if ":" in incomplete.rpartition("/")[2]:  # the shortest names leave out the tag `latest`
        references = [ref for model in models for ref in model.references]
        names |= {f"{ref.familiar}:latest" for ref in references if ref.tag == "latest"}
    return sorted(name for name in names if name.startswith(incomplete))


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        pairs[key] = text
    return pairs


def annotation_option(what: str) -> Callable[[F], F]:
    """Return `--annotation`; the command gets a dictionary as `annotations`."""
    return click.option(
        "--annotation", "annotations", metavar="KEY=VALUE", multiple=True, callback=_pairs,
        help=f"Add an annotation to the {what}. May be repeated.",
    )  # fmt: skip


#: Read a model from its registry instead of the store; the command gets `in_registry`.
REMOTE = click.option("-r", "--remote", "in_registry", is_flag=True, help="Read from the registry.")


def model_argument(name: str = "model", **attributes: Any) -> Callable[[F], F]:
    """Return an argument for a model name, with shell completion of stored models."""
    attributes.setdefault("metavar", name.upper())
    return click.argument(name, shell_complete=model_names, **attributes)
