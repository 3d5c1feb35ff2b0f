"""VisionEncoder: the embeddings of pictures, by the vision tower, in a bounded cache.

`Vision` is what a loaded model has beside its language model; `open_vision` makes it, and tests it
with one picture.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Parts
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.batch import MediaRows, StepBatch
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.kernels import launch
from modelpack_engine.layers.cross_attention import Crossing
from modelpack_engine.platform.device import available_memory
from modelpack_engine.request import Media
from modelpack_engine.vision.models import Encode, VisionModel
from modelpack_engine.vision.processor import Picture, PictureProcessor
from modelpack_engine.vision.sounds import Sound, SoundProcessor
from modelpack_engine.vision.videos import Video, VideoProcessor

#: Bytes of embeddings that are kept, and for models with cross-attention, also pictures.
MAX_CACHE_BYTES, LEAST_PICTURES = 256 * 1024 * 1024, 8
#: Bytes of evicted embeddings in host memory: at most an eighth of what is available.
MAX_HOST_BYTES, _HOST_PART = 1024**3, 8

_log = logging.getLogger(__name__)
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, EngineError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


#: An owner, and the digest of a picture.
Key = tuple[bytes, bytes]


class HostCache:
    """Copies in host memory of the embeddings that `VisionEncoder` evicts (LRU).

    On CUDA, MLX moves an array that the host reads, which a step in flight may be using. `save`
    therefore lets the device copy the bytes, and `collect` reads the copy before a later step, when
    the device has made it. An embedding has a copy until the host's limit drops it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._saving: dict[Key, tuple[mx.array, mx.Dtype, tuple[int, ...]]] = {}
        self._kept: OrderedDict[Key, tuple[NDArray[np.uint8], mx.Dtype, tuple[int, ...]]]
        self._kept = OrderedDict()
        #: The bytes of the copies.
        self.nbytes = 0

    def save(self, key: Key, made: mx.array) -> None:
        """Start copying embeddings, unless there is a copy or they exceed the limit."""
        if key in self._kept:
            self._kept.move_to_end(key)
        elif made.nbytes <= self._max_bytes:
            content = made.flatten().view(mx.uint8) | 0  # the view alone would share the memory
            mx.async_eval(content)
            self._saving[key] = content, made.dtype, made.shape

    def collect(self) -> None:
        """Move the copies that were started to host memory."""
        saving, self._saving = self._saving, {}
        for key, (content, dtype, shape) in saving.items():
            self._kept[key] = np.array(content), dtype, shape
            self.nbytes += content.nbytes
            while self.nbytes > self._max_bytes:
                _, (oldest, *_) = self._kept.popitem(last=False)
                self.nbytes -= oldest.nbytes

    def load(self, key: Key) -> mx.array | None:
        """Return embeddings on the device with the bits that were saved; None without a copy."""
        if key in self._saving:  # evicted in this step
            self.collect()
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        content, dtype, shape = self._kept[key]
        made = mx.array(content).view(dtype).reshape(shape)
        mx.async_eval(made)
        return made


