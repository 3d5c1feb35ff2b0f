"""Bundles of models with a few small files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.bundles.bundle import Bundle, lay_out
from tests.unpacking.stored import Layer, Stored

WEIGHT: Layer = (media_types.DOCKER_GGUF, "tiny.gguf", b"weights")
DIRECTORY: list[Layer] = [
    (media_types.DOCKER_LICENSE, "LICENSE", b"MIT\n"),
    (media_types.DOCKER_CHAT_TEMPLATE, "chat_template.jinja", b"{{ messages }}\n"),
    (media_types.DOCKER_MODEL_FILE, "config.json", b'{"max_position_embeddings":512}'),
    (media_types.DOCKER_SAFETENSORS, "model.safetensors", b"weights"),
    (media_types.DOCKER_MODEL_FILE, "sub/README.md", b"# tiny\n"),
]


def bundle_of(
    stored: Stored,
    directory: Path,
    layers: Sequence[Layer],
    config: ModelConfig | str = media_types.DOCKER_CONFIG_V02,
    **options: Any,
) -> Bundle:
    return lay_out(stored.model(layers, config), stored.path, directory, **options)
