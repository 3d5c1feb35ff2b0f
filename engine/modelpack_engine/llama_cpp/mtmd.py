"""MtmdProcessor: pictures by llama.cpp's mtmd, for projectors that our own encoder does not run.

mtmd runs in a process of its own (`main`), since llama.cpp ends its process (GGML_ASSERT) for some
files. It returns the tokens around a picture, and the embeddings that `LlamaCppEngine` decodes in
the places of the picture's tokens.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import math
import os
import resource
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.projector import projector_type
from modelpack_engine.core.sequence import Sequence as EngineSequence
from modelpack_engine.errors import (
    RETRY_AFTER,
    EngineError,
    ModelLoadError,
    QueueFullError,
    RequestError,
)
from modelpack_engine.llama_cpp.library import ERROR, PLACED_TYPES, bindings
from modelpack_engine.llama_cpp.model import LlamaModel
from modelpack_engine.models.load_budget import LOAD_SECONDS
from modelpack_engine.platform.device import usable_cores
from modelpack_engine.request import Media
from modelpack_engine.vision.models import Encode
from modelpack_engine.vision.processor import MediaProcessor, Picture
from modelpack_engine.vision.processor_cache import Place
from modelpack_engine.worker import process
from modelpack_engine.worker.picture import MAX_PIXELS, MAX_RATIO, MAX_SIDE
from modelpack_engine.worker.process import WorkerDiedError, WorkerProcess, WorkerTimeoutError
from modelpack_engine.worker.threads import Cancellation, current_cancellation

_log = logging.getLogger(__name__)

_MARKER = "<__media__>"
_ENCODE_SECONDS = 300.0
_PROGRAM = "modelpack_engine.llama_cpp.mtmd"
_IMAGE = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE
#: The most pictures that wait for mtmd, each decoded and in a thread of its own: in all, and of one
#: owner beside the one that it encodes.
_MAX_WAITING, _MAX_WAITING_OF_OWNER = 16, 8
_FAILED = "the process of llama.cpp failed"


class MtmdProcessor(MediaProcessor):
    """Places pictures that mtmd encodes in prompts of one model, one picture at a time.

    A copy in another process, by pickle, starts an mtmd of its own with the first picture.
    """

    image_token = _MARKER
    image_token_id = -1  # that of no token, so that no text becomes it
    is_marker = True
    encodes = True

    def __init__(self, weights: Sequence[Path], projector: Path) -> None:
        """Open the projector, and test it with two pictures of noise.

        Raises `ModelLoadError` if mtmd cannot open it beside the model, or this backend cannot run
        what it returns, and what `read_gguf_header` raises for a damaged file.
        """
        super().__init__()
        kind = projector_type(read_gguf_header(projector))
        if kind is None or kind in PLACED_TYPES:
            what = "of sound alone" if kind is None else f"of the type {kind!r}"
            raise ModelLoadError(f"llama.cpp runs no projectors {what} here")
        self.weight_bytes = projector.stat().st_size
        self._files = [*map(os.fspath, weights), os.fspath(projector)]
        self._worker: WorkerProcess | None = None
        self._ended: weakref.finalize[..., MtmdProcessor] | None = None
        self._opened: dict[str, Any] = {}
        self._reset()
        noise = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
        try:
            made = [self._encoded(Picture(each))[1] for each in noise]
        except EngineError as error:
            self.close()
            raise ModelLoadError(f"the projector cannot be run by llama.cpp: {error}") from error
        first, second = (np.concatenate([m.inputs["rows"] for m in media]) for media in made)
        if not np.isfinite(first).all() or np.array_equal(first, second):
            self.close()
            raise ModelLoadError("llama.cpp returned the same or infinite embeddings")

    def _reset(self) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._placed, self._places = threading.Lock(), Counter[bytes]()  # by owner

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._end()  # the copy has its own
        return self.__dict__ | {"_lock": None, "_placed": None, "_places": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def largest_span(self) -> int:
        """The most tokens of a picture that attend to each other in both directions, or 0."""
        return int(self._opened["span"])

    def close(self) -> None:
        """End mtmd's process, and fail the pictures that wait for it."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            worker.kill()  # ends a call of another thread, which holds the lock
        with self._lock:
            self._end()

    def token_ids(self, text: str, encode: Encode) -> list[int]:
        """Return the tokens of each text between two pictures, as mtmd makes them."""
        first, *others = text.split(_MARKER)
        found = encode(first)
        for other in others:
            found += [self.image_token_id, *(encode(other) if other else [])]
        return found

    def _picture(self, picture: Picture, place: Place) -> tuple[list[int], list[Media]]:
        height, width, _ = picture.pixels.shape
        with self._turn(picture.param, place.owner):
            try:
                return self._encoded(picture)
            except EngineError as error:
                self._check(picture.param)  # the process may have been killed
                _log.warning("a picture cannot be encoded: %s", error)
                raise RequestError(
                    f"{picture.param}: the picture of {width} x {height} pixels cannot be encoded:"
                    f" {error}",
                    param=picture.param,
                ) from error

    @contextmanager
    def _turn(self, param: str, owner: bytes) -> Iterator[None]:
        """Wait for mtmd, and hold it in the block. Raises `QueueFullError`, and as `_check`."""
        with self._placed:
            waiting = ""
            if self._places.total() > _MAX_WAITING:
                waiting = f"{_MAX_WAITING} pictures"
            elif owner and self._places[owner] > _MAX_WAITING_OF_OWNER:
                waiting = f"{_MAX_WAITING_OF_OWNER} pictures of the API key"
            if waiting:
                raise QueueFullError(
                    f"{waiting} wait to be encoded",
                    retry_after=RETRY_AFTER,
                    hint="try again later",
                )
            self._places[owner] += 1
        try:
            with self._lock:
                self._check(param)
                yield
        finally:
            with self._placed:
                self._places[owner] -= 1
                self._places += Counter()  # forget owners with none

    def _check(self, param: str) -> None:
        """Raise `EngineError` if the engine is stopped, or if the request was cancelled."""
        if self._closed:
            raise EngineError("the engine is stopped", hint="wait until it is ready")
        if _cancellation().is_set:
            raise RequestError(f"{param}: the request was cancelled", param=param)

    def _encoded(self, picture: Picture) -> tuple[list[int], list[Media]]:
        """Return the tokens of a picture from position 0 on, and its embeddings."""
        answer = self._answer(picture)
        rows = np.frombuffer(answer["raw"], np.float32).reshape(-1, self._opened["width"])
        tokens: list[int] = []
        media: list[Media] = []
        for part in answer["parts"]:
            if isinstance(part, list):
                tokens += part
                continue
            digest = hashlib.sha256(b"%d" % len(media) + picture.digest()).digest()
            unread = (self._opened["vocab_size"] - 1,) * part  # the embeddings replace it
            spans = ((0, part),) if self._opened["span"] else ()
            inputs = {"rows": rows[:part]}
            start = len(tokens)
            media.append(Media(start, unread, digest, inputs, picture.param, bidirectional=spans))
            tokens += unread
            rows = rows[part:]
        return tokens, media

    def _answer(self, picture: Picture) -> dict[str, Any]:
        """Return what the process answers for a picture; raise `EngineError`."""
        height, width, _ = picture.pixels.shape
        raw = np.ascontiguousarray(picture.pixels).tobytes()
        if self._worker is None or not self._worker.is_usable:
            self._end()
            try:
                self._worker = WorkerProcess(0, program=_PROGRAM)
            except OSError as error:
                raise EngineError(f"its process cannot start: {error.strerror}") from error
            self._ended = weakref.finalize(self, self._worker.close)
            if self._closed:  # `close` may have found no process to kill
                self._worker.kill()
            try:
                self._opened = self._ask({"files": self._files}, None, LOAD_SECONDS)
            except EngineError:
                self._end()
                raise
        cancellation = _cancellation()
        cancellation.set_end(self._worker.kill)
        try:
            return self._ask({"height": height, "width": width}, raw, _ENCODE_SECONDS)
        finally:
            cancellation.set_end(None)

    def _ask(self, message: dict[str, Any], raw: bytes | None, seconds: float) -> dict[str, Any]:
        assert self._worker is not None
        try:
            answer = process.decoded(self._worker.call(process.encoded(message, raw), seconds))
        except WorkerDiedError:
            self._end()
            raise EngineError("llama.cpp ended its process") from None
        except WorkerTimeoutError:
            self._end()
            raise EngineError(f"it took longer than {seconds:g} s") from None
        except BaseException:
            self._end()  # its answer would go to the next caller
            raise
        if "error" in answer:
            _log.debug("mtmd: %s", answer["detail"])
            raise EngineError(answer["error"])
        return answer

    def _end(self) -> None:
        if self._ended is not None:
            self._ended()
        self._worker = self._ended = None


