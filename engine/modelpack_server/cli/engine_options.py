"""The options of the engine and of speculative decoding, shared by serve, run and smoke."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from modelpack.cli.options import REGISTRIES, SIGNATURES, SIZE, Settings, checked
from modelpack.cli.output import shown_progress
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype

if TYPE_CHECKING:
    from modelpack.store.layout import LayoutStore

F = TypeVar("F", bound=Callable[..., Any])

#: The headings of these options in help, by the first option of each.
ENGINE_HEADINGS: Final = {
    "--device": "Engine",
    "--max-num-batched-tokens": "Scheduling and caches",
    "--speculative-method": "Speculative decoding",
}
#: The headings for which --help shows one line.
MORE_OPTIONS: Final = (
    "Scheduling and caches", "Speculative decoding", REGISTRIES, SIGNATURES
)  # fmt: skip

# The help of each option shows the default of its field.
_DEFAULTS = EngineConfig()


def _draft_model(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> str | Path | None:
    """Return a path if `text` names an existing file or directory, else the model's name.

    Raises `NotFoundError` for a path that does not exist.
    """
    if text is None:
        return None
    if Path(text).exists():
        return Path(text)
    from modelpack_server.cli.model_sources import path_in

    return path_in(text) or text


def pull_draft(config: Any, store: LayoutStore, settings: Settings, remote: RemoteOptions) -> None:
    """Pull the draft model of an EngineConfig, if it names one that the store lacks."""
    from modelpack.operations.pull import find_model
    from modelpack.storage import watching

    if isinstance(config.draft_model, str) and config.uses_draft_model:
        with shown_progress(settings) as progress:
            name, watch = config.draft_model, watching(progress)
            find_model(name, store, pull=True, remote=remote, watch=watch)


def require_engine() -> None:
    """Raise `UsageError` unless the engine's extra is installed."""
    for module in ("mlx", "mlx_lm", "fastapi", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"running a model requires {module}, which is not installed",
                hint="run pip install 'modelpack[engine]'",
            )


