"""Helpers of the transfer benchmarks: build the oras CLI, and read the digest of an OCI layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.interop.go_tool import build_go_tool


def oras_cli() -> Path:
    """Return the oras CLI in the version that `benchmarks/oras/go.mod` pins."""
    cache = Path(os.environ.get("MODELPACK_CACHE", Path(__file__).parents[1] / ".cache"))
    return build_go_tool(Path(__file__).parent / "oras", cache)


def only_manifest(layout: Path) -> str:
    """Return the digest of the one model in an OCI image layout."""
    [manifest] = json.loads((layout / "index.json").read_bytes())["manifests"]
    digest: str = manifest["digest"]
    return digest
