"""Numbers of bytes, as people type them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelpack.errors import UsageError

if TYPE_CHECKING:
    from modelpack.operations.remote import RemoteOptions
    from modelpack.store.layout import LayoutStore

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return bytes of a size like 24GiB, 8G (1000s) or a bare number; raises `UsageError`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no size", hint="like 24GiB")
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
            self.fail(f"{value!r} is nothing", param, ctx)
        return size


SIZE = _Size()


F = TypeVar("F", bound=Callable[..., Any])

_PEM = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(slots=True)
class Settings:
    """What the shared options say; the group's and the command's own are merged."""

    store_root: str | None = None
    json: bool = False
    debug: bool = False
    quiet: bool = False
    progress: str = "auto"
    #: The exit code of "any other failure", for a command to which 1 means something else.
    failure_code: int = 1

    def store(self) -> LayoutStore:
        """Return the store to work on; it is made when it does not exist."""
        from modelpack.store.layout import LayoutStore

        return LayoutStore(self.store_root)


def common_options(command: F) -> F:
    """Add the options that every command has; the command gets them as `settings`."""

    @click.option(
        "--store",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="The local store. [env: MODELPACK_STORE; default: in the platform's data directory]",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Show no progress and no notes.")
    @click.option(
        "--progress",
        type=click.Choice(["auto", "bars", "plain", "none"]),
        help="How to show progress. [default: bars on a terminal, else notes only]",
    )
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @click.pass_obj
    @functools.wraps(command)
    def wrapped(
        settings: Settings,
        /,
        store: str | None,
        as_json: bool,
        quiet: bool,
        progress: str | None,
        debug: bool,
        **arguments: Any,
    ) -> Any:
        settings.store_root = store or settings.store_root
        settings.json |= as_json
        settings.quiet |= quiet
        settings.debug |= debug
        settings.progress = progress or settings.progress
        return command(settings, **arguments)

    return wrapped  # type: ignore[return-value]


def remote_options(command: F) -> F:
    """Add the options of commands that talk to a registry; they get them as `remote`."""

    @click.option(
        "--plain-http/--https",
        default=None,
        help="Use http, or https. [default: http for loopback addresses; env: INSECURE_REGISTRY]",
    )
    @click.option(
        "--insecure",
        metavar="HOST",
        multiple=True,
        help="Do not check the certificate of HOST[:PORT], and send it credentials over plain http "
        "too. May be repeated.",
    )
    @click.option(
        "--allow-private",
        metavar="HOST",
        multiple=True,
        help="Let registries on public addresses lead to HOST[:PORT] on a private one, by "
        "redirects, upload locations and token servers. May be repeated. "
        "[env: MODELPACK_ALLOW_PRIVATE]",
    )
    @click.option("--ca-file", type=_PEM, help="Trust these authorities besides the system's.")
    @click.option("--client-cert", type=_PEM, help="Show the registry this certificate.")
    @click.option("--client-key", type=_PEM, help="Its key, if that is in another file.")
    @click.option(
        "--concurrency",
        type=click.IntRange(1, 64),
        default=4,
        show_default=True,
        help="Blobs transferred at a time.",
    )
    @click.option(
        "--connections",
        type=click.IntRange(1, 32),
        default=4,
        show_default=True,
        help="Connections over which a large blob is fetched, where one is slow.",
    )
    @click.option(
        "--chunk-size",
        metavar="SIZE",
        type=SIZE,
        help="Send blobs in chunks of SIZE, like 64MiB; otherwise each goes in one piece, unless "
        "the registry wants chunks.",
    )
    @click.option(
        "--limit-rate",
        metavar="SIZE",
        type=SIZE,
        help="Send and fetch no more than SIZE a second, like 10MB.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        plain_http: bool | None,
        insecure: tuple[str, ...],
        allow_private: tuple[str, ...],
        ca_file: Path | None,
        client_cert: Path | None,
        client_key: Path | None,
        concurrency: int,
        connections: int,
        chunk_size: int | None,
        limit_rate: int | None,
        **arguments: Any,
    ) -> Any:
        from modelpack.operations.remote import RemoteOptions

        if client_key and not client_cert:
            raise click.UsageError("--client-key needs --client-cert")
        tls = None
        if insecure or allow_private or ca_file or client_cert:
            from modelpack.registry import TlsOptions

            hosts = frozenset(insecure), frozenset(allow_private)
            tls = TlsOptions(ca_file, client_cert, client_key, *hosts)
        remote = RemoteOptions(
            plain_http=plain_http,
            tls=tls,
            concurrency=concurrency,
            connections=connections,
            chunk_size=chunk_size,
            limit_rate=limit_rate,
        )
        return command(*args, remote=remote, **arguments)

    return wrapped  # type: ignore[return-value]


def trust_options(command: F) -> F:
    """Add the options that say who has to have signed a model; they go into `remote`.

    Stands below `remote_options`.
    """

    @click.option(
        "--verify-key", "keys", metavar="PUB", multiple=True,
        help="Take no model that is not signed by this public key. May be repeated: any of them.",
    )  # fmt: skip
    @click.option(
        "--verify-format", "formats", multiple=True,
        type=click.Choice(["cosign", "bundle", "model-signing", "model-signing-files"]),
        help="Of --verify-key, accept signatures of this format only. May be repeated. "
        "[default: all that cover the manifest: not model-signing-files]",
    )  # fmt: skip
    @click.option(
        "--policy", type=_PEM, envvar="MODELPACK_POLICY", metavar="FILE", show_envvar=True,
        help="Take no model that is not signed as this file says.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        keys: tuple[str, ...],
        formats: tuple[str, ...],
        policy: Path | None,
        remote: RemoteOptions,
        **arguments: Any,
    ) -> Any:
        if formats and not keys:
            raise click.UsageError("--verify-format needs --verify-key")
        if keys or policy is not None:
            from modelpack.trust.keys import read_public_key
            from modelpack.trust.policy import Trust
            from modelpack.trust.signatures import SignatureKind

            accepted = [SignatureKind(name) for name in formats]
            trust = Trust.of([read_public_key(key) for key in keys], policy, accepted)
            remote = replace(remote, trust=trust)
        return command(*args, remote=remote, **arguments)

    return wrapped  # type: ignore[return-value]


def variant_option(command: F) -> F:
    """Add `--variant`; it stands right below `remote_options`, into whose result it goes."""

    @click.option(
        "--variant",
        metavar="NAME",
        help="Of a model in several variants, this one. [default: what this machine runs best]",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, variant: str | None, remote: RemoteOptions, **arguments: Any) -> Any:
        if variant is not None:
            remote = replace(remote, variant=variant)
        return command(*args, remote=remote, **arguments)

    return wrapped  # type: ignore[return-value]


def model_names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the stored models that complete what was typed, for the shell."""
    from modelpack.errors import ModelpackError
    from modelpack.store.layout import LayoutStore

    root = ctx.params.get("store") or (ctx.parent.params.get("store") if ctx.parent else None)
    try:
        models = LayoutStore(root, create=False).models()
    except ModelpackError:
        return []
    names = {ref.familiar for model in models for ref in model.references}
    names |= {str(ref) for model in models for ref in model.references}
    return sorted(name for name in names if name.startswith(incomplete))


def annotation_pairs(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """Return what repeated `--annotation KEY=VALUE` options say."""
    pairs = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        pairs[key] = text
    return pairs


def model_argument(name: str = "model", **attributes: Any) -> Callable[[F], F]:
    """Return an argument that takes a model's name and completes stored ones."""
    return click.argument(name, metavar=name.upper(), shell_complete=model_names, **attributes)
