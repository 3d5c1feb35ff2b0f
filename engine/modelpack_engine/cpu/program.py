"""Program: a model of mlx-lm as the library's list of operations.

A layer is six operations: queries, keys and values in one multiplication, their rotation and the
write to the cache, attention, its output added to the residual stream, gate and up with the
activation between them, and down added to the stream. Norms belong to the multiplication that
reads them; Gemma's norms of outputs are operations of their own. In the last layer, the sampled
rows are selected before and after attention. `can_run` says which models have this shape.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, cast

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
from modelpack_engine.cpu.weights import PackedWeights, can_pack
from modelpack_engine.errors import OutOfMemoryError

#: The modules of mlx-lm whose layers are as `Program` builds them.
MODELS = ("gemma2", "gemma3_text", "granite", "llama", "phi3", "qwen2", "qwen3", "smollm3")
#: The other names of these modules in config.json (`mlx_lm.utils.MODEL_REMAPPING`).
OTHER_NAMES = {"iquestcoder": "llama", "mistral": "llama", "xverse": "llama"}

_LARGEST_HEAD = 256
#: The buffers of activations. The widest has a layer's queries, keys and values, then its gated
#: activations.
_STREAM, _WIDEST, _ATTENDED, _SAMPLED, _SAMPLED_ATTENDED, _BRANCH = range(6)
_LOGITS = -1
_SILU, _GELU = 0, 1
_AFTER_ATTENTION, _AFTER_MLP = "post_attention_layernorm", "post_feedforward_layernorm"


def can_run(model: Any) -> bool:
    """Return whether the library is there, and can run a model."""
    if library() is None or _name(model) not in MODELS or not can_pack(model):
        return False
    return all(map(_can_run_layer, model.model.layers))


def _can_run_layer(layer: Any) -> bool:
    attention, width = layer.self_attn, layer.mlp.down_proj.weight.shape[0]
    dim, rope = _head_dim(attention), _frequencies(attention.rope)
    return (
        rope is not None
        and rope[0] % 2 == 0
        and rope[0] <= dim
        and dim % TILE == 0
        and dim <= _LARGEST_HEAD
        and attention.n_heads % attention.n_kv_heads == 0
        and width % GROUP == 0
    )


def _embedding_scale(model: Any) -> float:
    """Return the factor of the embeddings; gemma3's class rounds it to bfloat16."""
    name, hidden = _name(model), model.model.layers[0].mlp.down_proj.weight.shape[0]
    if name == "gemma3_text":
        return float(cast(float, mx.array(hidden**0.5, mx.bfloat16).item()))
    return hidden**0.5 if name == "gemma2" else getattr(model.model, "embedding_multiplier", 1.0)


def _window(inner: Any, layer: Any) -> int:
    """Return how many tokens a layer sees; 0 for all."""
    if getattr(layer, "use_sliding", False):
        return int(inner.sliding_window)
    return int(inner.window_size) if getattr(layer.self_attn, "is_sliding", False) else 0


def _name(model: Any) -> str:
    return type(model).__module__.rpartition(".")[2]


