"""Compare the embedded registry with docker-registry 2.8.2 over loopback, with 1 and 8 clients.

Both servers and the clients share one machine, and runs alternate. The clients are threads of this
process and do little work: a push is a POST and one PUT whose body the kernel sends from a warm
file, and a pull is read into one buffer and dropped. Pulls by processes of curl are measured too. A
third server, which stores nothing and sends by `sendfile` (`null_registry.py`), shows the limit of
these clients. Both registries hash pushed blobs and flush them to disk before they respond.
Finally, the memory of the embedded registry is measured while eight clients push a GiB each.
`--only push`, `pulls` or `memory` runs that part alone.

    python benchmarks/registry_server.py [--rounds N] [--mib SIZE] [--memory-mib SIZE] [--only PART]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from importlib.metadata import version
from pathlib import Path

from measuring import MIB, MODELPACK, machine_rates, print_machine, random_file, warm

from tests.peers import docker_registry

CLIENTS = 8
TAIL = 16
TICKS = os.sysconf("SC_CLK_TCK")
REPOSITORY = "/v2/bench/m/blobs"


class Source:
    """Generates distinct blobs of `size` bytes: the bytes of one file with different last bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self.file = random_file(path, size).open("rb")
        self.size = size
        self._shared = hashlib.sha256()
        left = size - TAIL
        while left:
            piece = self.file.read(min(left, 16 * MIB))
            self._shared.update(piece)
            left -= len(piece)
        self._count = 0

    def blob(self) -> tuple[str, bytes]:
        """Return the digest and the last bytes of the next blob."""
        self._count += 1
        tail = self._count.to_bytes(TAIL, "big")
        hasher = self._shared.copy()
        hasher.update(tail)
        return f"sha256:{hasher.hexdigest()}", tail


