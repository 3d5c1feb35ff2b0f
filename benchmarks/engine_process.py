"""Compare `serve` with the engine in the server's process and in a process of its own.

    engine_process.py [STREAMS ...]

The engines are simulated (`null_servers.py`): a step computes in Python, as the host of a GPU does,
and then waits, as for the GPU. Clients read streams to their end without parsing them. The kinds
take turns. Prints, for each round, milliseconds a step, without those for which the engine waited
for a core, and microseconds of processor time for each token of the server's process and of the
engine's. Linux only.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import print_machine

TOKENS = 300
#: Milliseconds of a step in which the host computes, and then waits for the GPU, and calls without
#: the GIL in between.
STEPS = ((3.5, 0.5, 0), (3.5, 0.5, 8))
ROUNDS = 3
SERVERS = Path(__file__).with_name("null_servers.py")
BODY = json.dumps({"model": "m", "stream": True, "max_tokens": 1000,
                   "messages": [{"role": "user", "content": "x"}]}).encode()  # fmt: skip
REQUEST = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
           b"application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)  # fmt: skip


def read_streams(port: int, count: int) -> float:
    """Read streams to their end; return the seconds from the first token to the last."""
    began = 0.0
    with selectors.DefaultSelector() as selector:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(REQUEST)
            selector.register(connection, selectors.EVENT_READ, bytearray())
        while selector.get_map():
            time.sleep(0.02)  # read many tokens at a time: the cores are for the servers
            for key, _ in selector.select():
                connection = key.fileobj  # type: ignore[assignment]
                received = connection.recv(1 << 16)
                if not began and b"word" in received:
                    began = time.monotonic()
                tail: bytearray = key.data
                tail += received
                if b"data: [DONE]" in tail or not received:
                    selector.unregister(connection)
                    connection.close()
                del tail[:-20]
    return time.monotonic() - began


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def waits_of(pid: int) -> dict[str, tuple[int, int]]:
    """Return the nanoseconds for which each thread has run, and has waited for a core."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        run, waited, _ = (task / "schedstat").read_text().split()
        found[task.name] = int(run), int(waited)
    return found


def engine_of(server: int) -> int | None:
    """Return the id of the engine's process of a server, None if it has none."""
    for task in Path(f"/proc/{server}/task").iterdir():  # each thread has its own children
        for child in (task / "children").read_text().split():
            if b"process_engine" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def measure(
    kind: str, streams: int, compute: float, wait: float, calls: int
) -> tuple[float, float, float]:
    """Return milliseconds a step, and microseconds a token of the server and of the engine.

    The time for which the engine's thread, which computes most, waited for a core is left out: that
    depends on what else the machine does.
    """
    arguments = [str(number) for number in (streams, TOKENS, wait, compute, calls)]
    with subprocess.Popen(
        [sys.executable, SERVERS, kind, *arguments],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            read_first(port)
            engine = engine_of(server.pid)
            pids = [server.pid, *([engine] if engine else [])]
            before = [processor_seconds(pid) for pid in pids]
            threads = waits_of(pids[-1])
            seconds = read_streams(port, streams)
            now = waits_of(pids[-1])
            ran = {name: now[name][0] - run for name, (run, _) in threads.items() if name in now}
            thread = max(ran, key=ran.__getitem__)
            seconds -= (now[thread][1] - threads[thread][1]) / 1e9
            used = [processor_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
        finally:
            server.kill()
    of_token = [1e6 * each / (streams * TOKENS) for each in used]
    return 1e3 * seconds / (TOKENS - 1), of_token[0], sum(of_token[1:])


def read_first(port: int) -> None:
    """Have the server load its model, by an empty request."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        body = b'{"model": "m", "prompt": ""}'
        connection.sendall(
            b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        while connection.recv(1 << 16):
            pass


def compare(streams: int, compute: float, wait: float, calls: int) -> None:
    """Print the rounds of both kinds, and their ratio."""
    print(f"{streams} streams; a step: {compute} ms of Python, {calls} calls, {wait} ms of waiting")
    ratios = []
    for _ in range(ROUNDS):
        found = {}
        for kind in ("protected", "process"):
            step, server, engine = measure(kind, streams, compute, wait, calls)
            found[kind] = step
            print(f"  {kind}: {step:.2f} ms a step, server {server:.0f} us a token, "
                  f"engine's process {engine:.0f}", flush=True)  # fmt: skip
        ratios.append(found["process"] / found["protected"])
    ratios.sort()
    print(f"  process / protected: {statistics.median(ratios):.2f} "
          f"(min {ratios[0]:.2f}, max {ratios[-1]:.2f})")  # fmt: skip


def main() -> None:
    print_machine()
    for streams in [int(text) for text in sys.argv[1:]] or [32, 64]:
        for step in STEPS:
            compare(streams, *step)


if __name__ == "__main__":
    main()