class VisionEncoder:
    """Runs the vision tower of a model; keeps embeddings by the digest of their picture (LRU).

    Up to `max_bytes` stay on the device, and what it evicts, up to `host_bytes` in host memory.

    Owners share none: the time of a reply would tell which pictures another one has sent.

    The scheduler calls `prepare` for each picture of a chunk, and `input_embeddings` then finds
    them. While sequences decode in a step, it encodes one picture, so that their tokens wait for no
    more than that.

    `hidden` are tokens that the language model must not see, and the one that it sees instead.

    Layers with cross-attention (`crossing`) read the keys and values of a picture in every step of
    its request, which therefore stay in the cache until it ends. Where there is no room for
    another picture, its request waits, unless no sequence decodes in the step.
    """

    def __init__(
        self,
        model: VisionModel,
        max_bytes: int = MAX_CACHE_BYTES,
        *,
        hidden: tuple[tuple[int, ...], int] | None = None,
        crossing: Crossing | None = None,
        picture_bytes: int = 0,
        host_bytes: int = 0,
    ) -> None:
        self._crossing, self._picture_bytes = crossing, picture_bytes
        self._users: dict[Key, weakref.WeakSet[Media]] = {}
        self._model, self._max_bytes, self._hidden = model, max_bytes, hidden
        self._kept: OrderedDict[Key, mx.array] = OrderedDict()
        self._nbytes = 0
        self._host = HostCache(host_bytes)
        self._step: dict[Key, mx.array] = {}  # those of the step being built
        self._num_encoded = 0  # in this step
        self._failures: list[tuple[Sequence, RequestError]] = []
        #: Pictures whose embeddings were in the cache, and those that were computed.
        self.hits = self.misses = 0

    @property
    def nbytes(self) -> int:
        """The bytes of the embeddings that are kept."""
        return self._nbytes

    @property
    def reserved_bytes(self) -> int:
        """The bytes that pictures of unfinished requests may take, beside the KV cache.

        They include the keys and values that one layer joins for rows with several pictures.
        """
        if self._crossing is None:
            return 0
        return self._max_bytes + self._max_bytes // max(1, len(self._crossing.layers))

    @property
    def is_ready(self) -> bool:
        """Whether the step encodes no picture, and its rows need only one embedding each.

        With DeepStack they need several. See `hidden` and `crossing` for other models.
        """
        if self._num_encoded or self._hidden is not None or self._crossing is not None:
            return False
        return all(made.ndim == 2 for made in self._step.values())

    def begin_step(self) -> None:
        """Forget what the step before needed; move what it evicted to the host."""
        self._host.collect()
        self._step.clear()
        self._num_encoded = 0

    def end_step(self) -> None:
        """Release what the step needed: its graph refers to it until the device has run it."""
        self._step.clear()
        if self._crossing is not None:
            self._crossing.spans = ()

    def prepare(self, sequence: Sequence, media: Media, *, alone: bool) -> bool:
        """Return whether a picture can be a part of this step; encode it if there is time.

        `alone` says that no sequence decodes in the step. A picture that cannot be encoded is one
        of `take_failures`. Copying one back from the host counts as encoding it.
        """
        key = sequence.owner, media.digest
        if key in self._step:
            return True
        if key not in self._kept:
            if self._num_encoded and not alone:
                return False
            if media.until and (self._num_encoded or not alone) and not self._has_room():
                return False
            self._num_encoded += 1
        if media.until:
            self._users.setdefault(key, weakref.WeakSet()).add(media)
        try:
            self._step[key] = self.embeddings(media, sequence.owner)
        except RequestError as error:
            self._failures.append((sequence, error))
            self._users.pop(key, None)
            return False
        return True

    def _has_room(self) -> bool:
        """Return whether another picture fits beside those of unfinished requests."""
        used = [made.nbytes for key, made in self._kept.items() if self._users.get(key)]
        return sum(used) + self._picture_bytes <= self._max_bytes

    def take_failures(self) -> list[tuple[Sequence, RequestError]]:
        """Return the sequences with a picture that cannot be encoded, each of them once."""
        failures, self._failures = self._failures, []
        return failures

    def embeddings(self, media: Media, owner: bytes = b"") -> mx.array:
        """Return the embeddings of a picture, as `VisionModel.embed` does.

        Raises `RequestError` if the model cannot encode it.
        """
        key = owner, media.digest
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return found
        found = self._host.load(key)
        if found is not None:
            self.hits += 1
            self._keep(key, found)
            return found
        self.misses += 1
        inputs = {name: mx.array(value) for name, value in media.inputs.items()}
        try:
            made = self._model.embed(mx.array(media.token_ids, mx.int32), inputs)
            mx.async_eval(made)  # while it runs, the host builds the step
        except _FAILURES as error:
            named = {"input_features": "sound", "pixel_values_videos": "video"}
            what = next((named[name] for name in media.inputs if name in named), "picture")
            _log.warning("a %s cannot be encoded: %s", what, error)
            raise RequestError(
                f"{media.param}: the model cannot encode this {what}", param=media.param
            ) from error
        self._keep(key, made)
        return made

    def _keep(self, key: Key, made: mx.array) -> None:
        if made.nbytes > self._max_bytes:
            return
        self._kept[key] = made
        self._nbytes += made.nbytes
        for idle in [each for each in self._kept if not self._users.get(each)]:
            if self._nbytes <= self._max_bytes:
                break
            self._users.pop(idle, None)
            evicted = self._kept.pop(idle)
            self._nbytes -= evicted.nbytes
            self._host.save(idle, evicted)

    def shown_ids(self, token_ids: mx.array) -> mx.array:
        """Return the ids that the language model sees in a step with pictures.

        Layers of Gemma 4 look up embeddings of their own, which tokens of pictures do not have.
        """
        if self._hidden is None:
            return token_ids
        hidden, shown = self._hidden
        for token_id in hidden:
            token_ids = mx.where(token_ids == token_id, shown, token_ids)
        return token_ids

    def input_embeddings(self, batch: StepBatch, token_ids: mx.array) -> mx.array | None:
        """Return the embeddings [rows, width] of a step with pictures, None for other steps.

        With DeepStack they are [1 + layers, rows, width]. With cross-attention, there are none, and
        the layers get what the rows see.
        """
        if self._crossing is not None:
            self._crossing.spans = tuple(self._seen(batch.media_rows))
            return None
        if not batch.media_rows:
            return None
        rows = self._model.embed(token_ids, {})
        for part in batch.media_rows:
            made = self._step[part.owner, part.media.digest]
            made = made[..., part.first : part.first + part.length, :].astype(rows.dtype)
            if made.ndim < rows.ndim:  # a sound beside a picture with DeepStack
                made = mx.concatenate(
                    [made[None], mx.zeros((len(rows) - 1, *made.shape), made.dtype)]
                )
            if made.ndim > rows.ndim:
                rows = mx.concatenate(
                    [rows[None], mx.zeros((len(made) - 1, *rows.shape), rows.dtype)]
                )
            rows[..., part.row : part.row + part.length, :] = made
        return rows

    def _seen(self, parts: Parts[MediaRows]) -> Iterator[tuple[int, int, tuple[mx.array, ...]]]:
        """Yield ranges of rows with the keys and values of the pictures that they see."""
        edges = {edge for part in parts for edge in (part.row, part.row + part.length)}
        for start, stop in pairwise(sorted(edges)):
            seen = tuple(
                self._kept[part.owner, part.media.digest]
                for part in parts
                if part.row <= start < part.row + part.length
            )
            if seen:
                yield start, stop, seen


