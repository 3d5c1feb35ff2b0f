"""MtpHead: a model's own layer for multi-token prediction, which drafts tokens.

Some models are trained with a further layer that predicts one more token, from the state after the
model's last layer and the embedding of the next token. mlx-lm's classes drop its weights;
`load_mtp_head` reads them from the model's files: safetensors by the names in `LAYOUTS`, GGUF by
those of `gguf_architectures`. `speculation.eagle` drafts with it as with an EAGLE-3 head.

Sources: DeepSeek-AI, DeepSeek-V3, arXiv:2412.19437, section 2.2; Xiaomi, MiMo, arXiv:2505.07608.
As in SGLang and llama.cpp, MiMo's layers read the model's state before the last norm, the others
the state after it. For further tokens, the layer's own state after its norm stands for the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.eagle import load_tensors, tensor_shapes
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.gguf import GGUFLoader
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.loader import LoadedModel
from modelpack_engine.models.mtp_attention import attention_of
from modelpack_engine.models.precision import Shape, evaluate, parameters_of, shapes_of

_HINT = "choose --speculative-method ngram, or a draft model"
_WHAT = "the multi-token-prediction layer"
#: The rows and columns of DeepSeek's fp8 weights that share a scale.
_FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class MtpLayout:
    """How a kind of model publishes its layer, and what the layer reads.

    `prefix` is that of all tensors; `{layers}` stands for the number of the model's layers. `names`
    has the published names of the head's modules. `block` makes the block from the model's layers
    and its arguments. `window` returns how many tokens its attention sees, by default all.
    """

    prefix: str
    names: Mapping[str, str]
    block: Callable[[list[Any], Any], nn.Module]
    reads_normed_state: bool = True
    state_first: bool = False
    window: Callable[[Any], int | None] = lambda args: None


def _block_at(index: Callable[[Any], int] | None, layers: list[Any], args: Any) -> nn.Module:
    """Return a block of the class of `layers`, with the rotation of one that has attention."""
    like = next((layer for layer in layers if "self_attn" in layer), None)
    if like is None:
        raise ValueError("no layer of the model has attention")
    block = type(like)(args) if index is None else type(like)(args, index(args))
    block.self_attn.rope = copy.copy(like.self_attn.rope)
    return block


def _sliding_block(layers: list[Any], args: Any) -> nn.Module:
    """Return MiMo V2's block: attention of a sliding window, and no experts."""
    like = next(layer for layer in layers if layer.is_sliding_window)
    block = type(like)(args, is_moe=False, is_sliding_window=True)
    block.self_attn.rope = copy.copy(like.self_attn.rope)
    return block


