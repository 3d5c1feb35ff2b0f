"""A step of a CI pipeline: package a model, check that it is reproducible, promote it by digest.

python examples/ci_pipeline.py DIRECTORY registry.example/staging/m:v1 registry.example/prod/m:v1
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import modelpack


def main(directory: Path, staging: str, production: str) -> None:
    request = modelpack.PackageRequest(safetensors_dir=directory)
    expected = modelpack.package(staging, request, dry_run=True).digest

    with tempfile.TemporaryDirectory() as scratch:
        store = modelpack.Store(Path(scratch, "store"))
        made = modelpack.package(staging, request, push=True, store=store)
        assert made.digest == expected, "the same files gave two digests"

    # The store is deleted; the registry has the model. Promote exactly this digest.
    pinned = modelpack.Reference.parse(staging).with_digest(made.digest)
    copied = modelpack.copy(pinned, production)
    assert modelpack.inspect(production, from_registry=True).digest == made.digest
    print(copied.digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
