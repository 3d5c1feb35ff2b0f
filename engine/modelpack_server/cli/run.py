"""`modelpack run`: one response of a model, or an interactive chat."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.help import command
from modelpack.cli.options import (
    DOWNLOAD,
    Settings,
    common_options,
    model_argument,
    remote_options,
    transfer_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import note, show_json
from modelpack.errors import NotFoundError, UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack_server.cli.engine_options import (
    ENGINE_HEADINGS,
    MORE_OPTIONS,
    adapter_option,
    engine_options,
    given_engine_options,
    merge_option,
    preset_option,
    pull_draft,
)
from modelpack_server.cli.load_display import LoadDisplay
from modelpack_server.cli.model_sources import ModelSources
from modelpack_server.pool.settings import DEFAULT_TEMPERATURE
from modelpack_server.repl.view import BareView, TerminalView

if TYPE_CHECKING:
    from modelpack_server.conversation.served_model import ServedModel
    from modelpack_server.conversation.spec import ChatUsage
    from modelpack_server.repl.chat import Chat


@command(headings=ENGINE_HEADINGS, more=MORE_OPTIONS)
@model_argument()
@click.argument("prompt", nargs=-1)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Generate at most this many tokens.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2),
    help="Sample with this temperature; 0: greedy. "
    f"[default: the model's, else {DEFAULT_TEMPERATURE}]",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the likeliest tokens up to this total probability. [default: the model's]",
)  # fmt: skip
@click.option("--seed", type=int, help="Use this random seed, for reproducible output.")
@click.option("--system", default="", help="Set the system message.")
@adapter_option("Run MODEL with this LoRA adapter.")
@merge_option
@preset_option
@click.option("--think/--no-think", default=None, help="Enable or disable reasoning.")
@click.option("--url", "--host", "host", metavar="URL",
              help="Use a running server instead of loading the model.")  # fmt: skip
@click.option("--verbose", is_flag=True,
              help="Print times and tokens per second after each response.")  # fmt: skip
@engine_options
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def run(
    settings: Settings,
    model: str,
    prompt: tuple[str, ...],
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    system: str,
    adapters: tuple[tuple[str, str], ...],
    merge: bool,
    preset: str | None,
    think: bool | None,
    host: str | None,
    verbose: bool,
    config: Callable[[], Any],
    remote: RemoteOptions,
) -> None:
    """Print the response of MODEL to PROMPT and stdin; without either, start a chat.

    MODEL may be a path: a GGUF file or a directory of safetensors. In the chat, /help lists the
    commands. An argument after the prompt that names a file in PNG, JPEG, WebP or GIF is a picture,
    for models that read pictures, one in WAV, MP3, FLAC or Ogg is a sound, and one in MP4, MOV,
    WebM or Matroska a video.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    prompt, files = _without_files(prompt)
    text = _question(prompt)
    pictures = picture_parts(files)
    if pictures and not text:
        raise UsageError("no prompt for the files", hint="give a prompt before the files")
    from modelpack_server.pool.settings import preset_named

    if preset is not None:
        preset_named(preset)
    chosen: dict[str, Any] = {
        "system": system, "given": given, "preset": preset, "max_tokens": max_tokens,
        "reasoning": think,
    }  # fmt: skip
    if len(adapters) > 1:
        raise UsageError(f"a response has one adapter, got {len(adapters)}")
    if host is not None:
        if adapters or merge:
            raise UsageError(
                "--url cannot be combined with --adapter and --merge",
                hint="give the server's name of the adapter as MODEL",
            )
        if own := given_engine_options():
            raise UsageError(
                f"--url cannot be combined with {', '.join(own)}",
                hint="give them to the server when it starts",
            )
        from modelpack_server.cli.client import find_target
        from modelpack_server.repl.chat import RemoteChat, RemoteModel

        def find(name: str) -> Any:
            target = find_target(host, name)
            return RemoteModel(target.url, target.model, target.context)

        with asyncio.Runner() as runner:
            _talk(
                settings,
                RemoteChat(find(model), **chosen),
                find,
                text,
                pictures,
                verbose,
                runner.run,
            )
        return
    from modelpack_engine.worker.workers import shared_workers
    from modelpack_server.pool.settings import ModelSettings
    from modelpack_server.repl.chat import Chat, LocalModels, require_chat
    from modelpack_server.stored_models import looks_for_drafter

    engine = config()
    pull_draft(engine, settings.store(), settings, remote)
    drafter = looks_for_drafter(engine)

    def load(name: str) -> ServedModel:
        loaded = models.load(name, ModelSettings(preset=preset))
        require_chat(loaded)
        return loaded

    def open_and_load(name: str) -> ServedModel:
        return load(sources.open(name).name)

    with (
        ModelSources(settings, remote, merges_adapters=merge, drafter=drafter) as sources,
        LocalModels(sources.catalogue(engine), engine, LoadDisplay(settings).report) as models,
    ):
        found = sources.open(model)
        for name, typed in adapters:
            sources.add_adapter(name, typed, [found])
        if merge and not len(sources.adapters):
            raise UsageError("--merge requires an adapter", hint="give --adapter NAME=REF|DIR")
        if text:  # while the model is loaded
            for purpose in {"render", *map(_worker_of, files)}:
                shared_workers(purpose).start()
        first = load(adapters[0][0] if adapters else found.name)
        chat = Chat(first, **chosen)
        _talk(settings, chat, open_and_load, text, pictures, verbose, models.call)


