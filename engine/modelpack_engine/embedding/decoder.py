"""Decoder: any text model of mlx-lm without its head, from token ids to hidden states.

A decoder sees what is before a token only, so places filled up on the right change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders.config_guard import Limits
from modelpack_engine.loaders.corrections import corrected
from modelpack_engine.loaders.files import ModelFiles
from modelpack_engine.loaders.parameters import token_rows
from modelpack_engine.loaders.safetensors import load_safetensors

#: What mlx-lm's classes call the part that is not the head.
_INNER = ("model", "transformer", "backbone")
_HEAD = "lm_head"


class Decoder:
    """The inner model of an mlx-lm model."""

    def __init__(self, model: Module, config: Mapping[str, Any]) -> None:
        """Raise `ModelLoadError` if the model has no inner one, or would have to see both sides."""
        kind = str(config.get("model_type"))
        for key, value in (("use_bidirectional_attention", True), ("is_causal", False)):
            if config.get(key) is value:
                raise ModelLoadError(f"{kind} with {key} {str(value).lower()} is not supported")
        self.module = model
        inner = next((model[name] for name in _INNER if name in model), None)
        if inner is None:
            raise ModelLoadError(f"mlx-lm's {kind} has no part that gives hidden states")
        self._inner = inner
        rows = token_rows(model)
        if rows is None:
            raise ModelLoadError(f"mlx-lm's {kind} has no table of tokens")
        self.vocab_size = rows
        # Nothing is computed: the shape is known from the graph.
        self.hidden_size = int(self(mx.zeros((1, 1), mx.int32), mx.ones((1,), mx.int32)).shape[-1])

    def __call__(
        self, token_ids: mx.array, lengths: mx.array, type_ids: mx.array | None = None
    ) -> mx.array:
        """Return hidden states [texts, tokens, hidden_size], as `Encoder` does."""
        return cast(mx.array, self._inner(token_ids))


def load_decoder(
    files: ModelFiles, config: Mapping[str, Any], ignored_fields: Collection[str] = ()
) -> tuple[Module, dict[str, Any], Limits]:
    """Return the model of safetensors without its head, its completed config and its limits.

    Checkpoints of embedding models leave out the head, and the prefix `model.` too. Raises
    `ModelLoadError` as `load_safetensors` does.
    """
    return load_safetensors(files, config, classes=_headless, ignored_fields=ignored_fields)


def _headless(config: dict[str, Any]) -> tuple[type[Module], type]:
    from mlx_lm.utils import _get_classes

    base, arguments = corrected(_get_classes)(config)

    class Headless(base):  # type: ignore[misc, valid-type]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            self.pop(_HEAD, None)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if "model" in self and not any(name.startswith("model.") for name in weights):
                weights = {f"model.{name}": array for name, array in weights.items()}
            if hasattr(base, "sanitize"):
                weights = super().sanitize(weights)
            return {
                name: array for name, array in weights.items() if not name.startswith(f"{_HEAD}.")
            }

    return Headless, arguments