def _cancellation() -> Cancellation:
    return current_cancellation.get() or Cancellation()


class AlreadyEncoded:
    """Tells the scheduler that pictures come encoded."""

    def prepare(
        self,
        sequence: EngineSequence,
        media: Media,
        *,
        alone: bool,
        in_slices: bool,
        waiting: Iterable[tuple[bytes, Media]],
    ) -> bool:
        return True


class _Projector:
    """A projector in mtmd, in the process that runs it."""

    def __init__(self, weights: Sequence[str], projector: str) -> None:
        """Raises `EngineError` if mtmd cannot open it, or `LlamaCppEngine` cannot run it."""
        library = bindings()
        self._mtmd: Any = importlib.import_module("llama_cpp.mtmd_cpp")
        self._path, self._errors = projector, list[str]()
        self._logger = library.llama_log_callback(self._log)
        self._mtmd.mtmd_helper_log_set(self._logger, ctypes.c_void_p(0))
        self._model = LlamaModel([Path(path) for path in weights], repack=False)
        parameters = self._mtmd.mtmd_context_params_default()
        parameters.use_gpu = parameters.print_timings = False
        parameters.n_threads = usable_cores()
        self._pointer = self._mtmd.mtmd_init_from_file(
            os.fsencode(projector), self._model.pointer, parameters
        )
        if not self._pointer:
            raise self._error("mtmd cannot open it")
        if not self._mtmd.mtmd_support_vision(self._pointer):
            raise EngineError("it has no encoder of pictures")
        if self._mtmd.mtmd_decode_use_mrope(self._pointer):
            raise EngineError("the model's tokens have M-RoPE positions, which are not supported")
        self._width = int(library.llama_model_n_embd_inp(self._model.pointer))

    def described(self) -> dict[str, Any]:
        """Return the width of embeddings, and the most in a row that attend to each other."""
        span = 0
        if self._mtmd.mtmd_decode_use_non_causal(self._pointer, None):
            span = self._largest_span()
        return {"width": self._width, "span": span, "vocab_size": self._model.vocab_size}

    def _largest_span(self) -> int:
        """Return at least the number of tokens of the largest part of any picture."""
        counts = set()
        side, thin = math.isqrt(MAX_PIXELS), MAX_SIDE // MAX_RATIO + 1
        for height, width in ((side, side), (MAX_SIDE, thin), (thin, MAX_SIDE)):
            # A picture that mtmd refuses fails alone later.
            with suppress(EngineError), self._chunks(height, width, bytes(height * width * 3)) as c:
                images = [each for each in c if self._is_image(each)]
                counts.add(max(map(self._mtmd.mtmd_input_chunk_get_n_tokens, images), default=0))
        largest = max(counts, default=0)
        if not largest:
            raise EngineError("mtmd cuts no large picture into tokens")
        # Rows and columns that are rounded down waste less than one of each in a square, so that
        # pictures of other shapes have no more tokens than a square with one more.
        return int((math.isqrt(largest) + 1) ** 2 if len(counts) > 1 else largest)

    def encode(self, height: int, width: int, pixels: bytes) -> tuple[list[Any], bytes]:
        """Return the parts of a picture, and the embeddings of all parts in a row.

        A part is a list of tokens, or the number of its embeddings. Raises `EngineError`.
        """
        self._errors.clear()  # of earlier pictures
        with self._chunks(height, width, pixels) as chunks:
            found = [self._part(chunk) for chunk in chunks]
        return [part for part, _ in found], b"".join(rows for _, rows in found)

    @contextmanager
    def _chunks(self, height: int, width: int, pixels: bytes) -> Iterator[list[Any]]:
        """Yield mtmd's chunks of a picture: texts and images."""
        mtmd = self._mtmd
        data = np.frombuffer(pixels, np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap, chunks = mtmd.mtmd_bitmap_init(width, height, data), mtmd.mtmd_input_chunks_init()
        try:
            marker = _MARKER.encode()
            text = mtmd.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            if mtmd.mtmd_tokenize(self._pointer, chunks, ctypes.byref(text), bitmaps, 1):
                raise self._error("mtmd cannot cut it into tokens")
            count = mtmd.mtmd_input_chunks_size(chunks)
            yield [mtmd.mtmd_input_chunks_get(chunks, at) for at in range(count)]
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _is_image(self, chunk: Any) -> bool:
        return bool(self._mtmd.mtmd_input_chunk_get_type(chunk) == _IMAGE)

    def _part(self, chunk: Any) -> tuple[list[int] | int, bytes]:
        mtmd, count = self._mtmd, ctypes.c_size_t()
        if not self._is_image(chunk):
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            found = [int(token) for token in tokens[: count.value]]
            if min(found, default=0) < 0:
                raise EngineError("the model's vocabulary lacks tokens that the projector needs")
            return found, b""
        if mtmd.mtmd_encode_chunk(self._pointer, chunk):
            raise self._error("mtmd cannot encode it")
        length = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        rows = mtmd.mtmd_get_output_embd(self._pointer)
        return length, np.ctypeslib.as_array(rows, (length, self._width)).tobytes()

    def _log(self, level: int, text: bytes, _: object) -> None:
        if level == ERROR and text.strip():
            self._errors.append(text.decode("utf-8", "replace").strip())

    def _error(self, what: str) -> EngineError:
        """Return an error with what mtmd has logged, which clients may read: without paths."""
        logged = "; ".join(self._errors).replace(self._path, "the projector")
        self._errors.clear()
        return EngineError(f"{what}: {logged}" if logged else what)


def main() -> None:
    """Open the files of the first message, and encode the pictures of the others."""
    _set_up_process()
    source, target = process.pipes()
    projector = None
    raw: bytes | None
    target.write(process.encoded({"ready": True}))
    target.flush()
    while (message := process.read(source)) is not None:
        raw = None
        try:
            if projector is None:
                *weights, path = message["files"]
                projector = _Projector(weights, path)
                answer = projector.described()
            else:
                parts, raw = projector.encode(message["height"], message["width"], message["raw"])
                answer = {"parts": parts}
        except (EngineError, ImportError, OSError, RuntimeError) as error:
            # Clients read the text: what the system says may name paths.
            is_ours = isinstance(error, EngineError) and error.__cause__ is None
            answer = {"error": str(error) if is_ours else _FAILED, "detail": str(error)}
        target.write(process.encoded(answer, raw))
        target.flush()


def _set_up_process() -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # llama.cpp must not start a debugger to print one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    with suppress(OSError):  # if memory runs out, Linux kills this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
