"""Videos in requests: from the bytes of a file to sampled frames, decoded in a worker process.

The workers are not those of pictures: a video takes them for up to half a minute.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.workers import JobFailedError
from modelpack_server.conversation.served_model import MediaFetcher

if TYPE_CHECKING:
    from modelpack_engine.vision.videos import Video
    from modelpack_engine.worker.video import Sampling

#: Of one file: base64 of more does not fit into a request.
MAX_VIDEO_BYTES = 45 * 1024 * 1024
MAX_DECODE_SECONDS = 30.0  # of one file


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A video as a client sent it; `param` is its place in the request.

    Raises `RequestError` for an empty or a large file, and if there is nothing that decodes it.
    """

    data: bytes = field(repr=False)
    param: str

    def __post_init__(self) -> None:
        check_decoder(self.param)
        if not self.data:
            raise self._bad("empty")
        if len(self.data) > MAX_VIDEO_BYTES:
            raise RequestError(
                f"{self.param}: the video has more than {MAX_VIDEO_BYTES} bytes",
                param=self.param,
                hint="send a shorter or smaller video",
            )

    def opened(self, owner: str, seconds: float) -> AbstractContextManager[VideoFile]:
        """Return the file itself; see `VideoUrl.opened`."""
        return nullcontext(self)

    @property
    def data_url(self) -> str:
        """The file as a data: URL, as vLLM's API takes it."""
        kind = "webm" if self.data.startswith(b"\x1aE\xdf\xa3") else "mp4"
        return f"data:video/{kind};base64,{base64.b64encode(self.data).decode()}"

    def decode(
        self,
        run: Callable[[dict[str, Any], bytes, float], dict[str, Any]],
        sampling: Sampling,
        seconds: float,
    ) -> Video:
        """Return the frames that a model sees; `run` is a worker's.

        Raises `RequestError` for bad files, and for one that takes longer than `seconds` to decode.
        """
        import numpy as np

        from modelpack_engine.vision.videos import Video

        job = {"kind": "video", "sampling": asdict(sampling)}
        try:
            answer = run(job, self.data, seconds)
        except JobFailedError as error:
            raise self._bad(f"refused: {error}") from None
        found = answer["value"]
        if "problem" in found:
            raise self._bad(found["problem"])
        frames = np.frombuffer(answer["raw"], np.uint8).reshape(found["shape"])
        return Video(frames, tuple(found["times"]), found["seconds"], self.param)

    def _bad(self, why: str) -> RequestError:
        return RequestError(f"{self.param}: the video is {why}", param=self.param)


@dataclass(frozen=True, slots=True)
class VideoUrl:
    """The http(s) URL of a video; `param` is its place in the request."""

    url: str = field(repr=False)
    param: str
    urls: MediaFetcher

    @contextmanager
    def opened(self, owner: str, seconds: float) -> Iterator[VideoFile]:
        """Fetch the file in at most so many seconds; raise what `MediaUrls.fetched` raises.

        Leave the context when the file is not needed any more.
        """
        with self.urls.fetched(
            self.url, self.param, owner=owner, seconds=seconds, max_bytes=MAX_VIDEO_BYTES,
            kind="video",
        ) as data:  # fmt: skip
            yield VideoFile(data, self.param)


def check_decoder(param: str) -> None:
    """Raise `RequestError` if the extra `video` is not installed."""
    if importlib.util.find_spec("av") is None:
        raise RequestError(
            f"{param}: videos need the extra 'video', which is not installed"
            " (pip install 'modelpack[video]')",
            param=param,
        )