def _head_dim(attention: Any) -> int:
    return int(attention.o_proj.weight.shape[1] // attention.n_heads)


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
        self._norms: list[NDArray[np.float32]] = []
        inner = model.model
        # Gemma's norms multiply by 1 + weight.
        self._shift = 1.0 if _name(model).startswith("gemma") else 0.0
        self._activation = _GELU if _name(model).startswith("gemma") else _SILU
        self._embed(_embedding_scale(model))
        for index, layer in enumerate(inner.layers):
            is_last = index == len(inner.layers) - 1
            self._layer(f"model.layers.{index}", index, layer, _window(inner, layer), is_last)
        self._head(model)
        attention = inner.layers[0].self_attn
        heads, dim = (attention.n_heads, attention.n_kv_heads), _head_dim(attention)
        hidden, gated = inner.layers[0].mlp.down_proj.weight.shape
        widths = np.array(
            [
                hidden,
                max((heads[0] + 2 * heads[1]) * dim, gated),
                heads[0] * dim,
                hidden,
                heads[0] * dim,
                hidden,
            ],
            np.int32,
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
        # Not at exit: a thread may still run it.
        weakref.finalize(self, lib.mp_program_free, self._pointer).atexit = False

    def run(self, step: Step) -> None:
        """Compute a step: write keys and values, and the logits of the sampled rows."""
        failed = library().mp_program_run(self._pointer, ctypes.byref(step))
        assert not failed, "the step has more rows than the program"

    def _add(self, code: Code, **fields: Any) -> None:
        operation = Operation(code=code, rope=-1, scale=1.0)
        for name, value in fields.items():
            if name in ("matrix", "bias"):
                for index, pointer in enumerate(value):
                    getattr(operation, name)[index] = pointer
            else:
                setattr(operation, name, value)
        self._operations.append(operation)

    def _embed(self, scale: float) -> None:
        matrix = self._weights.matrices["model.embed_tokens.weight"]
        self._add(Code.EMBED, output=_STREAM, matrix=[matrix.pointer], scale=scale)

    def _layer(self, name: str, index: int, layer: Any, window: int, is_last: bool) -> None:
        """Add a layer; after attention, the last one computes sampled rows only."""
        attention = layer.self_attn
        cached = {
            "pool": index,
            "cache": self._cache,
            "heads": attention.n_heads,
            "kv_heads": attention.n_kv_heads,
            "dim": _head_dim(attention),
        }
        own = ("q_proj", "k_proj", "v_proj") if "q_proj" in attention else ("qkv_proj",)
        self._multiply(
            _STREAM, _WIDEST, name, tuple(f"self_attn.{part}" for part in own),
            norm=f"{name}.input_layernorm", eps=layer.input_layernorm.eps,
        )  # fmt: skip
        norms: dict[str, Any] = {}
        if "q_norm" in attention:
            norms = {
                "norm": self._norm(f"{name}.self_attn.q_norm"),
                "second_norm": self._norm(f"{name}.self_attn.k_norm"),
                "eps": attention.q_norm.eps,
            }
        rope = self._rope(attention.rope)
        self._add(Code.ROTATE, input=_WIDEST, rope=rope, **cached, **norms)
        stream, attended = _STREAM, _ATTENDED
        if is_last:
            stream, attended = _SAMPLED, _SAMPLED_ATTENDED
            self._add(Code.SELECT, input=_STREAM, output=stream)
        self._add(
            Code.ATTEND, input=_WIDEST, output=_ATTENDED, **cached, scale=attention.scale,
            window=window, softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
        )  # fmt: skip
        if is_last:
            self._add(Code.SELECT, input=_ATTENDED, output=attended)
        before = "post_attention_layernorm"
        if normed := "pre_feedforward_layernorm" in layer:
            before = "pre_feedforward_layernorm"
        after = normed and _AFTER_ATTENTION
        self._branch(attended, stream, name, "self_attn.o_proj", layer, after)
        self._multiply(
            stream, _WIDEST, name, ("mlp.gate_proj", "mlp.up_proj"), ending=Ending.GATED,
            norm=f"{name}.{before}", eps=layer[before].eps,
        )  # fmt: skip
        self._branch(_WIDEST, stream, name, "mlp.down_proj", layer, normed and _AFTER_MLP)

    def _branch(
        self, source: int, stream: int, name: str, part: str, layer: Any, norm: str | bool
    ) -> None:
        """Multiply by a matrix, norm the product if `norm` names a norm, and add to the stream."""
        scale = getattr(layer, "residual_multiplier", 1.0)
        if not norm:
            self._multiply(source, stream, name, (part,), ending=Ending.ADD, scale=scale)
            return
        self._multiply(source, _BRANCH, name, (part,))
        weight = self._norm(f"{name}.{norm}")
        self._add(Code.NORM, input=_BRANCH, output=_BRANCH, norm=weight, eps=layer[norm].eps)
        self._add(Code.ADD, input=_BRANCH, output=stream, scale=scale)

    def _head(self, model: Any) -> None:
        tied = "lm_head.weight" not in self._weights.matrices
        name, parts = ("model", ("embed_tokens",)) if tied else ("", ("lm_head",))
        self._multiply(
            _SAMPLED, _LOGITS, name, parts, norm="model.norm", eps=model.model.norm.eps,
            scale=1 / getattr(model, "logits_scaling", 1.0),
        )  # fmt: skip
        if softcap := getattr(model, "final_logit_softcapping", None):
            rows = self._weights.matrices[f"{f'{name}.' if name else ''}{parts[0]}.weight"].rows
            self._add(Code.SOFTCAP, dim=rows, softcap=softcap)

    def _multiply(
        self, source: int, target: int, name: str, parts: Sequence[str], *,
        ending: Ending = Ending.STORE, norm: str | None = None, eps: float = 0.0,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        paths = [f"{name}.{part}" if name else part for part in parts]
        biases = [f"{path}.bias" for path in paths]
        self._add(
            Code.MULTIPLY, input=source, output=target, ending=ending, eps=eps, scale=scale,
            activation=self._activation,
            matrix=[self._weights.matrices[f"{path}.weight"].pointer for path in paths],
            bias=[self._vector(b) if b in self._weights.vectors else None for b in biases],
            norm=None if norm is None else self._norm(norm),
        )  # fmt: skip

    def _vector(self, name: str) -> int:
        return self._weights.vectors[name].ctypes.data

    def _norm(self, name: str) -> int:
        weight = self._weights.vectors[f"{name}.weight"] + np.float32(self._shift)
        self._norms.append(weight)
        return weight.ctypes.data

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
