"""Corrections of model classes of mlx-lm that differ from transformers, by model type.

A correction changes the model right after it is made, or the tensors before mlx-lm's `sanitize`
renames them. It can be removed when mlx-lm's class agrees with transformers' without it:
`tests/engine/oracle` compares the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.nn.layers.base import Module

from modelpack_engine.patches import mlx_lm_imports

#: Fields of a multimodal model's config.json with the configuration of its language model.
TEXT_PARTS = ("text_config", "llm_config", "language_config")

Config = Mapping[str, Any]
Tensors = dict[str, mx.array]
#: mlx-lm's method that converts the tensors of a checkpoint to those of the model.
Sanitize = Callable[[Tensors], Tensors]
#: From a config to a model class of mlx_lm.models and the class of its arguments.
Classes = Callable[[dict[str, Any]], tuple[type[Module], type]]


@dataclass(frozen=True, slots=True)
class Correction:
    """How to change a new model, and what replaces its `sanitize`; either may be None."""

    model: Callable[[Any, Config], None] | None = None
    tensors: Callable[[Any, Tensors, Sanitize], Tensors] | None = None


def corrected(classes: Classes) -> Classes:
    """Return `classes` with the correction of the model type applied, if there is one."""

    def choose(config: dict[str, Any]) -> tuple[type[Module], type]:
        made, arguments = classes(config)
        correction = CORRECTIONS.get(str(config.get("model_type")))
        return made if correction is None else _subclass(made, correction, config), arguments

    return choose


def classes_of(config: dict[str, Any]) -> tuple[type[Module], type]:
    """Return mlx-lm's class of a model, corrected, and that of its arguments.

    Raises `ValueError` for a type that mlx-lm does not have.
    """
    return corrected(mlx_lm_imports.utils()._get_classes)(config)


def correct(model: Module, config: Config) -> None:
    """Correct a model that was just made from `config`."""
    correction = CORRECTIONS.get(str(config.get("model_type")))
    if correction is not None and correction.model is not None:
        correction.model(model, config)


def _subclass(made: Any, correction: Correction, config: Config) -> type[Module]:
    def initialise(self: Any, args: Any) -> None:
        made.__init__(self, args)
        correct(self, config)

    body: dict[str, Any] = {"__init__": initialise, "__module__": made.__module__}
    tensors = correction.tensors
    if tensors is not None:
        body["sanitize"] = lambda self, weights: tensors(
            self, weights, partial(made.sanitize, self)
        )
    return type(made.__name__, (made,), body)


def override(module: Module, call: Callable[..., mx.array]) -> None:
    """Replace the call of one module; `modules.PATCHES` no longer apply to its class."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": __name__})


# Computations


def _scaled_rope(model: Any, config: Config) -> None:
    """Apply `rope_scaling` (yarn, llama3, linear, longrope), which mlx-lm's class ignores."""
    part = next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict)), config)
    scaling: Config = part.get("rope_scaling") or {}  # an object after normalisation
    kind = scaling.get("rope_type")
    if kind in (None, "default", "mrope", "dynamic"):  # dynamic scaling starts beyond the context
        return
    from mlx_lm.models.rope_utils import initialize_rope

    context = part.get("max_position_embeddings", part.get("max_seq_len"))
    for module in model.modules():
        rope = module.get("rope")
        if type(rope) is not nn.RoPE or (kind == "longrope" and rope.traditional):
            continue  # mlx-lm's longrope is never traditional; config_guard rejects it
        module.rope = initialize_rope(
            rope.dims, rope.base, rope.traditional, {**scaling, "type": kind}, context
        )


def _partial_rotation(model: Any, config: Config) -> None:
    """glm: rotate only the `partial_rotary_factor` part of each head."""
    part = config.get("partial_rotary_factor", 0.5)
    for layer in model.layers:
        layer.self_attn.rope.dims = int(layer.self_attn.head_dim * part)
    _scaled_rope(model, config)


def _configured_rope_base(model: Any, config: Config) -> None:
    """recurrent_gemma: use the configured `rope_theta` instead of 10000."""
    for layer in model.layers:
        rope = getattr(layer.temporal_block, "rope", None)
        if rope is not None:
            rope.base = config.get("rope_theta", 10000.0)


