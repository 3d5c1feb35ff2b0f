"""Small LoRA adapters for tests, as PEFT, mlx-lm and llama.cpp write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

Arrays = Mapping[str, np.ndarray]

#: The targets of `tiny_base`: outputs and inputs by module.
TARGETS = {
    "model.layers.0.self_attn.q_proj": (8, 4),
    "model.layers.0.mlp.down_proj": (4, 12),
}


def tiny_base(directory: Path, targets: Mapping[str, tuple[int, int]] = TARGETS) -> Path:
    """Write a directory of safetensors with the weights of `targets`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in targets.items()}
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def random_pairs(
    targets: Mapping[str, tuple[int, ...]], rank: int, seed: int = 0, size: float = 1.0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return matrices A [..., rank, inputs] and B [..., outputs, rank] of each target."""
    draw = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (draw.standard_normal(shape) * size).astype(np.float32)

    return {
        name: (matrix(*experts, rank, inputs), matrix(*experts, outputs, rank))
        for name, (*experts, outputs, inputs) in targets.items()
    }


def write_peft(
    directory: Path,
    targets: Mapping[str, tuple[int, int]] = TARGETS,
    *,
    rank: int = 2,
    seed: int = 0,
    size: float = 1.0,
    extra: Arrays | None = None,
    **config: Any,
) -> Path:
    """Write an adapter as PEFT does; `config` replaces fields, `extra` tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in random_pairs(targets, rank, seed, size).items():
        form = "lora_embedding_{}" if name.endswith("embed_tokens") else "lora_{}.weight"
        for part, matrix in (("A", a), ("B", b)):
            tensors[f"base_model.model.{name}.{form.format(part)}"] = matrix
    save_file({**tensors, **(extra or {})}, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
              "base_model_name_or_path": "team/base"}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return directory


def write_mlx(
    directory: Path,
    targets: Mapping[str, tuple[int, ...]] = TARGETS,
    *,
    rank: int = 2,
    scale: float = 2.0,
    seed: int = 0,
    size: float = 1.0,
    extra: Arrays | None = None,
    **config: Any,
) -> Path:
    """Write an adapter as mlx-lm does; `config` replaces fields, `extra` adds tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in random_pairs(targets, rank, seed, size).items():
        # Those of experts are not transposed.
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(a.T if a.ndim == 2 else a)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(b.T if b.ndim == 2 else b)
    save_file({**tensors, **(extra or {})}, directory / "adapters.safetensors")
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    fields = {"fine_tune_type": "lora", "lora_parameters": parameters, "model": "team/base"}
    (directory / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return directory


def write_gguf(
    path: Path,
    targets: Mapping[str, tuple[int, int]],
    *,
    rank: int = 2,
    alpha: float = 4.0,
    seed: int = 0,
    kind: str = "lora",
    arch: str = "llama",
) -> Path:
    """Write an adapter as convert_lora_to_gguf.py of llama.cpp does."""
    pairs = random_pairs(targets, rank, seed)
    return write_gguf_pairs(path, pairs, alpha=alpha, kind=kind, arch=arch)


def write_gguf_pairs(
    path: Path,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    alpha: float = 4.0,
    kind: str = "lora",
    arch: str = "llama",
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Write the matrices A and B of tensors, in the order of llama.cpp."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in (fields or {}).items():
        writer.add_array(key, value)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
