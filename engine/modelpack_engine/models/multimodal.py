"""The language model of a multimodal model whose type mlx-lm does not have.

mlx-lm has classes for some multimodal model types, and for the language models of many more. Here
such a language model becomes a model of the whole file's type, which keeps its tensors under
`language_model.` and leaves out those of the vision tower. Types are those of `CLASSES` with
`language`.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.nn.layers.base import Module

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.layers.cross_attention import insert_layers
from modelpack_engine.models.adapter import dtype_of, weight_shape
from modelpack_engine.models.model_config import completed
from modelpack_engine.patches.corrections import TEXT_PARTS, Classes, classes_of
from modelpack_engine.patches.lora import Matrices
from modelpack_engine.vision.models import CLASSES

_PREFIX = "language_model."
#: Types of text models in files of their own; mlx-lm runs them with the class of a multimodal type.
TEXT_TYPES: Mapping[str, str] = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
#: Model types with a class of mlx-lm that takes no embeddings.
_WITHOUT_EMBEDDINGS = ("kimi_k25", "llama4", "muse_glimmer")
#: The adapter of Phi-4 Multimodal for prompts with sounds, in the names of its tensors.
_SPEECH = re.compile(r"(?P<layer>.+)\.lora_A\.speech\.weight\Z")
#: Names of tensors of a language model without a head.
_DECODER = ("embed_tokens.", "layers.", "norm.")


def language_classes(config: Mapping[str, Any]) -> Classes | None:
    """Return what chooses the classes of a model whose language model mlx-lm has; None for others.

    Raises `ModelLoadError` for a language model that was not tested in this place.
    """
    kind = str(config.get("model_type"))
    if kind in _WITHOUT_EMBEDDINGS:
        return _choose_with_embeddings
    if kind in TEXT_TYPES:
        return _choose_text
    known = CLASSES[kind].language if kind in CLASSES else None
    if known is None:
        return None
    part = _text_part(config, flat=kind in known)
    text_type = _text(config, part).get("model_type")
    if not isinstance(text_type, str) or text_type not in known:
        raise ModelLoadError(
            f"config.json: {part}.model_type {str(text_type)[:50]!r} is not supported for"
            f" {kind}; expected one of {', '.join(known)}"
        )
    name = known[text_type]
    if name == "deepseek_v2" and not _text(config, part).get("kv_lora_rank"):
        name = "deepseek"  # DeepSeek-VL2 Tiny: experts without latent attention

    def choose(config: dict[str, Any]) -> tuple[type[Module], type]:
        module, _, inner = name.partition(".")
        made, arguments = classes_of({**_text(config, part), "model_type": module})
        if inner:
            found: Any = importlib.import_module(made.__module__)
            made, arguments = getattr(found, inner), getattr(found, f"{inner}Args")
        return _model_class(made), _arguments_class(arguments, part, name)

    return choose


def _choose_text(config: dict[str, Any]) -> tuple[type[Module], type]:
    """Return mlx-lm's class for a multimodal type, and arguments from the config of its text."""
    text_type = str(config["model_type"])
    made, inner = classes_of({**config, "model_type": TEXT_TYPES[text_type]})
    rules = f"{TEXT_TYPES[text_type]}/{text_type}"
    body = {"__module__": inner.__module__, "text_type": rules, "is_flat": True}
    return made, type("Arguments", (inner,), body)


def _choose_with_embeddings(config: dict[str, Any]) -> tuple[type[Module], type]:
    """Return mlx-lm's class for the whole model, which gets embeddings as its inputs, too."""
    inner, arguments = classes_of(config)
    native: Any = inner
    body = {
        "__call__": partialmethod(_called, call=native.__call__),
        "__module__": inner.__module__,
    }
    return type("Model", (native,), body), arguments