def _softmax_over_all_experts(model: Any, config: Config) -> None:
    """jamba: weigh experts by the softmax over all of them instead of over the chosen ones."""

    def call(self: Any, x: mx.array) -> mx.array:
        scores = mx.softmax(self.router(x), axis=-1, precise=True)
        k = self.num_experts_per_tok
        chosen = mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]
        scores = mx.take_along_axis(scores, chosen, axis=-1)
        result: mx.array = (self.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)
        return result

    for layer in model.layers:
        if hasattr(layer.feed_forward, "router"):
            override(layer.feed_forward, call)


def _normalised_scores(model: Any, config: Config) -> None:
    """hunyuan: where several experts are chosen, their scores add up to 1.

    Source: Tencent's `HunYuanMoE`, as transformers' `HunYuanMoEV1Gate`.
    """

    def call(self: Any, x: mx.array) -> mx.array:
        gates = mx.softmax(self.gate(x), axis=-1, precise=True)
        k = self.top_k
        chosen = mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k]
        scores = mx.take_along_axis(gates, chosen, axis=-1)
        scores = scores / scores.sum(axis=-1, keepdims=True)
        y: mx.array = self.switch_mlp(x, chosen)
        y = (y * scores[..., None].astype(mx.float32)).sum(axis=-2).astype(y.dtype)
        return y + self.shared_mlp(x) if self.use_shared_mlp else y

    for layer in model.layers:
        if getattr(layer.mlp, "top_k", 1) > 1:
            override(layer.mlp, call)


def _norm_per_group(model: Any, config: Config) -> None:
    """mamba2, granitemoehybrid: normalise the output of each group of heads separately."""
    groups = config.get("n_groups", config.get("mamba_n_groups"))
    if not isinstance(groups, int) or groups <= 1:
        return

    def call(self: Any, x: mx.array, gate: mx.array | None = None) -> mx.array:
        if gate is not None:
            x = nn.silu(gate) * x
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        result: mx.array = self.weight * mx.fast.rms_norm(grouped, None, self.eps).reshape(x.shape)
        return result

    for layer in model.layers:
        mixer = getattr(layer, "mixer", None) or getattr(layer, "mamba", None)
        if mixer is not None:
            override(mixer.norm, call)


