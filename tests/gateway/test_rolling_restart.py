"""Servers behind a gateway are replaced, restarted and killed while clients send requests."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.servers import CHAT, PATIENCE, Served, gateway, new_client, unused_url

_PROGRAM = Path(__file__).with_name("draining_backend.py")
#: Loopback addresses: DNS has addresses, but no ports.
ADDRESSES = tuple(f"127.0.0.{number}" for number in range(2, 6))
_PROBES = 0.1


class Backends:
    """Processes by address, all at one port; `addresses` is what DNS says."""

    def __init__(self) -> None:
        self.port = int(unused_url().rpartition(":")[2])
        self.addresses: list[str] = []
        self._running: dict[str, subprocess.Popen[str]] = {}

    async def lookup(self, host: str, port: int) -> list[str]:
        assert (host, port) == ("servers.test", self.port)
        return list(self.addresses)

    def start(self, address: str, drain: int = 1) -> None:
        process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), address, str(self.port), str(drain)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._running[address] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    def stop(self, address: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal, and return when the process has ended."""
        process = self._running.pop(address)
        process.send_signal(number)
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()

    def stop_all(self) -> None:
        for address in list(self._running):
            self.stop(address, signal.SIGKILL)


@dataclass
class Load:
    """What clients got: the address that answered each prompt, in order, and failures."""

    answers: dict[int, list[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def count(self) -> int:
        with self.lock:
            return sum(map(len, self.answers.values()))


def ask(client: httpx.Client, prompt: int) -> str:
    messages = [{"role": "user", "content": f"prompt {prompt}"}]
    reply = client.post(CHAT, json={"model": "m", "messages": messages})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["from"])


@contextmanager
def load(url: str, threads: int = 4) -> Iterator[Load]:
    """Send requests from several clients in the block."""
    found, over = Load(), threading.Event()

    def work(first: int) -> None:
        prompt = first
        with new_client(url) as client:
            while not over.is_set():
                prompt += threads
                try:
                    address = ask(client, prompt % 40)
                except (httpx.HTTPError, AssertionError) as error:
                    with found.lock:
                        found.failures.append(f"{type(error).__name__}: {error}")
                else:
                    with found.lock:
                        found.answers.setdefault(prompt % 40, []).append(address)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield found
    finally:
        over.set()
        for worker in workers:
            worker.join()


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def health(served: Served) -> Any:
    return served.client.get("/health").json()["upstreams"]


@pytest.fixture
def backends() -> Iterator[Backends]:
    made = Backends()
    try:
        yield made
    finally:
        made.stop_all()


@pytest.mark.long  # processes start and drain
def test_a_rolling_restart_fails_no_request(backends: Backends) -> None:
    """At fixed addresses: each server drains, stops and starts again at its own address."""
    for address in ADDRESSES[:3]:
        backends.start(address)
    urls = [f"http://{address}:{backends.port}" for address in ADDRESSES[:3]]
    with ExitStack() as stack:
        served = stack.enter_context(gateway(*urls, policy="prefix", probe_interval=_PROBES))
        with load(served.url) as found:
            until(lambda: found.count > 100)
            for address in ADDRESSES[:3]:
                backends.stop(address)
                backends.start(address)
                until(lambda: health(served) == {"healthy": 3, "total": 3})
            until(lambda: found.count >= 1000)
    assert found.failures == []
    assert {address for answers in found.answers.values() for address in answers} == {
        *ADDRESSES[:3]
    }


@pytest.mark.long
def test_servers_are_replaced_by_others(backends: Backends) -> None:
    """By DNS, as pods are: a new one is ready before an old one stops, with another address."""
    backends.addresses = list(ADDRESSES[:2])
    for address in ADDRESSES[:2]:
        backends.start(address)
    name = f"dns+http://servers.test:{backends.port}"
    with ExitStack() as stack:
        served = stack.enter_context(
            gateway(name, policy="prefix", probe_interval=_PROBES, lookup=backends.lookup)
        )
        until(lambda: health(served) == {"healthy": 2, "total": 2})
        before = {prompt: ask(served.client, prompt) for prompt in range(40)}
        assert {*before.values()} == {*ADDRESSES[:2]}
        assert before == {prompt: ask(served.client, prompt) for prompt in range(40)}
        with load(served.url) as found:
            for old, new in zip(ADDRESSES[:2], ADDRESSES[2:], strict=True):
                backends.start(new)
                backends.addresses = [*backends.addresses, new]
                until(lambda: health(served) == {"healthy": 3, "total": 3})
                backends.addresses = [each for each in backends.addresses if each != old]
                backends.stop(old)
                until(lambda: health(served) == {"healthy": 2, "total": 2})
        assert found.failures == []
        after = {prompt: ask(served.client, prompt) for prompt in range(40)}
        assert {*after.values()} == {*ADDRESSES[2:]}


@pytest.mark.long
def test_a_killed_server_is_left_and_its_prompts_alone_move(backends: Backends) -> None:
    backends.addresses = list(ADDRESSES[:3])
    for address in ADDRESSES[:3]:
        backends.start(address)
    name = f"dns+http://servers.test:{backends.port}"
    with gateway(name, policy="prefix", probe_interval=_PROBES, lookup=backends.lookup) as served:
        until(lambda: health(served) == {"healthy": 3, "total": 3})
        before = {prompt: ask(served.client, prompt) for prompt in range(40)}
        killed = before[0]
        backends.stop(killed, signal.SIGKILL)
        after = {prompt: ask(served.client, prompt) for prompt in range(40)}
        assert killed not in after.values()
        stayed = {prompt for prompt in before if before[prompt] != killed}
        assert all(after[prompt] == before[prompt] for prompt in stayed)
        backends.start(killed)
        until(lambda: health(served) == {"healthy": 3, "total": 3})
        assert {prompt: ask(served.client, prompt) for prompt in range(40)} == before
