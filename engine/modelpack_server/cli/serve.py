"""`modelpack serve`: models of the store answer over HTTP."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.options import (
    Settings,
    common_options,
    model_names,
    remote_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import note
from modelpack.cli.progress import shown_progress
from modelpack.cli.request_log import request_log
from modelpack.cli.sizes import parse_size
from modelpack.cli.tls import tls_options
from modelpack.errors import UsageError
from modelpack.hub.reference import local_name
from modelpack.operations.remote import RemoteOptions
from modelpack_server.cli.engine_options import engine_options
from modelpack_server.cli.gateway import protection_options
from modelpack_server.cli.ranks import is_parallel, join_ranks
from modelpack_server.cli.speculation_options import pull_draft

if TYPE_CHECKING:
    from modelpack_server.gateway.protecting import Protection


def _open(settings: Settings, model: str, remote: RemoteOptions) -> Any:
    from modelpack_server import open_model

    with shown_progress(settings) as progress:
        return open_model(model, store=settings.store(), remote=remote, progress=progress)


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=12434, show_default=True,
    help="The port; 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--served-model-name", metavar="NAME", help="What clients call the first MODEL, besides MODEL."
)
@protection_options
@tls_options
@click.option("--preset", help="Settings for a use: code, chat, creative or long-context.")
@click.option(
    "--keep-alive", metavar="TIME", default="5m", show_default=True,
    help="How long a model that is not named here stays loaded after its last use; -1: for ever.",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", help="What all models together may take, like 24GiB.")
@click.option(
    "--runtime-flags", metavar="FLAGS",
    help="Flags for all models, as llama.cpp or vLLM have them: '--temp 0.7 --ctx-size 8192'.",
)  # fmt: skip
@click.option(
    "--tensor-parallel-size", type=click.IntRange(min=1), metavar="N",
    help="Divide each model between N GPUs of this machine, or between the ranks of mlx.launch.",
)  # fmt: skip
@click.option(
    "--allow-request-templates", is_flag=True,
    help="Let admins send chat templates with requests: callers with a key for all models, or on "
    "this machine where there are no keys.",
)  # fmt: skip
@click.option(
    "--share-prefix-cache", is_flag=True,
    help="Let requests of different API keys share prefixes in the KV cache.",
)  # fmt: skip
@partial(engine_options, others=("vllm",))
@remote_options
@trust_options
@variant_option
@common_options
def serve(
    settings: Settings,
    models: tuple[str, ...],
    host: str,
    port: int,
    served_model_name: str | None,
    protection: Callable[[str], Protection],
    tls: tuple[Path, Path] | None,
    preset: str | None,
    keep_alive: str,
    memory: str | None,
    runtime_flags: str | None,
    tensor_parallel_size: int | None,
    allow_request_templates: bool,
    share_prefix_cache: bool,
    config: Callable[[], Any] | None,
    remote: RemoteOptions,
) -> int:
    """Serve the models of the store, from its blobs there; print the address.

    Each MODEL is pulled where the store lacks it, loaded at once, and stays loaded; /health says
    503 until all are. Any other model of the store is loaded when a request names it, and unloaded
    when it has not been used for a while.
    """
    if served_model_name and not models:
        raise UsageError("--served-model-name names a MODEL, and none is given")
    if config is None:
        from modelpack_server.cli.serve_vllm import exec_vllm

        protection(host)  # an address that others can reach is a decision here, too
        exec_vllm(
            settings,
            models,
            host,
            port,
            served_model_name,
            _words(runtime_flags or ""),
            tls,
            replace(remote, backend="vllm"),
        )
    from modelpack_server.api.model_server import ModelServer
    from modelpack_server.gateway.protecting import protect
    from modelpack_server.pool.device_memory import device_memory
    from modelpack_server.pool.keep_alive import parse_keep_alive
    from modelpack_server.pool.pool import ModelPool
    from modelpack_server.pool.settings import ModelSettings
    from modelpack_server.pool.store_catalogue import StoreCatalogue

    # What is wrong with the options is told before anything is pulled.
    protected_by = protection(host)
    chosen = ModelSettings(preset=preset, runtime_flags=_words(runtime_flags or ""))
    chosen.check()
    seconds = parse_keep_alive(keep_alive)
    size = parse_size(memory) if memory else None
    engine = config()
    if engine.backend != "auto":
        remote = replace(remote, backend=engine.backend)
    # By id: the name may stand for several variants, of which this is the one.
    opened = {local_name(model): _open(settings, model, remote).model for model in models}
    pull_draft(engine, settings.store(), settings, remote)
    ranks = None
    if is_parallel(tensor_parallel_size):
        joined = join_ranks(settings, tensor_parallel_size or 1, engine)
        if isinstance(joined, int):
            return joined
        ranks = joined
    budget = size or device_memory(engine)

    def pool() -> ModelPool:
        made = ModelPool(
            StoreCatalogue(settings.store(), engine, ranks, remote),
            settings=chosen,
            memory=budget,
            keep_alive=seconds,
        )
        for name, model in opened.items():
            if settings.store().resolve(name).digest == model.digest:
                made.pin(name)
            else:
                made.pin(str(model.digest))
                made.alias(name, str(model.digest))
        if served_model_name:
            made.alias(served_model_name, str(next(iter(opened.values())).digest))
        return made

    with request_log(settings):
        server = ModelServer(
            pool,
            address=f"{_bracketed(host)}:{port}",
            allow_remote=True,  # `Protection` has seen to it that keys are asked for
            max_body_bytes=protected_by.max_body,
            request_templates=allow_request_templates,
            share_prefix_cache=share_prefix_cache,
            wrap=lambda app: protect(app, protected_by, resolves=True),
            tls=tls,
        )
        note(settings, f"serving {', '.join(models) or 'the store'}; stop with Ctrl-C")
        server.run(lambda: click.echo(server.url))
    if ranks is not None:
        ranks.close()
    return 0


def _words(flags: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise UsageError(f"--runtime-flags: {error}") from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
