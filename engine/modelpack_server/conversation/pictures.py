"""Pictures in messages: from the base64 of a request to decoded pixels, within limits.

`PictureReader` is for the edge of an API: it makes a part of a message from a data: URL. The part
keeps the file as it was sent; `take_pictures` collects the files of a conversation, and iterating
over them decodes one at a time.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from modelpack_engine.errors import RequestError

if TYPE_CHECKING:
    from modelpack_engine.request import Media
    from modelpack_engine.vision.processor import Picture, PictureProcessor
    from modelpack_server.conversation.served_model import ServedModel

MAX_PICTURES = 32  # in one request
MAX_BYTES = 20 * 1024 * 1024  # of one file
MAX_PIXELS = 33_177_600  # of one picture: 8K, 7680 x 4320
MAX_SIDE = 16_384

#: The formats that OpenAI's and Anthropic's APIs take.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_SIGNS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"))
_ACCEPTED = "expected PNG, JPEG, WebP or GIF"

_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)
#: Decoded pictures take up to 100 MB each, so few requests process theirs at a time.
_processing = threading.Semaphore(2)


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

    def decode(self) -> Picture:
        """Return the decoded picture, upright; raises `RequestError` for bad and large files."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            image = Image.open(io.BytesIO(self.data), formats=FORMATS)  # reads the header only
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise self._refused(f"it has more than {MAX_PIXELS} pixels") from None
        except UnidentifiedImageError:
            raise self._refused(f"unknown format, {_ACCEPTED}") from None
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise self._damaged(error) from error
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise self._refused(
                f"it has {width} x {height} pixels, the limit is {MAX_PIXELS} pixels and"
                f" {MAX_SIDE} a side"
            )
        if not width or not height:
            raise self._refused(f"it has {width} x {height} pixels")
        try:
            if getattr(image, "is_animated", False):
                raise self._refused("it is animated; send one frame")
            return self._decoded(ImageOps.exif_transpose(image))
        except RequestError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def _decoded(self, image: Any) -> Picture:
        import numpy as np

        from modelpack_engine.vision.processor import Picture

        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            grey = np.asarray(image).astype(np.uint32) >> 8
            pixels = np.repeat(grey[..., None], 3, axis=2)
        else:
            pixels = np.asarray(image.convert("RGB"))
        return Picture(np.ascontiguousarray(pixels, np.uint8), self.param)

    def _refused(self, why: str) -> RequestError:
        return RequestError(f"{self.param}: the picture is refused: {why}", param=self.param)

    def _damaged(self, error: Exception) -> RequestError:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return RequestError(f"{self.param}: the picture is damaged: {why}", param=self.param)


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
            raise RequestError(f"{param}: {kind[:50]!r} is not a picture; {_ACCEPTED}", param=param)
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
    """The pictures of a conversation, in order; iterating decodes one at a time."""

    def __init__(self, files: Sequence[PictureFile]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Picture]:
        return (file.decode() for file in self._files)

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
    processor: PictureProcessor, token_ids: list[int], files: Sequence[PictureFile]
) -> tuple[list[int], tuple[Media, ...]]:
    """Return a prompt with its pictures in place; raises `RequestError`. Call it in a thread."""
    with _processing:
        return processor.place(token_ids, PictureFiles(files))


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
