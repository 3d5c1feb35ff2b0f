"""Measure `list`, `resolve` and `gc --dry-run` with up to 10,000 tags and 100,000 blobs."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from measuring import MODELPACK, Run, machine_rates, measure, print_machine

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Manifest

TAGS = 10_000
LAYERS = 8  # 10 blobs for each tag, with config and manifest


def fill(root: Path, tags: int) -> None:
    """Create a store of `tags` models that share no blobs; blobs have a few bytes."""
    blobs = modelpack.Store(root).root / "blobs" / "sha256"
    entries = []
    for number in range(tags):
        layers = []
        for layer in range(LAYERS):
            path = {media_types.FILEPATH: f"model-{layer:05}.gguf"}
            layers.append(_blob(blobs, f"{number} {layer}".encode(), media_types.DOCKER_GGUF, path))
        settings = {
            "format": "gguf",
            "quantization": "Q4_K_M",
            "parameters": "7 B",
            "architecture": "llama",
            "size": "4.1 GB",
            "context_size": number + 1,
        }
        value = {
            "config": settings,
            "descriptor": {"created": "2025-01-02T03:04:05Z"},
            "rootfs": {"type": "rootfs", "diff_ids": [str(layer.digest) for layer in layers]},
        }
        config = _blob(blobs, encode(value), media_types.DOCKER_CONFIG_V01)
        manifest = Manifest.build(config, layers)
        entry = _blob(blobs, manifest.raw, media_types.OCI_MANIFEST)
        entries.append(entry.to_json() | {"annotations": {media_types.REF_NAME: name_of(number)}})
    index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries}
    (root / "index.json").write_bytes(encode(index))


def name_of(number: int) -> str:
    """Return the name of one of the models."""
    return f"registry.example/team-{number % 100}/model-{number}:v1"


def _blob(
    blobs: Path, content: bytes, media_type: str, annotations: dict[str, str] | None = None
) -> Descriptor:
    digest = Digest.of(content)
    (blobs / digest.encoded).write_bytes(content)
    return Descriptor(media_type, digest, len(content), annotations or {})


def median(store: Path, runs: int, *arguments: str) -> Run:
    """Return the median wall time and processor time of a whole command, after a warm-up."""
    command = [MODELPACK, *arguments]
    environment = {"MODELPACK_STORE": str(store)}
    measure(command, environment)
    done = [measure(command, environment) for _ in range(runs)]
    return Run(
        statistics.median(run.wall for run in done),
        statistics.median(run.cpu for run in done),
        max(run.peak for run in done),
    )


def main() -> None:
    print_machine([MODELPACK, "--version"])
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    figures: dict[int, dict[str, Run]] = {}
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        machine_rates(Path(scratch))
        measure([MODELPACK, "list"], {"MODELPACK_STORE": str(Path(scratch) / "empty")})  # bytecode
        for tags in (TAGS // 10, TAGS // 2, TAGS):
            root = Path(scratch) / str(tags)
            fill(root, tags)
            first = measure([MODELPACK, "list"], {"MODELPACK_STORE": str(root)})
            found = figures[tags] = {
                "list": median(root, 7, "list"),
                "resolve": median(root, 7, "resolve", name_of(tags // 2)),
                "gc --dry-run": median(root, 3, "gc", "--dry-run", "--grace", "0"),
            }
            shown = {"first list": first, **found}
            print(f"{tags} tags, {tags * (LAYERS + 2)} blobs:")
            for what, run in shown.items():
                memory = f"{run.peak / 1e6:.0f} MB"
                print(f"  {what}: {run.wall:.3f} s, {run.cpu:.3f} s of processor, {memory}")
    most, few, half = (figures[tags] for tags in (TAGS, TAGS // 10, TAGS // 2))
    gc = "gc --dry-run"
    growth = (most[gc].cpu - few[gc].cpu) / (half[gc].cpu - few[gc].cpu)
    print(f"list: {most['list'].wall:.3f} s (goal < 1)")
    print(f"resolve: {most['resolve'].wall * 1000:.0f} ms (goal < 150)")
    print(f"gc --dry-run: 9 parts of the blobs take {growth:.2f} times what 4 take (linear: 2.25)")


if __name__ == "__main__":
    main()
