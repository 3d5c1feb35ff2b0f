"""Small models for tests."""

from __future__ import annotations

import shutil
from pathlib import Path

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