def _called(
    self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None, *, call: Any
) -> Any:
    """Call a model of text with the embeddings of its inputs, if they are given."""
    if input_embeddings is None:
        return call(self, inputs, cache=cache)
    decoder = getattr(self, "language_model", self).model
    table = decoder.embed_tokens
    decoder.embed_tokens = _Rows(input_embeddings, table)  # many classes accept no embeddings
    try:
        return call(self, inputs, cache=cache)
    finally:
        decoder.embed_tokens = table


def adapter_for_sounds(
    paths: Sequence[Path], config: Mapping[str, Any], model: Module
) -> dict[str, Matrices]:
    """Return the adapter of Phi-4 Multimodal for prompts with sounds, by layers of `model`.

    `paths` are its safetensors files. {} for other models, and for files whose weights have the
    adapter in them, as mlx-vlm quantises them. Raises `ModelLoadError` for one that does not fit.
    """
    if config["model_type"] != "phi4mm":
        return {}
    arrays: dict[str, mx.array] = {}
    for path in paths:
        stored: Any = mx.load(str(path), format="safetensors")
        arrays |= {name: value for name, value in stored.items() if ".speech.weight" in name}
    settings = config.get("speech_lora")
    settings = settings if isinstance(settings, Mapping) else {}
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    modules: dict[str, Any] = dict(model.named_modules())
    found: dict[str, Matrices] = {}
    for name, a in arrays.items():
        if (match := _SPEECH.fullmatch(name)) is None:
            continue
        if type(rank) is not int or not isinstance(alpha, int | float) or rank < 1:
            raise ModelLoadError("config.json: speech_lora has no r and lora_alpha")
        layer = f"{_PREFIX}{match['layer']}"
        b, module = arrays.get(name.replace("lora_A", "lora_B")), modules.get(layer)
        if b is None or not hasattr(module, "weight"):
            raise ModelLoadError(f"{name}: the model has no such layer, or no B for this A")
        outputs, inputs = weight_shape(module)
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise ModelLoadError(
                f"{name}: A is {list(a.shape)} and B {list(b.shape)}, expected"
                f" {[rank, inputs]} and {[outputs, rank]}"
            )
        scaled = b.astype(mx.float32).T * (alpha / rank)
        kind = dtype_of(module)
        made = Matrices(mx.contiguous(a.T).astype(kind), mx.contiguous(scaled).astype(kind))
        if not (mx.isfinite(made.a).all() & mx.isfinite(made.b).all()):
            raise ModelLoadError(f"{name}: A or B has values that are not finite")
        found[layer] = made
    return found


