"""VisionEncoder: the embeddings of pictures, sounds and frames of videos, in a bounded cache.

`Vision` is what a loaded model has beside its language model; `open_vision` makes it, and tests
its towers with noise.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Parts
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from operator import attrgetter
from statistics import median
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
from modelpack_engine.vision.models import AUDIO_PARTS, CLASSES, Encode, VisionModel
from modelpack_engine.vision.processor import (
    HearingProcessor,
    Picture,
    PictureProcessor,
    TowerProcessor,
)
from modelpack_engine.vision.sounds import Sound, SoundProcessor
from modelpack_engine.vision.tower_call import BlockOutputs, TowerCall
from modelpack_engine.vision.transfers import Arrival, Transfers
from modelpack_engine.vision.videos import Video, VideoProcessor

#: Bytes of embeddings that are kept, and for models with cross-attention, also pictures.
MAX_CACHE_BYTES, LEAST_PICTURES = 256 * 1024 * 1024, 8
#: Bytes of evicted embeddings in host memory: at most an eighth of what is available.
MAX_HOST_BYTES, _HOST_PART = 1024**3, 8
#: Bytes of the inputs, in float32, of files that one call of a tower encodes together: those of one
#: megapixel (half of one for Qwen's, whose inputs have each picture twice), or of four minutes of
#: sound with 128 features for 10 ms. So many patches fill a GPU, and sequences that decode wait for
#: them as for one photo of a model with more tokens for larger pictures.
MAX_BATCH_BYTES = 3 * 1024**2 * 4
#: Files that a call looks at, to find those of the same shapes: many short videos may wait.
_MAX_CANDIDATES = 1024
#: The most that embeddings may change if files are encoded together, as a part of what two files
#: differ by: sums in 16 bits change with the shapes of matrices.
_TOLERANCE = 0.1
#: Seconds that a step in which no sequence decodes waits for the inputs of a picture.
_PROCESS_SECONDS = 0.01
#: Steps without pictures, the last ones, whose median time is that of a slice.
_MAX_TIMES = 15
#: The least estimate of the seconds that a block takes for each token.
_LEAST_BLOCK_TIME = 1e-9
#: What a tower encodes, by the name of the input that has its content.
_KINDS = {"pixel_values": "picture", "input_features": "sound", "pixel_values_videos": "video"}

_log = logging.getLogger(__name__)
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, EngineError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


#: An owner, and the digest of a picture.
Key = tuple[bytes, bytes]
#: The inputs of a tower, by name.
Inputs = Mapping[str, NDArray[Any]]


class HostCache:
    """Copies in host memory of the embeddings that `VisionEncoder` evicts (LRU).

    On CUDA, MLX moves an array that the host reads, which a step in flight may be using. `save`
    therefore lets the device copy the bytes, and `collect`, which is called before each step, reads
    the copies that were started in the step before the last: the device has made them. An embedding
    has a copy until the host's limit drops it.
    """

    def __init__(self, max_bytes: int, transfers: Transfers) -> None:
        self._max_bytes, self._transfers = max_bytes, transfers
        self._saving: dict[Key, tuple[Arrival, mx.Dtype, tuple[int, ...]]] = {}
        self._arriving: dict[Key, tuple[Arrival, mx.Dtype, tuple[int, ...]]] = {}  # for a step
        self._kept: OrderedDict[Key, tuple[NDArray[np.uint8], mx.Dtype, tuple[int, ...]]]
        self._kept = OrderedDict()
        #: The bytes of the copies.
        self.nbytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._kept or key in self._saving or key in self._arriving

    def save(self, key: Key, made: mx.array) -> None:
        """Start copying embeddings, unless there is a copy or they exceed the limit."""
        if key in self._kept:
            self._kept.move_to_end(key)
        elif key not in self and made.nbytes <= self._max_bytes:
            self._saving[key] = self._transfers.take(made), made.dtype, made.shape

    def collect(self) -> None:
        """Read the copies that were started before the previous call."""
        arriving, self._arriving, self._saving = self._arriving, self._saving, {}
        for key, (arrival, dtype, shape) in arriving.items():
            content = arrival.read()
            self._kept[key] = content, dtype, shape
            self.nbytes += content.nbytes
            while self.nbytes > self._max_bytes:
                _, (oldest, *_) = self._kept.popitem(last=False)
                self.nbytes -= oldest.nbytes

    def load(self, key: Key) -> mx.array | None:
        """Return embeddings on the device with the bits that were saved; None without a copy."""
        while key not in self._kept and key in self:  # evicted in this step, or in the one before
            self.collect()
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        content, dtype, shape = self._kept[key]
        made = self._transfers.send([content]).view(dtype).reshape(shape)
        mx.async_eval(made)
        return made


class VisionEncoder:
    """Runs the vision tower of a model; keeps embeddings by the digest of their picture (LRU).

    Up to `max_bytes` stay on the device, and what it evicts, up to `host_bytes` in host memory.

    Owners share none: the time of a reply would tell which pictures another one has sent.

    The scheduler calls `prepare` for each picture of a chunk, and `input_embeddings` then finds
    them. While sequences decode in a step, it calls the tower once, so that their tokens wait for
    no more than that. In slices, the call is evaluated over several steps, each of which takes
    about twice as long as one without pictures. The time of a block is estimated from whole steps
    with and without a slice, as the time of its evaluation would include the step in flight. The
    call ends with the last request that waits for it.

    Of the kinds in `batched`, the names of their inputs, one call also encodes files that wait, of
    any owner, if their inputs have the same shapes, up to `MAX_BATCH_BYTES`. Those that wait get at
    most about half of the cache. If the call fails, each file gets a call of its own, so that a bad
    one fails its request alone.

    `inputs` makes the inputs of media that lack them (`MediaProcessor.inputs`), in a thread, as it
    takes as long as the tower: sequences in other steps do not wait for it.

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
        batched: Collection[str] = (),
        inputs: Callable[[Media], Inputs] = attrgetter("inputs"),
    ) -> None:
        self._crossing, self._picture_bytes = crossing, picture_bytes
        self._users: dict[Key, weakref.WeakSet[Media]] = {}
        self._model, self._max_bytes, self._hidden = model, max_bytes, hidden
        self._kept: OrderedDict[Key, mx.array] = OrderedDict()
        self._nbytes = 0
        self._transfers = Transfers()
        self._host = HostCache(host_bytes, self._transfers)
        self._step: dict[Key, mx.array] = {}  # those of the step being built
        self._num_encoded = 0  # calls of the tower in this step
        self._batched = frozenset(batched)
        self._ahead: set[Key] = set()  # encoded, and not needed by a step yet
        self._single = weakref.WeakSet[Media]()  # not to be encoded together with others
        self._failures: list[tuple[Sequence, RequestError]] = []
        self._inputs = inputs
        self._threads = ThreadPoolExecutor(1, "modelpack-media")  # starts it with the first call
        #: The inputs of one picture, made or being made.
        self._processing = weakref.WeakKeyDictionary[Media, Future[Inputs]]()
        self._patience = _PROCESS_SECONDS
        self._outputs = BlockOutputs(model)
        #: The calls that are evaluated in slices, by the files that wait for them.
        self._calls = weakref.WeakKeyDictionary[Media, TowerCall]()
        #: When the step began, whether it needs no picture, and the seconds of such steps.
        self._began, self._is_text = 0.0, False
        self._text_times = deque[float](maxlen=_MAX_TIMES)
        #: The kind of the step's slice, with its blocks times their tokens, and by kind, the
        #: estimated seconds of one of these.
        self._slice: tuple[str, int] | None = None
        self._block_times: dict[str, float] = {}
        self._after_prompts = False  # whether the step before had tokens of prompts
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

    def begin_step(self, *, after_prompts: bool = False) -> None:
        """Forget what the step before needed; move what it evicted to the host.

        `after_prompts` says that it computed tokens of prompts, so that it took longer.
        """
        self._host.collect()
        self._step.clear()
        self._num_encoded, self._patience = 0, _PROCESS_SECONDS
        now = time.perf_counter()
        if self._is_text:
            self._text_times.append(now - self._began)
        elif self._slice is not None and not (after_prompts or self._after_prompts):
            self._count_slice(*self._slice, now - self._began)
        self._began, self._is_text, self._slice = now, True, None
        self._after_prompts = after_prompts

    def end_step(self) -> None:
        """Release what the step needed: its graph refers to it until the device has run it."""
        self._step.clear()
        if self._crossing is not None:
            self._crossing.spans = ()

    def prepare(
        self,
        sequence: Sequence,
        media: Media,
        *,
        alone: bool,
        in_slices: bool = False,
        waiting: Iterable[tuple[bytes, Media]] = (),
    ) -> bool:
        """Return whether a picture can be a part of this step; encode it if there is time.

        `alone` says that no sequence decodes in the step, `in_slices` that the step is to take
        little longer than without the picture. A picture that cannot be encoded is one of
        `take_failures`. Copying one back from the host counts as encoding it. `waiting` are
        pictures that later steps need, with their owners.
        """
        self._is_text = False
        key = sequence.owner, media.digest
        if key in self._step:
            return True
        in_slices &= self._outputs.found and key not in self._host
        if key not in self._kept:
            call = self._call(key)
            if call is not None:
                self._calls[media] = call
            if self._num_encoded and not alone:
                if call is None and not self._processing:
                    self._has_inputs(key, media, alone=False)  # a thread makes them meanwhile
                return False
            if media.until and (self._num_encoded or not alone) and not self._has_room():
                return False
            if call is None and not self._has_inputs(key, media, alone=alone):
                return False
            if in_slices and sequence.num_computed_tokens < media.start:
                return False  # the step computes these tokens instead of a slice
            self._num_encoded += 1
        if media.until:
            self._users.setdefault(key, weakref.WeakSet()).add(media)
        try:
            found = self._encoded(key, media, waiting, in_slices=in_slices)
        except RequestError as error:
            self._failures.append((sequence, error))
            found = None
        if found is None:
            self._users.pop(key, None)
            return False
        self._step[key] = found
        return True

    def _has_inputs(self, key: Key, media: Media, *, alone: bool) -> bool:
        """Return whether a picture that is not on the device has inputs, which a thread makes."""
        if not media.lacks_inputs or key in self._host:
            return True
        making = self._processing
        if media not in making and all(each.done() for each in making.values()):
            making.clear()  # inputs are large, and those of a preempted sequence may wait for this
            try:
                making[media] = self._threads.submit(self._inputs, media)
            except RuntimeError:  # no thread can be started
                return True  # then the inputs are made here
        if alone:  # there may be no step without it, but requests that arrive do not wait for it
            wait(making.values(), self._patience)
            self._patience = 0.0
        return media in making and making[media].done()

    def _processed(self, media: Media) -> Media:
        """Return media with inputs; raises `RequestError` if they cannot be made."""
        if not media.lacks_inputs:
            return media
        making = self._processing.pop(media, None)
        try:
            inputs = self._inputs(media) if making is None else making.result()
        except RequestError:
            raise
        except Exception as error:  # of a library: it fails this request, not the engine
            _log.exception("the inputs of a file cannot be made")
            raise RequestError(
                f"{media.param}: the file cannot be processed: {type(error).__name__}",
                param=media.param,
            ) from error
        return replace(media, inputs=inputs, source=None)

    def _has_room(self) -> bool:
        """Return whether another picture fits beside those of unfinished requests."""
        used = [made.nbytes for key, made in self._kept.items() if self._users.get(key)]
        return sum(used) + self._picture_bytes <= self._max_bytes

    def take_failures(self) -> list[tuple[Sequence, RequestError]]:
        """Return the sequences with a picture that cannot be encoded, each of them once."""
        failures, self._failures = self._failures, []
        return failures

    def _encoded(
        self,
        key: Key,
        media: Media,
        waiting: Iterable[tuple[bytes, Media]],
        *,
        in_slices: bool = False,
    ) -> mx.array | None:
        """Return the embeddings of a picture; None if they are not evaluated yet.

        While a call for another picture is evaluated in slices, a slice is one of that call.
        """
        self._ahead.discard(key)
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
        call = self._call(key)
        if call is None and in_slices:
            call = next(iter(self._calls.values()), None)
        if call is None:
            call = self._begin(key, media, waiting)
        try:
            if in_slices and not call.is_evaluated:
                if (blocks := call.advance(self._num_blocks(call))) > 0:
                    self._slice = call.kind, call.num_tokens * blocks
                return None
            parts = dict(zip(call.keys, call.finish(), strict=True))
        except _FAILURES as error:
            files = self._end(call)
            if len(call.keys) > 1:
                _log.warning("%d %ss are encoded one by one: %s", len(call.keys), call.kind, error)
                self._single.update(files)
                return None if in_slices else self._encoded(key, media, waiting)
            if key not in call.keys:
                return None  # its own request gets the error when it tries again
            self.misses += 1
            _log.warning("a %s cannot be encoded: %s", call.kind, error)
            raise RequestError(
                f"{media.param}: the model cannot encode this {call.kind}", param=media.param
            ) from error
        self._end(call)
        self.misses += len(parts)
        for each, part in parts.items():
            self._keep(each, part)
        self._ahead |= parts.keys() - {key}
        return parts.get(key)

    @property
    def _text_time(self) -> float:
        """The seconds of a step without pictures."""
        return median(self._text_times) if self._text_times else 0.0

    def _count_slice(self, kind: str, work: int, seconds: float) -> None:
        """Estimate the time of a block from that of a step with a slice."""
        more = (seconds - self._text_time) / work
        if more <= 0:  # the next slice has twice as many blocks, at least
            most = self._text_time / work
            more = max(min(self._block_times.get(kind, most), most) / 2, _LEAST_BLOCK_TIME)
        self._block_times[kind] = more

    def _num_blocks(self, call: TowerCall) -> int:
        """Return the blocks of a slice that takes as long as a step without pictures."""
        each = self._block_times.get(call.kind)
        return 1 if each is None else max(1, int(self._text_time / (each * call.num_tokens)))

    def _call(self, key: Key) -> TowerCall | None:
        """Return the call that has begun to encode a picture, or None."""
        return next((call for call in self._calls.values() if key in call.keys), None)

    def _begin(self, key: Key, media: Media, waiting: Iterable[tuple[bytes, Media]]) -> TowerCall:
        """Return a call for a picture and others; raises `RequestError` if it gets no inputs."""
        processed = self._processed(media)
        batch = {key: processed}
        if media not in self._single:
            batch = self._batch(key, processed, waiting)
        kind = _KINDS[_content(processed)]
        call = TowerCall(
            self._model, [*batch.values()], [*batch], kind, self._outputs, self._transfers.send
        )
        self._calls.update(dict.fromkeys([media, *batch.values()], call))
        return call

    def _end(self, call: TowerCall) -> list[Media]:
        """Forget a call; return the files that waited for it."""
        files = [media for media, each in self._calls.items() if each is call]
        for media in files:
            del self._calls[media]
        return files

    def _batch(
        self, key: Key, media: Media, waiting: Iterable[tuple[bytes, Media]]
    ) -> dict[Key, Media]:
        """Return a picture, and those that are encoded together with it."""
        batch = {key: media}
        content = _content(media)
        if content not in self._batched:
            return batch
        most = MAX_BATCH_BYTES // max(1, media.inputs[content].nbytes)
        self._ahead &= self._kept.keys()
        if sum(self._kept[each].nbytes for each in self._ahead) >= self._max_bytes // 2:
            return batch
        shapes = _shapes(media)
        for owner, other in islice(waiting, _MAX_CANDIDATES) if most > 1 else ():
            each = owner, other.digest
            if each in self._kept or each in self._host or other in self._single:
                continue
            if self._call(each) is not None:
                continue
            if _shapes(other) == shapes:
                batch.setdefault(each, other)
                if len(batch) == most:
                    break
        return batch

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


