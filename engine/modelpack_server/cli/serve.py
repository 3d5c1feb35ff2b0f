"""`modelpack serve`: serve models with our engine, with tensor-parallel ranks, or with vLLM."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from modelpack.cli.help import command
from modelpack.cli.options import (
    DOWNLOAD,
    SIZE,
    Settings,
    common_options,
    model_names,
    remote_options,
    stop_options,
    tls_options,
    transfer_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import human_size, note, request_log, show_error, shown_progress
from modelpack.deploy.local_server import PORT
from modelpack.errors import ModelpackError, UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack.store.tree import Tree
from modelpack_server.cli.engine_options import (
    ENGINE_HEADINGS,
    MORE_OPTIONS,
    adapter_option,
    engine_options,
    merge_option,
    preset_option,
    pull_draft,
)
from modelpack_server.cli.gateway import announce, protection_options
from modelpack_server.cli.load_display import LoadDisplay
from modelpack_server.cli.logs import LogFormat, log_format_option, serving_log
from modelpack_server.cli.model_sources import ModelSources
from modelpack_server.pool.adapters import DEFAULT_MAX_ADAPTERS, Adapters
from modelpack_server.pool.settings import DEFAULT_KEEP_ALIVE, ModelSettings, parse_keep_alive

if TYPE_CHECKING:
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.distributed.leader import Ranks
    from modelpack_server.gateway.protection import Protection
    from modelpack_server.pool.pool import ModelPool


def is_parallel(size: int | None) -> bool:
    """Return whether to use several ranks; raise `UsageError` under mlx.launch without a size."""
    if size is None and os.environ.get("MLX_RANK", "0") != "0":
        raise UsageError(
            f"this is rank {os.environ['MLX_RANK']} of several (MLX_RANK)",
            hint="give --tensor-parallel-size, or start one process without mlx.launch",
        )
    return size is not None and size > 1


def has_own_process(given: bool | None, config: EngineConfig, ranks: Ranks | None) -> bool:
    """Return whether engines run in processes of their own: if `given`, or on an NVIDIA GPU."""
    if given is not None or ranks is not None:
        return bool(given)
    from modelpack_engine.platform import blas

    blas.prepare()  # must run before MLX is imported
    from modelpack_engine.platform.device import uses_cuda

    return uses_cuda(config)


def join_ranks(
    settings: Settings, size: int, config: EngineConfig, adapters: Adapters
) -> Ranks | int:
    """Return the ranks if this process is rank 0, else an exit code.

    `adapters` has those to merge into their models. The process that launches the ranks returns
    when all have exited; ranks other than 0 return when rank 0 is done.
    """
    from modelpack_engine.platform import blas

    blas.prepare()  # must run before MLX is imported
    from modelpack_engine.distributed.follower import Follower
    from modelpack_engine.distributed.group import find_place
    from modelpack_engine.distributed.launch import join, launch
    from modelpack_engine.platform.device import uses_cuda
    from modelpack_server.stored_models import parts_of

    has_nccl = uses_cuda(config)
    if find_place() is None:
        command = [sys.executable, "-m", "modelpack", *sys.argv[1:]]
        outcome = launch(command, size, backend="nccl" if has_nccl else "ring")
        if outcome.failure:
            raise ModelpackError(outcome.failure)
        return outcome.code
    joined = join(size, _end)
    if not isinstance(joined, Follower):
        note(settings, f"{size} ranks have joined")
        return joined
    # Ctrl-C in a terminal reaches all ranks; rank 0 ends the others after its pending requests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with request_log(settings):
        joined.follow(parts_of(settings.store(), config, adapters.to_merge))
    return 0


def _end(error: ModelpackError) -> None:
    """Exit the process at once: other threads may wait in MLX for a rank that has exited."""
    show_error(error)
    sys.stdout.flush()
    os._exit(error.exit_code)


#: Options that vLLM has under the same names.
_SAME = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
         "tensor_parallel_size")  # fmt: skip
#: Options that work with --backend vllm. The other options are for our own server.
_UNDERSTOOD = frozenset((*_SAME, "models", "host", "port", "served_model_name", "runtime_flags",
                         "backend", "allow_anonymous", "tls_cert", "tls_key", "kv_cache_bytes",
                         "no_prefix_caching"))  # fmt: skip
#: Options of registries and signatures, which apply before vLLM starts; "keys" is --verify-key.
_ALWAYS = frozenset(("store", "as_json", "quiet", "progress", "debug", "plain_http", "insecure",
                     "allow_private", "ca_file", "client_cert", "client_key", "concurrency",
                     "connections", "chunk_size", "limit_rate", "keys", "formats", "policy",
                     "authorities", "certificate_identity", "certificate_identity_regexp",
                     "certificate_oidc_issuer", "certificate_oidc_issuer_regexp", "trusted_root",
                     "variant"))  # fmt: skip


def exec_vllm(
    settings: Settings,
    models: tuple[str, ...],
    host: str,
    port: int,
    served_model_name: str | None,
    flags: tuple[str, ...],
    tls: tuple[Path, Path] | None,
    remote: RemoteOptions,
) -> NoReturn:
    """Replace this process by `vllm serve` for the model; return only by raising.

    Raises `UsageError` for options that vLLM does not support, and the errors of `open_model` and
    `vllm_command`.
    """
    from modelpack.deploy.vllm import open_model, vllm_command

    given = _given(click.get_current_context())
    foreign = sorted(given.keys() - _UNDERSTOOD - _ALWAYS)
    if foreign:
        params = click.get_current_context().command.params
        options_of = {param.name: param.opts[0] for param in params}
        raise UsageError(
            f"--backend vllm does not support {', '.join(options_of[name] for name in foreign)}",
            hint="run `modelpack gateway` before vLLM for keys and limits; give options of vLLM "
            "as --runtime-flags '--dtype bfloat16'",
        )
    if len(models) != 1:
        raise UsageError(f"--backend vllm serves one MODEL, got {len(models)}")
    options: dict[str, object] = {"host": host, "port": port}
    options |= {name.replace("_", "-"): given[name] for name in _SAME if name in given}
    if "kv_cache_bytes" in given:
        options["kv-cache-memory-bytes"] = given["kv_cache_bytes"]
    if "no_prefix_caching" in given:
        options["no-enable-prefix-caching"] = True
    if tls is not None:
        options |= {"ssl-certfile": tls[0], "ssl-keyfile": tls[1]}
    names = [name for name in (served_model_name, models[0]) if name]
    vllm_command(Path(), names, options)  # fails before the pull if vLLM is not installed
    with ExitStack() as until:  # closed if this fails; vLLM inherits the lease
        with shown_progress(settings) as progress:
            opened = open_model(
                models[0], store=settings.store(), remote=remote, progress=progress, until=until
            )
        for message in opened.settings.notes:
            note(settings, f"warning: {message}")
        command = vllm_command(opened.directory, names, {**opened.options(), **options}, flags)
        note(settings, " ".join(command))
        sys.stdout.flush()
        os.execv(command[0], command)  # noqa: S606 - the arguments are a list, without a shell


def _given(ctx: click.Context) -> dict[str, Any]:
    """Return the options given on the command line or by environment variables."""
    chosen = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {
        name: value for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) in chosen and value is not None
    }  # fmt: skip


def _media_hosts(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Check the hosts before any model is pulled."""
    if values:
        from modelpack_server.api.media_urls import MediaUrls

        MediaUrls(values)
    return values


