"""CUDA's driver and kernels on the host, for steps that run as graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.kernels import grouped, launch, operations, prefill
from modelpack_engine.kernels.recording import Note
from modelpack_engine.layers import matmul
from modelpack_engine.platform.driver import DriverError
from modelpack_engine.runner import replay
from modelpack_engine.runner.paged import Layout, PagedRunner
from modelpack_engine.runner.replay import ReplayedTokens, Replays
from modelpack_engine.sampling import delivery
from modelpack_engine.speculation.head_runner import HeadRunner
from tests.engine.kernels.onhost import Host, address_of, emulated


class FakeDriver:
    """CUDA's driver on the host's memory.

    A stream does nothing until somebody waits for it, so that what is read or overwritten too early
    is found.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.graphs: dict[int, list[Call]] = {}
        self.num_launches = self.num_copies = 0
        self.events: set[int] = set()
        self.fails = False
        self._handles = count(1)
        self._work: list[Callable[[], object]] = []
        self._reached: set[int] = set()
        self._memory: dict[int, Any] = {}

    def allocate_host(self, num_bytes: int) -> int:
        made = np.zeros(num_bytes, np.uint8)
        self._memory[int(made.ctypes.data)] = made
        return int(made.ctypes.data)

    def free_host(self, address: int) -> None:
        self._memory.pop(address)[:] = 255

    def new_stream(self) -> int:
        return next(self._handles)

    def free_stream(self, stream: int) -> None:
        assert not self._work

    def synchronise(self, stream: int) -> None:
        while self._work:
            self._work.pop(0)()

    def new_event(self) -> int:
        self.events.add(event := next(self._handles))
        return event

    def free_event(self, event: int) -> None:
        self.events.remove(event)

    def record(self, event: int, stream: int) -> None:
        self._reached.discard(event)
        self._work.append(lambda: self._reached.add(event))

    def wait(self, event: int) -> None:
        while event not in self._reached:
            self._work.pop(0)()

    def copy(self, to: int, address: int, num_bytes: int, stream: int) -> None:
        self._work.append(lambda: ctypes.memmove(to, address, num_bytes))

    def copy_within(self, to: int, address: int, num_bytes: int, stream: int) -> None:
        self.num_copies += 1
        self.copy(to, address, num_bytes, stream)

    def make_graph(self, calls: Iterable[Any], stream: int) -> int:
        assert not self._work, "a stream that is captured has no work"
        self.graphs[handle := next(self._handles)] = list(calls)
        return handle

    def run_graph(self, graph: int, stream: int) -> None:
        if self.fails:
            self._work.clear()
            raise DriverError("cuGraphLaunch failed: CUDA error 700")
        self.num_launches += 1
        self._work += [
            partial(self.host.run_at, call.note, call.reads, call.writes)
            for call in self.graphs[graph]
        ]

    def free_graph(self, graph: int) -> None:
        assert not self._work
        del self.graphs[graph]


@dataclass
class Call:
    """A kernel of a graph, with addresses."""

    note: Note
    reads: list[int]
    writes: list[int]


def no_driver() -> Any:
    raise DriverError("CUDA's driver is not found")


def no_tiles(compare: Any, *args: Any, **kwargs: Any) -> str | None:
    return "not on the host" if compare in (prefill.probe, grouped.probe) else None


def with_tiles(compare: Any, *args: Any, **kwargs: Any) -> str | None:
    return "not on the host" if compare is grouped.probe else None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Kernels as on CUDA, all by emulation."""
    mx.disable_compile()  # the emulator runs kernels on arrays that have values
    with emulated(monkeypatch) as found:
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        monkeypatch.setattr(launch, "tried", no_tiles)
        monkeypatch.setattr(operations, "tried", no_tiles)
        monkeypatch.setattr(operations, "_verdicts", {})
        monkeypatch.setattr(delivery, "verdict", lambda: "the host has no page-locked memory")
        # Tensor cores are not emulated.
        monkeypatch.setattr(matmul, "_takes_one", lambda x, weights, swiglu=False: True)
        yield found
    mx.enable_compile()


@pytest.fixture
def driver(host: Host, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    found = FakeDriver(host)
    monkeypatch.setattr(replay, "find_driver", lambda: found)
    monkeypatch.setattr(replay, "addresses", lambda arrays, **_: [address_of(a) for a in arrays])
    monkeypatch.setattr(Replays, "_call", lambda self, *call: Call(*call))

    def alone(run: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*given: Any, **more: Any) -> Any:
            assert not found._work, "MLX does not wait for graphs"
            return run(*given, **more)

        return checked

    monkeypatch.setattr(PagedRunner, "forward", alone(PagedRunner.forward))
    monkeypatch.setattr(HeadRunner, "_run", alone(HeadRunner._run))
    return found


@pytest.fixture
def launched(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """The layouts of steps that are launched as graphs, with prompts too."""
    monkeypatch.setattr(launch, "tried", with_tiles)
    monkeypatch.setattr(operations, "tried", with_tiles)
    monkeypatch.setattr(replay, "_FREQUENT_PROMPTS", 2)
    found: list[Layout] = []
    launches = Replays.launch

    def noted(self: Replays, step: ReplayedTokens) -> None:
        found.append(step.shape.layout)
        launches(self, step)

    monkeypatch.setattr(Replays, "launch", noted)
    return found
