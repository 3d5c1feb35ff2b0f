"""Helpers of the packaging tests: small models on disk, and packaging without a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.builder.build import Built, build
from modelpack.builder.plan import Plan, plan
from modelpack.builder.request import PackageRequest

MODELS = Path(__file__).resolve().parents[2] / "fixtures" / "models"
TINY = (MODELS / "tiny-gguf" / "tiny.gguf").read_bytes()
ALIGNED = (MODELS / "tiny-gguf-aligned" / "tiny.gguf").read_bytes()
PAIR = (MODELS / "tiny-safetensors" / "model.safetensors").read_bytes()
DDUF = (MODELS / "tiny-dduf" / "tiny.dduf").read_bytes()
PROJECTOR = (MODELS / "tiny-mmproj" / "mmproj-tiny-f16.gguf").read_bytes()
SHARDS = {path.name: path.read_bytes() for path in (MODELS / "tiny-gguf-sharded").glob("*.gguf")}
MIT = b"MIT\n"
TEMPLATE = b"{{ messages }}\n"

#: 2025-01-02T03:04:05Z
MTIME_NS = 1_735_787_045 * 10**9
CREATED = "2025-01-02T03:04:05Z"

TINY_DIRECTORY: Mapping[str, bytes] = {
    ".gitattributes": b"# a dot file\n",
    "LICENSE": MIT,
    "chat_template.jinja": TEMPLATE,
    "config.json": b'{"max_position_embeddings":512}',
    "model.safetensors": PAIR,
    "sub/README.md": b"# tiny\n",
}


def write(root: Path, files: Mapping[str, bytes], *, mode: int = 0o644) -> Path:
    """Write `files` below `root`, with one mode and one time, and return `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return root


def digests(files: Plan) -> list[Digest]:
    """Return the digests of a plan's files, as a store computes them."""
    return [
        Digest("sha256", hashlib.sha256(file.path.read_bytes()).hexdigest()) for file in files.files
    ]


def package(request: PackageRequest, environ: Mapping[str, str] | None = None) -> Built:
    """Package the files of `request`, by default with an empty environment."""
    planned = plan(request, environ=environ or {})
    return build(planned, request, digests(planned))


def layers(built: Built) -> list[tuple[str, str | None]]:
    """The short types and the paths of a model's layers."""
    return [
        (layer.media_type.rpartition("vnd.")[2], layer.filepath) for layer in built.manifest.layers
    ]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root's rights in the block, so that permissions apply; see the fixture `open_dir`."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