class _NemotronBlock(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """Two of Nemotron's layers, attention and experts, as one block of the usual kind."""

    def __init__(self, layers: list[Any], args: Any) -> None:
        super().__init__()
        attention, experts = (type(layers[0])(args, kind) for kind in "*E")
        self.input_layernorm, self.self_attn = attention.norm, attention.mixer
        self.post_attention_layernorm, self.mlp = experts.norm, experts.mixer


_NEXTN = MtpLayout(
    "model.layers.{layers}.",
    {
        "embedding_norm": "enorm",
        "state_norm": "hnorm",
        "projection": "eh_proj",
        "block": "",
        "norm": "shared_head.norm",
        "embed_tokens": "embed_tokens",
        "head": "shared_head.head",
    },
    partial(_block_at, lambda args: int(args.num_hidden_layers)),
)
_QWEN = MtpLayout(
    "mtp.",
    {
        "embedding_norm": "pre_fc_norm_embedding",
        "state_norm": "pre_fc_norm_hidden",
        "projection": "fc",
        "block": "layers.0",
        "norm": "norm",
    },
    # The layer has full attention, whose blocks end each interval.
    partial(_block_at, lambda args: int(args.full_attention_interval) - 1),
)
_MIMO = MtpLayout(
    "model.mtp_layers.0.",
    {
        "embedding_norm": "token_layernorm",
        "state_norm": "hidden_layernorm",
        "projection": "input_proj",
        "block": "",
        "norm": "final_layernorm",
    },
    partial(_block_at, None),
    reads_normed_state=False,
    state_first=True,
)
_MIMO_V2 = MtpLayout(
    "model.mtp.layers.0.",
    {
        "embedding_norm": "enorm",
        "state_norm": "hnorm",
        "projection": "eh_proj",
        "block.post_attention_layernorm": "pre_mlp_layernorm",
        "block": "",
        "norm": "final_layernorm",
    },
    _sliding_block,
    reads_normed_state=False,
    window=lambda args: int(args.sliding_window_size),
)
_NEMOTRON = MtpLayout(
    "mtp.layers.",
    {
        "embedding_norm": "0.enorm",
        "state_norm": "0.hnorm",
        "projection": "0.eh_proj",
        "block.input_layernorm": "0.norm",
        "block.self_attn": "0.mixer",
        "block.post_attention_layernorm": "1.norm",
        "block.mlp": "1.mixer",
        "norm": "1.final_layernorm",
    },
    _NemotronBlock,
)

#: By the model type of config.json. Of several layers, the first drafts all tokens.
LAYOUTS: Mapping[str, MtpLayout] = {
    "deepseek_v3": _NEXTN,
    "glm4_moe": _NEXTN,
    "glm4_moe_lite": _NEXTN,
    "mimo": _MIMO,
    "mimo_v2_flash": _MIMO_V2,
    "nemotron_h": _NEMOTRON,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_next": _QWEN,
}


class MtpHead(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """The layer of `model`, a block of the model's own class, without weights yet.

    It has the interface of `EagleHead`. Its vocabulary is the model's, and so are its embeddings
    and its output layer, unless `embed_tokens` and `head` are added. Make it before a runner adapts
    the model's modules.
    """

    def __init__(self, model: Any, layout: MtpLayout) -> None:
        super().__init__()
        text = TextModel.of(model)
        self.embedding_norm, self.state_norm, self.norm = (
            nn.RMSNorm(text.hidden_size, text.norm.eps) for _ in range(3)
        )
        self.projection = nn.Linear(2 * text.hidden_size, text.hidden_size, bias=False)
        self.block = layout.block(text.layers, text.args)
        self._attention = attention_of(self.block.self_attn)
        #: The columns of the logits.
        self.num_logits = int(text.args.vocab_size)
        #: The tokens that the attention sees; None for all.
        self.window = layout.window(text.args)
        self._state_first = layout.state_first
        # Copies, with the same weights: the runner replaces the calls of the model's own modules.
        # Methods of copies: modules would be parts of this one.
        self._read = copy.copy(text.norm).__call__ if layout.reads_normed_state else None
        tied = text.head is None
        output: Any = copy.copy(text.embeddings if tied else text.head)
        self._output = output.as_linear if tied else output.__call__

    def read(self, states: mx.array) -> mx.array:
        """Return what the layer reads of the states [rows, hidden] after the model's last layer."""
        return states if self._read is None else self._read(states)

    def project(
        self, hidden: mx.array, embedded: mx.array, positions: mx.array
    ) -> tuple[Any, mx.array, mx.array, mx.array]:
        """Return what `finish` needs, and queries, keys and values of rows at `positions`.

        `hidden` and `embedded` are [rows, hidden]; the results have the shape [rows, heads, dim].
        """
        both = [self.embedding_norm(embedded), self.state_norm(hidden)]
        residual = self.projection(mx.concatenate(both[:: -1 if self._state_first else 1], axis=-1))
        found = self._attention.project(self.block.input_layernorm(residual), positions)
        return (residual, found.gate), found.queries, found.keys, found.values

    def finish(self, carried: Any, attended: mx.array) -> mx.array:
        """Return the hidden states of rows whose attention output is [rows, heads * dim]."""
        residual, gate = carried
        hidden: mx.array = residual + self._attention.output(attended, gate)
        hidden = hidden + self.block.mlp(self.block.post_attention_layernorm(hidden))
        found: mx.array = self.norm(hidden)
        return found

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of the vocabulary, from hidden states of `finish`."""
        found: mx.array = self.head(hidden) if "head" in self else self._output(hidden)
        return found

    def token_ids(self, drafted: mx.array) -> mx.array:
        """Return the token ids of columns of the logits."""
        return drafted.astype(mx.int32)

    def cast_predicate(self, name: str) -> bool:
        """Return whether a parameter has the model's type: all but what chooses the experts."""
        return not name.endswith("e_score_correction_bias")

    def set_dtype(self, dtype: mx.Dtype, *args: Any) -> None:
        """Set the type of all floats but the biases of the router, which choose the experts."""
        biases = [
            (name, array)
            for name, array in parameters_of(self).items()
            if not self.cast_predicate(name)
        ]
        super().set_dtype(dtype, *args)
        self.load_weights(biases, strict=False)

    @property
    def num_kv_heads(self) -> int:
        """The heads of the layer's keys and values."""
        return self._attention.num_kv_heads

    @property
    def key_dim(self) -> int:
        """The elements of a head's key."""
        return self._attention.key_dim

    @property
    def value_dim(self) -> int:
        """The elements of a head's value."""
        return self._attention.value_dim

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the layer's keys and values."""
        dtype: mx.Dtype = self.norm.weight.dtype
        return dtype

    @property
    def scale(self) -> float:
        """The factor of the attention's scores."""
        return float(self.block.self_attn.scale)

    @property
    def sinks(self) -> mx.array | None:
        """The attention's sinks [heads], which are added to the denominator of the softmax."""
        sinks: mx.array | None = getattr(self.block.self_attn, "attention_sink_bias", None)
        return sinks

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that the model itself does not have."""
        flat: Any = tree_flatten(self.parameters())
        return sum(array.nbytes for _, array in flat)


@dataclass(frozen=True, slots=True)
class TextModel:
    """The parts of a language model that the layer uses; `head` is None if it is the embeddings."""

    args: Any
    layers: list[Any]
    embeddings: Any
    norm: Any
    head: Any | None

    @classmethod
    def of(cls, model: Any) -> TextModel:
        """Return the parts of a model of one of `LAYOUTS`."""
        text = getattr(model, "language_model", model)
        head = text.lm_head if "lm_head" in text else None
        if "backbone" in text:
            inner = text.backbone
            return cls(text.args, inner.layers, inner.embeddings, inner.norm_f, head)
        inner = text.model
        return cls(text.args, inner.layers, inner.embed_tokens, inner.norm, head)

    @property
    def hidden_size(self) -> int:
        """The elements of a hidden state."""
        return int(self.args.hidden_size)


def load_mtp_head(files: ModelFiles, loaded: LoadedModel) -> MtpHead:
    """Load the multi-token-prediction layer of a model from its files.

    Raises `ModelLoadError` for a model without one, for an architecture or a format whose layer is
    not read, and for tensors that are missing or of the wrong shape.
    """
    kind = str(loaded.config.get("model_type") or loaded.architecture)
    what = "speculative method mtp"
    if kind.startswith("gemma4"):
        raise ModelLoadError(
            f"{what}: Gemma 4's multi-token prediction is a drafter of its own files",
            hint="choose it with --draft-model REF",
        )
    if kind not in LAYOUTS:
        raise ModelLoadError(
            f"{what}: multi-token-prediction layers of {kind!r} are not supported, expected "
            f"{', '.join(sorted(LAYOUTS))}",
            hint=_HINT,
        )
    if loaded.packed is not None:
        raise ModelLoadError(f"{what}: needs MLX", hint=_HINT + ", or --backend mlx")
    layout = LAYOUTS[kind]
    _check_config(loaded.config, what)
    source = None if files.format == "gguf" else _source(files, loaded, layout, what)
    try:
        head = MtpHead(loaded.model, layout)
    except (AttributeError, TypeError, ValueError) as error:  # from mlx-lm's classes
        raise ModelLoadError(f"{what}: the configuration describes no layer: {error}") from error
    if source is not None:
        source.load(head, loaded)
    else:
        assert loaded.precision is not None, "of a GGUF model in MLX"
        loader = GGUFLoader(GGUFFile.open(files.weights))
        loader.load_predicting_layer(head, loaded.precision)
    evaluate(head)
    return head


def _source(files: ModelFiles, loaded: LoadedModel, layout: MtpLayout, what: str) -> _Source:
    """Return the layer's tensors in safetensors."""
    stored = tensor_shapes(files)
    prefix = layout.prefix.format(layers=len(TextModel.of(loaded.model).layers))
    if not any(name.startswith(prefix) for name in stored):
        raise ModelLoadError(
            f"{what}: the files have no tensors {prefix}*",
            hint="use the published files: conversions by mlx-lm drop these tensors",
        )
    return _Source(files, layout, prefix, stored)


def _check_config(config: Mapping[str, Any], what: str) -> None:
    """Raise `ModelLoadError` for a layer of another shape than those that `LAYOUTS` describe."""
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    if config.get("mtp_use_dedicated_embeddings"):
        raise ModelLoadError(f"{what}: mtp_use_dedicated_embeddings is not supported", hint=_HINT)
    blocks = config.get("mtp_hybrid_override_pattern") or config.get("mtp_layers_block_type")
    known = ("*E", ["*", "E"], ["attention", "moe"], ["full_attention", "moe"])
    if blocks is not None and blocks not in known:
        raise ModelLoadError(
            f"{what}: the layer has the blocks {str(blocks)[:100]}, expected attention and experts",
            hint=_HINT,
        )


#: The published tensors of a parameter, with their shapes, and what makes the parameter of them.
_Parts = tuple[Mapping[str, Shape], Callable[[list[mx.array]], mx.array]]


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of a layer in `files`; `stored` has the shapes of all tensors.

    mlx-lm's blocks stack the experts and split DeepSeek's `kv_b_proj`; tensors that are stored in
    this way are taken as they are.
    """

    files: ModelFiles
    layout: MtpLayout
    prefix: str
    stored: Mapping[str, Shape]

    def load(self, head: MtpHead, loaded: LoadedModel) -> None:
        """Load the layer into `head`, with embeddings and an output layer of its own."""
        self.quantise(head, loaded.config.get("quantization") or {})
        head.load_weights(list(self.weights(head, loaded.model).items()))
        for name, weight in self.own_vocabulary(TextModel.of(loaded.model)).items():
            shape = tuple(weight.shape)
            embeds = name == "embed_tokens"
            head[name] = nn.Embedding(*shape) if embeds else nn.Linear(*shape[::-1], bias=False)
            head[name].weight = weight

    def quantise(self, head: MtpHead, settings: Mapping[str, Any]) -> None:
        """Make the modules of `head` quantised that are stored so, as mlx-lm's config says."""

        def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
            path = self._path(path)
            own = settings.get(path)
            return f"{path}.scales" in self.stored and (own if isinstance(own, dict) else True)

        group_size, bits = settings.get("group_size", 64), settings.get("bits", 4)
        mode = settings.get("mode", "affine")
        try:
            nn.quantize(head, group_size, bits, mode=mode, class_predicate=chosen)
        except (TypeError, ValueError) as error:
            raise ModelLoadError(f"{_WHAT} cannot be quantised: {error}") from error

    def weights(self, head: MtpHead, model: Any) -> dict[str, mx.array]:
        """Return all parameters of `head`, which drafts for `model`."""
        parts = {n: self._parts(n, s, head.block.self_attn) for n, s in shapes_of(head).items()}
        wanted = {name: shape for tensors, _ in parts.values() for name, shape in tensors.items()}
        scales = {
            f"{name}_scale_inv": tuple(-(-size // _FP8_BLOCK) for size in shape)
            for name, shape in wanted.items()
            if f"{name}_scale_inv" in self.stored
        }

        def dequantised(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
            # Without the prefix, mlx-lm's class unpacks fp8 and does nothing else.
            found = model.sanitize({n.removeprefix(self.prefix): a for n, a in arrays.items()})
            return {self.prefix + name: array for name, array in found.items()}

        arrays = load_tensors(
            self.files, wanted | scales, _WHAT, dequantised=dequantised if scales else None
        )
        return {name: make([arrays[n] for n in tensors]) for name, (tensors, make) in parts.items()}

    def own_vocabulary(self, text: TextModel) -> dict[str, mx.array]:
        """Return stored embeddings and output layer, unless they are the model's.

        DeepSeek and GLM publish copies of the model's.
        """
        shape = (text.args.vocab_size, text.hidden_size)
        shared = {"embed_tokens": text.embeddings, "head": text.head}
        found = {}
        for name, module in shared.items():
            tensor = f"{self.prefix}{self.layout.names.get(name)}.weight"
            if name not in self.layout.names or tensor not in self.stored:
                continue
            own = load_tensors(self.files, {tensor: shape}, _WHAT)[tensor]
            weight = None if module is None else module.weight
            if weight is None or not mx.array_equal(own.astype(weight.dtype), weight).item():
                found[name] = own
        return found

    def _path(self, name: str) -> str:
        """Return the published name of a module or parameter of the head."""
        for module, published in self.layout.names.items():
            if f"{name}.".startswith(f"{module}."):
                path = f"{published}{name[len(module) :]}"
                return self.prefix + path.removeprefix(".")
        return self.prefix + name

    def _parts(self, name: str, shape: Shape, attention: Any) -> _Parts:
        path = self._path(name)
        if path not in self.stored:
            if ".switch_mlp." in path:
                return self._experts(path, shape)
            if path.endswith(("embed_q.weight", "unembed_out.weight")):
                return _latent(path, attention)
        shifted = len(shape) == 1 and "norm" in path and self._has_shifted_norms()
        return {path: shape}, lambda arrays: arrays[0] + 1 if shifted else arrays[0]

    def _has_shifted_norms(self) -> bool:
        """Return whether norms are stored less by one: in Qwen's files, with their convolutions."""
        return self.layout is _QWEN and any(
            name.endswith("conv1d.weight") and shape[-1] != 1 for name, shape in self.stored.items()
        )

    def _experts(self, path: str, shape: Shape) -> _Parts:
        """Stack the experts' matrices, or take a part of those that are stored together."""
        start, _, rest = path.partition("switch_mlp.")
        rest = rest.replace("fc1", "up_proj").replace("fc2", "down_proj")  # Nemotron's in mlx-lm
        projection = rest.removesuffix(".weight")
        count, outputs, inputs = shape
        if f"{start}experts.gate_up_proj" not in self.stored:
            each = {f"{start}experts.{n}.{rest}": (outputs, inputs) for n in range(count)}
            return each, mx.stack
        if projection == "down_proj":
            return {f"{start}experts.down_proj": shape}, lambda arrays: arrays[0]
        part = slice(0, outputs) if projection == "gate_proj" else slice(outputs, None)
        both = {f"{start}experts.gate_up_proj": (count, 2 * outputs, inputs)}
        return both, lambda arrays: arrays[0][:, part]


def _latent(path: str, attention: Any) -> _Parts:
    """Take the part of `kv_b_proj` that makes keys, or values, of the latent vector."""
    keys, heads, rank = attention.qk_nope_head_dim, attention.num_heads, attention.kv_lora_rank
    start, _, name = path.removesuffix(".weight").rpartition(".")
    shape = (heads * (keys + attention.v_head_dim), rank)

    def make(arrays: list[mx.array]) -> mx.array:
        both = arrays[0].reshape(heads, -1, rank)
        return both[:, :keys].swapaxes(-1, -2) if name == "embed_q" else both[:, keys:]

    return {f"{start}.kv_b_proj.weight": shape}, make
