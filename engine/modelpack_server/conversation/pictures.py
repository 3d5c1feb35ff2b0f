"""Pictures, sounds and videos in messages: from base64 or a URL of a request to pixels and samples.

`PictureReader` is for the edge of an API: it makes a part of a message. The part keeps the file or
the URL as it was sent; `take_pictures` collects those of a conversation, and `place_pictures`
fetches and decodes one at a time, the latter in a worker process. `sounds` decodes sounds, and
`videos` videos.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.picture import ACCEPTED
from modelpack_engine.worker.workers import JobFailedError, shared_workers
from modelpack_server.conversation.served_model import (
    MediaFetcher,
    ServedModel,
    request_context,
)
from modelpack_server.conversation.sounds import (
    MAX_SOUND_BYTES,
    SOUND_FORMATS,
    SoundFile,
    is_sound,
)
from modelpack_server.conversation.videos import (
    MAX_DECODE_SECONDS,
    MAX_VIDEO_BYTES,
    VideoFile,
    VideoUrl,
    check_decoder,
)

if TYPE_CHECKING:
    from modelpack_engine.request import Media
    from modelpack_engine.vision.processor import MediaFile, Picture
    from modelpack_engine.vision.sounds import Sound, SoundProcessor
    from modelpack_engine.vision.videos import Video, VideoProcessor

MAX_PICTURES = 32  # in one request, with sounds and videos
MAX_BYTES = 20 * 1024 * 1024  # of one file
MAX_SECONDS = 10.0  # to decode one file
LOW_DETAIL_SIDE = 512  # pixels on the longer side of a picture with OpenAI's detail "low"
PDF = "application/pdf"
MAX_SECONDS_ALL = 60.0  # to fetch and decode those of one request

_SIGNS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"))
_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)


#: Runs a job with bytes in a reserved worker, for at most so many seconds.
Job = Callable[[dict[str, Any], bytes, float], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture as a client sent it, or a page of a PDF; `param` is its place in the request.

    `page` counts from 0. A picture is made smaller for `max_side` pixels on its longer side.
    """

    data: bytes = field(repr=False)
    param: str
    page: int | None = None
    max_side: int | None = None

    def opened(self, owner: str, seconds: float) -> AbstractContextManager[PictureFile]:
        """Return the file itself; see `PictureUrl.opened`."""
        return nullcontext(self)

    @property
    def data_url(self) -> str:
        """The file as a data: URL, as OpenAI's API takes it."""
        kind = next((kind for sign, kind in _SIGNS if self.data.startswith(sign)), "webp")
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"

    def decode(self, run: Job, seconds: float) -> Picture:
        """Return the decoded picture, upright; raises `RequestError` for bad and large files."""
        import numpy as np

        from modelpack_engine.vision.processor import Picture

        job: dict[str, Any] = {"kind": "picture", "max_side": self.max_side}
        if self.page is not None:
            job = {"kind": "page", "index": self.page}
        try:
            answer = run(job, self.data, seconds)
        except JobFailedError as error:
            raise self._bad(f"refused: {error}") from None
        found = answer["value"]
        if "problem" in found:
            raise self._bad(found["problem"])
        pixels = np.frombuffer(answer["raw"], np.uint8)
        return Picture(pixels.reshape(found["height"], found["width"], 3), self.param)

    def _bad(self, why: str) -> RequestError:
        what = "the picture" if self.page is None else f"page {self.page + 1}"
        return RequestError(f"{self.param}: {what} is {why}", param=self.param)


@dataclass(frozen=True, slots=True)
class PictureUrl:
    """The http(s) URL of a picture; `param` and `max_side` are those of its `PictureFile`."""

    url: str = field(repr=False)
    param: str
    urls: MediaFetcher
    max_side: int | None = None

    @contextmanager
    def opened(self, owner: str, seconds: float) -> Iterator[PictureFile]:
        """Fetch the file in at most so many seconds; raise what `MediaUrls.fetched` raises.

        Leave the context when the file is not needed any more.
        """
        with self.urls.fetched(
            self.url, self.param, owner=owner, seconds=seconds, max_bytes=MAX_BYTES
        ) as data:
            yield PictureFile(data, self.param, max_side=self.max_side)


