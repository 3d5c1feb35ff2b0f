"""The state of one model in a pool."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from modelpack_engine.async_engine import EngineState
from modelpack_engine.core.metrics import Meter
from modelpack_engine.models.load_budget import LoadBudget
from modelpack_engine.outputs import EngineStats
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.pool.catalogue import PooledEngine, StoredModel
from modelpack_server.pool.settings import ModelSettings


class ModelState(StrEnum):
    """Where a model is."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Hold:
    """The last use of a model by one API key: it stays for `keep_alive` seconds after it."""

    last_used: float
    keep_alive: float

    def has_ended(self, clock: float) -> bool:
        """Whether the seconds are over."""
        return clock - self.last_used >= self.keep_alive


@dataclass(slots=True, eq=False)
class Entry:
    """One model. The pool alone changes it, on its event loop.

    `keep_alive` is for uses that say nothing else; `holds` has the last use of each API key (None:
    of requests without one), so that no key shortens what another one asked for.
    """

    stored: StoredModel
    keep_alive: float
    holds: dict[str | None, Hold] = field(default_factory=dict)
    settings: ModelSettings = field(default_factory=ModelSettings)
    pinned: bool = False
    state: ModelState = ModelState.UNLOADED
    engine: PooledEngine | None = None
    model: ServedModel | None = None
    users: int = 0
    waiting: int = 0  # those who will use it once it is loaded,
    preloading: int = 0  # and those who only want it to be
    last_used: float = 0.0
    #: Bytes that it takes, or will take once it is loaded.
    memory: int = 0
    #: What the last attempt to load it raised.
    failure: Exception | None = None
    change: asyncio.Task[None] | None = None
    #: The budget of the load in progress.
    budget: LoadBudget | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    meter: Meter = field(default_factory=Meter)
    #: Counters of all the times it was loaded before.
    past: EngineStats = field(default_factory=EngineStats)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.stored.names[0] if self.stored.names else self.stored.key

    def stats(self) -> EngineStats:
        """Return its counters since the pool began, and the gauges of this moment."""
        now = self.engine.stats() if self.engine is not None else EngineStats()
        return now.after(self.past)

    @property
    def is_wanted(self) -> bool:
        """Whether requests wait for it: it is being loaded, or was just loaded."""
        return self.state is ModelState.LOADING or bool(self.waiting or self.preloading)

    @property
    def is_idle(self) -> bool:
        """Whether it is loaded, and neither in use nor about to be."""
        wanted = self.users or self.waiting or self.preloading
        return self.state is ModelState.READY and not wanted

    @property
    def may_go(self) -> bool:
        """Whether nobody would miss it: idle, and not pinned."""
        return self.is_idle and not self.pinned

    def expires(self, clock: float) -> bool:
        """Whether it has been idle for long enough to go."""
        return self.may_go and self.hold.has_ended(clock)

    @property
    def hold(self) -> Hold:
        """The hold that lasts longest."""
        return max(
            self.holds.values(),
            key=lambda hold: hold.last_used + hold.keep_alive,
            default=Hold(self.last_used, self.keep_alive),
        )

    def is_held_by_others(self, owner: str | None, clock: float) -> bool:
        """Whether another API key than `owner`, or the operator, wants the model to stay."""
        others = (hold for name, hold in self.holds.items() if name != owner)
        return self.pinned or any(not hold.has_ended(clock) for hold in others)


@dataclass(frozen=True, slots=True)
class RunningModel:
    """A model that is loaded, or is about to be or not to be; times are those of the pool's clock.

    `last_used` is None while it is in use.
    """

    name: str
    stored: StoredModel
    state: ModelState
    users: int
    last_used: float | None
    keep_alive: float
    expires_at: float | None
    pinned: bool
    memory: int
    context_size: int | None
    settings: ModelSettings


def shown(entry: Entry, stored: StoredModel) -> RunningModel:
    """Return what a request sees of an entry; `stored` has the names that it may see."""
    hold = entry.hold
    idle = entry.state is ModelState.READY and not entry.users
    stays = entry.pinned or hold.keep_alive == math.inf
    engine = entry.engine if entry.state is ModelState.READY else None
    ready = engine is not None and engine.state is EngineState.READY
    return RunningModel(
        name=stored.names[0] if stored.names else stored.key,
        stored=stored,
        state=entry.state,
        users=entry.users,
        last_used=entry.last_used if idle else None,
        keep_alive=math.inf if entry.pinned else hold.keep_alive,
        expires_at=hold.last_used + hold.keep_alive if idle and not stays else None,
        pinned=entry.pinned,
        memory=entry.memory,
        context_size=engine.max_model_len if engine is not None and ready else None,
        settings=entry.settings,
    )


@dataclass(slots=True)
class Pin:
    """One of them; `failure` is why it could not even be found."""

    settings: ModelSettings | None
    entry: Entry | None = None
    failure: Exception | None = None


class Pins:
    """Those of a pool, by the names that were given."""

    def __init__(self) -> None:
        self._pins: dict[str, Pin] = {}

    def __iter__(self) -> Iterator[tuple[str, Pin]]:
        return iter(list(self._pins.items()))

    def add(self, name: str, settings: ModelSettings | None) -> None:
        """Have a model stay."""
        self._pins[name] = Pin(settings)

    def remove(self, entry: Entry) -> None:
        """Let a model go."""
        entry.pinned = False
        self._pins = {name: pin for name, pin in self._pins.items() if pin.entry is not entry}

    def readiness(self) -> tuple[bool, str]:
        """Return whether all are loaded, and if not, why."""
        for name, pin in self._pins.items():
            entry = pin.entry
            if entry is not None and entry.state is ModelState.READY:
                continue
            failure = pin.failure or (entry.failure if entry is not None else None)
            if failure is not None:
                return False, f"the model {name} could not be loaded: {told(failure)}"
            return False, f"the model {name} is being loaded"
        return True, ""


def told(failure: Exception) -> str:
    """Return what an error says, with what to do about it where it knows."""
    hint = getattr(failure, "hint", None)
    return f"{failure}. {hint}" if hint else str(failure)