def host_limit() -> int:
    """Return the bytes of host memory for embeddings that the device's cache evicts.

    0 on a CPU and with Metal's unified memory: there, the device's memory is the host's, and copies
    would gain nothing over a larger cache.
    """
    if launch.backend() != "cuda":
        return 0
    return min(MAX_HOST_BYTES, available_memory() // _HOST_PART)


@dataclass(frozen=True, slots=True)
class Vision:
    """What a model needs to read pictures: the processor before, and the encoder in its engine."""

    processor: PictureProcessor
    encoder: VisionEncoder


def open_vision(
    model: Any,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    encode: Encode,
    sounds: Mapping[str, Any] | None = None,
    videos: Mapping[str, Any] | None = None,
) -> Vision:
    """Return the vision of a loaded model of `vision_classes`.

    With `sounds`, the settings of a feature extractor, it also reads sounds, or says why not
    (`PictureProcessor.no_sounds`); the same of `videos`. Noise goes through it first: raises
    `EngineError` if the model cannot read a picture, or if its pixels change nothing.
    """
    processor = PictureProcessor(config, settings, encode)
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (2, 64, 96, 3), np.uint8)
    _test("vision", model, processor, processor.image_token_id, [*map(Picture, noise)])
    if sounds is not None:
        try:
            if not any(getattr(model, name, None) for name in ("audio_tower", "embed_audio")):
                raise EngineError("the files have no audio tower")
            processor.sounds = found = SoundProcessor(config, sounds, encode)
            samples = random.normal(0, 0.1, (2, found.rate)).astype(np.float32)
            _test("audio", model, processor, found.token_id, [*map(Sound, samples)])
        except EngineError as error:
            processor.sounds, processor.no_sounds = None, str(error)
    if videos is not None:
        try:
            processor.videos = shown = VideoProcessor(config, videos, encode)
            sampling, side = shown.sampling, 2 * shown.sampling.factor
            shape = sampling.size(1, side, side) if sampling.frame_pixels else (side, side)
            frames = random.integers(0, 256, (2, sampling.group, *shape, 3), np.uint8)
            clips = [Video(each, (0.0,) * len(each), 0.0) for each in frames]
            _test("vision", model, processor, shown.token_id, clips)
        except EngineError as error:
            processor.videos, processor.no_videos = None, str(error)
    crossing, size = getattr(model, "crossing", None), getattr(model, "picture_bytes", 0)
    most = max(MAX_CACHE_BYTES, LEAST_PICTURES * size)
    processor.max_pictures = most // size if size else 0
    encoder = VisionEncoder(
        model, most, hidden=processor.hidden, crossing=crossing, picture_bytes=size,
        host_bytes=host_limit(),
    )  # fmt: skip
    return Vision(processor, encoder)


def _test(
    tower: str,
    model: Any,
    processor: PictureProcessor,
    token_id: int,
    files: Collection[Picture | Sound | Video],
) -> None:
    """Raise `EngineError` unless two files have finite embeddings that differ."""
    made = []
    for file in files:
        _, (media,) = processor.place([token_id], [file])
        embeddings = VisionEncoder(model).embeddings(media)
        if not media.until and embeddings.shape[-2] != len(media.token_ids):
            raise EngineError(
                f"the {tower} tower returned {embeddings.shape[-2]} embeddings for"
                f" {len(media.token_ids)} tokens"
            )
        made.append(embeddings)
    if not mx.all(mx.isfinite(made[0])) or mx.array_equal(made[0], made[1]):
        raise EngineError(f"the {tower} tower returned the same or infinite embeddings")
