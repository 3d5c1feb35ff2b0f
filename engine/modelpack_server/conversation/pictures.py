"""Pictures in messages: from the base64 of a request to decoded pixels, within limits.

`PictureReader` is for the edge of an API: it makes a part of a message from a data: URL. The part
keeps the file as it was sent; `take_pictures` collects the files of a conversation, and
`place_pictures` decodes one at a time in a worker process.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.picture import ACCEPTED
from modelpack_engine.worker.workers import JobFailedError, shared_workers
from modelpack_server.conversation.served_model import ServedModel, request_context

if TYPE_CHECKING:
    from modelpack_engine.request import Media
    from modelpack_engine.vision.processor import Picture

MAX_PICTURES = 32  # in one request
MAX_BYTES = 20 * 1024 * 1024  # of one file
MAX_SECONDS = 10.0  # to decode one file
MAX_SECONDS_ALL = 60.0  # to decode those of one request

_SIGNS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"))
_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)


#: Runs a job with bytes in a reserved worker, for at most so many seconds.
Job = Callable[[dict[str, Any], bytes, float], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture as a client sent it; `param` is its place in the request."""

    data: bytes = field(repr=False)
    param: str

    @property
    def data_url(self) -> str:
        """The file as a data: URL, as OpenAI's API takes it."""
        kind = next((kind for sign, kind in _SIGNS if self.data.startswith(sign)), "webp")
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"

    def decode(self, run: Job, seconds: float) -> Picture:
        """Return the decoded picture, upright; raises `RequestError` for bad and large files."""
        import numpy as np

        from modelpack_engine.vision.processor import Picture

        try:
            answer = run({"kind": "picture"}, self.data, seconds)
        except JobFailedError as error:
            raise self._bad(f"refused: {error}") from None
        found = answer["value"]
        if "problem" in found:
            raise self._bad(found["problem"])
        pixels = np.frombuffer(answer["raw"], np.uint8)
        return Picture(pixels.reshape(found["height"], found["width"], 3), self.param)

    def _bad(self, why: str) -> RequestError:
        return RequestError(f"{self.param}: the picture is {why}", param=self.param)


class PictureReader:
    """Reads the pictures of one request to a model with vision, or says why there is none."""

    def __init__(self, no_vision: str = "") -> None:
        self._no_vision, self._count = no_vision, 0

    def url(self, url: object, param: str) -> dict[str, Any]:
        """Return the part of a message for a data: URL; raises `RequestError` for other URLs."""
        self._check_vision(param)
        if not isinstance(url, str) or not url:
            raise RequestError(f"{param}: the URL of the picture is not a string", param=param)
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            raise RequestError(
                f"{param}: pictures are not fetched from the network; there is no"
                " --allow-media-url yet",
                param=param,
                hint="send the picture as a data: URL with base64",
            )
        if scheme != "data":
            raise RequestError(
                f"{param}: {url[:30]!r} is not a data: URL", param=param,
                hint="send the picture as data:image/png;base64,…",
            )  # fmt: skip
        found = _DATA_URL.match(url)
        if found is None or "base64" not in found["options"].lower().split(";"):
            raise RequestError(
                f"{param}: the data: URL has no base64", param=param,
                hint="send the picture as data:image/png;base64,…",
            )  # fmt: skip
        kind = found["type"].lower()
        if kind and not kind.startswith("image/"):
            raise RequestError(f"{param}: {kind[:50]!r} is not a picture; {ACCEPTED}", param=param)
        text = url[found.end() :]
        return self.base64(unquote(text) if "%" in text else text, param)

    def base64(self, text: object, param: str) -> dict[str, Any]:
        """Return the part of a message for a file in base64."""
        self._check_vision(param)
        if not isinstance(text, str):
            raise RequestError(f"{param}: the picture is not a base64 string", param=param)
        if len(text) > MAX_BYTES // 3 * 4 + 8:
            raise self._too_large(param)
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{param}: the base64 is not valid: {error}", param=param) from None
        return self.file(data, param)

    def file(self, data: bytes, param: str) -> dict[str, Any]:
        """Return the part of a message for the bytes of a file."""
        self._count += 1
        if self._count > MAX_PICTURES:
            raise RequestError(
                f"{param}: more than {MAX_PICTURES} pictures in one request", param=param
            )
        if not data:
            raise RequestError(f"{param}: the picture is empty", param=param)
        if len(data) > MAX_BYTES:
            raise self._too_large(param)
        return {"type": "image", "picture": PictureFile(data, param)}

    def _check_vision(self, param: str) -> None:
        if self._no_vision:
            raise RequestError(
                f"{param}: this model accepts text only: {self._no_vision}", param=param
            )

    def _too_large(self, param: str) -> RequestError:
        return RequestError(
            f"{param}: the picture has more than {MAX_BYTES} bytes", param=param,
            hint="send a smaller picture",
        )  # fmt: skip


