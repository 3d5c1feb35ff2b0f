"""Measure the processor time of servers for each streamed token, for ours and others on MLX.

64 clients stream from servers whose models take no time (`null_servers.py`), one server after the
other, for several rounds. MODELPACK_VLLM_MLX_PYTHON is a Python with vllm-mlx, which needs an older
mlx-lm; without it, that server is skipped. Only the processor time of the server's process counts.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import print_machine

STREAMS, TOKENS, TICK_MS = 64, 150, 25
ROUNDS = 3
GOAL_US, GOAL_RATIO = 150, 0.5
PYTHONS = {
    **dict.fromkeys(("ours", "protected", "mlx-lm", "mlx-lm-front"), sys.executable),
    "vllm-mlx": os.environ.get("MODELPACK_VLLM_MLX_PYTHON", ""),
}
KINDS = [kind for kind, python in PYTHONS.items() if python]
SERVERS = Path(__file__).with_name("null_servers.py")


async def listen(port: int) -> tuple[int, int]:
    """Read a stream to its end; return the numbers of events with text and of tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = {"model": "m", "stream": True, "max_tokens": 1000,
            "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
    content = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    events = words = 0
    while (line := await reader.readline()) and not line.startswith(b"data: [DONE]"):
        if line.startswith(b"data: "):
            count = line.count(b"word")
            events += count > 0
            words += count
    writer.close()
    return events, words


async def listen_all(port: int) -> tuple[int, int]:
    """Return the events and the tokens of all streams together."""
    found = await asyncio.gather(*(listen(port) for _ in range(STREAMS)))
    return sum(events for events, _ in found), sum(words for _, words in found)


def measure(kind: str) -> float:
    """Return the processor time for each token in microseconds."""
    arguments = [str(number) for number in (STREAMS, TOKENS, TICK_MS)]
    with subprocess.Popen(
        [PYTHONS[kind], SERVERS, kind, *arguments],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        try:
            events, words = asyncio.run(listen_all(int(server.stdout.readline())))
            taken = float(server.stdout.readline())
        finally:
            server.kill()
    if words != STREAMS * TOKENS:
        sys.exit(f"{kind}: {words} tokens came instead of {STREAMS * TOKENS}")
    # Late tokens share an event, which takes less time, so the comparison is by event.
    taken *= words / events
    print(f"  {kind}: {taken:.0f} us an event, {events / words:.2f} events a token", flush=True)
    return taken


def main() -> None:
    print_machine()
    for name in ("uvicorn", "h11", "starlette", "fastapi", "mlx-lm"):
        print(f"{name}: {importlib.metadata.version(name)}")
    rounds = []
    for number in range(ROUNDS):
        print(f"round {number + 1}", flush=True)
        rounds.append({kind: measure(kind) for kind in KINDS})
    for kind in KINDS:
        taken = statistics.median(found[kind] for found in rounds)
        goal = f" (goal <= {GOAL_US})" if kind in KINDS[:2] else ""
        print(f"{kind}: {taken:.0f} us{goal}")
    for ours in KINDS[:2]:
        for theirs in KINDS[2:]:
            ratios = sorted(found[ours] / found[theirs] for found in rounds)
            print(f"{ours} / {theirs}: {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, "
                  f"max {ratios[-1]:.2f}, goal <= {GOAL_RATIO})")  # fmt: skip


if __name__ == "__main__":
    main()