def _adapters(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Return the name and the source of each adapter."""
    pairs = []
    for value in values:
        name, equals, source = value.partition("=")
        if not (name and equals and source):
            raise click.BadParameter(f"{value!r}: expected NAME=REF or NAME=DIR")
        pairs.append((name, source))
    return tuple(pairs)


def adapter_option(help: str) -> Callable[[F], F]:
    """Return the option for adapters, each with its name and its source."""
    return click.option(
        "--adapter", "adapters", metavar="NAME=REF|DIR", multiple=True, callback=_adapters,
        help=help,
    )  # fmt: skip


merge_option = click.option(
    "--merge", is_flag=True,
    help="Merge the adapter into the weights as the model is loaded, which is faster.",
)  # fmt: skip


def _check_preset(name: str) -> None:
    from modelpack_server.pool.settings import preset_named

    preset_named(name)


preset_option = click.option(
    "--preset", callback=checked(_check_preset),
    help="Use this preset: code, chat, creative or long-context.",
)  # fmt: skip


def given_engine_options() -> list[str]:
    """Return the engine's options that are on the command line."""
    ctx = click.get_current_context()
    names = {field.name for field in dataclasses.fields(EngineConfig)} | {"no_prefix_caching"}
    return [
        option.opts[0]
        for option in ctx.command.params
        if option.name in names
        and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]


def engine_options(command: F, *, others: tuple[str, ...] = ()) -> F:
    """Add the options of the engine; the command gets `config`, a function that returns them.

    `others` are foreign backends; if the user selects one, `config` is None.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, no_prefix_caching: bool, **arguments: Any) -> Any:
        backend = arguments["backend"]
        if backend not in others:
            require_engine()
        fields = {field.name for field in dataclasses.fields(EngineConfig)}
        given = {name: arguments.pop(name) for name in fields & arguments.keys()}
        method = given["speculative_method"]
        if method == "draft" and not given["draft_model"]:
            raise UsageError("--speculative-method draft requires --draft-model")
        if method in ("ngram", "mtp") and given["draft_model"]:
            raise UsageError(
                f"--speculative-method {method} does not use --draft-model",
                hint=f"give one of them: {method} proposes tokens without another model",
            )
        if given["kv_offload_disk"] and not given["kv_offload_dir"]:
            raise UsageError("--kv-offload-disk requires --kv-offload-dir")

        def config() -> EngineConfig:
            given["kv_cache_dtype"] = parse_kv_cache_dtype(given["kv_cache_dtype"])
            return EngineConfig(**given, enable_prefix_caching=not no_prefix_caching)

        return command(*args, config=None if backend in others else config, **arguments)

    made: Any = wrapped
    for option in reversed(_options(others)):
        made = option(made)
    return made  # type: ignore[no-any-return]


def _options(others: tuple[str, ...]) -> tuple[Callable[[F], F], ...]:
    count = click.IntRange(min=1)
    return (
        click.option("--device", type=click.Choice(["auto", "gpu", "cpu"]), default="auto",
            show_default=True, help="Run on this device."),
        click.option("--backend", type=click.Choice(["auto", "mlx", "llama.cpp", *others]),
            default="auto", show_default=True,
            help="Use this engine: auto selects our kernels for CPUs, or llama.cpp for other GGUF "
            "on a CPU if installed, else MLX."),
        click.option("--max-model-len", "--context-size", type=click.IntRange(min=2),
            help="Limit the context to this many tokens."),
        click.option("--max-num-seqs", type=count,
            help="Run at most this many requests at a time (default: 256 on a large GPU, else "
            "64)."),
        click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True),
            default=_DEFAULTS.gpu_memory_utilization, show_default=True,
            help="Use this fraction of GPU memory."),
        click.option("--kv-cache-bytes", metavar="SIZE", type=SIZE,
            help="Set the size of the KV cache, like 8GiB."),
        click.option("--max-num-batched-tokens", type=count,
            help="Compute at most this many tokens per step."),
        click.option("--scheduling-policy", type=click.Choice(["shortest-first", "fcfs"]),
            default=_DEFAULTS.scheduling_policy, show_default=True,
            help="Start the shortest waiting prompt first, within bounds, or the oldest."),
        click.option("--kv-cache-dtype", metavar="auto|bf16|fp16|q8|q4",
            default=_DEFAULTS.kv_cache_dtype, show_default=True,
            help="Use this type for the KV cache; q8 and q4 hold about 1.9 and 3.5 times the "
            "tokens of bf16."),
        click.option("--ignore-config-field", "ignore_config_fields", multiple=True,
            metavar="NAME",
            help="Load a model even if its class ignores this field of config.json. May be "
            "repeated."),
        click.option("--no-prefix-caching", is_flag=True, help="Disable prefix caching."),
        click.option("--kv-offload-dir", type=click.Path(file_okay=False), metavar="DIR",
            help="Offload evicted prefixes to files in DIR, which survive restarts."),
        click.option("--kv-offload-memory", metavar="SIZE", type=SIZE,
            help="Offload prefixes to this much host memory; without --kv-offload-dir, only "
            "there."),
        click.option("--kv-offload-disk", metavar="SIZE", type=SIZE,
            help="Limit the size of the files."),
        click.option("--speculative-method",
            type=click.Choice(["ngram", "draft", "eagle3", "mtp", "none"]),
            help="Decode speculatively: propose tokens by n-gram lookup in the text, with the "
            "model's own layer for multi-token prediction (mtp), or with --draft-model, which "
            "implies draft (eagle3 for an EAGLE-3 head)."),
        click.option("--draft-model", metavar="REF|DIR", callback=_draft_model,
            help="Propose tokens with this smaller model of the same vocabulary, this EAGLE-3 "
            "head, or this drafter of Gemma 4."),
        click.option("--num-speculative-tokens", type=count,
            help="Propose this many tokens per step."),
        click.option("--speculative-min-acceptance", type=click.FloatRange(0, 1),
            default=_DEFAULTS.speculative_min_acceptance, show_default=True,
            help="Propose no tokens to which the draft model gives a lower probability."),
        click.option("--speculative-disable-by-batch-size", type=click.IntRange(min=0),
            help="Disable speculation while more requests than this generate."),
    )  # fmt: skip
