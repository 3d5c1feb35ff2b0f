"""Compare push and pull of 2 GiB through docker-registry with skopeo and oras.

All tools transfer the same artifact through the same registry and verify pulled blobs. A push goes
from an OCI layout to a registry without blobs of the model; a pull goes to an empty layout. oras
does not verify pushed blobs, and neither skopeo nor oras flushes pulled blobs to disk.

    python benchmarks/transfer.py [PAIRS]
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import (
    GIB,
    MODELPACK,
    Run,
    compare_all,
    machine_rates,
    measure,
    print_machine,
    warm,
    weights,
)
from peers import only_manifest, oras_cli

from tests.peers import docker_registry

NAME = "bench/m:v1"


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    oras = oras_cli()
    print_machine(
        ["skopeo", "--version"],
        [str(oras), "version"],
        ["docker-registry", "--version"],
        [MODELPACK, "--version"],
    )
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        root = Path(scratch)
        rates = machine_rates(root)
        model = root / "model"
        model.mkdir()
        weights(model / "model.safetensors", 2 * GIB)
        store = root / "store"
        env = {"MODELPACK_STORE": str(store)}
        measure([MODELPACK, "package", "-q", "--safetensors-dir", model, NAME], env)
        shutil.rmtree(model)
        from_layout = f"{store}@{only_manifest(store)}"
        layout = f"oci:{store}:docker.io/{NAME}"
        data = root / "registry"
        numbers = itertools.count()
        with docker_registry(data) as host:

            def fresh_registry() -> None:
                shutil.rmtree(data / "data", ignore_errors=True)

            def push() -> Run:
                fresh_registry()
                return measure(
                    [MODELPACK, "push", "-q", NAME, "--to", f"{host}/ours/m:v{next(numbers)}"], env
                )

            def skopeo_push() -> Run:
                fresh_registry()
                target = f"docker://{host}/theirs/m:v{next(numbers)}"
                return measure(["skopeo", "copy", "-q", "--dest-tls-verify=false", layout, target])

            def oras_push() -> Run:
                fresh_registry()
                target = f"{host}/theirs/m:v{next(numbers)}"
                return measure(
                    [oras, "cp", "--from-oci-layout", from_layout, "--to-plain-http", target]
                )

            warm(*store.glob("blobs/sha256/*"))
            compare_all(
                "push 2 GiB", push, {"skopeo": skopeo_push, "oras": oras_push}, runs=pairs, goal=1.0
            )
            print(f"push 2 GiB: {rates.bound(2 * GIB)}, by the registry", flush=True)

            source = f"{host}/bench/m:v1"
            first = measure([MODELPACK, "push", "-q", NAME, "--to", source], env)
            second = measure([MODELPACK, "push", "-q", NAME, "--to", source], env)
            print(f"second push: {second.wall:.2f} s (first {first.wall:.2f} s)")

            def pull() -> Run:
                shutil.rmtree(root / "pulled", ignore_errors=True)
                return measure(
                    [MODELPACK, "pull", "-q", source], {"MODELPACK_STORE": str(root / "pulled")}
                )

            def skopeo_pull() -> Run:
                shutil.rmtree(root / "skopeo", ignore_errors=True)
                return measure(
                    ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{source}",
                     f"oci:{root / 'skopeo'}:v1"]
                )  # fmt: skip

            def oras_pull() -> Run:
                shutil.rmtree(root / "oras", ignore_errors=True)
                target = f"{root / 'oras'}:v1"
                return measure([oras, "cp", "--from-plain-http", source, "--to-oci-layout", target])

            warm(*(path for path in data.rglob("*") if path.is_file()))
            compare_all(
                "pull 2 GiB, verified",
                pull,
                {"skopeo": skopeo_pull, "oras": oras_pull},
                runs=pairs,
                goal=1.0,
            )
            print(f"pull 2 GiB, verified: {rates.bound(2 * GIB)}", flush=True)
            subprocess.run(["sync"], check=False)


if __name__ == "__main__":
    main()
