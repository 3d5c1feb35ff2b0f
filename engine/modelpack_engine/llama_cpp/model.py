"""LlamaModel and Context: a GGUF model in llama.cpp, and its KV cache of up to 256 sequences.

llama.cpp ends its process (GGML_ASSERT) for some metadata that a file may hold, and with it the
other models and requests of a server. `try_out` therefore loads a model in another process first.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.llama_cpp.library import bindings
from modelpack_engine.models.load_budget import LOAD_SECONDS
from modelpack_engine.platform.device import usable_cores
from modelpack_engine.worker.process import worker_environment

_NO_ROOM = 1
_F16_BYTES = 2


class LlamaModel:
    """A model in llama.cpp; its weights are mapped from their files while it is referenced."""

    def __init__(self, weights: Sequence[Path], *, repack: bool = True) -> None:
        """Raises `ModelLoadError` if llama.cpp cannot load the model or `Context` cannot run it.

        Without `repack`, weights keep the layout of the file: quicker to load, slower to run.
        """
        self.library = library = bindings()
        parameters = library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = repack
        paths = [os.fsencode(path) for path in weights]
        if len(paths) == 1:
            self.pointer = library.llama_model_load_from_file(paths[0], parameters)
        else:
            array = (ctypes.c_char_p * len(paths))(*paths)
            self.pointer = library.llama_model_load_from_splits(array, len(paths), parameters)
        if not self.pointer:
            raise ModelLoadError(
                f"llama.cpp cannot load {weights[0].name}",
                hint="use --backend mlx, which may support the architecture",
            )
        weakref.finalize(self, library.llama_model_free, self.pointer)
        for kind in ("recurrent", "hybrid"):
            if getattr(library, f"llama_model_is_{kind}")(self.pointer):
                self._refuse(f"{kind} models", weights)
        if library.llama_model_has_encoder(self.pointer):
            self._refuse("models with an encoder", weights)
        self.vocab_size = int(
            library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.pointer))
        )
        self.context_length = int(library.llama_model_n_ctx_train(self.pointer))
        self.weight_bytes = int(library.llama_model_size(self.pointer))

    #: llama.cpp keeps prefixes without snapshots, and states in memory of its own.
    snapshot_bytes = bytes_per_sequence = 0

    @property
    def bytes_per_token(self) -> int:
        """The bytes of a token's keys and values, as float16."""
        library, model = self.library, self.pointer
        heads = library.llama_model_n_head_kv(model)
        per_head = library.llama_model_n_embd(model) // max(1, library.llama_model_n_head(model))
        sizes = [self._number(f"attention.{name}_length") or per_head for name in ("key", "value")]
        return int(library.llama_model_n_layer(model) * heads * sum(sizes) * _F16_BYTES)

    @property
    def architecture(self) -> str:
        """The architecture that the file names."""
        return self.metadata("general.architecture")

    def metadata(self, key: str) -> str:
        """Return a value of the file's metadata as text, empty if it is missing."""
        buffer = ctypes.create_string_buffer(256)
        length = self.library.llama_model_meta_val_str(
            self.pointer, key.encode(), buffer, len(buffer)
        )
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    def _number(self, key: str) -> int:
        value = self.metadata(f"{self.architecture}.{key}")
        return int(value) if value.isdecimal() else 0

    def _refuse(self, what: str, weights: Sequence[Path]) -> None:
        raise ModelLoadError(
            f"{weights[0].name}: this backend does not run {what}", hint="use --backend mlx"
        )


