"""`modelpack serve --backend vllm`: the process becomes `vllm serve` over a bundle of the model."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from modelpack.cli.options import Settings
from modelpack.cli.output import note
from modelpack.cli.progress import shown_progress
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions

#: Our options that are vLLM's under the same names.
_SAME = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
         "tensor_parallel_size")  # fmt: skip
#: Those that say something here, too. The others are of our own server.
_UNDERSTOOD = frozenset((*_SAME, "models", "host", "port", "served_model_name", "runtime_flags",
                         "backend", "allow_anonymous", "tls_cert", "tls_key", "kv_cache_bytes",
                         "no_prefix_caching"))  # fmt: skip
#: "keys" are those of --verify-key: a model that is not signed as asked reaches no vLLM.
_ALWAYS = frozenset(("store", "as_json", "quiet", "progress", "debug", "plain_http", "insecure",
                     "allow_private", "ca_file", "client_cert", "client_key", "concurrency",
                     "connections", "chunk_size", "limit_rate", "keys", "formats", "policy",
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
    """Become `vllm serve` for the one model; returns only by raising.

    Raises `UsageError` for options that vLLM would not be told of, and as `open_model` and
    `vllm_command` do.
    """
    from modelpack.deployment.vllm import open_model, vllm_command

    given = _given(click.get_current_context())
    foreign = sorted(given.keys() - _UNDERSTOOD - _ALWAYS)
    if foreign:
        options_of = {
            param.name: param.opts[0] for param in click.get_current_context().command.params
        }
        raise UsageError(
            f"--backend vllm has no {', '.join(options_of[name] for name in foreign)}",
            hint="keys, limits and traces: put `modelpack gateway` before it; vLLM's own options: "
            "--runtime-flags '--dtype bfloat16'",
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
    vllm_command(
        Path(), names, options
    )  # that it is not installed is told before anything is pulled
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
        os.execv(command[0], command)  # noqa: S606 - its arguments are a list; no shell is between


def _given(ctx: click.Context) -> dict[str, Any]:
    """Return the options that the user gave, by the environment or by hand."""
    chosen = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {
        name: value for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) in chosen and value is not None
    }  # fmt: skip
