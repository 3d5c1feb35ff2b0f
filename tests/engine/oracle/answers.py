"""What our loader makes of a case of the oracle."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.safetensors import load_safetensors, read_config
from tests.engine.oracle.weights import POSITIONS, TOKENS, weight

FIXTURES = {
    version: Path(__file__).parent / f"transformers-{version}.json.gz" for version in ("4", "5")
}


@dataclass(frozen=True)
class Case:
    """A config, the tensors that belong to it, and transformers' logits; `field` was changed."""

    kind: str
    field: str
    config: Mapping[str, Any]
    tensors: Mapping[str, list[int]]
    logits: npt.NDArray[np.float64]
    tensors_changed: bool = False


def fixture(path: Path) -> dict[str, Any]:
    """Return what `generate.py` wrote."""
    content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return content


def cases_of(kind: str, model: Mapping[str, Any]) -> Iterator[Case]:
    """Return the model as it is, and each change of it."""
    base = model["config"]
    yield Case(kind, "", base, model["tensors"], np.array(model["logits"]))
    for change in model["cases"]:
        config = {**base, **change["set"]}
        absent = change.get("absent", ())
        tensors = {n: s for n, s in model["tensors"].items() if n not in absent}
        yield Case(
            kind,
            change["field"],
            {name: value for name, value in config.items() if value is not None or name in base},
            {**tensors, **change.get("tensors", {})},
            np.array(change["logits"]),
            bool(change.get("tensors") or absent),
        )


@lru_cache(maxsize=1024)
def _array(name: str, shape: tuple[int, ...]) -> mx.array:
    """Return a tensor, kept for the other cases of its model."""
    return mx.array(weight(name, shape))


def answer(case: Case, directory: Path) -> tuple[npt.NDArray[np.float64], int | None]:
    """Return our logits, and the longest context for which they are meant to be right."""
    arrays = {name: _array(name, tuple(shape)) for name, shape in case.tensors.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(case.config))
    files = ModelFiles.from_directory(directory)
    model, _, limits = load_safetensors(files, read_config(files))
    model.set_dtype(mx.float32)
    logits = model(mx.array([TOKENS]))[0]
    return np.array(logits[list(POSITIONS), :64], dtype=np.float64), limits.max_length


def cosine(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Return the smallest cosine of two rows of logits."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / lengths).min())
