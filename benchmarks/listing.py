"""Compare `modelpack list` with 1,000 models and with 10 models."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from measuring import MODELPACK, compare, measure, print_machine

import modelpack
from tests.models import tiny_gguf


def fill(store: modelpack.Store, directory: Path, count: int) -> None:
    """Package `count` models that differ in one annotation."""
    gguf = tiny_gguf(directory)
    for i in range(count):
        request = modelpack.PackageRequest(gguf=gguf, annotations={"n": str(i)}, context_size=i + 1)
        modelpack.package(f"bench/m{i}:v1", request, store=store)


def main() -> None:
    print_machine([MODELPACK, "--version"])
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        root = Path(scratch)
        for count in (10, 1000):
            fill(modelpack.Store(root / str(count)), root, count)
        command = [MODELPACK, "list"]
        compare(
            "list 1,000 models",
            lambda: measure(command, {"MODELPACK_STORE": str(root / "1000")}),
            lambda: measure(command, {"MODELPACK_STORE": str(root / "10")}),
            runs=9,
            goal=5,
        )
        shutil.rmtree(root / "1000")


if __name__ == "__main__":
    main()