@command(
    headings={
        "--host": "Server",
        "--adapter": "LoRA adapters",
        "--keys": "Access",
        "--preset": "Models and requests",
        "--tensor-parallel-size": "Devices and processes",
        **ENGINE_HEADINGS,
    },
    more=("LoRA adapters", "Devices and processes", *MORE_OPTIONS),
)
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True,
    help="Listen on this port; 0 selects a free port.",
)  # fmt: skip
@click.option("--served-model-name", metavar="NAME",
              help="Accept this additional name of the first MODEL in API requests.")  # fmt: skip
@log_format_option
@adapter_option("Serve this LoRA adapter of a MODEL as NAME; may be repeated.")
@merge_option
@click.option(
    "--max-adapters", type=click.IntRange(min=1), default=DEFAULT_MAX_ADAPTERS, show_default=True,
    help="Hold at most this many adapters in memory.",
)  # fmt: skip
@click.option(
    "--allow-adapter-loading", is_flag=True,
    help="Let admins load and unload LoRA adapters with POST /v1/load_lora_adapter.",
)  # fmt: skip
@click.option(
    "--adapter-directory", "adapter_directories", metavar="DIR", multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Let these requests name adapters in DIR too; may be repeated.",
)  # fmt: skip
@protection_options
@tls_options
@stop_options
@preset_option
@click.option(
    "--keep-alive", metavar="TIME", default=DEFAULT_KEEP_ALIVE, show_default=True,
    help="Unload a model this long after its last use, unless it is a MODEL; -1: never.",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", type=SIZE,
              help="Limit the memory of all models together, like 24GiB.")  # fmt: skip
