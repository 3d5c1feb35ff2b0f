"""Small models for tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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


def package(
    name: str, weights: Path, store: modelpack.Store, *, push: bool = False, **settings: Any
) -> modelpack.Packaged:
    """Package the GGUF or the directory `weights`; `settings` are further ones of the request."""
    source = {"safetensors_dir" if weights.is_dir() else "gguf": weights}
    request = modelpack.PackageRequest(**source, **settings)
    return modelpack.package(name, request, push=push, store=store)


def store_of_two(directory: Path) -> modelpack.Store:
    """Return a new store with a GGUF, x/gguf:v1, and a directory of safetensors, x/st:v1."""
    store = modelpack.Store(directory / "store")
    package("x/gguf:v1", tiny_gguf(directory), store)
    package("x/st:v1", tiny_safetensors(directory), store)
    return store