class PictureReader:
    """Reads the pictures, sounds and videos of one request, or says why the model takes none.

    Without `urls`, pictures in http(s) URLs are refused.
    """

    def __init__(
        self,
        no_vision: str = "",
        urls: MediaFetcher | None = None,
        no_sounds: str = "",
        no_videos: str = "",
        no_pictures: str = "",
    ) -> None:
        self._no_vision, self._no_pictures = no_vision, no_pictures
        self._no_sounds, self._no_videos = no_sounds, no_videos
        self._urls, self._count = urls, 0

    def url(self, url: object, param: str, detail: object = None) -> dict[str, Any]:
        """Return the part of a message for a URL; raises `RequestError` for a refused one.

        `detail` is OpenAI's: "low" makes the picture smaller, anything else leaves it as it is.
        """
        self._check_pictures(param)
        max_side = LOW_DETAIL_SIDE if detail == "low" else None
        if not isinstance(url, str) or not url:
            raise RequestError(f"{param}: the URL of the picture is not a string", param=param)
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return self._remote(url, param, max_side)
        if scheme != "data":
            raise RequestError(
                f"{param}: {url[:30]!r} is not a data: URL", param=param,
                hint="send the picture as data:image/png;base64,…",
            )  # fmt: skip
        kind, text = self._data(url, param, "picture")
        if kind and not kind.startswith("image/"):
            raise RequestError(f"{param}: {kind[:50]!r} is not a picture; {ACCEPTED}", param=param)
        return self.file(self._decoded(text, param, "picture"), param, max_side)

    def base64(self, text: object, param: str) -> dict[str, Any]:
        """Return the part of a message for a picture in base64."""
        self._check_pictures(param)
        return self.file(self._decoded(text, param, "picture"), param)

    def media(self, text: object, param: str) -> dict[str, Any]:
        """Return the part of a message for a picture or a sound in base64, by its content."""
        self._check_vision(param)
        data = self._decoded(text, param, "picture or sound", MAX_SOUND_BYTES)
        return self.sound_file(data, param) if is_sound(data) else self.file(data, param)

    def sound(self, given: object, param: str) -> dict[str, Any]:
        """Return the part of a message for OpenAI's `input_audio`: base64 and its format."""
        self._check_sounds(param)
        fields = given if isinstance(given, Mapping) else {}
        kind = fields.get("format", "wav")
        if kind not in SOUND_FORMATS:
            raise RequestError(
                f"{param}: format is {str(kind)[:50]!r}, expected {', '.join(SOUND_FORMATS)}",
                param=param,
            )
        data = self._decoded(fields.get("data"), param, "sound", MAX_SOUND_BYTES)
        return self.sound_file(data, param)

    def sound_file(self, data: bytes, param: str) -> dict[str, Any]:
        """Return the part of a message for the bytes of a sound."""
        self._check_sounds(param)
        self._count_one(param, "sounds and pictures")
        return {"type": "audio", "sound": SoundFile(data, param)}

    def video(self, url: object, param: str) -> dict[str, Any]:
        """Return the part of a message for the URL of a video; raise as `url` does."""
        self._check_videos(param)
        if not isinstance(url, str) or not url:
            raise RequestError(f"{param}: the URL of the video is not a string", param=param)
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            urls = self._fetcher(param, "video")
            urls.check(url, param)
            self._count_one(param, "videos and pictures")
            return {"type": "video", "video": VideoUrl(url, param, urls)}
        if scheme != "data":
            raise RequestError(
                f"{param}: {url[:30]!r} is not a data: URL", param=param,
                hint="send the video as data:video/mp4;base64,…",
            )  # fmt: skip
        kind, text = self._data(url, param, "video")
        if kind and not kind.startswith("video/"):
            raise RequestError(f"{param}: {kind[:50]!r} is not a video", param=param)
        return self.video_file(self._decoded(text, param, "video", MAX_VIDEO_BYTES), param)

    def video_file(self, data: bytes, param: str) -> dict[str, Any]:
        """Return the part of a message for the bytes of a video."""
        self._check_videos(param)
        self._count_one(param, "videos and pictures")
        return {"type": "video", "video": VideoFile(data, param)}

    def document(self, text: object, param: str) -> dict[str, Any]:
        """Return the part of a message for a PDF in base64 or in a data: URL.

        Raises `RequestError`, also if there is nothing that renders it.
        """
        self._check_pictures(param)
        if importlib.util.find_spec("pypdfium2") is None:
            raise RequestError(
                f"{param}: PDF documents need the extra 'documents', which is not installed"
                " (pip install 'modelpack[documents]')",
                param=param,
            )
        if isinstance(text, str) and text[:5].lower() == "data:":
            kind, text = self._data(text, param, "document")
            if kind not in ("", PDF):
                raise RequestError(f"{param}: {kind[:50]!r} is not {PDF}", param=param)
        data = self._decoded(text, param, "document")
        if not data:
            raise RequestError(f"{param}: the document is empty", param=param)
        self._count_one(param)
        return {"type": "document", "document": PictureFile(data, param)}

    def file(self, data: bytes, param: str, max_side: int | None = None) -> dict[str, Any]:
        """Return the part of a message for the bytes of a file."""
        self._check_pictures(param)
        self._count_one(param)
        if not data:
            raise RequestError(f"{param}: the picture is empty", param=param)
        if len(data) > MAX_BYTES:
            raise self._too_large(param)
        return {"type": "image", "picture": PictureFile(data, param, max_side=max_side)}

    def _remote(self, url: str, param: str, max_side: int | None) -> dict[str, Any]:
        urls = self._fetcher(param, "picture")
        urls.check(url, param)
        self._count_one(param)
        return {"type": "image", "picture": PictureUrl(url, param, urls, max_side)}

    def _fetcher(self, param: str, what: str) -> MediaFetcher:
        if self._urls is None:
            raise RequestError(
                f"{param}: {what}s are not fetched from the network: the server was started"
                " without --allow-media-url",
                param=param,
                hint=f"send the {what} as a data: URL with base64",
            )
        return self._urls

    def _data(self, url: str, param: str, what: str) -> tuple[str, str]:
        """Return the media type and the base64 of a data: URL."""
        found = _DATA_URL.match(url)
        if found is None or "base64" not in found["options"].lower().split(";"):
            kind = {"document": PDF, "video": "video/mp4"}.get(what, "image/png")
            raise RequestError(
                f"{param}: the data: URL has no base64", param=param,
                hint=f"send the {what} as data:{kind};base64,…",
            )  # fmt: skip
        text = url[found.end() :]
        return found["type"].lower(), unquote(text) if "%" in text else text

    def _decoded(self, text: object, param: str, what: str, max_bytes: int | None = None) -> bytes:
        """Return the bytes of base64, at most `max_bytes` or those of a picture."""
        max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        if not isinstance(text, str):
            raise RequestError(f"{param}: the {what} is not a base64 string", param=param)
        if len(text) > max_bytes // 3 * 4 + 8:
            raise self._too_large(param, what, max_bytes)
        try:
            data = _from_base64(text)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{param}: the base64 is not valid: {error}", param=param) from None
        if len(data) > max_bytes:
            raise self._too_large(param, what, max_bytes)
        return data

    def _count_one(self, param: str, what: str = "pictures") -> None:
        self._count += 1
        if self._count > MAX_PICTURES:
            raise RequestError(
                f"{param}: more than {MAX_PICTURES} {what} in one request", param=param
            )

    def _check_sounds(self, param: str) -> None:
        self._check_vision(param)
        if self._no_sounds:
            raise RequestError(
                f"{param}: this model reads no sound: {self._no_sounds}", param=param
            )

    def _check_videos(self, param: str) -> None:
        self._check_vision(param)
        if self._no_videos:
            raise RequestError(
                f"{param}: this model reads no video: {self._no_videos}", param=param
            )
        check_decoder(param)

    def _check_pictures(self, param: str) -> None:
        self._check_vision(param)
        if self._no_pictures:
            raise RequestError(
                f"{param}: this model reads no pictures: {self._no_pictures}", param=param
            )

    def _check_vision(self, param: str) -> None:
        if self._no_vision:
            raise RequestError(
                f"{param}: this model accepts text only: {self._no_vision}", param=param
            )

    def _too_large(
        self, param: str, what: str = "picture", max_bytes: int | None = None
    ) -> RequestError:
        return RequestError(
            f"{param}: the {what} has more than {max_bytes or MAX_BYTES} bytes", param=param,
            hint=f"send a smaller {what}",
        )  # fmt: skip