def _talk(
    settings: Settings,
    chat: Chat,
    load: Callable[[str], ServedModel],
    text: str,
    pictures: list[dict[str, Any]],
    verbose: bool,
    call: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    """Respond to `text` with `pictures`, or start the chat if it is empty."""
    from modelpack_engine.errors import RequestError

    try:
        chat.check()
    except RequestError as error:
        raise UsageError(str(error)) from None

    def ask(question: str) -> None:
        call(answer(settings, chat, question, pictures, verbose=verbose))

    if text:
        ask(text)
        return
    from modelpack_server.repl.loop import Loop

    Loop(settings, chat, ask, load).run()


_PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".webp")
_SOUNDS = (".flac", ".mp3", ".oga", ".ogg", ".wav")
_VIDEOS = (".m4v", ".mkv", ".mov", ".mp4", ".webm")


def _worker_of(file: Path) -> str:
    return "video" if file.suffix.lower() in _VIDEOS else "media"


def _without_files(prompt: tuple[str, ...]) -> tuple[tuple[str, ...], list[Path]]:
    """Return the arguments before the pictures, sounds and videos, and the files of these.

    A path of no file raises `NotFoundError`, as does a bare name after a prompt in quotes. There, a
    file of any name is one of these, and its content says which. After single words, such names are
    words, too.
    """
    files: list[Path] = []
    is_quoted = bool(re.search(r"\s", prompt[0])) if prompt else False
    for index, name in reversed([*enumerate(prompt)]):
        is_named = name.lower().endswith(_PICTURES + _SOUNDS + _VIDEOS)
        if not os.path.isfile(name):  # pathlib raises if a prompt is longer than a name may be
            is_path = os.sep in name or is_quoted
            if is_named and is_path and not re.search(r"\s|://", name):
                raise NotFoundError(f"{name}: no such file", hint="check the path")
            break
        if not is_named and not (is_quoted and index):
            break
        files.insert(0, Path(name))
    return prompt[: len(prompt) - len(files)], files


def picture_parts(files: Iterable[Path], sounds: Iterable[Path] = ()) -> list[dict[str, Any]]:
    """Return files as parts of a message: `sounds`, and others by their name, if not pictures."""
    from modelpack_engine.errors import RequestError
    from modelpack_server.conversation.pictures import PictureReader

    reader = PictureReader()
    readers = dict.fromkeys(_SOUNDS, reader.sound_file) | dict.fromkeys(_VIDEOS, reader.video_file)
    try:
        parts = [
            readers.get(path.suffix.lower(), reader.file)(path.read_bytes(), str(path))
            for path in files
        ]
        return parts + [reader.sound_file(path.read_bytes(), str(path)) for path in sounds]
    except (OSError, RequestError) as error:
        raise UsageError(str(error)) from None


def _question(prompt: tuple[str, ...]) -> str:
    """Return the arguments and the piped text; "" starts a chat."""
    text = " ".join(prompt)
    if sys.stdin.isatty() or (text and not _is_piped()):
        return text
    text = "\n\n".join(piece for piece in (text, sys.stdin.read().strip()) if piece)
    if not text:
        raise UsageError("no prompt: stdin is empty", hint="give a prompt")
    return text


def _is_piped() -> bool:
    """Return whether stdin is a pipe or a file: a service manager's stdin may never end."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return True  # a replaced stdin has no descriptor and was set on purpose
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


async def answer(
    settings: Settings,
    chat: Chat,
    question: str,
    pictures: Sequence[dict[str, Any]] = (),
    *,
    verbose: bool = False,
) -> None:
    """Stream the response to the terminal; with --json, print it when it is complete."""
    from modelpack_server.tool_parsers.parts import Reasoning, Text

    view = None if settings.json else _view()
    texts, thoughts = [], []
    finish, usage = None, None
    start, first = time.perf_counter(), None
    try:
        async with aclosing(chat.ask(question, pictures)) as deltas:
            async for delta in deltas:
                if first is None and (delta.token_ids or delta.parts):
                    first = time.perf_counter()
                for part in delta.parts:
                    if isinstance(part, Text):
                        texts.append(part.text)
                        if view is not None:
                            view.text(part.text)
                    elif isinstance(part, Reasoning):
                        thoughts.append(part.text)
                        if view is not None:
                            view.thought(part.text)
                finish = delta.finish or finish
                usage = delta.usage or usage
    finally:
        end = time.perf_counter()
        if view is not None:
            view.end()
    if finish == "length" and view is not None:
        note(settings, "(truncated: maximum number of tokens reached)")
    if verbose and usage is not None:
        click.echo(figures(usage, start, first or end, end), err=True)
    if view is not None:
        return
    show_json(
        {
            "text": "".join(texts),
            "reasoning": "".join(thoughts) or None,
            "finish_reason": finish,
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "completion_tokens": usage.completion_tokens if usage else 0,
            "cached_tokens": usage.cached_tokens if usage else 0,
            "reasoning_tokens": usage.reasoning_tokens if usage else 0,
        }
    )


def figures(usage: ChatUsage, start: float, first: float, end: float) -> str:
    """Return the lines of --verbose, with ollama's names; times are in seconds.

    Rates are those of the tokens that were computed: of the prompt without cached tokens, and of
    the response without its first token, whose time is the prompt's.
    """
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    rows = [
        ("total duration:", f"{end - start:.3f} s"),
        ("time to first token:", f"{first - start:.3f} s"),
        ("prompt eval count:", f"{usage.prompt_tokens} tokens{cached}"),
        ("prompt eval rate:", _rate(usage.prompt_tokens - usage.cached_tokens, first - start)),
        ("eval count:", f"{usage.completion_tokens} tokens"),
        ("eval rate:", _rate(usage.completion_tokens - 1, end - first)),
    ]
    return "\n".join(f"{name:21} {value}" for name, value in rows)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.2f} tokens/s" if tokens > 0 and seconds > 0 else "-"


def _view() -> BareView | TerminalView:
    if not sys.stdout.isatty():
        return BareView()
    from rich.console import Console

    return TerminalView(Console(highlight=False))