def _content(media: Media) -> str:
    """Return the name of the input with the content of a picture, a sound or frames."""
    return next((name for name in _KINDS if name in media.inputs), "pixel_values")


def _shapes(media: Media) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's inputs, which are those of all files of a call.

    Inputs of other kinds have other names. Frames of a call have as many tokens, too: the last one
    of LLaVA-OneVision's has one more.
    """
    shapes = {name: array.shape for name, array in media.inputs.items()}
    if "pixel_values_videos" in shapes:
        shapes["token_ids"] = (len(media.token_ids),)
    return shapes


def joins() -> bool:
    """Return whether files may be encoded together: on GPUs, which a small one does not fill.

    A CPU takes as long for each, and the first one would wait for the others.
    """
    return mx.default_device() != mx.Device(mx.cpu)


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
    """What a model needs to read files: the processor before, and the encoder in its engine."""

    processor: TowerProcessor
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
    (`MediaProcessor.no_sounds`); the same of `videos`. Noise goes through it first: raises
    `EngineError` if the model cannot read a picture, or if its pixels change nothing; for types
    that read sounds only, the same of these. Of each kind, if one call for two files returns other
    embeddings, they are encoded one by one, and a log says so.
    """
    needs = CLASSES[config["model_type"]]
    random, batched = np.random.default_rng(0), set[str]()
    together = joins() and needs.batched
    processor: TowerProcessor = HearingProcessor(config)
    if needs.pictures:
        processor = PictureProcessor(config, settings, encode)
        pictures = [*map(Picture, random.integers(0, 256, (2, 64, 96, 3), np.uint8))]
        batched |= _test("vision", model, processor, processor.image_token_id, pictures, together)
    if sounds is not None:
        try:
            if not any(getattr(model, name, None) for name in AUDIO_PARTS):
                raise EngineError("the files have no audio tower")
            processor.sounds = found = SoundProcessor(config, sounds, encode)
            # A multiple of 128 and one more: Gemma 4's last row is of padding.
            samples = random.normal(0, 0.1, (2, found.rate + 129)).astype(np.float32)
            heard = [*map(Sound, samples)]
            batched |= _test("audio", model, processor, found.token_id, heard, joins())
        except EngineError as error:
            if not needs.pictures:
                raise
            processor.sounds, processor.no_sounds = None, str(error)
    if videos is not None:
        try:
            processor.videos = shown = VideoProcessor(config, videos, encode)
            sampling, side = shown.sampling, 2 * shown.sampling.factor
            shape = sampling.size(1, side, side) if sampling.frame_pixels else (side, side)
            frames = random.integers(0, 256, (2, sampling.group, *shape, 3), np.uint8)
            clips = [Video(each, (0.0,) * len(each), 0.0) for each in frames]
            batched |= _test("vision", model, processor, shown.token_id, clips, together)
        except EngineError as error:
            processor.videos, processor.no_videos = None, str(error)
    crossing, size = getattr(model, "crossing", None), getattr(model, "picture_bytes", 0)
    most = max(MAX_CACHE_BYTES, LEAST_PICTURES * size)
    processor.max_pictures = most // size if size else 0
    encoder = VisionEncoder(
        model, most, hidden=processor.hidden, crossing=crossing, picture_bytes=size,
        host_bytes=host_limit(), batched=batched, inputs=processor.inputs,
    )  # fmt: skip
    return Vision(processor, encoder)


