"""The scheduler's simulation with an offload: blocks leave the fake device and are restored.

The simulation decides when loads are done, and which blocks they find, as if files were slow or
missing. Every token must be the one that a sequence gets when it runs alone.
"""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass, field

from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.offload.tiers import BlockMemory, Load, OffloadTiers, PrefixOffload
from tests.engine.scheduling.simulation import Simulation


class SlowTiers(OffloadTiers):
    """Tiers in memory, whose loads are late and incomplete at random."""

    def __init__(self, room: int, seed: int) -> None:
        super().__init__(BlockMemory(room), None)
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
        """Complete some loads."""
        self.random.shuffle(self.slow)
        half = len(self.slow) // 2
        self.slow, ready = self.slow[:half], self.slow[half:]
        for load in ready:
            load.done = True


@dataclass(slots=True)
class OffloadSimulation(Simulation):
    """Keep up to `room` bytes of blocks, and restore up to `per_step` blocks in a step."""

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
        self.offload = PrefixOffload(
            self.tiers,
            per_step=self.per_step,
            make_state=lambda content: int(content.decode()),
            num_groups=1 + len(self.window_pools),
        )
        self.blocks.set_offload(self.offload)

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
        """Save the evicted blocks, then restore, as the block mover does."""
        evicted, restored = self.offload.take()
        size, devices = self.block_size, [self.device, *self.others]
        for group, block, key in evicted:
            entries = devices[group].memory[block * size : (block + 1) * size]
            assert None not in entries
            self.tiers.save(key, repr((group, entries)).encode())
        for key, state in self.offload.take_states():
            self.tiers.save(key, repr(state).encode())
        for group, block, content in restored:
            of_group, entries = ast.literal_eval(content.decode())
            assert of_group == group, "the content is that of other layers"
            devices[group].memory[block * size : (block + 1) * size] = entries

    def drain(self) -> None:
        Simulation.drain(self)
        assert not self.offload._loads, "a load is for nobody"
        assert not self.offload.is_awaited
