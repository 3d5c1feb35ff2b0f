"""EagleHead: an EAGLE-3 head, the small network that drafts tokens from a model's hidden states.

`load_head` reads the format of published heads: safetensors and a config.json of SGLang and vLLM
(`LlamaForCausalLMEagle3`) or of vLLM's speculators library. A head is one Llama layer. Its input is
the hidden states that enter three layers of the model, reduced by `fc`, next to the embedding of
the following token; its output is the logits of a smaller vocabulary, and the hidden state that
stands for the model's in the head's next step.

Source: Li et al., EAGLE-3, arXiv:2503.01840.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from modelpack.formats.drafter import ARCHITECTURES, drafter_kind
from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.files import ModelFiles

_HINT = "use a head that was trained for this model, or --speculative-method none"
_MOST = 1 << 20  # for every size in a config: keeps products within 64 bits
#: Tensors that a head may have and that it does not need.
_UNUSED = ("rotary_emb.inv_freq", "t2d")


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """The sizes of a head. `layers` are the model's layers whose inputs it reads; () for default.

    With `norm_before_residual`, the residual of its layer is the hidden state after the norm.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 4096
    norm_before_residual: bool = False
    layers: tuple[int, ...] = ()

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers whose inputs the head reads in a model of `num_layers` layers.

        Raises `ModelLoadError` if the model lacks one.
        """
        chosen = self.layers or (2, num_layers // 2, num_layers - 3)
        if not all(0 < layer <= num_layers for layer in chosen):
            raise ModelLoadError(
                f"the EAGLE head reads layers {', '.join(map(str, chosen))}, but the model has "
                f"{num_layers}",
                hint=_HINT,
            )
        return chosen


def read_head_config(config: Mapping[str, Any]) -> HeadConfig:
    """Return the sizes in a head's config.json; raises `ModelLoadError` for values out of range."""
    layer = config.get("transformer_layer_config", config)
    if not isinstance(layer, Mapping):
        raise ModelLoadError("config.json: transformer_layer_config is not an object")

    def size(name: str, default: int | None = None, of: Mapping[str, Any] = layer) -> int:
        value = of.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            raise ModelLoadError(f"config.json: {name} is {str(value)[:100]!r}, expected a size")
        return value

    def number(name: str, default: float) -> float:
        value = layer.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise ModelLoadError(f"config.json: {name} is {str(value)[:100]!r}, expected a number")
        return float(value)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if size("num_hidden_layers", 1) != 1:
        raise ModelLoadError("config.json: num_hidden_layers is not 1, as EAGLE-3 heads have")
    vocab = size("vocab_size")
    rope = layer.get("rope_parameters") or {}
    scaling = layer.get("rope_scaling") or (rope if isinstance(rope, Mapping) else {})
    if not isinstance(scaling, Mapping):
        raise ModelLoadError("config.json: rope_scaling is not an object")
    theta = number("rope_theta", scaling.get("rope_theta", 10000.0))
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    found = HeadConfig(
        hidden_size=hidden,
        target_hidden_size=size("target_hidden_size", hidden, config),
        intermediate_size=size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads or 1),
        vocab_size=vocab,
        draft_vocab_size=size("draft_vocab_size", vocab, config),
        rms_norm_eps=number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=None if plain else dict(scaling),
        max_position_embeddings=size("max_position_embeddings", 4096),
        norm_before_residual=config.get("norm_before_residual") is True,
        layers=_layers_in(config),
    )
    if found.num_heads % found.num_kv_heads or found.head_dim % 2:
        raise ModelLoadError(
            f"config.json: {heads} attention heads of {found.head_dim} elements cannot share "
            f"{found.num_kv_heads} key heads"
        )
    return found


