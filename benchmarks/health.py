"""GET /health beside the requests that cost a server most to read.

    PYTHONPATH=.:engine python benchmarks/health.py [--rounds 3]

First each request of tests/engine/serving/worst_requests.py alone, then all of them at once, from
another process. A table of milliseconds: /health on a connection of its own, every 10 ms.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import modelpack
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from tests.engine.serving.test_api import wait_until_ready
from tests.engine.serving.tiny import write_tiny
from tests.engine.serving.worst_requests import requests_to

_SENDER = Path("tests/engine/serving/worst_requests.py")
_ONE = (
    "import sys; from tests.engine.serving.worst_requests import requests_to, send; "
    "name, address = sys.argv[1:]; "
    "[(path, body)] = [(p, b()) for n, p, b in requests_to('team/tiny') if n == name]; "
    "print(flush=True); input(); send(address, path, body)"
)


def health(address: str, sender: subprocess.Popen[str]) -> list[float]:
    """Return the seconds of each call until the sender has ended."""
    times = []
    while sender.poll() is None:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(address, timeout=300)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        times.append(time.perf_counter() - began)
        time.sleep(0.01)
    return sorted(times)


def row(name: str, times: list[float]) -> str:
    """Return a row of the table."""
    shares = (0.5, 0.9, 0.99, 1)
    cells = [times[min(int(len(times) * share), len(times) - 1)] * 1000 for share in shares]
    return f"| {name} | {len(times)} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |"


def main() -> None:
    """Serve a tiny model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        store = LayoutStore(Path(folder) / "store")
        files = write_tiny(Path(folder) / "files")
        config = json.loads((files / "config.json").read_text())
        (files / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2**17}))
        modelpack.package("team/tiny", PackageRequest(safetensors_dir=files), store=store)
        server = subprocess.Popen(
            [sys.executable, "-m", "modelpack", "serve", "team/tiny", "--port", "0", "--device",
             "cpu", "--store", str(store.root), "--kv-cache-bytes", "100000000"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            wait_until_ready(url)
            address = url.removeprefix("http://")
            print("| beside | calls | median | p90 | p99 | worst |\n|---|---|---|---|---|---|")
            for name, _, _ in requests_to("team/tiny"):
                one = subprocess.Popen(
                    [sys.executable, "-c", _ONE, name, address],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                assert one.stdout is not None
                assert one.stdin is not None
                one.stdout.readline()
                one.stdin.write("\n")
                one.stdin.flush()
                print(row(name, health(address, one)), flush=True)
            for _ in range(rounds):
                all_of_them = subprocess.Popen(
                    [sys.executable, _SENDER, address, "team/tiny", "1"],
                    stdout=subprocess.DEVNULL, text=True,
                )  # fmt: skip
                print(row("all at once", health(address, all_of_them)), flush=True)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
