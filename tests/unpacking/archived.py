"""Models whose layers are archives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelpack.artifacts import media_types
from modelpack.bundles.bundle import Bundle, lay_out
from tests.unpacking.stored import CNCF, Layer, Stored
from tests.unpacking.tars import gzipped, zstandard_of

WEIGHT: Layer = (media_types.CNCF_WEIGHT_RAW, "tiny.gguf", b"weights")
TAR, GZIP, ZSTD = (f"{CNCF}weight.config.v1.{form}" for form in ("tar", "tar+gzip", "tar+zstd"))
PACK: dict[str, Callable[[bytes], bytes]] = {TAR: bytes, GZIP: gzipped, ZSTD: zstandard_of}


def bundle_of(
    stored: Stored,
    directory: Path,
    archives: Sequence[tuple[str, bytes]],
    *,
    diff_ids: Sequence[bytes] = (b"not checked: one too few",),
    **options: Any,
) -> Bundle:
    layers = [WEIGHT, *((media_type, None, blob) for media_type, blob in archives)]
    model = stored.model(layers, media_types.CNCF_CONFIG, diff_ids=diff_ids)
    return lay_out(model, stored.path, directory, **options)
