"""mlx-vlm's model classes, as mlx-lm's loader and the runners expect models.

`vision_classes` returns a subclass of mlx-vlm's model, whose `embed` returns the embeddings of a
picture's tokens. `language_tower` is the part that the runners run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.patches.mlx_vlm_imports import is_installed, prepare

#: The model types of config.json whose pictures are read.
VISION_TYPES = ("idefics3", "llava", "smolvlm")

INSTALL_HINT = "pip install 'modelpack[vision]'"

#: Fields of `text_config` that change the output and that mlx-vlm's classes do not read, with the
#: values that they compute.
_UNREAD: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "hidden_act": (None, "silu"),
    "mlp_bias": (None, False),
    "pretraining_tp": (None, 1),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}
#: The language models that mlx-vlm's classes compute: Llama's layers, with biases in Qwen 2's.
_TEXT_TYPES: Mapping[str, tuple[str, ...]] = {
    "idefics3": ("idefics3", "llama", "vllama3"),
    "llava": ("llama", "qwen2"),
    "smolvlm": ("llama", "smolvlm"),
}


class VisionModel(Protocol):
    """A model of `vision_classes`."""

    config: Any

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        """Return the embeddings [tokens, width] of a prompt's tokens, with a picture's `inputs`."""


def vision_classes(config: Mapping[str, Any]) -> tuple[type[Module], type] | None:
    """Return the model class for `config`, and that of its arguments; None for other models.

    Raises `ModelLoadError` for a model that needs the extra `vision` where it is not installed, and
    for fields that mlx-vlm does not support.
    """
    kind = config.get("model_type")
    if kind not in VISION_TYPES:
        return None
    if not is_installed():
        raise ModelLoadError(
            f"the architecture {kind!r} needs the extra 'vision', which is not installed",
            hint=INSTALL_HINT,
        )
    _check(config)
    prepare()
    package: Any = importlib.import_module(f"mlx_vlm.models.{kind}")
    return _model_class(package), _arguments_class(package)


def _check(config: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` for a field that changes the output and that mlx-vlm does not read."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelLoadError("config.json: text_config is missing")
    if not isinstance(config.get("vision_config"), Mapping):
        raise ModelLoadError("config.json: vision_config is missing")
    checks = {**_UNREAD, "model_type": _TEXT_TYPES[config["model_type"]]}
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        checks["head_dim"] = (None, width // heads)
    given = dict(text)
    rope = given.get("rope_parameters")  # transformers 5: settings of the default kind are read
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        given["rope_scaling"] = rope
    for name, allowed in checks.items():
        value = given.get(name)
        if value in allowed:
            continue
        is_plain = isinstance(value, str | int | float)
        shown = f" = {str(value)[:100]!r}" if is_plain else ""  # others may be nested deeply
        raise ModelLoadError(
            f"config.json: text_config.{name}{shown} changes the model's output, and mlx-vlm's"
            f" {config['model_type']} does not support it"
        )


def _arguments_class(package: Any) -> type:
    """Return a class whose `from_dict` makes mlx-vlm's config with those of its parts."""

    class Arguments:
        @classmethod
        def from_dict(cls, config: Mapping[str, Any]) -> Any:
            made = package.ModelConfig.from_dict(dict(config))
            made.text_config = package.TextConfig.from_dict(config["text_config"])
            made.vision_config = package.VisionConfig.from_dict(config["vision_config"])
            return made

    Arguments.__module__ = package.ModelConfig.__module__
    return Arguments


def language_tower(model: Any) -> Module:
    """Return the language model of a model of `vision_classes`, with the interface of mlx-lm's.

    The runners adapt its modules, and leave those of the vision tower as they are.
    """
    language: Any = model.language_model

    def call(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> Any:
        return self.language_model(inputs, inputs_embeds=input_embeddings, cache=cache).logits

    body: dict[str, Any] = {
        "__call__": call,
        "__module__": type(model).__module__,
        "layers": property(lambda self: self.language_model.layers),
    }
    if hasattr(language, "make_cache"):
        body["make_cache"] = lambda self: self.language_model.make_cache()
    tower: Any = type("LanguageTower", (Module,), body)()
    tower.language_model = language
    return cast(Module, tower)


def _model_class(package: Any) -> type[Module]:
    """Return a subclass of mlx-vlm's model with `embed`, which loads the weights of all parts."""
    base = package.Model

    def embed(self: Any, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        made = base.get_input_embeddings(self, token_ids[None], **inputs)
        return cast(mx.array, made.inputs_embeds[0])

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if hasattr(base, "sanitize"):
            weights = base.sanitize(self, weights)
        for kind in (package.VisionModel, package.LanguageModel):
            part: Any = next(module for module in self.modules() if isinstance(module, kind))
            if hasattr(part, "sanitize"):
                weights = part.sanitize(weights)
        return _with_tied_head(weights, self.parameters())

    body = {"__module__": base.__module__, "embed": embed, "sanitize": sanitize}
    return type(base.__name__, (base,), body)


def _with_tied_head(
    weights: dict[str, mx.array], parameters: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Return the weights with a head for a class that has no tied one, where they lack it."""
    head, table = "language_model.lm_head", "language_model.embed_tokens"
    if "lm_head" not in parameters.get("language_model", {}) or f"{head}.weight" in weights:
        return weights
    tied = {
        name.replace(table, head): value
        for name, value in weights.items()
        if name.startswith(f"{table}.")
    }
    return {**weights, **tied}