@click.option(
    "--runtime-flags", metavar="FLAGS",
    help="Pass these flags of llama.cpp or vLLM to all models: '--temp 0.7 --ctx-size 8192'.",
)  # fmt: skip
@click.option(
    "--allow-request-templates", is_flag=True,
    help="Accept chat templates in requests from callers with a key for all models or, without "
    "keys, from this machine.",
)  # fmt: skip
@click.option(
    "--allow-media-url", "media_hosts", metavar="HOST[:PORT]", multiple=True, callback=_media_hosts,
    help="Fetch pictures and videos in http(s) URLs from HOST; may be repeated.",
)  # fmt: skip
@click.option("--share-prefix-cache", is_flag=True,
              help="Share cached prefixes between API keys.")  # fmt: skip
@click.option("--keep-going", is_flag=True,
              help="Serve the other models if a MODEL cannot be loaded.")  # fmt: skip
@click.option("--show-content", is_flag=True,
              help="Show admins the prompts and replies of recent requests.")  # fmt: skip
@click.option(
    "--tensor-parallel-size", type=click.IntRange(min=1), metavar="N",
    help="Split each model across N GPUs of this machine, or across the ranks of mlx.launch.",
)  # fmt: skip
@click.option(
    "--engine-process/--no-engine-process", default=None,
    help="Run each generating model in a process of its own, which shares no GIL with the server. "
    "[default: on NVIDIA GPUs]",
)  # fmt: skip
@partial(engine_options, others=("vllm",))
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def serve(
    settings: Settings,
    models: tuple[str, ...],
    host: str,
    port: int,
    served_model_name: str | None,
    adapters: tuple[tuple[str, str], ...],
    merge: bool,
    max_adapters: int,
    allow_adapter_loading: bool,
    adapter_directories: tuple[Path, ...],
    protection: Callable[[str], Protection],
    tls: tuple[Path, Path] | None,
    drain: int,
    grace: int,
    log_format: LogFormat | None,
    preset: str | None,
    keep_alive: str,
    memory: int | None,
    runtime_flags: str | None,
    tensor_parallel_size: int | None,
    engine_process: bool | None,
    allow_request_templates: bool,
    media_hosts: tuple[str, ...],
    share_prefix_cache: bool,
    keep_going: bool,
    show_content: bool,
    config: Callable[[], Any] | None,
    remote: RemoteOptions,
) -> int:
    """Serve the models of the store; print the address.

    Each MODEL is pulled if it is not stored, loaded at start, and stays loaded; /health returns 503
    until all are loaded, and the server exits if one cannot be. Other stored models are loaded when
    a request names them, and unloaded when idle. A MODEL may be a path: a GGUF file or a directory
    of safetensors.
    """
    if served_model_name and not models:
        raise UsageError("--served-model-name requires a MODEL")
    if adapter_directories and not allow_adapter_loading:
        raise UsageError("--adapter-directory requires --allow-adapter-loading")
    if merge and allow_adapter_loading:
        raise UsageError(
            "--merge cannot be combined with --allow-adapter-loading", hint="leave out one of them"
        )
    if config is None:
        protection(host)  # the check for reachable addresses without keys
        flags, remote = _words(runtime_flags or ""), replace(remote, backend="vllm")
        exec_vllm(settings, models, host, port, served_model_name, flags, tls, remote)
    from modelpack_server.api.app import ModelServer
    from modelpack_server.gateway.protection import protect
    from modelpack_server.pool.memory import device_memory
    from modelpack_server.pool.pool import ModelPool
    from modelpack_server.stored_models import looks_for_drafter

    # Check the options before the pull.
    protected_by = protection(host)
    chosen = ModelSettings(preset=preset, runtime_flags=_words(runtime_flags or ""))
    chosen.check()
    seconds = parse_keep_alive(keep_alive)
    engine = config()
    if engine.backend != "auto":
        remote = replace(remote, backend=engine.backend)
    made_sources = ModelSources(
        settings, remote, max_adapters, loads_adapters=allow_adapter_loading, merges_adapters=merge,
        drafter=looks_for_drafter(chosen.engine_config(engine))
        and not is_parallel(tensor_parallel_size),
    )  # fmt: skip
    sources = click.get_current_context().with_resource(made_sources)
    opened = [sources.open(model) for model in models]
    for name, typed in adapters:
        sources.add_adapter(name, typed, opened)
    if merge and not len(sources.adapters):
        raise UsageError("--merge requires an adapter", hint="give --adapter NAME=REF|DIR")
    if len({found.name for found in opened}) < len({found.model.digest for found in opened}):
        raise UsageError("two files have the same name", hint="rename one, or serve it elsewhere")
    if engine_process and is_parallel(tensor_parallel_size):
        raise UsageError(
            "--engine-process cannot be combined with --tensor-parallel-size",
            hint="leave out one of them",
        )
    pull_draft(engine, settings.store(), settings, remote)
    ranks = None
    if is_parallel(tensor_parallel_size):
        joined = join_ranks(settings, tensor_parallel_size or 1, engine, sources.adapters)
        if isinstance(joined, int):
            return joined
        ranks = joined
    own_process = has_own_process(engine_process, engine, ranks)
    budget = memory or device_memory(engine)
    start = time.monotonic()
    failures: list[ModelpackError] = []

    def fail(name: str, error: Exception) -> None:
        text = f"cannot load the model {name}: {error}"
        failures.append(ModelpackError(text, hint=getattr(error, "hint", None)))
        server.request_stop()

    def pool() -> ModelPool:
        made = ModelPool(
            sources.catalogue(engine, ranks, engine_process=own_process),
            settings=chosen,
            memory=budget,
            keep_alive=seconds,
            adapter_loading=(
                sources.adapter_loading(adapter_directories) if allow_adapter_loading else None
            ),
            on_ready=lambda: _note_ready(settings, made, server.url, engine, start),
            on_failure=None if keep_going else fail,
            on_progress=LoadDisplay(settings).report,
        )
        for found in opened:
            made.pin(found.name)
            if found.alias is not None:
                made.alias(found.alias, str(found.model.digest))
        if served_model_name:
            first = str(opened[0].model.digest)
            merged = sources.adapters.merged_into(first)
            made.alias(served_model_name, merged.name if merged is not None else first)
        return made

    with serving_log(settings, log_format):
        server = ModelServer(
            pool,
            address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            allow_remote=True,  # `Protection` has checked that keys are required
            request_templates=allow_request_templates,
            share_prefix_cache=share_prefix_cache,
            show_content=show_content,
            media_hosts=media_hosts,
            state=Tree(settings.store().root).server,
            wrap=lambda app: protect(app, protected_by, resolves=True),
            tls=tls,
            drain=drain,
            grace=grace,
        )
        text = f"serving {', '.join(models) or 'the store'}"
        names = [found.alias or found.name for found in opened if not sources.is_merged(found)]
        names += [name for name, _ in adapters]
        server.run(lambda: announce(settings, server.url, text, models=names))
    if ranks is not None:
        ranks.close()
    if failures:
        raise failures[0]
    return 0