def _test(
    tower: str,
    model: Any,
    processor: TowerProcessor,
    token_id: int,
    files: Collection[Picture | Sound | Video],
    together: bool,
) -> set[str]:
    """Raise `EngineError` unless embeddings of two files are finite and differ.

    Return the kind of the files, as `VisionEncoder` has it in `batched`, if they may be encoded
    `together`, and are the same then.
    """
    made: dict[Media, mx.array] = {}
    for file in files:
        _, (media,) = processor.place([token_id], [file])
        try:
            (embeddings,) = TowerCall(model, [media]).finish()
            mx.eval(embeddings)
        except _FAILURES as error:
            kind = _KINDS[_content(media)]
            raise EngineError(f"the model cannot encode this {kind}: {error}") from error
        if not media.until and embeddings.shape[-2] != len(media.token_ids):
            raise EngineError(
                f"the {tower} tower returned {embeddings.shape[-2]} embeddings for"
                f" {len(media.token_ids)} tokens"
            )
        made[media] = embeddings
    first, second = made.values()
    if not mx.all(mx.isfinite(first)) or mx.array_equal(first, second):
        raise EngineError(f"the {tower} tower returned the same or infinite embeddings")
    return {_content(next(iter(made)))} if together and _is_batched(model, made) else set()


def _is_batched(model: Any, made: Mapping[Media, mx.array]) -> bool:
    """Return whether one call for files returns the embeddings `made` of calls for each.

    The call has both files twice: some towers separate only the first pictures.
    """
    what = _KINDS[_content(next(iter(made)))]
    first, second = alone = [each.astype(mx.float32) for each in made.values()]
    try:
        together = mx.stack(TowerCall(model, [*made, *made]).finish())
        error = mx.abs(together - mx.stack([*alone, *alone])).mean()
        is_close = bool(error <= _TOLERANCE * mx.abs(first - second).mean())  # NaN is not
    except _FAILURES as failure:
        _log.warning("%ss are encoded one by one: %s", what, failure)
        return False
    if not is_close:
        _log.warning("%ss are encoded one by one: together, they have other embeddings", what)
    return is_close
