"""The scheduler's simulation with an offload: what leaves the fake device comes back to it.

Loads are done when the simulation says so, or find less than they were to: files are slow, and may
be gone. Whatever happens, every token is the one that a lone sequence gets.
"""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass, field

from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.offload.tiers import BlockMemory, Load, OffloadTiers, PrefixOffload
from tests.engine.scheduling.simulation import Simulation


class SlowTiers(OffloadTiers):
    """Everything is in memory, and gets there late and with losses, as a seed says."""

    def __init__(self, room: int, seed: int) -> None:
        super().__init__(BlockMemory(room), None, length=0)
        self.random = random.Random(seed)
        self.slow: list[Load] = []

    def save(self, hash_: bytes, content: bytes) -> None:
        self.memory.put(hash_, content)

    def load(self, hashes: list[bytes]) -> Load:
        load = super().load(hashes)
        assert load.done
        if self.random.random() < 0.2:
            lost = self.random.choice(hashes)
            load.contents.pop(lost)
            self.memory.discard(lost)
        if self.random.random() < 0.6:
            load.done = False
            self.slow.append(load)
        return load

    def go_on(self) -> None:
        """Let some loads be done."""
        self.random.shuffle(self.slow)
        half = len(self.slow) // 2
        self.slow, ready = self.slow[:half], self.slow[half:]
        for load in ready:
            load.done = True


@dataclass(slots=True)
class OffloadSimulation(Simulation):
    """`room` characters of blocks are kept; a step restores `per_step` of them."""

    room: int = 4000
    per_step: int = 2
    seed: int = 0
    num_turns: int = field(default=0, init=False)
    num_waits: int = field(default=0, init=False)
    tiers: SlowTiers = field(init=False)
    offload: PrefixOffload = field(init=False)

    def __post_init__(self) -> None:
        Simulation.__post_init__(self)
        self.tiers = SlowTiers(self.room, self.seed)
        self.offload = PrefixOffload(self.tiers, per_step=self.per_step)
        self.blocks.offload = self.offload

    def await_blocks(self) -> bool:
        self.tiers.go_on()
        self.num_waits += self.offload.is_awaited
        assert self.num_waits < 50, "what is awaited never comes"
        return self.offload.is_awaited

    def _schedule(self) -> SchedulerOutput | None:
        self.num_turns += 1
        if self.num_turns % 3 == 0:
            self.tiers.go_on()
        output = Simulation._schedule(self)
        self.num_waits = self.num_waits if output is None else 0
        self.move()
        return output

    def move(self) -> None:
        """Do what the mover does: save what is evicted, then restore."""
        evicted, restored = self.offload.take()
        size, memory = self.block_size, self.device.memory
        for block, hash_ in evicted:
            content = memory[block * size : (block + 1) * size]
            assert None not in content
            self.tiers.save(hash_, repr(content).encode())
        for block, content in restored:
            memory[block * size : (block + 1) * size] = ast.literal_eval(content.decode())

    def drain(self) -> None:
        Simulation.drain(self)
        assert not self.offload._loads, "a load is for nobody"
        assert not self.offload.is_awaited