def _note_ready(
    settings: Settings, pool: ModelPool, url: str, config: EngineConfig, start: float
) -> None:
    """Print how long the start took, the addresses, the device, and the memory of each model."""
    import mlx.core as mx

    from modelpack_engine.async_engine import EngineClient
    from modelpack_engine.platform.device import choose_device

    on_gpu = choose_device(config) == "gpu"
    device = str(mx.device_info().get("device_name", "GPU")) if on_gpu else "CPU"
    rows = [("chat page", f"{url}/"), ("API", f"{url}/v1"), ("API docs", f"{url}/docs"),
            ("device", device)]  # fmt: skip
    for entry in pool.entries():
        engine = entry.engine
        if isinstance(engine, EngineClient):
            weights, cache = human_size(engine.weight_bytes), human_size(engine.kv_cache_bytes)
            memory = f"weights {weights}, KV cache {cache}"
        else:
            memory = f"memory {human_size(entry.memory)}"
        if engine is not None:
            context = f", context {engine.max_model_len}" if engine.max_model_len else ""
            rows.append((entry.name, f"{memory}{context}"))
    note(settings, f"ready in {time.monotonic() - start:.1f} s")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        note(settings, f"  {name.ljust(width)}  {value}")


def _words(flags: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise UsageError(f"--runtime-flags: {error}") from None