class Context:
    """Computes batches of rows; a row is a token of a sequence at a position."""

    def __init__(self, model: LlamaModel, *, num_cells: int, num_slots: int, max_rows: int) -> None:
        """Allocate a cache of `num_cells` tokens of `num_slots` sequences, and a batch of rows.

        Raises `EngineError` if llama.cpp cannot allocate them.
        """
        self._library = library = model.library
        self._vocab_size = model.vocab_size
        parameters = library.llama_context_default_params()
        parameters.n_ctx = num_cells
        # llama.cpp reserves a batch with a row of each sequence, and aborts if that does not fit.
        parameters.n_batch = parameters.n_ubatch = max(max_rows, num_slots)
        parameters.n_seq_max = num_slots
        parameters.n_threads = parameters.n_threads_batch = usable_cores()
        parameters.kv_unified = True  # sequences share cells: copying a prefix only marks them
        parameters.swa_full = True  # otherwise sequences could not be cut back to a prefix
        parameters.no_perf = True
        self._pointer = library.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise EngineError(
                f"llama.cpp cannot allocate a KV cache of {num_cells} tokens",
                hint="lower max_model_len or kv_cache_bytes",
            )
        self.close = weakref.finalize(self, _free, library, self._pointer, model)
        self._memory = library.llama_get_memory(self._pointer)
        self._rows = _Rows(library, max_rows)

    def compute(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        wanted: Sequence[int],
        embeddings: NDArray[np.float32] | None = None,
        *,
        causal: bool = True,
    ) -> NDArray[np.float32]:
        """Write the keys and values of rows; return the logits of those `wanted`, in their order.

        Logits are a new array [len(wanted), vocab_size]. `embeddings` [rows, width] replace those
        of the tokens; unless `causal`, all rows attend to each other. Raises `EngineError`.
        """
        batch = self._rows.fill(token_ids, positions, slots, wanted, embeddings)
        if not causal:
            self._library.llama_set_causal_attn(self._pointer, False)
        try:
            failed = self._library.llama_decode(self._pointer, batch)
        finally:
            if not causal:
                self._library.llama_set_causal_attn(self._pointer, True)
        if failed == _NO_ROOM:
            raise EngineError("the KV cache of llama.cpp has no room for a step")
        if failed:
            raise EngineError(f"llama.cpp could not compute a step (llama_decode: {failed})")
        if not wanted:
            return np.empty((0, self._vocab_size), np.float32)
        pointer = self._library.llama_get_logits(self._pointer)
        logits = np.ctypeslib.as_array(pointer, (len(wanted), self._vocab_size))
        # llama.cpp has them in the order of the rows.
        return logits[np.argsort(np.argsort(np.array(wanted)))]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a sequence the first `length` tokens of another; they are shared, not copied."""
        self._library.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, slot: int, length: int) -> None:
        """Remove the tokens of a sequence after the first `length`."""
        if not self._library.llama_memory_seq_rm(self._memory, slot, length, -1):
            raise EngineError("llama.cpp cannot remove tokens from a sequence of this model")

    def clear(self) -> None:
        """Remove the tokens of all sequences."""
        self._library.llama_memory_clear(self._memory, True)


def _free(library: Any, pointer: Any, _model: LlamaModel) -> None:
    """Free a context; `_model` keeps its model alive until then."""
    library.llama_free(pointer)


class _Rows:
    """The arrays of a batch, which are reused for all batches."""

    def __init__(self, library: Any, size: int) -> None:
        arrays = (np.zeros(size, np.int32) for _ in range(4))
        self._token, self._position, self._count, self._slot = arrays
        self._count[:] = 1
        self._wanted = np.zeros(size, np.int8)
        integers = ctypes.POINTER(ctypes.c_int32)
        base = self._slot.ctypes.data
        self._slots = (integers * size)(
            *(ctypes.cast(base + 4 * row, integers) for row in range(size))
        )
        self._tokens, position, count = (
            array.ctypes.data_as(integers) for array in (self._token, self._position, self._count)
        )
        self._batch = library.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=position,
            n_seq_id=count,
            seq_id=ctypes.cast(self._slots, ctypes.POINTER(integers)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        wanted: Sequence[int],
        embeddings: NDArray[np.float32] | None = None,
    ) -> Any:
        count = len(token_ids)
        if embeddings is None:
            self._batch.token, self._batch.embd = self._tokens, None
        else:  # llama.cpp takes tokens or embeddings
            floats = ctypes.POINTER(ctypes.c_float)
            self._embeddings = np.ascontiguousarray(embeddings)
            self._batch.token, self._batch.embd = None, self._embeddings.ctypes.data_as(floats)
        self._token[:count] = token_ids
        self._position[:count] = positions
        self._slot[:count] = slots
        self._wanted[:count] = 0
        self._wanted[list(wanted)] = 1
        self._batch.n_tokens = count
        return self._batch


_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from modelpack_engine.llama_cpp.model import main; main(sys.argv[2:])"
)
_CELLS, _SLOTS = 256, 2


def try_out(weights: Sequence[Path]) -> None:
    """Raise `ModelLoadError` if llama.cpp ends its process while it loads or runs the model.

    Errors that llama.cpp reports are ignored: the caller gets them when it loads the model.
    """
    command = [sys.executable, "-I", "-c", _PROGRAM, json.dumps([p for p in sys.path if p])]
    # llama.cpp must not start a debugger to print a backtrace.
    environment = worker_environment() | {"GGML_NO_BACKTRACE": "1"}
    try:
        ended = subprocess.run(
            [*command, *map(os.fspath, weights)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=LOAD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelLoadError(
            f"cannot test whether llama.cpp loads {weights[0].name}: {error}"
        ) from error
    if ended.returncode:
        raise ModelLoadError(
            f"llama.cpp ended its process when it loaded {weights[0].name}"
            f" (exit status {ended.returncode})",
            hint="use --backend mlx, which reports damaged metadata",
        )


def main(arguments: Sequence[str]) -> None:
    """Load the files and compute two tokens."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        model = LlamaModel([Path(argument) for argument in arguments], repack=False)
        context = Context(model, num_cells=_CELLS, num_slots=_SLOTS, max_rows=_SLOTS)
        context.compute([0, 0], [0, 1], [0, 0], [1])
        context.close()
    except EngineError:
        return  # the caller gets the error when it loads the model
