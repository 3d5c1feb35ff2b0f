"""Clients of a served model, as a process of their own: they stream, and many leave at random.

    python -m tests.engine.serving.load.clients PORT CLIENTS SECONDS SEED

Prints a JSON object: `whole`, streams that ended, `left`, those that were left, `refused`, those
that the full queue refused, and `faults`, what was wrong with whole ones.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.engine.serving.load.streams import malformed, text_of

TASKS = 18
_FAMILIES = ("openai", "anthropic", "ollama")
_PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "ollama": "/api/chat"}


@dataclass(frozen=True)
class Task:
    """A request with a reproducible reply: seeded, or greedy if the API has no seed."""

    family: str
    body: Mapping[str, Any]

    def request(self) -> bytes:
        content = json.dumps(self.body).encode()
        head = (
            f"POST {_PATHS[self.family]} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


def make_tasks(model: str) -> list[Task]:
    """Return short and long tasks for all families."""
    generator = random.Random(7)
    tasks = []
    for number in range(TASKS):
        family = _FAMILIES[number % len(_FAMILIES)]
        messages = [{"role": "user", "content": "x" * generator.choice([1, 30, 90]) + str(number)}]
        limit = generator.choice([4, 20, 60])
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
        if family == "openai":
            body |= {"max_tokens": limit, "seed": number, "temperature": 1, "ignore_eos": True}
        elif family == "anthropic":
            body |= {"max_tokens": limit, "temperature": 0}
        else:
            body["options"] = {"num_predict": limit, "seed": number, "temperature": 1}
        tasks.append(Task(family, body))
    return tasks


class LeftError(Exception):
    """The client disconnected before the end."""


class Client:
    """A client with one connection at a time that leaves after `patience` pieces of a stream."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, task: Task, patience: int | None = None) -> tuple[int, bytes]:
        """Return status and content. Raises `LeftError` after `patience` pieces."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(task.request())
        if patience == 0:
            self.leave()
            raise LeftError
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if b"content-length" in headers:
            return status, await reader.readexactly(int(headers[b"content-length"]))
        pieces: list[bytes] = []
        while (size := int(await reader.readline(), 16)) != 0:
            pieces.append((await reader.readexactly(size + 2))[:-2])
            if patience is not None and len(pieces) >= patience:
                self.leave()
                raise LeftError
        await reader.readexactly(2)
        return status, b"".join(pieces)

    def leave(self) -> None:
        """Close the connection abruptly."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def converse(port: int, count: int, seconds: float, seed: int, model: str) -> dict[str, Any]:
    """Run every task once, alone; then run all clients concurrently until the time is over."""
    tasks = make_tasks(model)
    expected = [await _alone(port, task) for task in tasks]
    found: Counter[str] = Counter()
    faults: list[str] = []
    end = time.monotonic() + seconds

    async def client(generator: random.Random) -> None:
        connection = Client(port)
        while time.monotonic() < end:
            number = generator.randrange(len(tasks))
            patience = generator.choice([None, None, 0, 1, 2, 8])
            try:
                status, content = await connection.ask(tasks[number], patience)
            except LeftError:
                found["left"] += 1
                continue
            if status in (429, 529):
                found["refused"] += 1
                await asyncio.sleep(0.1)  # like a client that obeys Retry-After
                continue
            found["whole"] += 1
            family = tasks[number].family
            fault = f"status {status}" if status != 200 else malformed(family, content)
            if not fault and text_of(family, content) != expected[number]:
                fault = f"{text_of(family, content)!r} instead of {expected[number]!r}"
            if fault:
                faults.append(f"task {number} ({family}): {fault}")
        connection.leave()

    await asyncio.gather(*(client(random.Random(f"{seed}/{i}")) for i in range(count)))
    return {**{name: found[name] for name in ("whole", "left", "refused")}, "faults": faults[:20]}


async def _alone(port: int, task: Task) -> str:
    client = Client(port)
    status, content = await client.ask(task)
    client.leave()
    fault = f"status {status}" if status != 200 else malformed(task.family, content)
    if fault:
        raise SystemExit(f"alone, {task} got {content[:500]!r}: {fault}")
    return text_of(task.family, content)


def main(arguments: Sequence[str]) -> None:
    port, count, seconds, seed = arguments
    found = asyncio.run(converse(int(port), int(count), float(seconds), int(seed), "tiny"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