def _from_base64(text: str) -> bytes:
    """Return the bytes of base64, which may be in lines; raises `ValueError`."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # most texts have no lines, whose search takes a quarter of the time more
        return base64.b64decode("".join(text.split()), validate=True)


def picture_reader(model: ServedModel) -> PictureReader | None:
    """Return the reader for a request to `model`; None if it is a model of text."""
    if (processor := model.pictures) is not None:
        urls = request_context.get().media_urls
        why = processor.why_no_sounds, processor.why_no_videos, processor.why_no_pictures
        return PictureReader("", urls, *why)
    reason = model.engine.no_vision
    return PictureReader(reason) if reason else None


#: A file as a client sent it, or the URL of one.
SentFile = PictureFile | PictureUrl | SoundFile | VideoFile | VideoUrl


class PictureFiles:
    """The files of a request, which are decoded one at a time, in a worker process.

    Few workers decode, and requests of one `owner` take one of them. Unless `frees`, it stays
    reserved until the caller asks for the next picture, because decoded ones take up to 100 MB.
    Leaving the context frees it. Pictures in URLs are fetched one at a time, before a worker is
    reserved. A file that the caller does not decode reserves none.
    """

    def __init__(
        self,
        files: Sequence[SentFile],
        owner: bytes = b"",
        sounds: SoundProcessor | None = None,
        videos: VideoProcessor | None = None,
        *,
        frees: bool = False,
    ) -> None:
        self._frees, self._left = frees, MAX_SECONDS_ALL
        self._files, self._sounds, self._videos = files, sounds, videos
        self._owner, self._hashed = owner, (b"", b"")
        self._key = owner.hex() or f"request {id(self)}"
        self._reserved = ExitStack()

    def __enter__(self) -> PictureFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._reserved.close()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[MediaFile]:
        for source in self._files:
            self._reserved.close()
            self._check_time(self._left, source.param)
            began = time.monotonic()
            file: PictureFile | SoundFile | VideoFile
            if isinstance(source, SoundFile):
                file = source
            else:
                opened: AbstractContextManager[Any] = source.opened(self._key, self._left)
                file = self._reserved.enter_context(opened)
            self._left -= time.monotonic() - began
            yield self._media_file(file)

    def _media_file(self, file: PictureFile | SoundFile | VideoFile) -> MediaFile:
        """Return a file that `decode` reads before the next one is asked for."""
        from modelpack_engine.vision.processor import MediaFile, Picture
        from modelpack_engine.vision.sounds import Sound
        from modelpack_engine.vision.videos import Video

        if file.data is not self._hashed[0]:  # the pages of a document have the same data
            self._hashed = file.data, hashlib.sha256(file.data).digest()
        kind: type[Picture | Sound | Video] = Sound if isinstance(file, SoundFile) else Video
        settings = ""
        if isinstance(file, PictureFile):
            kind, settings = Picture, f"{file.page} {file.max_side}"
        digest = hashlib.sha256(self._hashed[1] + f"{kind.__name__} {settings}".encode()).digest()
        return MediaFile(kind, (self._owner, digest), file.param, partial(self._read, file))

    def _read(self, file: PictureFile | SoundFile | VideoFile) -> Picture | Sound | Video:
        """Return a decoded file; raises `RequestError`."""
        try:
            purpose = "video" if isinstance(file, VideoFile) else "media"
            reserved = shared_workers(purpose).reserved(self._key)
            run = self._reserved.enter_context(reserved)
        except JobFailedError as error:  # the request was cancelled
            raise RequestError(f"{file.param}: {error}", param=file.param) from None
        self._check_time(self._left, file.param)
        began = time.monotonic()
        decoded = self._decoded(file, run, self._left)
        self._left -= time.monotonic() - began
        if self._frees:
            self._reserved.close()
        return decoded

    def _decoded(
        self, file: PictureFile | SoundFile | VideoFile, run: Job, left: float
    ) -> Picture | Sound | Video:
        if isinstance(file, VideoFile):
            assert self._videos is not None, "the reader refuses videos"
            return file.decode(run, self._videos.sampling, min(MAX_DECODE_SECONDS, left))
        seconds = min(MAX_SECONDS, left)
        if isinstance(file, PictureFile):
            return file.decode(run, seconds)
        from modelpack_engine.vision.sounds import Sound

        assert self._sounds is not None, "the reader refuses sounds"
        samples = file.decode(
            run, self._sounds.rate, seconds, max_sound_seconds=self._sounds.seconds
        )
        return Sound(samples, file.param)

    @staticmethod
    def _check_time(left: float, param: str) -> None:
        if left <= 0:
            raise RequestError(
                f"{param}: the files of the request take longer than {MAX_SECONDS_ALL:g} s",
                param=param,
            )

    def __contains__(self, item: object) -> bool:
        return False


def with_pages(model: ServedModel, messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return messages with the pages of documents as pictures. Call it in a thread.

    Raises `RequestError` for a document that is no PDF, or if pictures and pages are too many, and
    `QueueFullError` if the queue is full already.
    """
    parts = [
        part
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part["type"] in (*_FIELDS, "document")
    ]
    documents = [part["document"] for part in parts if part["type"] == "document"]
    if not documents:
        return messages
    model.engine.check_queue()
    owner, began = request_context.get().cache_salt, time.monotonic()
    left = MAX_PICTURES - (len(parts) - len(documents))
    pages: dict[int, list[dict[str, Any]]] = {}
    for document in documents:
        if time.monotonic() - began > MAX_SECONDS_ALL:
            raise RequestError(
                f"{document.param}: the documents of the request take longer than"
                f" {MAX_SECONDS_ALL:g} s",
                param=document.param,
            )
        count = _count_pages(document, owner)
        left -= count
        if left < 0:
            raise RequestError(
                f"{document.param}: the document has {count} pages, the limit is {MAX_PICTURES}"
                " pages and pictures in one request",
                param=document.param,
            )
        pages[id(document)] = [
            {"type": "image", "picture": replace(document, page=page)} for page in range(count)
        ]

    def expanded(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = (pages[id(p["document"])] if p["type"] == "document" else [p] for p in content)
        return [part for several in found for part in several]

    return [
        {**message, "content": expanded(message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _count_pages(document: PictureFile, owner: bytes) -> int:
    param = document.param
    key = owner.hex() or f"document {id(document)}"
    try:
        with shared_workers("media").reserved(key) as run:
            found = run({"kind": "pages"}, document.data, MAX_SECONDS)["value"]
    except JobFailedError as error:
        raise RequestError(f"{param}: the document is refused: {error}", param=param) from None
    if "problem" in found:
        raise RequestError(f"{param}: the document is {found['problem']}", param=param)
    count = int(found["count"])
    if not count:
        raise RequestError(f"{param}: the document has no pages", param=param)
    return count


def take_pictures(
    messages: Sequence[Mapping[str, Any]],
    placeholder: str | None,
    picture: str | None = None,
    sound: str | None = None,
    video: str | None = None,
) -> tuple[list[dict[str, Any]], list[SentFile]]:
    """Return messages without the files of their pictures, sounds and videos, and these in order.

    With a `placeholder`, the content of each message becomes text with it in the pictures' places:
    for templates that show text only. `sound` and `video` are the texts in the places of those, for
    templates that do not show them, and `picture` that for templates that show another placeholder.
    """
    found: list[SentFile] = []
    changed = []
    for message in messages:
        turn = dict(message)
        content = turn.get("content")
        if isinstance(content, list):
            found += [part[_FIELDS[part["type"]]] for part in content if part["type"] in _FIELDS]
            shown = {"image": picture, "audio": sound, "video": video}
            parts = [_without_file(part, shown.get(part["type"])) for part in content]
            if placeholder is not None:
                turn["content"] = "".join(part.get("text", placeholder) for part in parts)
            else:
                turn["content"] = parts
        changed.append(turn)
    return changed, found


#: The fields of parts of messages with their file, by type.
_FIELDS = {"image": "picture", "audio": "sound", "video": "video"}


def _without_file(part: Mapping[str, Any], shown: str | None) -> dict[str, Any]:
    if shown is not None:
        return {"type": "text", "text": shown}
    return {"type": part["type"]} if part["type"] in _FIELDS else dict(part)


def shows_parts(chat_template: str | None, kind: str) -> bool:
    """Return whether a template shows parts of the type `kind`: "image", "audio" or "video"."""
    return re.search(rf"""['"]{kind}['"]""", chat_template or "") is not None


def place_pictures(
    model: ServedModel, token_ids: list[int], files: Sequence[SentFile]
) -> tuple[list[int], tuple[Media, ...]]:
    """Return a prompt with its pictures, sounds and videos in place. Call it in a thread.

    Raises `RequestError`, `ContextLengthError` as soon as the prompt is too long, and
    `QueueFullError` if the queue is full already or too many pictures wait.
    """
    assert model.pictures is not None
    model.engine.check_queue()
    owner = request_context.get().cache_salt
    processor = model.pictures
    with PictureFiles(
        files, owner, processor.sounds, processor.videos, frees=processor.encodes
    ) as pictures:
        return model.pictures.place(token_ids, pictures, model.check_room, owner)


def joined_content(contents: Sequence[str | list[dict[str, Any]]]) -> str | list[dict[str, Any]]:
    """Return the contents of consecutive messages as one, with an empty line between them."""
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        return "\n\n".join(texts)
    parts: list[dict[str, Any]] = []
    for content in contents:
        if parts:
            parts.append({"type": "text", "text": "\n\n"})
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts
