"""The state of one model in a pool."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
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
    """The state of a model."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Hold:
    """The last use of a model by one API key, which keeps it loaded for `keep_alive` seconds."""

    last_used: float
    keep_alive: float

    def has_ended(self, clock: float) -> bool:
        """Return whether the time is over."""
        return clock - self.last_used >= self.keep_alive


@dataclass(slots=True, eq=False)
class Entry:
    """One model of a pool; only the pool changes it, on its event loop.

    `keep_alive` is the default for uses; `holds` has the last use of each API key (None: of
    requests without a key), so that no key shortens the time that another key requested.
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
    waiting: int = 0  # requests that will use it once it is loaded
    preloading: int = 0  # requests that only want it loaded
    last_used: float = 0.0
    #: The bytes of memory that it uses, or will use once it is loaded.
    memory: int = 0
    #: The exception of the last attempt to load it.
    failure: Exception | None = None
    change: asyncio.Task[None] | None = None
    #: The budget of the load in progress.
    budget: LoadBudget | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    meter: Meter = field(default_factory=Meter)
    #: The counters of its earlier engines.
    past: EngineStats = field(default_factory=EngineStats)

    @property
    def name(self) -> str:
        """The preferred name of the model."""
        return self.stored.names[0] if self.stored.names else self.stored.key

    def stats(self) -> EngineStats:
        """Return its counters since the pool started, and its current gauges."""
        now = self.engine.stats() if self.engine is not None else EngineStats()
        return now.after(self.past)

    @property
    def has_failed(self) -> bool:
        """Whether it is loaded, but its engine has ended: the next use loads it again."""
        engine = self.engine if self.state is ModelState.READY else None
        return engine is not None and engine.state is not EngineState.READY

    @property
    def is_wanted(self) -> bool:
        """Whether requests wait for it, because it is loading or was just loaded."""
        return self.state is ModelState.LOADING or bool(self.waiting or self.preloading)

    @property
    def is_idle(self) -> bool:
        """Whether it is loaded, not in use, and no request waits for it."""
        wanted = self.users or self.waiting or self.preloading
        return self.state is ModelState.READY and not wanted

    @property
    def may_go(self) -> bool:
        """Whether it may be unloaded: it is idle and not pinned."""
        return self.is_idle and not self.pinned

    def expires(self, clock: float) -> bool:
        """Return whether it has been idle for its keep-alive time."""
        return self.may_go and self.hold.has_ended(clock)

    @property
    def hold(self) -> Hold:
        """The hold that ends last."""
        return max(
            self.holds.values(),
            key=lambda hold: hold.last_used + hold.keep_alive,
            default=Hold(self.last_used, self.keep_alive),
        )

    def is_held_by_others(self, owner: str | None, clock: float) -> bool:
        """Return whether another API key than `owner`, or the operator, keeps the model loaded."""
        others = (hold for name, hold in self.holds.items() if name != owner)
        return self.pinned or any(not hold.has_ended(clock) for hold in others)


@dataclass(frozen=True, slots=True)
class RunningModel:
    """A model that is loaded, loading or unloading; times are those of the pool's clock.

    `last_used` is None while the model is in use.
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
    """Return the view of an entry for a request; `stored` has the names that it may see."""
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
        context_size=(engine.max_model_len or None) if engine is not None and ready else None,
        settings=entry.settings,
    )


@dataclass(slots=True)
class Pin:
    """A pinned model; `failure` is set if it was not found."""

    entry: Entry | None = None
    failure: Exception | None = None


def readiness(pins: Mapping[str, Pin]) -> tuple[bool, str]:
    """Return whether all pinned models are loaded, and if not, the reason."""
    for name, pin in pins.items():
        entry = pin.entry
        if entry is not None and entry.state is ModelState.READY:
            if entry.has_failed and entry.engine is not None:
                return False, f"the model {name} is loaded again: {entry.engine.failure}"
            continue
        failure = pin.failure or (entry.failure if entry is not None else None)
        if failure is not None:
            return False, f"cannot load the model {name}: {told(failure)}"
        return False, f"the model {name} is being loaded"
    return True, ""


def told(failure: Exception) -> str:
    """Return the text of an error with its hint."""
    hint = getattr(failure, "hint", None)
    return f"{failure}. {hint}" if hint else str(failure)