def _exact_yarn_ramp(model: Any, config: Config) -> None:
    """gpt_oss: without `truncate`, do not round the ends of yarn's ramp to whole frequencies."""
    rope = config.get("rope_scaling")
    if not isinstance(rope, dict) or rope.get("truncate") is not False:
        return
    base, length = config["rope_theta"], rope["original_max_position_embeddings"]
    factor = rope["factor"]
    for layer in model.layers:
        rotation = layer.self_attn.rope
        dims = rotation.dims
        first, last = (
            dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (rope.get("beta_fast", 32.0), rope.get("beta_slow", 1.0))
        )
        first, last = max(first, 0.0), min(last, dims - 1.0)
        numbers = mx.arange(dims // 2, dtype=mx.float32)
        ramp = mx.clip((numbers - first) / max(last - first, 0.001), 0, 1)
        wavelengths = base ** (2 * numbers / dims)
        rotation._freqs = wavelengths / (1 - ramp + ramp / factor)


# Tensors

_BIAS = re.compile(r"model\.layers\.(\d+)\.mlp\.moe_statics\.e_score_correction_bias")


def _router_bias(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """ernie4_5_moe: choose experts by score plus the bias that mlx-lm ignores."""

    def call(self: Any, x: mx.array) -> mx.array:
        scores = self.gate_act(self.gate(x).astype(mx.float32))
        k = self.k
        biased = scores + self.moe_statics.e_score_correction_bias.reshape(-1)
        chosen = mx.argpartition(-biased, kth=k - 1, axis=-1)[..., :k]
        scores = mx.take_along_axis(scores, chosen, axis=-1)
        scores = scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)
        y = self.switch_mlp(x, chosen)
        y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
        result: mx.array = y if self.shared_experts is None else y + self.shared_experts(x)
        return result

    biases: Tensors = {}
    for name, value in weights.items():
        found = _BIAS.fullmatch(name)
        if found is None or int(found[1]) >= len(model.layers):
            continue
        block = model.layers[int(found[1])].mlp
        if not hasattr(block, "switch_mlp"):
            continue
        block.moe_statics = Module()
        block.moe_statics.e_score_correction_bias = mx.zeros(value.shape)
        override(block, call)
        biases[name] = value
    return {**sanitize(weights), **biases}


def _without_prefix(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """gpt2: drop the prefix with which transformers saves the model without its head."""
    return sanitize({name.removeprefix("transformer."): value for name, value in weights.items()})


def _transposed_experts(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """gpt_oss: transpose unquantised experts, which are saved [experts, input, output]."""
    result: Tensors = {}
    for name, value in weights.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            result[f"{name}.weight"] = value.swapaxes(-1, -2)
        else:
            result[name] = value
    return sanitize(result)


def _stacked_experts(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """qwen3_5_moe: stack the experts, which transformers 5 saves separately."""
    result = dict(weights)
    for name in weights:
        path, found, projection = name.partition(".experts.0.")
        if not found or "language_model." not in path:
            continue
        experts: list[mx.array] = []
        while (expert := f"{path}.experts.{len(experts)}.{projection}") in result:
            experts.append(result.pop(expert))
        result[f"{path}.switch_mlp.{projection}"] = mx.stack(experts)
    return sanitize(result)


def _transposed_qwen_experts(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """qwen3_vl_moe: transpose experts that transformers 5 saved, unlike the published ones.

    The published ones are [experts, input, output]. mlx-lm's `sanitize` needs a head even if the
    embeddings are tied.
    """
    if not any(name.endswith("lm_head.weight") for name in weights):
        given = {f"{path}lm_head.weight": mx.zeros(()) for path in ("", "language_model.")}
        result = _transposed_qwen_experts(model, {**weights, **given}, sanitize)
        return {name: value for name, value in result.items() if "lm_head" not in name}
    args = model.language_model.args
    published = {
        "gate_up_proj": (args.hidden_size, 2 * args.moe_intermediate_size),
        "down_proj": (args.moe_intermediate_size, args.hidden_size),
    }
    experts = [name for name in weights if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name)]
    if all(weights[name].shape[1:] == published[name.rpartition(".")[2]] for name in experts):
        return sanitize(weights)
    return sanitize({**weights, **{name: weights[name].swapaxes(-1, -2) for name in experts}})


def _without_further_layers(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """deepseek_v3: drop the layers after the last, for multi-token prediction, as transformers.

    mlx-lm drops layer 61 of models of any size.
    """

    def is_further(name: str) -> bool:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return found is not None and int(found[1]) >= model.args.num_hidden_layers

    return sanitize({name: value for name, value in weights.items() if not is_further(name)})


def _without_images(model: Any, weights: Tensors, sanitize: Sanitize) -> Tensors:
    """muse_glimmer: drop the image encoder, which transformers saves under `model`."""
    return sanitize({n: value for n, value in weights.items() if not n.startswith("model.vision_")})


# mlx-lm's classes of these types ignore `rope_scaling`.
_UNSCALED = """
    cohere cohere2 dbrx ernie4_5 gemma gemma2 glm4 glm4_moe gpt_neox helium minimax_m2 mixtral phi
    qwen2_moe qwen3_moe solar_open stablelm starcoder2
""".split()  # noqa: SIM905 - a long list is easier to read as one text

#: By the model type of config.json.
CORRECTIONS: Mapping[str, Correction] = {
    **dict.fromkeys(_UNSCALED, Correction(model=_scaled_rope)),
    "deepseek_v3": Correction(tensors=_without_further_layers),
    "ernie4_5_moe": Correction(model=_scaled_rope, tensors=_router_bias),
    "glm": Correction(model=_partial_rotation),
    "gpt2": Correction(tensors=_without_prefix),
    "gpt_oss": Correction(model=_exact_yarn_ramp, tensors=_transposed_experts),
    "granitemoehybrid": Correction(model=_norm_per_group),
    "hunyuan": Correction(model=_normalised_scores),
    "jamba": Correction(model=_softmax_over_all_experts),
    "mamba2": Correction(model=_norm_per_group),
    "muse_glimmer": Correction(tensors=_without_images),
    "qwen3_5_moe": Correction(tensors=_stacked_experts),
    "qwen3_vl_moe": Correction(model=_scaled_rope, tensors=_transposed_qwen_experts),
    "recurrent_gemma": Correction(model=_configured_rope_base),
}