def _text(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return the fields of the language model: those of a part, or of the whole config."""
    found: Mapping[str, Any] = config[part] if part else config
    return found


def _text_part(config: Mapping[str, Any], *, flat: bool) -> str:
    """Return the name of the language model's part, "" if its fields are in the whole config."""
    found = [part for part in TEXT_PARTS if isinstance(config.get(part), Mapping)]
    if flat and not found:
        return ""
    if not found:
        raise ModelLoadError("config.json: text_config is missing")
    return found[0]


def _arguments_class(inner: Any, part: str, name: str) -> type:
    """Return a class whose `from_dict` makes mlx-lm's arguments from a part of config.json."""

    class Arguments:
        #: The model type whose fields `config_guard` checks in the part, or in the whole config.
        text_type, is_flat = name, not part

        @classmethod
        def from_dict(cls, config: Mapping[str, Any]) -> Any:
            text = {**_text(config, part), "model_type": name.partition(".")[0]}
            if config["model_type"] == "molmo":
                text |= _molmo_fields(config)
            text = completed(text, inner)
            if name == "deepseek_v2" and not text.get("rope_scaling"):  # mlx-lm's needs one
                text["rope_scaling"] = {"type": "yarn", "factor": 1.0}
            made = SimpleNamespace(model_type=config["model_type"], text_config=text)
            made.more_tokens = _more_tokens(config)
            made.num_layers = text.get("num_hidden_layers")  # the next one predicts tokens (MTP)
            if config["model_type"] == "granite4_vision":
                made.added_layers = _added_layers(config, made.num_layers)
            if config["model_type"] == "mllama":
                made.cross_layers = _cross_layers(text)
            if made.more_tokens:  # the table has rows without logits
                text["tie_word_embeddings"] = False
            made.inner = inner.from_dict(text)
            return made

    Arguments.__module__ = inner.__module__
    return Arguments


def _added_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers, without the first, before which rows of a picture are added.

    Granite 4 Vision has such layers. Raises `ModelLoadError` for a layer that the model lacks.
    """
    try:
        targets = {layer for _, layer in config.get("deepstack_layer_map") or []}
        if config.get("use_spatial_sampling", True):
            targets |= set(config.get("spatial_target_layers") or [])
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"config.json: deepstack_layer_map: {error}") from error
    for layer in targets:
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise ModelLoadError(
                f"config.json: pictures are added before layer {str(layer)[:20]!r}, and there are"
                f" {num_layers}"
            )
    return tuple(sorted(targets - {0}))


def _more_tokens(config: Mapping[str, Any]) -> int:
    """Return the tokens of pictures that have embeddings after the vocabulary, and no logits."""
    if config["model_type"] == "molmo":
        return int(config.get("additional_vocab_size", 128))
    return 8 if config["model_type"] == "mllama" else 0


#: Fields of Molmo's config.json that change the output, with the value that is computed.
_MOLMO_FIELDS: Mapping[str, Any] = {
    "attention_layer_norm": False, "clip_qkv": None, "layer_norm_type": "rms", "norm_after": False,
    "qkv_bias": True,
}  # fmt: skip
#: Layers of Molmo's blocks, by mlx-lm's names for Qwen 2.
_MOLMO_LAYERS: Mapping[str, str] = {
    "attn_norm": "input_layernorm", "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm", "ff_out": "mlp.down_proj",
}  # fmt: skip


def _molmo_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Qwen 2 that computes a Molmo.

    Raises `ModelLoadError` for one with another order of norms.
    """
    for name, computed in _MOLMO_FIELDS.items():
        if config.get(name, computed) != computed:
            raise ModelLoadError(
                f"config.json: {name} is not {computed!r}: only Molmo 7B-D and 72B are supported"
            )
    return {
        "intermediate_size": config["intermediate_size"] // 2,
        "rms_norm_eps": config.get("layer_norm_eps", 1e-5),
    }


def _molmo_tensors(weights: Mapping[str, mx.array], args: Any) -> dict[str, mx.array]:
    """Return Molmo's tensors by the names of Qwen 2's, of which it joins several."""
    made: dict[str, mx.array] = {}
    tables: dict[str, mx.array] = {}
    queries = args.hidden_size
    keys = queries // args.num_attention_heads * args.num_key_value_heads
    for name, value in weights.items():
        name = name.replace("model.transformer.", f"{_PREFIX}model.", 1)
        if not name.startswith(f"{_PREFIX}model."):
            continue
        path, _, kind = name.removeprefix(f"{_PREFIX}model.").rpartition(".")
        block, _, layer = path.rpartition(".")
        block = f"model.{block.replace('blocks.', 'layers.', 1)}"
        if layer == "att_proj":
            for part, array in zip("qkv", mx.split(value, [queries, queries + keys]), strict=True):
                made[f"{block}.self_attn.{part}_proj.{kind}"] = array
        elif layer == "ff_proj":
            for part, array in zip(("up", "gate"), mx.split(value, 2), strict=True):
                made[f"{block}.mlp.{part}_proj.{kind}"] = array
        elif layer == "wte":
            tables[kind] = value
        elif path in ("ff_out", "ln_f"):
            made[f"{'lm_head' if path == 'ff_out' else 'model.norm'}.{kind}"] = value
        else:
            made[f"{block}.{_MOLMO_LAYERS[layer]}.{kind}"] = value
    embeddings = [tables["embedding"], tables["new_embedding"]]
    return {**made, "model.embed_tokens.weight": mx.concatenate(embeddings)}


def _cross_layers(text: Mapping[str, Any]) -> list[int]:
    """Return the layers that attend to pictures: those of Llama 3.2 Vision, if none are named.

    Raises `ModelLoadError` for a layer that the model lacks, and if no other layers are left.
    """
    layers = text.get("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38])
    known = range(int(text.get("num_hidden_layers", 40)))
    if (
        not isinstance(layers, list)
        or not all(type(layer) is int and layer in known for layer in layers)
        or not 0 < len(set(layers)) == len(layers) < len(known)
    ):
        raise ModelLoadError(
            "config.json: text_config.cross_attention_layers"
            f" {str(layers)[:100]} are not some of the {len(known)} layers"
        )
    return layers


class _Rows:
    """Stands for a table of embeddings in a call that has them already."""

    def __init__(self, rows: mx.array, table: Any) -> None:
        self._rows, self._table = rows, table

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self._rows

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the table, as a model with tied embeddings does at its end."""
        return self._table.as_linear(x)  # type: ignore[no-any-return]


def _model_class(inner: Any) -> type[Module]:
    """Return a class of models with one of mlx-lm's as `language_model`."""

    def initialise(self: Any, args: Any) -> None:
        Module.__init__(self)
        self.args, self.model_type = args, args.model_type
        self.language_model = inner(args.inner)
        if args.model_type == "paddleocr_vl":  # unlike Ernie 4.5, it rotates halves of heads
            for layer in self.language_model.layers:
                layer.self_attn.rope.traditional = False
        if args.more_tokens:
            rows, width = args.inner.vocab_size + args.more_tokens, args.inner.hidden_size
            self.language_model.model.embed_tokens = nn.Embedding(rows, width)
        if args.model_type == "mllama":
            self.crossing = insert_layers(self.language_model, args.cross_layers)

    def call(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> Any:
        native = lambda self, *given, **named: self.language_model(*given, **named)  # noqa: E731
        logits = _called(self, inputs, cache, input_embeddings, call=native)
        if self.args.more_tokens:  # these are in prompts, and never generated
            after = [(0, 0)] * (logits.ndim - 1) + [(0, self.args.more_tokens)]
            logits = mx.pad(logits, after, constant_values=-math.inf)
        return logits

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        kept = {}
        if self.model_type == "molmo":
            weights = _molmo_tensors(weights, self.args.inner)
        if self.model_type == "phi4mm":  # `adapter_for_sounds` has that of sounds
            weights = {
                name.replace(".base_layer.", "."): value
                for name, value in weights.items()
                if ".lora_A." not in name and ".lora_B." not in name
            }
        for name, value in weights.items():
            name = name.removeprefix("thinker.").removeprefix("llm.")
            name = name.replace("model.language_model.", "language_model.model.", 1)
            name = name.replace("model.text_model.", "language_model.model.", 1)
            if name.startswith("language."):
                name = f"{_PREFIX}{name.removeprefix('language.')}"
            if name.startswith(("lm_head.", *(f"model.{part}" for part in _DECODER))):
                name = f"{_PREFIX}{name}"
            if name.startswith(_PREFIX) and f".layers.{self.args.num_layers}." not in name:
                name = name.removeprefix(_PREFIX)
                kept[f"model.{name}" if name.startswith(_DECODER) else name] = value
        if hasattr(inner, "sanitize"):
            kept = self.language_model.sanitize(kept)
        return {f"{_PREFIX}{name}": value for name, value in kept.items()}

    body: dict[str, Any] = {
        "__call__": call,
        "__init__": initialise,
        "__module__": inner.__module__,
        "layers": property(lambda self: self.language_model.layers),
        "sanitize": sanitize,
    }
    if hasattr(inner, "make_cache"):
        body["make_cache"] = lambda self: self.language_model.make_cache()
    return type("Model", (Module,), body)
