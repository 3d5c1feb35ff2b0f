"""AssistantHead: Gemma 4's published drafter, which reads the keys and values of its model.

Google publishes one for each Gemma 4 (`gemma-4-*-it-assistant`, `Gemma4AssistantForCausalLM`). Its
few layers have queries only: they attend to the keys and values of the model's last layer of the
same type, sliding or full. Its input is the embedding of a token next to the model's state before
it; its output is logits, and the state that stands for the model's in the next step. The position
and the keys stay the same for all tokens of a draft.

The layers are mlx-lm's own class for Gemma 4. Small drafters score the tokens of a few clusters
only, those whose centroids fit the state best. Sources: transformers, models/gemma4_assistant;
vLLM, models/gemma4_mtp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from modelpack.formats.drafter import ASSISTANTS, drafter_kind
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.eagle import load_tensors, tensor_shapes
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.precision import evaluate, parameters_of, shapes_of

_WHAT = "Gemma 4's drafter"
_HINT = "use the drafter that was published for this model, or --speculative-method ngram"
# For every size in a config. Products may still exceed what MLX accepts, which raises.
_MOST = 1 << 20
_MOST_LAYERS = 64  # published drafters have 4; each layer takes memory before files are compared
_TYPES = ("full_attention", "sliding_attention")
# What mlx-lm's classes raise for fields of the wrong type, and for numbers out of range.
_BAD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
#: Fields of text_config that have to be off: such layers read more than states.
_OFF = ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block",
        "use_double_wide_mlp")  # fmt: skip

#: The keys and values that a layer attends to, or handles of them.
SharedKV = tuple[mx.array, mx.array]


@dataclass(frozen=True, slots=True)
class AssistantConfig:
    """The sizes of a drafter. `text` are the arguments of its layers in mlx-lm.

    `target_hidden_size` is the size of the model's states. Of `num_centroids` clusters, the tokens
    of the best `top_centroids` are scored; without clusters, both are 0.
    """

    text: gemma4_text.ModelArgs
    target_hidden_size: int
    num_centroids: int = 0
    top_centroids: int = 0
    tied: bool = True


def read_assistant_config(config: Mapping[str, Any]) -> AssistantConfig:
    """Return the sizes in a drafter's config.json; raises `ModelLoadError` for others."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelLoadError("config.json: text_config is not an object")

    def size(of: Mapping[str, Any], name: str, default: int | None = None) -> int:
        value = of.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            raise ModelLoadError(f"config.json: {name} is {str(value)[:100]!r}, expected a size")
        return value

    for name in _OFF:
        if text.get(name):
            raise ModelLoadError(
                f"config.json: {name} is {str(text[name])[:100]}, which {_WHAT} cannot have",
                hint=_HINT,
            )
    layers = size(text, "num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise ModelLoadError(f"config.json: {layers} layers, {_WHAT} has at most {_MOST_LAYERS}")
    types = text.get("layer_types")
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {*_TYPES}:
        raise ModelLoadError(
            f"config.json: layer_types is {str(types)[:100]}, expected {layers} of "
            f"{' and '.join(_TYPES)}"
        )
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
        size(text, name)
    if text.get("global_head_dim") is not None:
        size(text, "global_head_dim")
    vocab = size(text, "vocab_size")
    num_centroids = top = 0
    if config.get("use_ordered_embeddings"):
        num_centroids = size(config, "num_centroids", 2048)
        top = size(config, "centroid_intermediate_top_k", 32)
        if vocab % num_centroids or top > num_centroids:
            raise ModelLoadError(
                f"config.json: {num_centroids} clusters, of which {top} are scored, cannot divide "
                f"{vocab} tokens"
            )
    own = {**text, "num_kv_shared_layers": layers, **dict.fromkeys(_OFF[:2], 0)}
    own |= dict.fromkeys(_OFF[2:], False)
    try:
        args = gemma4_text.ModelArgs.from_dict(own)
    except _BAD as error:
        raise ModelLoadError(f"config.json: text_config describes no layers: {error}") from error
    tied = config.get("tie_word_embeddings") is not False
    hidden = size(config, "backbone_hidden_size")
    return AssistantConfig(args, hidden, num_centroids, top, tied)


class _Layers(nn.Module):  # type: ignore[misc]  # MLX has no types here
    def __init__(self, args: gemma4_text.ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [gemma4_text.DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class _Clusters(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """`token_ordering` has the tokens of the first cluster, then those of the second, …"""

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        self.centroids = nn.Linear(config.text.hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((config.text.vocab_size,), mx.int32)


class AssistantHead(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """The network of a drafter; its parameters are named as in published files."""

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        args = config.text
        self.config = config
        self.model = _Layers(args)
        both = 2 * config.target_hidden_size
        self.pre_projection = nn.Linear(both, args.hidden_size, bias=False)
        self.post_projection = nn.Linear(args.hidden_size, config.target_hidden_size, bias=False)
        if not config.tied:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        if config.num_centroids:
            self.masked_embedding = _Clusters(config)

    @property
    def layer_types(self) -> Sequence[str]:
        """The type of each layer: whose keys and values of the model it reads."""
        return [layer.layer_type for layer in self.model.layers]

    def forward(
        self,
        embedded: mx.array,
        states: mx.array,
        positions: mx.array,
        shared_kv: Callable[[str], SharedKV],
    ) -> tuple[mx.array, mx.array]:
        """Return the layers' output [rows, size], and the states [rows, hidden] of the next step.

        `embedded` and `states` are [rows, hidden], `positions` int32 [rows]. `shared_kv` returns
        the keys and values [rows, heads, keys, dim] of a type of layer.
        """
        hidden = self.pre_projection(mx.concatenate([embedded, states], axis=-1))[:, None]
        for layer in self.model.layers:
            kv = shared_kv(layer.layer_type)
            hidden, _, _ = layer(hidden, shared_kv=kv, offset=positions)
        hidden = self.model.norm(hidden)[:, 0]
        return hidden, self.post_projection(hidden)

    def best(self, hidden: mx.array) -> tuple[mx.array, mx.array]:
        """Return the most likely token of each row of `forward`'s output, and its probability."""
        logits, tokens = self._logits(hidden)
        best = mx.argmax(logits, axis=-1, keepdims=True)
        logits = logits.astype(mx.float32)
        top = mx.take_along_axis(logits, best, axis=-1)[:, 0]
        found = best if tokens is None else mx.take_along_axis(tokens, best, axis=-1)
        return found[:, 0].astype(mx.int32), mx.exp(top - mx.logsumexp(logits, axis=-1))

    def _logits(self, hidden: mx.array) -> tuple[mx.array, mx.array | None]:
        """Return logits [rows, tokens] and their tokens; None stands for the whole vocabulary."""
        if "masked_embedding" not in self:
            output = self.model.embed_tokens.as_linear if self.config.tied else self.lm_head
            return output(hidden), None
        clusters, top = self.masked_embedding, self.config.top_centroids
        chosen = mx.argpartition(clusters.centroids(hidden), kth=-top, axis=-1)[:, -top:]
        tokens = clusters.token_ordering.reshape(self.config.num_centroids, -1)[chosen]
        tokens = tokens.reshape(len(hidden), -1)
        output = self.model.embed_tokens if self.config.tied else self.lm_head
        return (output.weight[tokens] @ hidden[:, :, None])[:, :, 0], tokens

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights."""
        return sum(array.nbytes for array in parameters_of(self).values())


def load_assistant(files: ModelFiles) -> AssistantHead:
    """Load the drafter in `files`; its weights keep their type.

    Raises `ModelLoadError` for a config that is no drafter's, and for tensors that are missing,
    unknown or of the wrong shape; `WeightFormatError` for a damaged file.
    """
    raw = files.json("config.json")
    if raw is None or drafter_kind(raw) != "gemma4-assistant":
        raise ModelLoadError(
            f"config.json: is not that of {_WHAT}",
            hint=f"expected the architecture {min(ASSISTANTS)}",
        )
    if files.format != "safetensors":
        raise ModelLoadError(f"{_WHAT} is {files.format}, expected safetensors")
    config = read_assistant_config(raw)
    stored = tensor_shapes(files)
    try:
        head = AssistantHead(config)
    except _BAD as error:
        raise ModelLoadError(f"config.json: text_config describes no layers: {error}") from error
    wanted = shapes_of(head)
    arrays = load_tensors(files, wanted, _WHAT)
    unused = {"lm_head.weight"} if config.tied else set()
    unknown = [name for name in stored if name not in wanted and name not in unused]
    if unknown:
        raise ModelLoadError(f"{_WHAT} has an unknown tensor: {unknown[0][:100]}")
    name = "masked_embedding.token_ordering"
    if name in arrays:
        arrays[name] = _checked_ordering(arrays[name], config.text.vocab_size)
    head.load_weights(list(arrays.items()))
    evaluate(head)
    return head


def _checked_ordering(ordering: mx.array, vocab_size: int) -> mx.array:
    if not mx.issubdtype(ordering.dtype, mx.integer):
        raise ModelLoadError(f"{_WHAT}'s token_ordering has no integers")
    if mx.any((ordering < 0) | (ordering >= vocab_size)).item():
        raise ModelLoadError(
            f"{_WHAT}'s token_ordering names tokens outside of its vocabulary of {vocab_size}"
        )
    return ordering.astype(mx.int32)


@dataclass(frozen=True, slots=True)
class AssistantTarget:
    """What a drafter uses of its model: embeddings with their factor, the last norm, and layers.

    `layers` has the index of the layer whose keys and values serve each type of layer.
    """

    embed: Callable[[mx.array], mx.array]
    norm: nn.RMSNorm
    layers: Mapping[str, int]


def assistant_target(
    head: AssistantHead, inner: Any, vocab_size: int, key_dims: Mapping[int, tuple[int, int]]
) -> AssistantTarget:
    """Return what `head` uses of the model without head `inner`.

    `key_dims` has the heads and elements of the keys that each layer caches. Raises
    `ModelLoadError` unless the drafter fits the model.
    """
    if not isinstance(inner, gemma4_text.Gemma4TextModel):
        raise ModelLoadError(f"{_WHAT} needs Gemma 4, the model is {type(inner).__name__}")
    args, text = head.config, head.config.text
    hidden = int(inner.norm.weight.shape[0])
    if args.target_hidden_size != hidden:
        raise ModelLoadError(
            f"{_WHAT} is for a model with hidden states of {args.target_hidden_size}, this model "
            f"has {hidden}",
            hint=_HINT,
        )
    if text.vocab_size != vocab_size:
        raise ModelLoadError(
            f"{_WHAT} is for a vocabulary of {text.vocab_size} tokens, this model has {vocab_size}",
            hint=_HINT,
        )
    # The last layer of a type may itself use the keys of an earlier layer.
    owners = {
        layer.layer_type: owner
        for layer, owner in zip(inner.layers, inner.previous_kvs, strict=True)
    }
    for layer in head.model.layers:
        kind, attention = layer.layer_type, layer.self_attn
        if kind not in owners or owners[kind] not in key_dims:
            raise ModelLoadError(
                f"{_WHAT} has a layer of {kind}, which the model lacks", hint=_HINT
            )
        heads, dim = key_dims[owners[kind]]
        if attention.head_dim != dim or attention.n_heads % heads:
            raise ModelLoadError(
                f"{_WHAT} has {attention.n_heads} heads of {attention.head_dim} for {kind}, the "
                f"model has keys of {heads} heads of {dim}",
                hint=_HINT,
            )
    # The runner replaces the calls of the model's own norm.
    norm = nn.RMSNorm(hidden, eps=inner.norm.eps)
    norm.weight = inner.norm.weight
    return AssistantTarget(lambda ids: inner.embed_tokens(ids) * inner.embed_scale, norm, owners)
