"""`modelpack transcribe`: write down the speech in a sound file, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from modelpack.cli.output import show_json, shown_progress
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack_server.cli.load_display import LoadDisplay

if TYPE_CHECKING:
    from modelpack_engine.speech.transcript import Task, Transcript, TranscriptionRequest
    from modelpack_server.conversation.served_model import ServedModel


@command()
@model_argument()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--format", "written", type=click.Choice(["text", "srt", "vtt"]), default="text",
              show_default=True, help="Print this format, unless --json.")  # fmt: skip
@click.option("--language", metavar="CODE", help="The language that is spoken, such as en.")
@click.option("--translate", is_flag=True, help="Translate to English.")
@click.option("--words", is_flag=True, help="With --json: print the times of words.")
@click.option("--prompt", default="", metavar="TEXT", help="Text that comes before, for Whisper.")
@click.option("--device", type=click.Choice(["auto", "gpu", "cpu"]), default="auto",
              show_default=True, help="Run on this device.")  # fmt: skip
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def transcribe(
    settings: Settings,
    model: str,
    file: Path,
    written: str,
    language: str | None,
    translate: bool,
    words: bool,
    prompt: str,
    device: Literal["auto", "gpu", "cpu"],
    remote: RemoteOptions,
) -> None:
    """Transcribe the speech in FILE with MODEL: WAV, FLAC, MP3 or Ogg Vorbis."""
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.speech.transcript import (
        SAMPLE_RATE,
        TranscriptionRequest,
        as_srt,
        as_vtt,
    )
    from modelpack_server import open_model
    from modelpack_server.api.openai.transcriptions import verbose
    from modelpack_server.conversation.sounds import MAX_SOUND_BYTES, decode_sound
    from modelpack_server.pool.store_catalogue import StoreCatalogue
    from modelpack_server.repl.chat import LocalModels

    if words and not settings.json:
        raise UsageError("--words requires --json")
    with file.open("rb") as opened:  # a bad file fails before the model is loaded
        samples = decode_sound(opened.read(MAX_SOUND_BYTES + 1), str(file), SAMPLE_RATE)
    language = (language or "").strip().lower() or None
    task: Task = "translate" if translate else "transcribe"
    request = TranscriptionRequest(samples, task, language, prompt, words=words)
    store = settings.store()
    with shown_progress(settings) as progress:
        open_model(model, store=store, remote=remote, progress=progress)
    engine = EngineConfig(device=device)
    catalogue = StoreCatalogue(store, engine, remote=remote)
    with LocalModels(catalogue, engine, LoadDisplay(settings).report) as models:
        made = models.call(_transcribe(models.load(model), request))
    if settings.json:
        show_json(verbose(made, task, {"segment", *(["word"] if words else [])}))
    elif written == "text":
        click.echo(made.text)
    else:
        click.echo({"srt": as_srt, "vtt": as_vtt}[written](made.segments), nl=False)


async def _transcribe(model: ServedModel, request: TranscriptionRequest) -> Transcript:
    from modelpack_server.api.model_use import check_transcribes

    return await check_transcribes(model, model.name).transcribe(request)
