"""Sounds in requests: from the bytes of a file to samples, decoded in a worker process.

`decode_sound` is for one file alone; `SoundFile` is a part of a message.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.sound import MAX_SOUND_SECONDS, starts_as_mp3
from modelpack_engine.worker.workers import JobFailedError, shared_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

MAX_SOUND_BYTES = 25 * 1024 * 1024  # of one file, as OpenAI's API has it
MAX_SECONDS = 10.0  # to decode one file
#: The formats by the names of OpenAI's `input_audio`, and by which files are named.
SOUND_FORMATS = ("wav", "mp3", "flac", "ogg")


@dataclass(frozen=True, slots=True)
class SoundFile:
    """A sound as a client sent it; `param` is its place in the request.

    Raises `RequestError` for an empty or a large file, and if there is nothing that decodes it.
    """

    data: bytes = field(repr=False)
    param: str

    def __post_init__(self) -> None:
        check_decoder(self.param)
        if not self.data:
            raise self._bad("empty")
        if len(self.data) > MAX_SOUND_BYTES:
            raise too_large(self.param)

    @property
    def format(self) -> str:
        """The format, as OpenAI's API names it."""
        signs = ((b"RIFF", "wav"), (b"RF64", "wav"), (b"fLaC", "flac"), (b"OggS", "ogg"))
        return next((kind for sign, kind in signs if self.data.startswith(sign)), "mp3")

    def decode(
        self,
        run: Callable[[dict[str, Any], bytes, float], dict[str, Any]],
        rate: int,
        seconds: float = MAX_SECONDS,
        *,
        max_sound_seconds: float = MAX_SOUND_SECONDS,
    ) -> NDArray[np.float32]:
        """Return the samples, one channel of `rate` samples a second; `run` is a worker's.

        Raises `RequestError` for a bad file, and for one that takes longer than `seconds` to decode
        or `max_sound_seconds` to play.
        """
        import numpy as np

        job = {"kind": "sound", "rate": rate, "max_seconds": max_sound_seconds}
        try:
            answer = run(job, self.data, seconds)
        except JobFailedError as error:
            raise self._bad(f"refused: {error}") from None
        if "problem" in answer["value"]:
            raise self._bad(answer["value"]["problem"])
        return np.frombuffer(answer["raw"], np.float32)

    def _bad(self, why: str) -> RequestError:
        return RequestError(f"{self.param}: the sound is {why}", param=self.param)


def decode_sound(
    data: bytes,
    param: str,
    rate: int,
    *,
    owner: bytes = b"",
    max_sound_seconds: float = MAX_SOUND_SECONDS,
) -> NDArray[np.float32]:
    """Return the samples of a file, one channel of `rate` samples a second. Call it in a thread.

    Few workers decode, and requests of one `owner` take one of them. Raises `RequestError` for bad
    files, large ones and those that take too long, and `QueueFullError` if too many wait.
    """
    file = SoundFile(data, param)
    key = owner.hex() or f"sound {id(file)}"
    try:
        with shared_workers("media").reserved(key) as run:
            return file.decode(run, rate, max_sound_seconds=max_sound_seconds)
    except JobFailedError as error:  # the request was cancelled
        raise RequestError(f"{param}: {error}", param=param) from None


def is_sound(data: bytes) -> bool:
    """Return whether a file begins as a sound does, and not as a picture."""
    is_wav = data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE"
    is_mp3 = data.startswith(b"ID3") or starts_as_mp3(data)
    return is_wav or is_mp3 or data.startswith((b"fLaC", b"OggS"))


def check_decoder(param: str) -> None:
    """Raise `RequestError` if the extra `audio` is not installed."""
    if importlib.util.find_spec("miniaudio") is None:
        raise RequestError(
            f"{param}: sounds need the extra 'audio', which is not installed"
            " (pip install 'modelpack[audio]')",
            param=param,
        )


def too_large(param: str) -> RequestError:
    """Return the error for a file of too many bytes."""
    return RequestError(
        f"{param}: the sound has more than {MAX_SOUND_BYTES} bytes", param=param,
        hint="send a shorter sound",
    )  # fmt: skip
