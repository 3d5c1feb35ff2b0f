"""Compare `modelpack package` with `openssl dgst -sha256` of the same files.

Packaging hashes and copies every byte; openssl only hashes. Both read from a warm page cache. The
machine's rates and the bound that follows from them are printed next to the ratios.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from measuring import (
    GIB,
    MODELPACK,
    Run,
    compare,
    machine_rates,
    measure,
    print_machine,
    warm,
    weights,
)


def main() -> None:
    print_machine(["openssl", "version"], [MODELPACK, "--version"])
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        root = Path(scratch)
        rates = machine_rates(root)
        one, four = root / "one", root / "four"
        one.mkdir()
        four.mkdir()
        single = weights(one / "model.safetensors", 2 * GIB)
        shards = [
            weights(four / f"model-0000{i}-of-00004.safetensors", GIB // 2) for i in (1, 2, 3, 4)
        ]

        def package(directory: Path) -> Run:
            store = root / "store"
            shutil.rmtree(store, ignore_errors=True)
            os.sync()  # finish earlier writes and deletions first
            command = [MODELPACK, "package", "-q", "--safetensors-dir", directory, "bench/m:v1"]
            return measure(command, {"MODELPACK_STORE": str(store)})

        for label, directory, files, goal in (
            ("package one 2 GiB file", one, [single], 1.25),
            ("package four shards of 512 MiB", four, shards, 0.7),
        ):
            warm(*files)
            compare(
                label,
                lambda directory=directory: package(directory),
                lambda files=files: measure(["openssl", "dgst", "-sha256", *files]),
                runs=5,
                goal=goal,
            )
            bound = rates.bound(2 * GIB, files=len(files))
            print(f"{label}: {bound}, without starting Python", flush=True)


if __name__ == "__main__":
    main()
