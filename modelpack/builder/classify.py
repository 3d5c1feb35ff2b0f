"""Classify the files of a model by name, as Docker Model Runner does, and detect Python pickles.

Source: docker/model-runner pkg/distribution/files. The rules match it exactly, oddities included
(`notice_me.py` is a license), because a layer's type is part of the manifest's digest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from modelpack.artifacts import media_types


class FileKind(StrEnum):
    """The kind of a file; for weights, the value is the format name in configs."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    DDUF = "dduf"
    CHAT_TEMPLATE = "chat template"
    LICENSE = "license"
    CONFIG = "config"
    OTHER = "other"


WEIGHT_KINDS: Final = (FileKind.GGUF, FileKind.SAFETENSORS, FileKind.DDUF)

#: Docker's layer type of each kind.
MEDIA_TYPES: Final[Mapping[FileKind, str]] = {
    FileKind.GGUF: media_types.DOCKER_GGUF,
    FileKind.SAFETENSORS: media_types.DOCKER_SAFETENSORS,
    FileKind.DDUF: media_types.DOCKER_DDUF,
    FileKind.CHAT_TEMPLATE: media_types.DOCKER_CHAT_TEMPLATE,
    FileKind.LICENSE: media_types.DOCKER_LICENSE,
    FileKind.CONFIG: media_types.DOCKER_MODEL_FILE,
    FileKind.OTHER: media_types.DOCKER_MODEL_FILE,
}
#: Docker's layer types of weights, without projectors.
WEIGHT_TYPES: Final = tuple(MEDIA_TYPES[kind] for kind in WEIGHT_KINDS)

#: Extensions of weights stored as Python pickles, which run code when they are loaded.
PICKLE_EXTENSIONS: Final = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
#: The number of bytes that `holds_pickle` needs.
PICKLE_HEAD_BYTES: Final = 512
# Protocols 2 to 5 start with PROTO; 0 and 1 start with a global, a dict or a list. PyTorch writes a
# ZIP archive that contains a pickle.
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]"
    rb"|c[A-Za-z_][\w.]+\n[A-Za-z_]\w+\n(?:[()]|q[\x00-\x1f]|p\d+\n)"
    rb"|\([dl]p\d+\n|[\]}]q\x00"
    rb"|PK\x03\x04.{22}.{0,300}?data\.pkl",
    re.DOTALL,
)

_LICENSE_WORDS = ("license", "licence", "copying", "notice")


def classify(path: str) -> FileKind:
    """Return the kind of the file `path` by its base name; the first matching rule wins."""
    name = lowered_name(path)
    for kind in WEIGHT_KINDS:
        if name.endswith(f".{kind}"):
            return kind
    if name.endswith(".jinja") or "chat_template" in name:
        return FileKind.CHAT_TEMPLATE
    if any(word in name for word in _LICENSE_WORDS):
        return FileKind.LICENSE
    if name.endswith((".md", ".txt", ".json", ".vocab")) or name == "tokenizer.model":
        return FileKind.CONFIG
    return FileKind.OTHER


def is_pickle(path: str) -> bool:
    """Return whether the extension of `path` is that of pickled weights."""
    return lowered_name(path).endswith(PICKLE_EXTENSIONS)


def holds_pickle(head: bytes) -> bool:
    """Return whether a file with these first bytes is a Python pickle, regardless of its name."""
    return _PICKLE.match(head) is not None


def is_projector_name(path: str) -> bool:
    """Return whether the name of `path` is that of a multimodal projector."""
    return "mmproj" in lowered_name(path)


def lowered_name(path: str) -> str:
    """Return the base name of `path` in lower case, as Go's `strings.ToLower`."""
    # Python lowers this character to two, Go to one.
    return path.rpartition("/")[2].replace("\u0130", "i").lower()
