"""Measure pulls over a link of 20 ms and 200 Mbit/s per connection: with skopeo, and resumed.

python benchmarks/slow_link.py [ROUNDS]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import GIB, MODELPACK, Run, measure, print_machine, weights
from shaped_link import ShapedLink

from tests.peers import docker_registry

SIZE = GIB // 2
ROUND_TRIP = 0.020
RATE = 200e6 / 8
CUT = 0.60


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    print_machine(
        ["skopeo", "--version"], ["docker-registry", "--version"], [MODELPACK, "--version"]
    )
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        root = Path(scratch)
        model = root / "model"
        model.mkdir()
        weights(model / "model.safetensors", SIZE)
        env = {"MODELPACK_STORE": str(root / "origin")}
        with docker_registry(root / "registry") as host:
            name = "bench/m:v1"
            to = f"{host}/{name}"
            measure([MODELPACK, "package", "-q", "--safetensors-dir", model, to, "--push"], env)
            with ShapedLink(host, round_trip=ROUND_TRIP, bytes_per_second=RATE) as link:
                source = f"{link.host}/{name}"
                for _ in range(rounds):
                    compare_once(source, root)
                resume(link, source, root)


def compare_once(source: str, root: Path) -> None:
    """Pull with one connection, with four connections and with skopeo."""
    one = pull(source, root, "--connections", "1")
    ours = pull(source, root)
    shutil.rmtree(root / "skopeo", ignore_errors=True)
    theirs = measure(
        ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{source}",
         f"oci:{root / 'skopeo'}:v1"]
    )  # fmt: skip
    print(
        f"pull {SIZE >> 20} MiB, 20 ms, 200 Mbit/s a connection: {theirs.wall / ours.wall:.2f} x "
        f"skopeo (goal >= 2.5); ours {ours.wall:.2f} s, by one connection {one.wall:.2f} s, "
        f"skopeo {theirs.wall:.2f} s",
        flush=True,
    )


def pull(source: str, root: Path, *options: str) -> Run:
    """Pull into an empty store."""
    shutil.rmtree(root / "pulled", ignore_errors=True)
    env = {"MODELPACK_STORE": str(root / "pulled")}
    return measure([MODELPACK, "pull", "-q", source, *options], env)


def resume(link: ShapedLink, source: str, root: Path) -> None:
    """Kill a pull at 60 %, and count the bytes that the next pull fetches."""
    store = root / "resumed"
    env = {"MODELPACK_STORE": str(store)}
    process = subprocess.Popen([MODELPACK, "pull", "-q", source], env={**os.environ, **env})
    while present(store) < CUT * SIZE:
        if process.poll() is not None:
            sys.exit("the pull ended before it could be killed")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, before = present(store), link.downloaded
    again = measure([MODELPACK, "pull", "-q", source], env)
    fetched = link.downloaded - before
    print(
        f"killed with {kept / SIZE:.1%} in the journal: the next pull fetched {fetched / SIZE:.1%} "
        f"(goal <= 41 %) in {again.wall:.2f} s"
    )


def present(store: Path) -> int:
    """Return the number of bytes that the journal of the download lists."""
    for journal in store.glob("ingest/*.json"):
        try:
            ranges = json.loads(journal.read_bytes()).get("present", [])
        except (OSError, ValueError):  # renamed meanwhile
            continue
        if ranges:
            return sum(end - start for start, end in ranges)
    return 0


if __name__ == "__main__":
    main()
