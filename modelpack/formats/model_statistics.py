"""What a config blob says about the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """The fields of a config that come from the weights; texts are empty where nothing is known.

    `parameters` and `size` are texts for people, in the number formats of `units`. The maps are
    sorted by key, as a config has them; `context_size` is in tokens. `notes` are for people: what
    was left out and why.
    """

    format: str = ""
    quantization: str = ""
    parameters: str = ""
    architecture: str = ""
    size: str = ""
    gguf: Mapping[str, str] | None = field(default=None, hash=False)
    safetensors: Mapping[str, str] | None = field(default=None, hash=False)
    diffusers: Mapping[str, str] | None = field(default=None, hash=False)
    context_size: int | None = None
    notes: tuple[str, ...] = ()
