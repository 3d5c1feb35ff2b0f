"""Small models for tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import modelpack

FIXTURES = Path(__file__).parent.parent / "fixtures"


def tiny_gguf(directory: Path, name: str = "tiny.gguf") -> Path:
    """Put the 256-byte GGUF into `directory` as `name`; return its path."""
    path = directory / name
    shutil.copyfile(FIXTURES / "models" / "tiny-gguf" / "tiny.gguf", path)
    return path


def tiny_safetensors(directory: Path) -> Path:
    """Put the small safetensors directory into `directory`; return its path."""
    path = directory / "tiny-safetensors"
    shutil.copytree(FIXTURES / "models" / "tiny-safetensors", path)
    return path


def store_of_two(directory: Path) -> modelpack.Store:
    """Return a new store with a GGUF, x/gguf:v1, and a directory of safetensors, x/st:v1."""
    store = modelpack.Store(directory / "store")
    gguf = modelpack.PackageRequest(gguf=tiny_gguf(directory))
    modelpack.package("x/gguf:v1", gguf, store=store)
    tensors = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(directory))
    modelpack.package("x/st:v1", tensors, store=store)
    return store