def _layers_in(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers that a config names, whose inputs the head reads.

    vLLM counts layers by their inputs, and SGLang, in `eagle_config`, by their outputs.
    """
    nested = config.get("eagle_config")
    shift = 0
    value = config.get("eagle_aux_hidden_state_layer_ids")
    if value is None and isinstance(nested, Mapping):
        value, shift = nested.get("eagle_aux_hidden_state_layer_ids"), 1
    if value is None:
        return ()
    whole = isinstance(value, list) and all(type(layer) is int for layer in value)
    if not whole or len(value) != 3:
        raise ModelLoadError(
            f"config.json: eagle_aux_hidden_state_layer_ids is {str(value)[:100]}, expected three "
            "layers"
        )
    return tuple(layer + shift for layer in value)


class _Attention(nn.Module):  # type: ignore[misc]  # MLX has no types here
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size, both = config.head_dim, 2 * config.hidden_size
        self.q_proj = nn.Linear(both, config.num_heads * size, bias=False)
        self.k_proj = nn.Linear(both, config.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(both, config.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * size, config.hidden_size, bias=False)


class _MLP(nn.Module):  # type: ignore[misc]  # MLX has no types here
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        product: mx.array = self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return product


class _Layer(nn.Module):  # type: ignore[misc]  # MLX has no types here
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.mlp = _Attention(config), _MLP(config)
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)


class EagleHead(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """The network of a head; its parameters are named as in published files.

    `d2t` has, for each token of the draft vocabulary, the distance to its id in the model's. Its
    attention has neither a window nor sinks, as that of some `MtpHead` does.
    """

    window: int | None = None
    sinks: mx.array | None = None

    def __init__(self, config: HeadConfig, *, own_embeddings: bool = False) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.d2t = mx.zeros((config.draft_vocab_size,), mx.int32)
        if own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self._rope = initialize_rope(
            config.head_dim,
            config.rope_theta,
            False,
            dict(config.rope_scaling) if config.rope_scaling else None,
            config.max_position_embeddings,
        )

    def project(
        self, hidden: mx.array, embedded: mx.array, positions: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return the residual, queries, keys and values of rows [rows, hidden] at `positions`.

        Queries, keys and values have the shape [rows, heads, dim].
        """
        layer, config = self.midlayer, self.config
        normed = layer.hidden_norm(hidden)
        residual = normed if config.norm_before_residual else hidden
        x = mx.concatenate([layer.input_layernorm(embedded), normed], axis=-1)
        attention = layer.self_attn

        def heads(product: mx.array, count: int) -> mx.array:
            return product.reshape(-1, count, 1, config.head_dim)

        queries = self._rope(heads(attention.q_proj(x), config.num_heads), offset=positions)
        keys = self._rope(heads(attention.k_proj(x), config.num_kv_heads), offset=positions)
        values = heads(attention.v_proj(x), config.num_kv_heads)
        return residual, queries[:, :, 0], keys[:, :, 0], values[:, :, 0]

    def finish(self, residual: mx.array, attended: mx.array) -> mx.array:
        """Return the hidden states of rows whose attention output is [rows, heads * dim]."""
        layer = self.midlayer
        hidden: mx.array = residual + layer.self_attn.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of the draft vocabulary, from hidden states of `finish`."""
        logits: mx.array = self.lm_head(self.norm(hidden))
        return logits

    def token_ids(self, drafted: mx.array) -> mx.array:
        """Return the model's token ids of columns of the logits."""
        return drafted.astype(mx.int32) + self.d2t[drafted]

    @property
    def num_logits(self) -> int:
        """The columns of the logits."""
        return self.config.draft_vocab_size

    @property
    def num_kv_heads(self) -> int:
        """The heads of the layer's keys and values."""
        return self.config.num_kv_heads

    @property
    def key_dim(self) -> int:
        """The elements of a head's key."""
        return self.config.head_dim

    @property
    def value_dim(self) -> int:
        """The elements of a head's value."""
        return self.config.head_dim

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the layer's keys and values."""
        dtype: mx.Dtype = self.norm.weight.dtype
        return dtype

    @property
    def scale(self) -> float:
        """The factor of the attention's scores."""
        return 1 / math.sqrt(self.config.head_dim)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights."""
        flat: Any = tree_flatten(self.parameters())
        return sum(array.nbytes for _, array in flat)


def load_head(files: ModelFiles) -> EagleHead:
    """Load the head in `files`; its weights keep their type.

    Raises `ModelLoadError` for a config that is no head's, and for tensors that are missing,
    unknown or of the wrong shape; `WeightFormatError` for a damaged file.
    """
    raw = files.json("config.json")
    if raw is None or drafter_kind(raw) != "eagle3":
        raise ModelLoadError(
            "config.json: is not that of an EAGLE-3 head",
            hint=f"expected the architecture {sorted(ARCHITECTURES)[-1]}",
        )
    if files.format != "safetensors":
        raise ModelLoadError(f"the EAGLE head is {files.format}, expected safetensors")
    config = read_head_config(raw)
    shapes = tensor_shapes(files, _renamed)
    head = EagleHead(config, own_embeddings="embed_tokens.weight" in shapes)
    flat: Any = tree_flatten(head.parameters())
    wanted = {name: tuple(array.shape) for name, array in flat}
    if "d2t" not in shapes and config.draft_vocab_size == config.vocab_size:
        del wanted["d2t"]
    unknown = [name for name in shapes if name not in wanted and not name.endswith(_UNUSED)]
    arrays = load_tensors(files, wanted, "the EAGLE head", _renamed)
    if unknown:
        raise ModelLoadError(f"the EAGLE head has an unknown tensor: {unknown[0][:100]}")
    head.load_weights(list(arrays.items()), strict=False)
    head.d2t = _checked_tokens(head.d2t, config)
    mx.eval(head.parameters())
    return head


def tensor_shapes(
    files: ModelFiles, renamed: Callable[[str], str] = str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in safetensors files, by the names that `renamed` gives."""
    return {
        renamed(tensor.name): tuple(tensor.shape)
        for path in files.weights
        for tensor in read_safetensors_header(path).tensors
    }


def load_tensors(
    files: ModelFiles,
    wanted: Mapping[str, tuple[int, ...]],
    what: str,
    renamed: Callable[[str], str] = str,
    dequantised: Callable[[dict[str, mx.array]], dict[str, mx.array]] | None = None,
) -> dict[str, mx.array]:
    """Return the `wanted` tensors of safetensors files, which have these shapes.

    `dequantised` replaces the tensors that were read. Raises `ModelLoadError` for those that are
    missing or of another shape, and for weights that are not floats and have no `.scales`, such as
    fp8, which MLX reads as integers; `what` names their owner.
    """
    shapes = tensor_shapes(files, renamed)
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelLoadError(f"{what} has no tensor {name}", hint="download it again")
        if shapes[name] != shape:
            raise ModelLoadError(
                f"{what}'s tensor {name} is {list(shapes[name])}, expected {list(shape)}"
            )
    arrays: dict[str, mx.array] = {}
    for path in files.weights:
        read: Any = mx.load(str(path), format="safetensors")
        found = ((renamed(name), array) for name, array in read.items())
        arrays |= {name: array for name, array in found if name in wanted}
    arrays = arrays if dequantised is None else dequantised(arrays)
    for name, array in arrays.items():
        if f"{name.removesuffix('.weight')}.scales" in wanted:
            continue
        if name.endswith((".weight", ".bias")) and not mx.issubdtype(array.dtype, mx.floating):
            raise ModelLoadError(
                f"{what}'s tensor {name} is stored as {str(array.dtype).rpartition('.')[2]}, "
                "expected floats",
                hint="use weights that are not quantised",
            )
    return arrays


def _renamed(name: str) -> str:
    """Return the name of a tensor in `EagleHead`; speculators number the only layer."""
    name = name.removeprefix("model.")
    prefix = "layers.0."
    return "midlayer." + name[len(prefix) :] if name.startswith(prefix) else name


def _checked_tokens(d2t: mx.array, config: HeadConfig) -> mx.array:
    d2t = d2t.astype(mx.int32)
    ids = mx.arange(config.draft_vocab_size) + d2t
    if mx.any((ids < 0) | (ids >= config.vocab_size)).item():
        raise ModelLoadError(
            f"the EAGLE head's d2t names tokens outside of its vocabulary of {config.vocab_size}"
        )
    return d2t


def check_target(head: EagleHead, *, hidden_size: int, vocab_size: int) -> None:
    """Raise `ModelLoadError` unless the head fits a model of these sizes."""
    config = head.config
    if config.target_hidden_size != hidden_size:
        raise ModelLoadError(
            f"the EAGLE head is for a model with hidden states of {config.target_hidden_size}, "
            f"this model has {hidden_size}",
            hint=_HINT,
        )
    if config.vocab_size != vocab_size:
        raise ModelLoadError(
            f"the EAGLE head is for a vocabulary of {config.vocab_size} tokens, this model has "
            f"{vocab_size}",
            hint=_HINT,
        )
    if config.hidden_size != hidden_size and "embed_tokens" not in head:
        raise ModelLoadError(
            f"the EAGLE head has no embeddings of its own size, {config.hidden_size}", hint=_HINT
        )