def picture_reader(model: ServedModel) -> PictureReader | None:
    """Return the reader for a request to `model`; None if it is a model of text."""
    if model.pictures is not None:
        return PictureReader()
    reason = model.engine.no_vision
    return PictureReader(reason) if reason else None


class PictureFiles:
    """The pictures of a request, in order; iterating decodes one at a time, in a worker process.

    Few workers decode, and requests of one `owner` take one of them. It stays reserved until the
    caller asks for the next picture, because decoded ones take up to 100 MB. Leaving the context
    frees it.
    """

    def __init__(self, files: Sequence[PictureFile], owner: bytes = b"") -> None:
        self._files = files
        self._key = owner.hex() or f"request {id(self)}"
        self._worker = ExitStack()

    def __enter__(self) -> PictureFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Picture]:
        left = MAX_SECONDS_ALL
        for file in self._files:
            self._worker.close()
            try:
                reserved = shared_workers("picture").reserved(self._key)
                run = self._worker.enter_context(reserved)
            except JobFailedError as error:  # the request was cancelled
                raise RequestError(f"{file.param}: {error}", param=file.param) from None
            if left <= 0:
                raise RequestError(
                    f"{file.param}: the pictures of the request take longer than"
                    f" {MAX_SECONDS_ALL:g} s",
                    param=file.param,
                )
            began = time.monotonic()
            yield file.decode(run, min(MAX_SECONDS, left))
            left -= time.monotonic() - began

    def __contains__(self, item: object) -> bool:
        return False


def take_pictures(
    messages: Sequence[Mapping[str, Any]], placeholder: str | None
) -> tuple[list[dict[str, Any]], list[PictureFile]]:
    """Return messages without the files of their pictures, and these in order.

    With a `placeholder`, the content of each message becomes text with it in the pictures' places:
    for templates that show text only.
    """
    found: list[PictureFile] = []
    changed = []
    for message in messages:
        turn = dict(message)
        content = turn.get("content")
        if isinstance(content, list):
            found += [part["picture"] for part in content if part["type"] == "image"]
            parts = [{"type": "image"} if part["type"] == "image" else part for part in content]
            if placeholder is not None:
                turn["content"] = "".join(part.get("text", placeholder) for part in parts)
            else:
                turn["content"] = parts
        changed.append(turn)
    return changed, found


def shows_pictures(chat_template: str | None) -> bool:
    """Return whether a template shows parts of the type `image`."""
    return re.search(r"""['"]image['"]""", chat_template or "") is not None


def place_pictures(
    model: ServedModel, token_ids: list[int], files: Sequence[PictureFile]
) -> tuple[list[int], tuple[Media, ...]]:
    """Return a prompt with its pictures in place. Call it in a thread.

    Raises `RequestError`, `ContextLengthError` as soon as the prompt is too long, and
    `QueueFullError` if the queue is full already or too many pictures wait.
    """
    assert model.pictures is not None
    model.engine.check_queue()
    with PictureFiles(files, request_context.get().cache_salt) as pictures:
        return model.pictures.place(token_ids, pictures, model.check_room)


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
