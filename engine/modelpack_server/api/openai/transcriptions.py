"""The routes POST /v1/audio/transcriptions and /v1/audio/translations: speech in a file to text.

Source: the OpenAI API reference, "Create transcription" and "Create translation". Additions:
`keep_alive`, and `language` of what is spoken for translations too. A stream has the text of each
segment once the whole sound is transcribed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from modelpack_engine.errors import RequestError
from modelpack_engine.speech.transcript import (
    SAMPLE_RATE,
    Segment,
    Task,
    Transcript,
    TranscriptionRequest,
    Word,
    as_srt,
    as_vtt,
)
from modelpack_engine.worker.threads import in_thread
from modelpack_server.api.errors import ClientGoneError
from modelpack_server.api.model_use import check_transcribes, seconds_of, unless_gone
from modelpack_server.api.paths import add_route
from modelpack_server.api.sse import LiveStream, dumps, event
from modelpack_server.conversation.served_model import request_context
from modelpack_server.conversation.sounds import MAX_SOUND_BYTES, decode_sound
from modelpack_server.gateway.bodies import release_body
from modelpack_server.gateway.forms import Form, FormError
from modelpack_server.pool.pool import ModelPool

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
_FORMATS: tuple[str, ...] = get_args(ResponseFormat)
_GRANULARITIES = ("segment", "word")
#: Fields with several values; clients write their names with [], or with the index of a value.
_LISTS = ("include", "known_speaker_names", "known_speaker_references", "timestamp_granularities")
_UNSUPPORTED = _LISTS[:3]
_STREAMED = ("json", "text")
_MEDIA_TYPES = {"vtt": "text/vtt"}
_FRAME = 64 * 1024  # bytes of a form without its file


def _form(*, translates: bool) -> dict[str, Any]:
    """Return the description of the form for the OpenAPI document."""
    fields: dict[str, Any] = {
        "file": {"type": "string", "format": "binary"},
        "model": {"type": "string"},
        "language": {"type": "string"},
        "prompt": {"type": "string"},
        "response_format": {"enum": list(_FORMATS)},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "keep_alive": {"type": "string"},
    }
    if not translates:
        items = {"enum": list(_GRANULARITIES)}
        fields["timestamp_granularities[]"] = {"type": "array", "items": items}
        fields["stream"] = {"type": "boolean"}
    schema = {"type": "object", "required": ["file", "model"], "properties": fields}
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    async def create_transcription(request: Request) -> Response:
        """Transcribe the speech in a sound file."""
        return await _answer(request, pool, "transcribe")

    async def create_translation(request: Request) -> Response:
        """Translate the speech in a sound file to English text."""
        return await _answer(request, pool, "translate")

    add_route(
        routes, "/audio/transcriptions", create_transcription, bare=True,
        extra=_form(translates=False),
    )  # fmt: skip
    add_route(
        routes, "/audio/translations", create_translation, bare=True, extra=_form(translates=True)
    )
    return routes


async def _answer(request: Request, pool: ModelPool, task: Task) -> Response:
    fields, data = await _read(request)
    files = [data]
    del data
    asked = _Asked.of(fields, task)
    owner = request_context.get().cache_salt

    async def sound() -> NDArray[np.float32]:
        made = await in_thread(decode_sound, files.pop(), "file", SAMPLE_RATE, owner=owner)
        release_body(request.scope)  # the queue limits the samples that wait
        return made

    async def work() -> Transcript:
        wanted = asked.request()
        wanted.check()
        async with pool.lease(asked.model, keep_alive=asked.keep_alive) as served:
            return await check_transcribes(served, asked.model).transcribe(wanted, sound)

    made = await unless_gone(request, work())
    if asked.stream:
        return LiveStream(_events(made), AsyncExitStack())
    text = _text(made, asked)
    if asked.format in ("json", "verbose_json"):
        return Response(text, media_type="application/json")
    return Response(text, media_type=_MEDIA_TYPES.get(asked.format, "text/plain"))


async def _read(request: Request) -> tuple[Mapping[str, list[str]], bytes]:
    """Return the fields of the form, and the bytes of its file; raises `RequestError`."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with aclosing(request.stream()) as arriving:
            async for piece in arriving:
                size += len(piece)
                if size > MAX_SOUND_BYTES + _FRAME:
                    raise _too_large()
                pieces.append(piece)
    except ClientDisconnect:
        raise ClientGoneError("the client disconnected") from None
    return await in_thread(_parsed, request.headers.get("content-type", ""), pieces)


def _parsed(content_type: str, pieces: list[bytes]) -> tuple[Mapping[str, list[str]], bytes]:
    try:
        form = Form(content_type)
        for piece in pieces:
            form.feed(piece)
        form.end()
    except FormError as error:
        raise RequestError(str(error), param=error.param) from None
    if form.filename is None:
        if any(name == "file" for name, _ in form.fields):
            raise RequestError(
                "file is text without a file name",
                param="file",
                hint="send a file, with curl as -F file=@PATH",
            )
        raise RequestError("file is required", param="file")
    if form.size > MAX_SOUND_BYTES:
        raise _too_large()
    fields: dict[str, list[str]] = {}
    for name, value in form.fields:
        start = name.partition("[")[0]
        fields.setdefault(start if start in _LISTS else name, []).append(value)
    return fields, form.take()


def _too_large() -> HTTPException:
    return HTTPException(413, f"the file exceeds {MAX_SOUND_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class _Asked:
    """The fields of a form beside the file, checked."""

    model: str
    task: Task
    language: str | None
    prompt: str
    temperature: float
    format: str
    granularities: frozenset[str]
    stream: bool
    keep_alive: float | None

    @classmethod
    def of(cls, fields: Mapping[str, list[str]], task: Task) -> _Asked:
        """Raises `RequestError`, naming the field."""
        for name, values in fields.items():
            if name in _UNSUPPORTED and any(values):
                raise RequestError(f"{name} is not supported", param=name)
            if len(values) > 1 and name not in _LISTS:
                raise RequestError(f"{name} is given {len(values)} times", param=name[:200])
        one = {name: values[0] for name, values in fields.items()}
        if not one.get("model"):
            raise RequestError("model is required", param="model")
        written = one.get("response_format") or "json"
        _one_of("response_format", written, _FORMATS)
        given = fields.get("timestamp_granularities", [])
        for value in given:
            _one_of("timestamp_granularities", value, _GRANULARITIES)
        if given and written != "verbose_json":
            raise RequestError(
                "timestamp_granularities needs the response_format verbose_json",
                param="timestamp_granularities",
            )
        stream = one.get("stream") or "false"
        _one_of("stream", stream.lower(), ("true", "false"))
        streams = stream.lower() == "true"
        if streams and written not in _STREAMED:
            raise RequestError(
                f"stream: expected the response_format json or text, got {written}",
                param="response_format",
            )
        return cls(
            one["model"],
            task,
            (one.get("language") or "").strip().lower() or None,
            one.get("prompt", ""),
            _number("temperature", one.get("temperature") or "0"),
            written,
            frozenset(given or ["segment"]),
            streams,
            seconds_of(one.get("keep_alive") or None),
        )

    def request(self) -> TranscriptionRequest:
        """Return the request to the model, without samples."""
        words = self.format == "verbose_json" and "word" in self.granularities
        return TranscriptionRequest(
            np.empty(0, np.float32), self.task, self.language, self.prompt, self.temperature, words
        )


def _one_of(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise RequestError(
            f"{name} is {value[:100]!r}, expected one of {', '.join(expected)}", param=name
        )


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{name} is {text[:100]!r}, expected a number", param=name) from None


def _usage(made: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(made.duration, 3)}


def _text(made: Transcript, asked: _Asked) -> str:
    match asked.format:
        case "text":
            return f"{made.text}\n"
        case "srt":
            return as_srt(made.segments)
        case "vtt":
            return as_vtt(made.segments)
        case "json":
            return dumps({"text": made.text, "usage": _usage(made)})
    found = {**verbose(made, asked.task, asked.granularities), "usage": _usage(made)}
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def verbose(made: Transcript, task: Task, granularities: Collection[str]) -> dict[str, Any]:
    """Return the object of the format `verbose_json`, with the times of `granularities`."""
    found: dict[str, Any] = {
        "task": task,
        "language": made.language if task == "transcribe" else "english",  # of the text
        "duration": made.duration,
        "text": made.text,
    }
    if "segment" in granularities:
        found["segments"] = [_segment(at, one) for at, one in enumerate(made.segments)]
    if "word" in granularities:
        found["words"] = [_word(one) for one in made.words]
    return found


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": segment.seek,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _word(word: Word) -> dict[str, Any]:
    return {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}


async def _events(made: Transcript) -> AsyncGenerator[str, None]:
    """Yield the text of each segment, then the whole text, which they make together."""
    left = made.text
    for segment in made.segments:
        text = segment.text if left.startswith(segment.text) else segment.text.strip()
        if text and left.startswith(text):
            left = left[len(text) :]
            yield event({"type": "transcript.text.delta", "delta": text})
    if left:
        yield event({"type": "transcript.text.delta", "delta": left})
    yield event({"type": "transcript.text.done", "text": made.text, "usage": _usage(made)})
