"""`modelpack serve`, `run` and `smoke`: a model of the store answers."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.engine import engine_options, parse_size
from modelpack.cli.gateway import protection_options
from modelpack.cli.options import (
    Settings,
    common_options,
    model_argument,
    model_names,
    remote_options,
)
from modelpack.cli.output import note, show_json
from modelpack.cli.progress import shown_progress
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions

if TYPE_CHECKING:
    from modelpack.gateway.protecting import Protection


def _open(settings: Settings, model: str, remote: RemoteOptions) -> Any:
    from modelpack_engine import open_model

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
@engine_options
@remote_options
@common_options
def serve(
    settings: Settings,
    models: tuple[str, ...],
    host: str,
    port: int,
    served_model_name: str | None,
    protection: Callable[[str], Protection],
    preset: str | None,
    keep_alive: str,
    memory: str | None,
    runtime_flags: str | None,
    config: Callable[[], Any],
    remote: RemoteOptions,
) -> None:
    """Serve the models of the store, from its blobs there; print the address.

    Each MODEL is pulled where the store lacks it, loaded at once, and stays loaded; /health says
    503 until all are. Any other model of the store is loaded when a request names it, and unloaded
    when it has not been used for a while.
    """
    if served_model_name and not models:
        raise UsageError("--served-model-name names a MODEL, and none is given")
    protected_by = protection(host)
    for model in models:
        _open(settings, model, remote)
    from modelpack.gateway.protecting import protect
    from modelpack_engine.pool.device_memory import device_memory
    from modelpack_engine.pool.keep_alive import parse_keep_alive
    from modelpack_engine.pool.pool import ModelPool
    from modelpack_engine.pool.settings import ModelSettings
    from modelpack_engine.pool.store_catalogue import StoreCatalogue
    from modelpack_engine.server.model_server import ModelServer

    engine = config()
    chosen = ModelSettings(preset=preset, runtime_flags=tuple(shlex.split(runtime_flags or "")))
    chosen.check()
    seconds = parse_keep_alive(keep_alive)
    budget = parse_size(memory) if memory else device_memory(engine)

    def pool() -> ModelPool:
        made = ModelPool(
            StoreCatalogue(settings.store(), engine),
            settings=chosen,
            memory=budget,
            keep_alive=seconds,
        )
        for model in models:
            made.pin(model)
        if served_model_name:
            made.alias(served_model_name, models[0])
        return made

    _log_to_stderr(settings)
    server = ModelServer(
        pool,
        address=f"{_bracketed(host)}:{port}",
        allow_remote=True,  # `Protection` has seen to it that keys are asked for
        wrap=lambda app: protect(app, protected_by),
    )
    note(settings, f"serving {', '.join(models) or 'the store'}; stop with Ctrl-C")
    server.run(lambda: click.echo(server.url))


@click.command()
@model_argument()
@click.argument("prompt", nargs=-1)
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True)
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--system", help="A system message.")
@engine_options
@remote_options
@common_options
def run(
    settings: Settings,
    model: str,
    prompt: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    seed: int | None,
    system: str | None,
    config: Callable[[], Any],
    remote: RemoteOptions,
) -> None:
    """Have MODEL answer PROMPT, or what stdin holds, or one line after the other."""
    opened = _open(settings, model, remote)
    from modelpack_engine.chatting import Conversation

    conversation = Conversation(
        opened.engine(config()),
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    text = " ".join(prompt)
    if not sys.stdin.isatty() and not prompt:
        text = sys.stdin.read().strip()
        if not text:
            raise UsageError("nothing to answer: stdin is empty", hint="give a prompt")
    if text:
        _answer(settings, conversation, text)
        return
    note(settings, "one line, one question; end with Ctrl-D")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line:
            _answer(settings, conversation, line)


def _answer(settings: Settings, conversation: Any, text: str) -> None:
    if settings.json:
        answer = "".join(conversation.ask(text))
        usage = conversation.last_usage
        show_json(
            {
                "text": answer,
                "promptTokens": usage.prompt_tokens,
                "completionTokens": usage.completion_tokens,
                "cachedTokens": usage.cached_tokens,
            }
        )
        return
    for piece in conversation.ask(text):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@click.command()
@model_argument()
@click.option("--prompt", default="What is the capital of France?", show_default=True)
@click.option("--expect", metavar="REGEX", help="What the answer has to match.")
@click.option("--min-tps", type=click.FloatRange(min=0), help="Fewest tokens a second to pass.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@engine_options
@remote_options
@common_options
def smoke(
    settings: Settings,
    model: str,
    prompt: str,
    expect: str | None,
    min_tps: float | None,
    max_tokens: int,
    config: Callable[[], Any],
    remote: RemoteOptions,
) -> None:
    """Load MODEL, ask it once and check the answer; print a JSON report. Exit code 1: failed."""
    opened = _open(settings, model, remote)
    from modelpack_engine.smoking import smoke_test

    report = smoke_test(
        opened,
        config(),
        prompt=prompt,
        expect=expect,
        min_tokens_per_second=min_tps,
        max_tokens=max_tokens,
    )
    show_json(report.to_json())
    if not report.passed:
        raise SystemExit(1)


def _log_to_stderr(settings: Settings) -> None:
    """Show what is logged: a line for each request unless --quiet, and warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("modelpack", "modelpack_engine"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    handler.setLevel(logging.WARNING if settings.quiet else logging.INFO)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
