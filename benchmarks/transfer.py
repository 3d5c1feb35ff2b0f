"""Push and pull of 2 GiB through docker-registry, against skopeo copying the same artifact.

Both verify what they read; the registry and its files are the same for both. A push goes to a
repository that has nothing of the model; a pull goes to an empty directory.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

from measuring import GIB, MODELPACK, Run, compare, measure, print_machine, warm, weights

from tests.peers import docker_registry

NAME = "bench/m:v1"


def main() -> None:
    print_machine(
        ["skopeo", "--version"], ["docker-registry", "--version"], [MODELPACK, "--version"]
    )
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        root = Path(scratch)
        model = root / "model"
        model.mkdir()
        weights(model / "model.safetensors", 2 * GIB)
        store = root / "store"
        env = {"MODELPACK_STORE": str(store)}
        measure([MODELPACK, "package", "-q", "--safetensors-dir", model, NAME], env)
        shutil.rmtree(model)
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

            warm(*store.glob("blobs/sha256/*"))
            compare("push 2 GiB", push, skopeo_push, runs=5, goal=1.1)

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

            warm(*(path for path in data.rglob("*") if path.is_file()))
            compare("pull 2 GiB, verified", pull, skopeo_pull, runs=5, goal=1.0)
            subprocess.run(["sync"], check=False)


if __name__ == "__main__":
    main()
