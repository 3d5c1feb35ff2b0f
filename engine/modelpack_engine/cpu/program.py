"""Program: a model of mlx-lm as the library's list of operations.

A layer is six operations: queries, keys and values in one multiplication, their rotation and the
write to the cache, attention, its output added to the residual stream, gate and up with the
activation between them, and down added to the stream. Norms belong to the multiplication that
reads them. `why_not` says which models have this shape.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.cpu.library import (
    GROUP,
    TILE,
    CacheType,
    Code,
    Ending,
    Operation,
    Rope,
    Step,
    library,
)
from modelpack_engine.cpu.weights import PackedWeights
from modelpack_engine.errors import OutOfMemoryError

#: The modules of mlx-lm whose layers are as `Program` builds them.
MODELS = ("llama", "qwen2", "qwen3", "smollm3")

_LARGEST_HEAD = 256
#: The buffers of activations.
_STREAM, _HEADS, _ATTENDED, _GATED, _SAMPLED = range(5)
_LOGITS = -1


def why_not(model: Any) -> str | None:
    """Return why the library cannot run a model, or None if it can."""
    if library() is None:
        return "the library for CPUs was not built"
    name = type(model).__module__.rpartition(".")[2]
    if name not in MODELS:
        return f"the library for CPUs has no layers of {name}"
    inner = model.model
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if _frequencies(attention.rope) is None:
            return f"the library for CPUs has no {type(attention.rope).__name__}"
        head = attention.q_proj.weight.shape[0] // attention.n_heads
        if head % TILE or head > _LARGEST_HEAD or attention.n_heads % attention.n_kv_heads:
            return f"heads of {head} elements are not supported"
        if mlp.down_proj.weight.shape[0] % GROUP:
            return "the width is not a multiple of 32"
    return None


def _frequencies(rope: Any) -> tuple[int, bool, float, NDArray[np.float32]] | None:
    """Return the dims, order, factor and frequencies of a rotation; None for an unknown class."""
    kind = type(rope).__name__
    if kind == "NoPE":
        return 0, False, 1.0, np.zeros(0, np.float32)
    if kind == "RoPE" and isinstance(rope, nn.RoPE):
        exponents = np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims
        powers = rope.scale * np.float64(rope.base) ** -exponents
        return rope.dims, rope.traditional, 1.0, powers.astype(np.float32)
    if kind in ("Llama3RoPE", "YarnRoPE", "SuScaledRoPE"):
        periods = np.array(rope._freqs.astype(mx.float32))
        frequencies = (1 / periods).astype(np.float32)
        if kind == "SuScaledRoPE":
            return rope.dim, False, float(rope._scale), frequencies
        return rope.dims, rope.traditional, float(getattr(rope, "mscale", 1.0)), frequencies
    return None


class Program:
    """The operations of one model, for steps of up to `max_rows` rows."""

    def __init__(
        self, model: Any, weights: PackedWeights, cache: CacheType, *, max_rows: int
    ) -> None:
        """Raises `OutOfMemoryError` if the buffers do not fit."""
        self._weights, self._cache = weights, cache
        self._operations: list[Operation] = []
        self._ropes: list[Rope] = []
        self._kept: dict[bytes, tuple[int, NDArray[np.float32]]] = {}
        inner = model.model
        self._embed()
        for index, layer in enumerate(inner.layers):
            window = inner.sliding_window if getattr(layer, "use_sliding", False) else None
            self._layer(f"model.layers.{index}", index, layer, window)
        self._head(inner.norm)
        attention, mlp = inner.layers[0].self_attn, inner.layers[0].mlp
        heads = attention.n_heads, attention.n_kv_heads
        dim = attention.q_proj.weight.shape[0] // heads[0]
        hidden = mlp.down_proj.weight.shape[0]
        gated = max(layer.mlp.down_proj.weight.shape[1] for layer in inner.layers)
        widths = np.array(
            [hidden, (heads[0] + 2 * heads[1]) * dim, heads[0] * dim, gated, hidden], np.int32
        )
        lib = library()
        self.num_layers, self.kv_heads, self.dim = len(inner.layers), heads[1], dim
        self._pointer = lib.mp_program_new(
            (Operation * len(self._operations))(*self._operations), len(self._operations),
            (Rope * len(self._ropes))(*self._ropes), len(self._ropes),
            widths.ctypes.data, len(widths), max_rows, int(max(hidden, heads[0] * dim, gated)),
        )  # fmt: skip
        if not self._pointer:
            raise OutOfMemoryError(
                f"the buffers of steps with {max_rows} tokens do not fit in memory",
                hint="lower max_num_batched_tokens",
            )
        weakref.finalize(self, lib.mp_program_free, self._pointer)

    def run(self, step: Step) -> None:
        """Compute a step: write keys and values, and the logits of the sampled rows."""
        failed = library().mp_program_run(self._pointer, ctypes.byref(step))
        assert not failed, "the step has more rows than the program"

    def _add(self, code: Code, **fields: Any) -> None:
        operation = Operation(code=code, scale=1.0, rope=-1)
        for name, value in fields.items():
            if name in ("matrix", "bias"):
                for index, pointer in enumerate(value):
                    getattr(operation, name)[index] = pointer
            else:
                setattr(operation, name, value)
        self._operations.append(operation)

    def _embed(self) -> None:
        matrix = self._weights.matrices["model.embed_tokens.weight"]
        self._add(Code.EMBED, output=_STREAM, matrix=[matrix.pointer])

    def _layer(self, name: str, index: int, layer: Any, window: int | None) -> None:
        attention = layer.self_attn
        heads, kv_heads = attention.n_heads, attention.n_kv_heads
        dim = attention.q_proj.weight.shape[0] // heads
        cached = {"pool": index, "cache": self._cache, "heads": heads, "kv_heads": kv_heads,
                  "dim": dim}  # fmt: skip
        self._multiply(
            _STREAM, _HEADS, name, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            norm=f"{name}.input_layernorm", eps=layer.input_layernorm.eps,
        )  # fmt: skip
        norms: dict[str, Any] = {}
        if "q_norm" in attention:
            norms = {
                "norm": self._vector(f"{name}.self_attn.q_norm.weight"),
                "second_norm": self._vector(f"{name}.self_attn.k_norm.weight"),
                "eps": attention.q_norm.eps,
            }
        rope = self._rope(attention.rope)
        self._add(Code.ROTATE, input=_HEADS, rope=rope, **cached, **norms)
        self._add(
            Code.ATTEND, input=_HEADS, output=_ATTENDED, **cached,
            scale=attention.scale, window=window or 0,
        )  # fmt: skip
        self._multiply(_ATTENDED, _STREAM, name, ("self_attn.o_proj",), ending=Ending.ADD)
        self._multiply(
            _STREAM, _GATED, name, ("mlp.gate_proj", "mlp.up_proj"), ending=Ending.GATED,
            norm=f"{name}.post_attention_layernorm", eps=layer.post_attention_layernorm.eps,
        )  # fmt: skip
        self._multiply(_GATED, _STREAM, name, ("mlp.down_proj",), ending=Ending.ADD)

    def _head(self, norm: Any) -> None:
        self._add(Code.SELECT, input=_STREAM, output=_SAMPLED)
        tied = "lm_head.weight" not in self._weights.matrices
        name, parts = ("model", ("embed_tokens",)) if tied else ("", ("lm_head",))
        self._multiply(_SAMPLED, _LOGITS, name, parts, norm="model.norm", eps=norm.eps)

    def _multiply(
        self, source: int, target: int, name: str, parts: Sequence[str], *,
        ending: Ending = Ending.STORE, norm: str | None = None, eps: float = 0.0,
    ) -> None:  # fmt: skip
        paths = [f"{name}.{part}" if name else part for part in parts]
        biases = [f"{path}.bias" for path in paths]
        self._add(
            Code.MULTIPLY, input=source, output=target, ending=ending, eps=eps,
            matrix=[self._weights.matrices[f"{path}.weight"].pointer for path in paths],
            bias=[self._vector(b) if b in self._weights.vectors else None for b in biases],
            norm=None if norm is None else self._vector(f"{norm}.weight"),
        )  # fmt: skip

    def _vector(self, name: str) -> int:
        return self._weights.vectors[name].ctypes.data

    def _rope(self, rope: Any) -> int:
        """Return the number of a rotation in the program; -1 for none."""
        found = _frequencies(rope)
        assert found is not None
        dims, traditional, scale, frequencies = found
        if not dims:
            return -1
        key = repr((dims, traditional, scale)).encode() + frequencies.tobytes()
        if key not in self._kept:
            self._kept[key] = len(self._ropes), frequencies
            self._ropes.append(Rope(dims, traditional, scale, 0, frequencies.ctypes.data))
        return self._kept[key][0]
