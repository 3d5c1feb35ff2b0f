"""ModelPool: load models on use, unload idle ones, and keep within the memory budget."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from modelpack.errors import ModelpackError, UntrustedError
from modelpack_engine.async_engine import EngineState
from modelpack_engine.errors import (
    BusyError,
    EngineError,
    LoadCancelledError,
    LoadingError,
    ModelLoadError,
    OutOfMemoryError,
    as_error,
)
from modelpack_engine.models.load_budget import LOAD_SECONDS, LoadBudget, applied
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.pool import names as access
from modelpack_server.pool.catalogue import Catalogue, LoadedEngine, StoredModel
from modelpack_server.pool.entry import (
    Entry,
    Hold,
    ModelState,
    Pin,
    Pins,
    RunningModel,
    shown,
    told,
)
from modelpack_server.pool.memory import MemoryBudget
from modelpack_server.pool.names import Names
from modelpack_server.pool.settings import (
    DEFAULT_KEEP_ALIVE,
    PRESETS,
    ModelSettings,
    parse_keep_alive,
)

_log = logging.getLogger(__name__)

#: Seconds that streams get to end before the model under them goes.
GRACE = 30.0
#: Requests that wait for one model to be loaded.
MAX_WAITING = 1024
#: Seconds after which a request for a model that is not ready may be sent again (Retry-After).
RETRY_AFTER = 1.0


class ModelPool:
    """The models of a catalogue, on one event loop. Whoever uses one leases it.

    Names and lists are those of the current request (`access`): a model that its API key may not
    use is not there, and other names of a model that it may use are not shown.

    `memory` is the budget of all loaded models together, in bytes (None: no limit but the
    machine's). `keep_alive` is how many seconds a model stays after its last use, `max_waiting` how
    many requests may wait for one to be loaded. A load that takes longer than `load_seconds` is
    abandoned, one that nobody waits for is cancelled; models load at the same time. `clock` gives
    seconds that only grow. Models that are unloaded for want of memory are idle ones, the one that
    was used longest ago first; pinned ones stay.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        settings: ModelSettings | None = None,
        memory: int | None = None,
        keep_alive: float | None = None,
        grace: float = GRACE,
        max_waiting: int = MAX_WAITING,
        load_seconds: float = LOAD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalogue = catalogue
        self.clock = clock
        self.is_closing = False
        self._settings = settings or ModelSettings()
        default = parse_keep_alive(DEFAULT_KEEP_ALIVE)
        self._keep_alive = default if keep_alive is None else keep_alive
        self._grace = grace
        self._max_waiting = max_waiting
        self._load_seconds = load_seconds
        self._entries: dict[str, Entry] = {}
        self._budget = MemoryBudget(memory, self._entries.values())
        self._configured: dict[str, ModelSettings] = {}  # by key, also of what is not loaded
        self._pins = Pins()
        self._names = Names(catalogue)
        self._room = asyncio.Condition()  # memory is reserved by one load at a time
        self._reaper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def memory(self) -> int | None:
        """The budget of all models, in bytes."""
        return self._budget.total

    # Names

    def alias(self, name: str, target: str) -> None:
        """Have `name` stand for the model `target` as well."""
        self._names.give(name, target)

    async def aliases(self) -> dict[str, StoredModel]:
        """Return the names that `alias` gave, and their models."""
        return await self._names.given()

    async def find(self, name: str) -> StoredModel:
        """Return the stored model that a user calls so; raise `NotFoundError`."""
        found = self._names.view_of(await self._names.find(name))
        assert found is not None, "it was just seen"
        return found

    async def stored(self) -> Sequence[StoredModel]:
        """Return what could be loaded."""
        found = await asyncio.to_thread(self.catalogue.stored)
        return [model for one in found if (model := self._names.view_of(one)) is not None]

    # Use

    @asynccontextmanager
    async def lease(
        self, name: str, *, keep_alive: float | None = None, wait: bool = True
    ) -> AsyncIterator[ServedModel]:
        """Lend a model, loading it first where it is not; it stays for as long as it is lent.

        `keep_alive` replaces the seconds that it stays afterwards: 0 is not at all, `math.inf` for
        ever. Raises `NotFoundError`, what loading raises, and `LoadingError` where it would have to
        be waited for and `wait` is false, or too many wait.
        """
        entry = await self._entry(name)
        owner = access.owner()
        self._check_queue(entry)
        entry.waiting += 1
        try:
            model = await self._ready(entry, wait)
            entry.users += 1
            entry.idle.clear()
        finally:
            entry.waiting -= 1
            self._stopped_waiting(entry)
        try:
            yield model
        finally:
            entry.users -= 1
            self._left(entry, owner, keep_alive)

    async def preload(self, name: str, *, keep_alive: float | None = None) -> None:
        """Load a model; raises what `lease` does. It is nobody's use of it, for `configure`."""
        entry = await self._entry(name)
        self._check_queue(entry)
        entry.preloading += 1
        try:
            await self._ready(entry, wait=True)
        finally:
            entry.preloading -= 1
            self._stopped_waiting(entry)
        self._left(entry, access.owner(), keep_alive)

    def pin(self, name: str, settings: ModelSettings | None = None) -> None:
        """Have `start` load a model that is to stay; `readiness` waits for it."""
        self._pins.add(name, settings)

    # What there is

    def running(self) -> list[RunningModel]:
        """Return the models that are loaded, being loaded or being unloaded."""
        return [
            shown(entry, stored)
            for entry in self._entries.values()
            if entry.state is not ModelState.UNLOADED
            and (stored := self._names.view_of(entry.stored)) is not None
        ]

    def entries(self) -> list[Entry]:
        """Return all models that were ever used, for their counters."""
        return [e for e in self._entries.values() if self._names.view_of(e.stored) is not None]

    def readiness(self) -> tuple[bool, str]:
        """Return whether all models that are to stay are loaded, and if not, why."""
        if self.is_closing:
            return False, "the server is shutting down"
        ready, why = self._pins.readiness()
        if not ready and access.is_restricted():  # `why` names models
            return False, "the models are not all loaded"
        return ready, why

    # Settings

    async def settings(self, name: str) -> ModelSettings:
        """Return the settings of a model: its own over those of all."""
        stored = await self.find(name)
        return self._settings_of(stored.key)

    def configured(self) -> dict[str, ModelSettings]:
        """Return the settings that models were given, by key."""
        return dict(self._configured)

    async def configure(self, name: str, settings: ModelSettings) -> None:
        """Give a model settings; one that is loaded with others is unloaded.

        Raises `UsageError` for settings that make no sense, and `BusyError` if the model is in use
        with others, or held by others than the API key of a request that may manage nothing.
        """
        settings.check()
        entry = await self._entry(name)
        key = entry.stored.key
        if self._configured.get(key, ModelSettings()) == settings:
            return
        if entry.state is not ModelState.UNLOADED:
            if entry.users or entry.waiting or entry.state is ModelState.LOADING:
                raise BusyError(f"the model {name} is in use with other settings")
            if not self._may_unload(entry):
                raise BusyError(f"the model {name} is kept loaded with other settings")
            await self._unload(entry, grace=0)
        self._configured[key] = settings
        if settings.keep_alive is not None:
            entry.keep_alive = settings.keep_alive
            entry.holds.clear()
        if entry.pinned:
            self._spawn(self._load_again(entry))

    # Unloading

    async def unload(
        self,
        names: Iterable[str] | None = None,
        *,
        grace: float | None = None,
        idle_only: bool = False,
    ) -> list[str]:
        """Unload these models, or all; return the names of those that were loaded.

        Requests under way get `grace` seconds (None: the pool's), then they fail; with `idle_only`,
        models that are in use or being loaded stay, and are not among the names. Those that were
        pinned no longer are. For a request that may manage nothing, the models stay that others use
        or hold.
        """
        entries = self.entries() if names is None else [await self._entry(n) for n in names]
        if idle_only or access.is_restricted():
            entries = [e for e in entries if e.is_idle]
        entries = [e for e in entries if self._may_unload(e)]
        for entry in entries:
            self._pins.remove(entry)
        loaded = [e for e in entries if e.state is not ModelState.UNLOADED]
        limit = self._grace if grace is None else grace
        unloading = (self._unload(e, grace=limit, unless_used=idle_only) for e in loaded)
        await asyncio.gather(*unloading)
        return [entry.name for entry in loaded]

    async def reap(self) -> float:
        """Unload what has been idle for long enough; return the seconds until there may be more."""
        now = self.clock()
        for entry in list(self._entries.values()):
            if entry.expires(now):
                await self._unload(entry, grace=0)
        waits = [
            entry.hold.last_used + entry.hold.keep_alive - now
            for entry in self._entries.values()
            if entry.may_go
        ]
        return max(0.0, min(waits, default=math.inf))

    # From start to end

    async def start(self) -> None:
        """Begin to load what is pinned, and to unload what is idle; returns at once."""
        self._reaper = asyncio.create_task(self._reap_for_ever())
        for name, pin in self._pins:
            self._spawn(self._load_pinned(name, pin))

    async def close(self, *, grace: float | None = None) -> None:
        """Unload everything; requests under way get `grace` seconds (None: the pool's)."""
        self.is_closing = True
        for entry in self.entries():
            if entry.budget is not None:
                entry.budget.cancel()
        await self._memory_changed()
        tasks = [task for task in (self._reaper, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.unload(grace=grace)

    # Details

    async def _entry(self, name: str) -> Entry:
        stored = await self._names.find(name)
        entry = self._entries.get(stored.key)
        if entry is None:
            kept = self._settings_of(stored.key).keep_alive
            entry = Entry(stored, self._keep_alive if kept is None else kept)
            entry.idle.set()
            self._entries[stored.key] = entry
        return entry

    def _may_unload(self, entry: Entry) -> bool:
        """Return whether the current request may unload a model that others may want to stay."""
        held = entry.is_held_by_others(access.owner(), self.clock())
        return not (access.is_restricted() and held)

    def _settings_of(self, key: str) -> ModelSettings:
        return self._configured.get(key, ModelSettings()).over(self._settings)

    async def _ready(self, entry: Entry, wait: bool) -> ServedModel:
        """Return the model of an entry, once it is loaded; whoever comes shares one load."""
        while True:
            if entry.state is ModelState.READY:
                assert entry.engine is not None
                assert entry.model is not None
                if entry.engine.state is EngineState.READY:
                    return entry.model
                _log.error("the engine of %s is %s", entry.name, entry.engine.state)
                await self._unload(entry, grace=0)
            if not wait:
                raise LoadingError(
                    f"the model{_named(entry)} is being loaded", retry_after=RETRY_AFTER
                )
            if self.is_closing:
                raise LoadingError("the server is shutting down", retry_after=RETRY_AFTER)
            if entry.state is ModelState.UNLOADED:
                entry.state = ModelState.LOADING
                entry.change = asyncio.create_task(self._load(entry))
            assert entry.change is not None
            change, loads = entry.change, entry.state is ModelState.LOADING
            with suppress(Exception):
                await asyncio.shield(change)
            if loads and entry.failure is not None and entry.change is change:
                raise _told_failure(entry.failure)

    async def _load(self, entry: Entry) -> None:
        entry.budget = LoadBudget(self._load_seconds)
        try:
            await self._load_within(entry, entry.budget)
        finally:
            entry.budget = None
            await self._memory_changed()

    async def _load_within(self, entry: Entry, budget: LoadBudget) -> None:
        settings = self._settings_of(entry.stored.key)
        entry.settings = settings
        entry.failure = None
        try:
            loaded = await self._loaded(entry, settings, budget)
            if loaded.engine.state is not EngineState.READY:  # else it would be loaded for ever
                await asyncio.to_thread(loaded.engine.close)
                raise ModelLoadError(f"the engine of {entry.name} died as soon as it was loaded")
        except BaseException as error:  # noqa: BLE001 - waiting callers get it
            entry.state = ModelState.UNLOADED
            entry.memory = 0
            if isinstance(error, LoadCancelledError):  # whoever wants it since loads it anew
                _log.info("the load of %s was cancelled: nobody waits for it", entry.name)
                return
            failure = as_error(error, f"loading {entry.name}")
            entry.failure = failure
            _log.warning("the model %s could not be loaded: %s", entry.name, told(failure))
            return
        entry.engine = loaded.engine
        entry.memory = loaded.engine.memory_bytes or entry.memory
        entry.model = ServedModel(
            entry.name,
            loaded.engine,
            model_type=loaded.model_type,
            defaults=settings.sampling_defaults(loaded.defaults),
            presets={name: preset.sampling for name, preset in PRESETS.items()},
            preface=loaded.preface,
            reasoning_budget=settings.reasoning_budget,
        )
        entry.state = ModelState.READY
        entry.last_used = self.clock()
        self._wake.set()

    async def _loaded(
        self, entry: Entry, settings: ModelSettings, budget: LoadBudget
    ) -> LoadedEngine:
        """Load a model; idle ones give way if the engine finds that it does not fit."""
        room = await self._reserve(entry, settings, budget)
        while True:
            try:
                return await self._within_deadline(entry, settings, room, budget)
            except OutOfMemoryError:
                async with self._room:
                    victim = self._budget.victim(entry)
                    if victim is None:
                        raise
                    await self._unload(victim, grace=0)
                    room = self._budget.reserve(entry, entry.memory)

    async def _within_deadline(
        self, entry: Entry, settings: ModelSettings, room: int | None, budget: LoadBudget
    ) -> LoadedEngine:
        """Run the load in a thread; abandon it, and keep its memory reserved, if it hangs."""
        with applied(budget):
            work = asyncio.create_task(
                asyncio.to_thread(self.catalogue.load, entry.stored, settings, entry.meter, room)
            )
        done, _ = await asyncio.wait({work}, timeout=budget.remaining())
        if done:
            return work.result()
        budget.cancel()
        self._budget.abandoned += entry.memory
        self._spawn(self._clear_away(work, entry.memory))
        raise budget.expired()

    async def _clear_away(self, work: asyncio.Task[LoadedEngine], memory: int) -> None:
        """Free what an abandoned load took, once its thread ends."""
        try:
            with suppress(Exception):
                loaded = await asyncio.shield(work)
                await asyncio.to_thread(loaded.engine.close)
        finally:
            self._budget.abandoned -= memory
            await self._memory_changed()

    async def _reserve(
        self, entry: Entry, settings: ModelSettings, budget: LoadBudget
    ) -> int | None:
        """Reserve memory for a model, unloading idle ones until it fits; return the bytes.

        While other models are being loaded it waits for what they leave.
        """
        with applied(budget):
            need = await asyncio.to_thread(self.catalogue.needs, entry.stored, settings)
        async with self._room:
            while (free := self._budget.free()) is not None and need > free:
                victim = self._budget.victim(entry)
                if victim is not None:
                    await self._unload(victim, grace=0)
                elif self._budget.may_grow(entry, need):
                    await self._room.wait()
                    budget.check()
                else:
                    raise self._budget.too_large(entry, need)
            return self._budget.reserve(entry, need)

    def _stopped_waiting(self, entry: Entry) -> None:
        """Cancel the load of a model that nobody waits for and that is not pinned."""
        wanted = entry.waiting or entry.preloading or (entry.pinned and not self.is_closing)
        if entry.budget is not None and not wanted:
            entry.budget.cancel()
        if any(other.budget is not None for other in self._entries.values()):
            self._spawn(self._memory_changed())  # this model may be idle now

    async def _memory_changed(self) -> None:
        async with self._room:
            self._room.notify_all()

    def _check_queue(self, entry: Entry) -> None:
        waiting = entry.waiting + entry.preloading
        if entry.state is not ModelState.READY and waiting >= self._max_waiting:
            text = f"{waiting} requests wait for the model{_named(entry)}"
            raise LoadingError(text, retry_after=RETRY_AFTER)

    def _left(self, entry: Entry, owner: str | None, keep_alive: float | None) -> None:
        """Take note that somebody no longer needs a model."""
        entry.last_used = self.clock()
        if keep_alive is None:
            before = entry.holds.get(owner)
            keep_alive = entry.keep_alive if before is None else before.keep_alive
        elif not access.is_restricted():
            entry.holds.clear()  # who manages models decides for all
        entry.holds[owner] = Hold(entry.last_used, keep_alive)
        if not entry.users:
            entry.idle.set()
            if entry.expires(entry.last_used):
                self._spawn(self._unload(entry, grace=0, unless_used=True))
        self._wake.set()

    async def _unload(self, entry: Entry, *, grace: float, unless_used: bool = False) -> None:
        """Unload a model, whatever it is doing; who wants it meanwhile waits and loads it anew."""
        while entry.state in (ModelState.LOADING, ModelState.UNLOADING):
            assert entry.change is not None
            with suppress(Exception):
                await asyncio.shield(entry.change)
        if entry.state is not ModelState.READY or (unless_used and entry.users):
            return
        entry.state = ModelState.UNLOADING
        entry.change = asyncio.create_task(self._take_down(entry, grace))
        await asyncio.shield(entry.change)

    async def _take_down(self, entry: Entry, grace: float) -> None:
        engine = entry.engine
        assert engine is not None
        try:
            if entry.users and grace > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(entry.idle.wait(), grace)
            await asyncio.to_thread(engine.close)
        except EngineError as error:
            _log.warning("unloading %s: %s", entry.name, error)
        finally:
            entry.past = entry.stats().counters()
            entry.engine = entry.model = None
            entry.memory = 0
            entry.holds.clear()
            entry.state = ModelState.UNLOADED
            kept = self._settings_of(entry.stored.key).keep_alive
            entry.keep_alive = self._keep_alive if kept is None else kept
            self._spawn(self._memory_changed())

    async def _reap_for_ever(self) -> None:
        while not self.is_closing:  # a cancellation may be lost: `wait_for` of 3.11 swallows some
            self._wake.clear()
            wait = await self.reap()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), None if wait == math.inf else wait)

    async def _load_pinned(self, name: str, pin: Pin) -> None:
        try:
            entry = pin.entry = await self._entry(name)
            entry.pinned = True
            if pin.settings is not None:
                self._configured[entry.stored.key] = pin.settings
            await self.preload(name)
        except Exception as error:  # noqa: BLE001 - `readiness` tells; it is tried again at use
            if pin.entry is None:  # else `_load` has told
                pin.failure = error
                _log.error("the model %s could not be loaded: %s", name, error)

    async def _load_again(self, entry: Entry) -> None:
        with suppress(ModelpackError):  # `readiness` tells
            await self._ready(entry, wait=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _named(entry: Entry) -> str:
    """Return the name of a model for an error, nothing where another name of it may be known."""
    return "" if access.is_restricted() else f" {entry.name}"


def _told_failure(failure: Exception) -> Exception:
    """Return what the current request is told; the log has names and sizes of other models."""
    if not access.is_restricted():
        return failure
    if isinstance(failure, OutOfMemoryError):
        return OutOfMemoryError("the model does not fit into the memory that is free")
    if isinstance(failure, UntrustedError):
        return UntrustedError("the model is not trusted here")
    return ModelLoadError("the model could not be loaded", hint="the server's log says why")