@dataclass(frozen=True, slots=True)
class Server:
    """A running registry; `clean` removes all its blobs."""

    host: str
    pid: int
    clean: Callable[[], None]

    def connect(self) -> HTTPConnection:
        name, _, port = self.host.rpartition(":")
        return HTTPConnection(name, int(port))

    def push(self, source: Source, digest: str, tail: bytes) -> None:
        connection = self.connect()
        connection.request("POST", f"{REPOSITORY}/uploads/")
        location = answered(connection, 202).getheader("Location") or ""
        location = location.removeprefix(f"http://{self.host}")
        connection.putrequest("PUT", f"{location}{'&' if '?' in location else '?'}digest={digest}")
        connection.putheader("Content-Length", str(source.size))
        connection.putheader("Content-Type", "application/octet-stream")
        connection.endheaders()
        position = 0
        while position < source.size - TAIL:
            left = source.size - TAIL - position
            position += os.sendfile(connection.sock.fileno(), source.file.fileno(), position, left)
        connection.sock.sendall(tail)
        answered(connection, 201)
        connection.close()

    def pull(self, digest: str, size: int) -> None:
        name, _, port = self.host.rpartition(":")
        request = f"GET {REPOSITORY}/{digest} HTTP/1.1\r\nHost: {self.host}\r\n\r\n"
        buffer = bytearray(MIB)
        with socket.create_connection((name, int(port))) as connection:
            connection.sendall(request.encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            head, _, begun = head.partition(b"\r\n\r\n")
            if b" 200 " not in head.splitlines()[0]:
                sys.exit(f"{self.host}: {head.decode()}")
            left = size - len(begun)
            while left:
                count = connection.recv_into(buffer)
                if not count:
                    sys.exit(f"{self.host} ended a blob early")
                left -= count

    def curl(self, digest: str, clients: int) -> None:
        """Pull a blob by so many processes of curl at once."""
        command = ["curl", "-sf", "-o", os.devnull, f"http://{self.host}{REPOSITORY}/{digest}"]
        processes = [subprocess.Popen(command) for _ in range(clients)]
        if sum(process.wait() for process in processes):
            sys.exit(f"{self.host}: curl failed")

    def cpu(self) -> float:
        """Return the processor seconds of the server so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def peak(self) -> int:
        """Return the peak resident bytes of the server so far."""
        [line] = [
            line
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        ]
        return int(line.split()[1]) * 1024


def answered(connection: HTTPConnection, status: int) -> HTTPResponse:
    response = connection.getresponse()
    body = response.read()
    if response.status != status:
        sys.exit(f"{connection.host}: {response.status}, expected {status}: {body[:300]!r}")
    return response


@contextmanager
def embedded(root: Path) -> Iterator[Server]:
    """Run `modelpack registry serve` with the store `root`."""
    command = [MODELPACK, "registry", "serve", "--root", root, "--addr", "127.0.0.1:0"]
    command.append("--no-access-log")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        host = ""
        while "127.0.0.1:" not in host:
            host = process.stdout.readline() or sys.exit("the embedded registry did not start")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        host = f"127.0.0.1:{host.split('127.0.0.1:')[1].split('/')[0].split()[0]}"

        def clean() -> None:
            connection = HTTPConnection(host)
            for path in root.glob("blobs/sha256/*"):
                connection.request("DELETE", f"{REPOSITORY}/sha256:{path.name}")
                answered(connection, 202)

        yield Server(host, process.pid, clean)
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def peer(root: Path) -> Iterator[Server]:
    """Run docker-registry with the directory `root`."""
    with docker_registry(root) as host:
        yield Server(host, listener(root), lambda: shutil.rmtree(root / "data"))


@contextmanager
def nothing(file: Path) -> Iterator[Server]:
    """Run the server that stores nothing and serves `file`."""
    command = [sys.executable, Path(__file__).with_name("null_registry.py"), file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(process.stdout.readline().strip(), process.pid, lambda: None)
    finally:
        process.terminate()
        process.wait(timeout=20)


def listener(root: Path) -> int:
    """Return the process of the docker-registry that this script started for `root`."""
    config = str(root / "config.yml").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if config in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
        except OSError:
            continue
    sys.exit("docker-registry is not running")


@dataclass(frozen=True, slots=True)
class Taken:
    """Wall seconds, and processor seconds of the server."""

    wall: float
    cpu: float


def timed(server: Server, calls: list[Callable[[], None]]) -> Taken:
    """Return the time of the calls, made in parallel by one thread each."""
    with ThreadPoolExecutor(len(calls)) as executor:
        cpu, began = server.cpu(), time.perf_counter()
        for future in [executor.submit(call) for call in calls]:
            future.result()
        return Taken(time.perf_counter() - began, server.cpu() - cpu)


def push(server: Server, source: Source, clients: int) -> Taken:
    """Push a new blob from each client, then remove all blobs."""
    blobs = [source.blob() for _ in range(clients)]
    taken = timed(server, [lambda b=blob: server.push(source, *b) for blob in blobs])  # type: ignore[misc]
    server.clean()
    return taken


def pull(server: Server, digest: str, size: int, clients: int) -> Taken:
    """Pull one blob from all clients."""
    return timed(server, [lambda: server.pull(digest, size)] * clients)


def compare(label: str, rounds: int, goal: float, act: Callable[[Server], Taken],
            ours: Server, theirs: Server, null: Server) -> None:  # fmt: skip
    """Run all servers in turn after a warm-up; print the ratios to ours for each round.

    The order of the servers changes from round to round.
    """
    servers = (ours, theirs, null)
    for server in servers:
        act(server)
    done: list[list[Taken]] = []
    for number in range(rounds):
        order = (0, 1, 2) if number % 2 else (1, 0, 2)
        taken = {which: act(servers[which]) for which in order}
        done.append([taken[which] for which in range(3)])
    ratios = sorted(b.wall / a.wall for a, b, _ in done)
    wall = [statistics.median(row[which].wall for row in done) for which in range(3)]
    cpu = [statistics.median(row[which].cpu for row in done) for which in range(3)]
    print(
        f"{label}: {statistics.median(ratios):.2f} x docker-registry (min {ratios[0]:.2f}, max "
        f"{ratios[-1]:.2f}, goal >= {goal}); ours {wall[0]:.3f} s, docker-registry "
        f"{wall[1]:.3f} s, nothing kept {wall[2]:.3f} s; processor {cpu[0]:.2f} s, "
        f"{cpu[1]:.2f} s, {cpu[2]:.2f} s",
        flush=True,
    )


def compare_all(root: Path, options: argparse.Namespace) -> None:
    """Compare pushes and pulls, in stores under `root`."""
    source = Source(root / "source", options.mib * MIB)
    with (
        embedded(root / "ours") as ours,
        peer(root / "theirs") as theirs,
        nothing(root / "source") as null,
    ):

        def rounds_of(what: str, goal: float, act: Callable[[Server], Taken]) -> None:
            compare(f"{what} {options.mib} MiB", options.rounds, goal, act, ours, theirs, null)

        if options.only != "pulls":
            rounds_of("1 client pushes", 2.0, lambda server: push(server, source, 1))
        if options.only == "push":
            return
        digest, tail = source.blob()
        for server in (ours, theirs):
            server.push(source, digest, tail)
        warm(*(path for path in root.rglob("*") if path.is_file()))
        rounds_of("1 client pulls", 1.0, lambda server: pull(server, digest, source.size, 1))
        rounds_of(
            f"{CLIENTS} clients pull",
            1.0,
            lambda server: pull(server, digest, source.size, CLIENTS),
        )
        for clients in (1, CLIENTS):
            rounds_of(
                f"{clients} curl {'pulls' if clients == 1 else 'pull'}",
                1.0,
                lambda server, clients=clients: timed(  # type: ignore[misc]
                    server, [lambda: server.curl(digest, clients)]
                ),
            )


def measure_memory(root: Path, mib: int) -> None:
    """Print the peak memory of the embedded registry while it receives eight large blobs."""
    large = Source(root / "large", mib * MIB)
    with embedded(root / "memory") as server:
        before = server.peak()
        taken = push(server, large, CLIENTS)
        print(
            f"{CLIENTS} clients push {mib} MiB each: peak RSS {server.peak() / 1e6:.0f} MB "
            f"(goal <= 150, {before / 1e6:.0f} MB before) in {taken.wall:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded registry against docker-registry.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=512, help="size of the blobs of the comparison")
    parser.add_argument("--memory-mib", type=int, default=1024, help="size of the eight blobs")
    parser.add_argument("--only", choices=["push", "pulls", "memory"], help="do this part alone")
    options = parser.parse_args()
    versions = [["docker-registry", "--version"], ["curl", "--version"], [MODELPACK, "--version"]]
    print_machine(*versions)
    print(", ".join(f"{name} {version(name)}" for name in ("uvicorn", "h11", "starlette")))
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="modelpack-bench-") as scratch:
        root = Path(scratch)
        rates = machine_rates(root)
        print(f"push of {options.mib} MiB: {rates.bound(options.mib * MIB)}", flush=True)
        if options.only != "memory":
            compare_all(root, options)
        if options.only in (None, "memory"):
            measure_memory(root, options.memory_mib)


if __name__ == "__main__":
    main()
