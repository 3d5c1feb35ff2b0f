"""ModelPool: load models on use, unload idle ones, and keep within the memory budget."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

from modelpack.errors import ModelpackError, NotFoundError, UntrustedError, UsageError
from modelpack.operations.adapters import base_name
from modelpack_engine.async_engine import EngineClient, EngineState
from modelpack_engine.errors import (
    RETRY_AFTER,
    BusyError,
    EngineError,
    LoadCancelledError,
    LoadingError,
    ModelLoadError,
    OutOfMemoryError,
    RequestError,
    as_error,
)
from modelpack_engine.models.load_budget import LOAD_SECONDS, LoadBudget, applied
from modelpack_engine.models.load_progress import LoadProgress, watched
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.pool import names as access
from modelpack_server.pool.adapters import (
    AdapterLoading,
    Adapters,
    ServedAdapter,
    check_adapter_name,
)
from modelpack_server.pool.catalogue import Catalogue, LoadedEngine, StoredModel
from modelpack_server.pool.entry import (
    Entry,
    Hold,
    ModelState,
    Pin,
    RunningModel,
    readiness,
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

#: The seconds that running requests get before their model is unloaded.
GRACE = 30.0
#: The limit of requests that wait for one model.
MAX_WAITING = 1024


class ModelPool:
    """The models of a catalogue, on one event loop; users acquire a model with `lease`.

    Lookups and lists are limited to the current request (`names`): models that its API key may not
    use, and names that it may not see, do not exist for it.

    `memory` is the budget for all loaded models, in bytes (None: only the machine's limit).
    `keep_alive` is the number of seconds for which a model stays loaded after its last use,
    `max_waiting` the limit of requests that wait for one model. A load that takes longer than
    `load_seconds` is abandoned; a load for which no request waits is cancelled. Several models may
    load concurrently. `clock` is a monotonic clock in seconds. If memory is short, the pool unloads
    idle models, least recently used first, but no pinned models. With `adapter_loading`, requests
    may load and unload adapters.

    `on_ready` is called once all models that `start` loads are loaded; `on_failure`, with name and
    error, once one of them is not, instead of logging it. `on_progress` gets the name and the
    progress of each load in the thread that loads, and None when the load has ended. Failed loads
    are logged, unless those who wait for them print the error (`logs_failures`).
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
        adapter_loading: AdapterLoading | None = None,
        on_ready: Callable[[], None] | None = None,
        on_failure: Callable[[str, Exception], None] | None = None,
        on_progress: Callable[[str, LoadProgress | None], None] | None = None,
        logs_failures: bool = True,
    ) -> None:
        self.catalogue = catalogue
        self.adapter_loading = adapter_loading
        self.clock = clock
        self.is_closing = False
        self._settings = settings or ModelSettings()
        default = parse_keep_alive(DEFAULT_KEEP_ALIVE)
        self._keep_alive = default if keep_alive is None else keep_alive
        self._grace = grace
        self._max_waiting = max_waiting
        self._load_seconds = load_seconds
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._on_progress = on_progress
        self._logs_failures = logs_failures
        self._entries: dict[str, Entry] = {}
        self._budget = MemoryBudget(memory, self._entries.values())
        # By key, also for models that are not loaded.
        self._configured: dict[str, ModelSettings] = {}
        self._pins: dict[str, Pin] = {}  # by the name in `pin`
        self._names = Names(catalogue)
        self._changing_adapters: set[str] = set()
        self._making_slots = asyncio.Lock()
        self._room = asyncio.Condition()  # one load at a time reserves memory
        self._reaper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def memory(self) -> int | None:
        """The budget for all models, in bytes."""
        return self._budget.total

    # Names

    def alias(self, name: str, target: str) -> None:
        """Add the alias `name` for the model `target`."""
        self._names.give(name, target)

    async def aliases(self) -> dict[str, StoredModel]:
        """Return the aliases and their models."""
        return {n: m for n, m in (await self._names.given()).items() if not _is_merged_base(m)}

    async def find(self, name: str) -> StoredModel:
        """Return the stored model with this name; raise `NotFoundError`."""
        found = self._names.view_of(await self._names.find(name))
        assert found is not None, "`Names.find` returned it, so the request may see it"
        return found

    async def stored(self) -> Sequence[StoredModel]:
        """Return all models that can be loaded."""
        found = await asyncio.to_thread(self.catalogue.stored)
        views = [model for one in found if (model := self._names.view_of(one)) is not None]
        return [model for model in views if not _is_merged_base(model)]

    # Leases

    @asynccontextmanager
    async def lease(
        self, name: str, *, keep_alive: float | None = None, wait: bool = True
    ) -> AsyncIterator[ServedModel]:
        """Acquire a model, loading it if needed; it stays loaded until released.

        The name of an adapter acquires its base, for requests that use the adapter.

        `keep_alive` replaces the seconds for which it stays loaded afterwards; `math.inf` means
        without end. Raises `NotFoundError`, what loading raises, and `LoadingError` if the model is
        not ready and `wait` is false, or if too many requests wait.
        """
        stored = await self._names.find(name)
        if _is_merged_base(stored):
            raise _without_adapter(name, stored.merged)
        entry = await self._entry_of(stored)
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
            if stored.adapter:
                model = model.with_adapter(stored.adapter, is_merged=bool(stored.merged))
            yield model
        finally:
            entry.users -= 1
            self._left(entry, owner, keep_alive)

    async def preload(self, name: str, *, keep_alive: float | None = None) -> None:
        """Load a model; raises what `lease` raises. For `configure`, it does not count as a use."""
        entry = await self._entry(name)
        self._check_queue(entry)
        entry.preloading += 1
        try:
            await self._ready(entry, wait=True)
        finally:
            entry.preloading -= 1
            self._stopped_waiting(entry)
        self._left(entry, access.owner(), keep_alive)

    def pin(self, name: str) -> None:
        """Pin a model: `start` loads it, and `readiness` includes it."""
        self._pins[name] = Pin()

    # State

    def running(self) -> list[RunningModel]:
        """Return the models that are loaded, loading or unloading."""
        return [
            shown(entry, stored)
            for entry in self._entries.values()
            if entry.state is not ModelState.UNLOADED
            and (stored := self._names.view_of(entry.stored)) is not None
        ]

    def context_size(self, model: StoredModel) -> int | None:
        """Return the tokens of a context: as the model is loaded, or else as it is stored."""
        entry = self._entries.get(model.base or model.key)
        loaded = None if entry is None else shown(entry, entry.stored).context_size
        return loaded or model.context_size

    def entries(self) -> list[Entry]:
        """Return the entries of all models used so far, for their counters."""
        return [e for e in self._entries.values() if self._names.view_of(e.stored) is not None]

    def readiness(self) -> tuple[bool, str]:
        """Return whether all pinned models are loaded, and if not, the reason."""
        if self.is_closing:
            return False, "the server is shutting down"
        ready, why = readiness(self._pins)
        for pin in self._pins.values():
            if pin.entry is not None and pin.entry.has_failed:
                # No request may come to load it again while the server is not ready.
                self._spawn(self._revive(pin.entry))
        if not ready and access.is_restricted():  # `why` contains names of models
            return False, "not all models are loaded"
        return ready, why

    # Settings

    async def settings(self, name: str) -> ModelSettings:
        """Return the settings of a model: its own, completed by the pool's."""
        stored = await self.find(name)
        return self._settings_of(stored.base or stored.key)

    def uses_drafters(self) -> bool:
        """Return whether models run with their drafters, so that a pull should fetch these."""
        return self.catalogue.uses_drafters(self._settings)

    def configured(self) -> dict[str, ModelSettings]:
        """Return the settings of `configure` calls, by key."""
        return dict(self._configured)

    async def configure(self, name: str, settings: ModelSettings) -> None:
        """Set the settings of a model; unload it if it is loaded with other settings.

        A pinned model is loaded again before this returns. If that fails, the model gets its
        previous settings back, and what the load raised is raised.

        Raises `UsageError` for an adapter, and for settings that are invalid or that the model
        cannot have, `OutOfMemoryError` for those that need more than the whole budget, and
        `BusyError` if the model is in use with other settings, or if a restricted API key
        configures a model that other keys keep loaded.
        """
        settings.check()
        stored = await self._names.find(name)
        if stored.adapter:
            raise UsageError(f"{name} is an adapter", hint="configure its base")
        entry = await self._entry_of(stored)
        key = stored.key
        before = self._configured.get(key, ModelSettings())
        if before == settings:
            return
        await self._check_fits(entry, settings)
        was_loaded = entry.state is ModelState.READY
        if entry.state is not ModelState.UNLOADED:
            if entry.users or entry.waiting or entry.state is ModelState.LOADING:
                raise BusyError(f"the model {name} is in use with other settings")
            if not self._may_unload(entry):
                raise BusyError(f"the model {name} is kept loaded with other settings")
            await self._unload(entry, grace=0)
        self._set(entry, settings)
        if not entry.pinned:
            return
        try:
            await self._ready(entry, wait=True)
        except Exception:
            self._set(entry, before)
            if was_loaded:
                await self._unload(entry, grace=0)  # a request may have loaded it meanwhile
                await self._ready(entry, wait=True)
            raise

    async def _check_fits(self, entry: Entry, settings: ModelSettings) -> None:
        chosen = settings.over(self._settings)
        try:
            need = await asyncio.to_thread(self.catalogue.needs, entry.stored, chosen)
        except ModelLoadError as error:
            raise UsageError(str(error), hint=error.hint) from error
        if not self._budget.holds(need):
            raise self._budget.too_large(entry, need)

    def _set(self, entry: Entry, settings: ModelSettings) -> None:
        self._configured[entry.stored.key] = settings
        entry.keep_alive = self._keep_alive_of(entry.stored.key)
        entry.holds.clear()

    # Adapters

    async def load_adapter(self, name: str, source: str) -> None:
        """Add an adapter, which requests may then name; its base is loaded if needed.

        `source` is a reference, or an absolute path in a directory that the operator allows, for
        the model that was pinned first. Raises `RequestError` for a name that is taken, `BusyError`
        while the name is being loaded or unloaded, `OutOfMemoryError`, and what
        `AdapterLoading.open`, `lease` and `EngineClient.add_adapter` raise.
        """
        loading = self._adapter_loading()
        check_adapter_name(name)
        with self._changing(name):
            await self._check_untaken(name)
            first = next(iter(self._pins), None)
            if source.startswith("/") and first is None:
                raise UsageError("directories are for the server's first MODEL, but it has none")
            model = await self._names.find(first) if first is not None else None
            base = (model.base or model.key) if model is not None else ""
            adapter = await asyncio.to_thread(loading.open, name, source, base)
            try:
                await self._add_adapter(loading, adapter)
            except BaseException:
                adapter.discard()
                raise

    async def _add_adapter(self, loading: AdapterLoading, adapter: ServedAdapter) -> None:
        adapters = loading.adapters
        try:
            await self._names.find(adapter.base)
        except NotFoundError:
            base = base_name(adapter.model)
            raise NotFoundError(
                f"the base of the adapter is not stored: {base}", hint=f"pull {base}"
            ) from None
        try:
            await self._make_slots(adapter.base, adapters)
            await self._add_to_engine(loading, adapter)
        except BaseException:
            if not adapters.of(adapter.base):
                adapters.expected.discard(adapter.base)
            self._spawn(self._load_again(adapter.base))
            raise

    async def _revive(self, entry: Entry) -> None:
        """Load a model again whose engine has failed."""
        with suppress(ModelpackError):  # `readiness` tells
            await self._ready(entry, wait=True)

    async def _load_again(self, base: str) -> None:
        """Load a pinned model that could not be loaded with slots for adapters."""
        entry = self._entries.get(base)
        if entry is not None and entry.pinned and entry.state is ModelState.UNLOADED:
            with suppress(ModelpackError):  # `readiness` tells
                await self.preload(base)

    async def _make_slots(self, base: str, adapters: Adapters) -> None:
        """Let a model be loaded with slots for adapters, again if it runs without.

        On a CPU, not MLX but our library or llama.cpp may run it. Running requests get the pool's
        grace, and then fail.
        """
        async with self._making_slots:
            entry = await self._entry(base)
            if entry.state is not ModelState.UNLOADED:
                async with self.lease(base):
                    engine = entry.engine
                    if not isinstance(engine, EngineClient) or engine.runs_adapters:
                        return
            adapters.expected.add(base)
            if entry.state is not ModelState.UNLOADED:
                _log.info("%s is loaded again, to run adapters", entry.name)
                await self._unload(entry, grace=self._grace)

    async def _add_to_engine(self, loading: AdapterLoading, adapter: ServedAdapter) -> None:
        adapters = loading.adapters
        async with self.lease(adapter.base):
            entry = self._entries[adapter.base]
            engine = entry.engine
            if not isinstance(engine, EngineClient):
                raise RequestError("the base of the adapter generates no text", param="lora_path")
            read = await asyncio.to_thread(adapter.verified, loading.remote)
            reserved = adapters.bytes_of(adapter.base, adapter) - adapters.bytes_of(adapter.base)
            await self._grow(entry, reserved)
            try:
                await engine.add_adapter(adapter.name, read, adapter.key)
            finally:
                if entry.engine is engine:
                    entry.memory -= reserved
            before = adapters.bytes_of(adapter.base)  # other adapters may have changed
            adapters.add(adapter)
            if entry.engine is engine:
                entry.memory += adapters.bytes_of(adapter.base) - before

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter: requests that use it go on, others do not find it any more.

        Raises `NotFoundError` for a name that is no adapter's, and `BusyError` while it is being
        loaded or unloaded.
        """
        adapters = self._adapter_loading().adapters
        with self._changing(name):
            adapter = adapters.named(name)
            if adapter is None or adapter.name != name:
                raise NotFoundError(f"The lora adapter '{name[:200]}' cannot be found.")
            entry = self._entries.get(adapter.base)
            while entry is not None and entry.state is ModelState.LOADING:
                assert entry.change is not None
                await asyncio.wait({entry.change})  # its engine gets the adapter
            before = adapters.bytes_of(adapter.base)
            adapters.remove(adapter)
            if not adapters.of(adapter.base):
                adapters.expected.discard(adapter.base)  # when it is loaded again
            if entry is None or not isinstance(engine := entry.engine, EngineClient):
                return
            entry.memory -= before - adapters.bytes_of(adapter.base)
            with suppress(NotFoundError, EngineError):  # the model may be unloaded meanwhile
                await engine.remove_adapter(name)

    async def _check_untaken(self, name: str) -> None:
        try:
            found = await self._names.find(name)
        except NotFoundError:
            return
        if found.adapter == name:
            text = f"The lora adapter '{name}' has already been loaded."  # vLLM's
            raise RequestError(text, param="lora_name")
        raise RequestError(f"{name} is the name of a model, {found.key}", param="lora_name")

    def _adapter_loading(self) -> AdapterLoading:
        if self.adapter_loading is None:
            raise UsageError(
                "this server loads no adapters", hint="start it with --allow-adapter-loading"
            )
        return self.adapter_loading

    @contextmanager
    def _changing(self, adapter: str) -> Iterator[None]:
        """Refuse a second change of the same adapter during the block."""
        if adapter in self._changing_adapters:
            raise BusyError(f"the adapter {adapter} is being loaded or unloaded")
        self._changing_adapters.add(adapter)
        try:
            yield
        finally:
            self._changing_adapters.discard(adapter)

    async def _grow(self, entry: Entry, more: int) -> None:
        """Reserve `more` bytes for a loaded model, unloading idle models until they fit."""
        async with self._room:
            while (free := self._budget.free()) is not None and more > free:
                victim = self._budget.victim(entry)
                if victim is None:
                    raise OutOfMemoryError(
                        f"the adapter needs about {more} bytes, and {max(0, free)} are free",
                        hint="unload a model or an adapter, or raise --memory",
                    )
                await self._unload(victim, grace=0)
            entry.memory += more

    # Unloading

    async def unload(
        self,
        names: Iterable[str] | None = None,
        *,
        grace: float | None = None,
        idle_only: bool = False,
    ) -> list[str]:
        """Unload these models, or all; return the names of those that were loaded.

        Running requests get `grace` seconds (None: the pool's) and then fail. With `idle_only`,
        models that are in use or loading stay loaded and are not returned. Pinned models are
        unpinned. A restricted API key cannot unload models that other keys use or keep loaded.
        """
        entries = self.entries() if names is None else [await self._entry(n) for n in names]
        if idle_only or access.is_restricted():
            entries = [e for e in entries if e.is_idle]
        entries = [e for e in entries if self._may_unload(e)]
        for entry in entries:
            entry.pinned = False
            self._pins = {name: pin for name, pin in self._pins.items() if pin.entry is not entry}
        loaded = [e for e in entries if e.state is not ModelState.UNLOADED]
        limit = self._grace if grace is None else grace
        unloading = (self._unload(e, grace=limit, unless_used=idle_only) for e in loaded)
        await asyncio.gather(*unloading)
        return [entry.name for entry in loaded]

    async def reap(self) -> float:
        """Unload models whose keep-alive time is over; return the seconds until the next may be."""
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

    # Lifecycle

    async def start(self) -> None:
        """Start loading pinned models and unloading idle ones; return immediately."""
        self._reaper = asyncio.create_task(self._reap_for_ever())
        self._spawn(self._load_all_pinned())

    async def close(self, *, grace: float | None = None) -> None:
        """Unload all models; running requests get `grace` seconds (None: the pool's)."""
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

    # Internals

    async def _entry(self, name: str) -> Entry:
        return await self._entry_of(await self._names.find(name))

    async def _entry_of(self, stored: StoredModel) -> Entry:
        """Return the entry of a model, or of the base of an adapter."""
        if stored.adapter:
            stored = await self._names.base_of(stored)
        entry = self._entries.get(stored.key)
        if entry is None:
            entry = Entry(stored, self._keep_alive_of(stored.key))
            entry.idle.set()
            self._entries[stored.key] = entry
        return entry

    def _may_unload(self, entry: Entry) -> bool:
        """Return whether the current request may unload a model that others may keep loaded."""
        held = entry.is_held_by_others(access.owner(), self.clock())
        return not (access.is_restricted() and held)

    def _settings_of(self, key: str) -> ModelSettings:
        return self._configured.get(key, ModelSettings()).over(self._settings)

    def _keep_alive_of(self, key: str) -> float:
        kept = self._settings_of(key).keep_alive
        return self._keep_alive if kept is None else kept

    async def _ready(self, entry: Entry, wait: bool) -> ServedModel:
        """Return an entry's model when it is loaded; concurrent requests share one load."""
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
            if loaded.engine.state is not EngineState.READY:  # otherwise it would count as loaded
                await asyncio.to_thread(loaded.engine.close)
                raise ModelLoadError(f"the engine of {entry.name} died as soon as it was loaded")
        except BaseException as error:  # noqa: BLE001 - waiting callers get it
            entry.state = ModelState.UNLOADED
            entry.memory = 0
            if isinstance(error, LoadCancelledError):  # a later request loads it again
                _log.info("the load of %s was cancelled: no request waits for it", entry.name)
                return
            failure = as_error(error, f"loading {entry.name}")
            entry.failure = failure
            if self._logs_failures and not (entry.pinned and self._on_failure):
                _log.warning("cannot load the model %s: %s", entry.name, told(failure))
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
        """Load a model; if the engine finds that it does not fit, unload idle models and retry."""
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
        """Run the load in a thread; if it hangs, abandon it and keep its memory reserved."""
        progress = partial(self._on_progress, entry.name) if self._on_progress else None
        with applied(budget), watched(progress):
            work = asyncio.create_task(
                asyncio.to_thread(self.catalogue.load, entry.stored, settings, entry.meter, room)
            )
        try:
            done, _ = await asyncio.wait({work}, timeout=budget.remaining())
        finally:
            if self._on_progress is not None:
                self._on_progress(entry.name, None)
        if done:
            return work.result()
        budget.cancel()
        self._budget.abandoned += entry.memory
        self._spawn(self._clear_away(work, entry.memory))
        raise budget.expired()

    async def _clear_away(self, work: asyncio.Task[LoadedEngine], memory: int) -> None:
        """Free the memory of an abandoned load when its thread ends."""
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
        """Reserve memory for a model, unloading idle models until it fits; return the bytes.

        While other models are loading, it waits for the memory that they may free.
        """
        with applied(budget):
            limit = self._budget.obtainable(entry)
            need = await asyncio.to_thread(self.catalogue.needs, entry.stored, settings, limit)
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
        """Cancel the load of a model that is not pinned and for which no request waits."""
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
        """Record the end of a use of a model."""
        entry.last_used = self.clock()
        if keep_alive is None:
            before = entry.holds.get(owner)
            keep_alive = entry.keep_alive if before is None else before.keep_alive
        elif not access.is_restricted():
            entry.holds.clear()  # an unrestricted caller decides for all
        entry.holds[owner] = Hold(entry.last_used, keep_alive)
        if not entry.users:
            entry.idle.set()
            if entry.expires(entry.last_used):
                self._spawn(self._unload(entry, grace=0, unless_used=True))
        self._wake.set()

    async def _unload(self, entry: Entry, *, grace: float, unless_used: bool = False) -> None:
        """Unload a model in any state; requests that arrive meanwhile wait and load it again."""
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
            entry.keep_alive = self._keep_alive_of(entry.stored.key)
            self._spawn(self._memory_changed())

    async def _reap_for_ever(self) -> None:
        while not self.is_closing:  # Python 3.11's `wait_for` may lose a cancellation
            self._wake.clear()
            wait = await self.reap()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), None if wait == math.inf else wait)

    async def _load_all_pinned(self) -> None:
        await asyncio.gather(*(self._load_pinned(name, pin) for name, pin in self._pins.items()))
        self._on_failure = None
        if self._on_ready is not None and readiness(self._pins)[0]:
            self._on_ready()

    async def _load_pinned(self, name: str, pin: Pin) -> None:
        try:
            entry = pin.entry = await self._entry(name)
            entry.pinned = True
            await self.preload(name)
        except Exception as error:  # noqa: BLE001 - `readiness` tells; it is tried again at use
            if pin.entry is None:
                pin.failure = error
            if self.is_closing:
                return
            if self._on_failure is not None:
                self._on_failure(name, error)
                self._on_failure = None
            elif pin.entry is None:  # otherwise `_load` has logged it
                _log.error("cannot load the model %s: %s", name, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_merged_base(stored: StoredModel) -> bool:
    """Return whether a model has an adapter in its weights, and is not that adapter."""
    return bool(stored.merged) and not stored.adapter


def _without_adapter(name: str, merged: str) -> NotFoundError:
    if access.is_restricted():
        return NotFoundError(f"no such model: {name}")
    return NotFoundError(
        f"{name} is served with the adapter {merged} merged into its weights only",
        hint=f"request {merged}",
    )


def _named(entry: Entry) -> str:
    """Return the model's name for an error, or "" if the caller may not know this name."""
    return "" if access.is_restricted() else f" {entry.name}"


def _told_failure(failure: Exception) -> Exception:
    """Return the error for the current request, without names and sizes of other models."""
    if not access.is_restricted():
        return failure
    if isinstance(failure, OutOfMemoryError):
        return OutOfMemoryError("the model does not fit into the free memory")
    if isinstance(failure, UntrustedError):
        return UntrustedError("this server does not trust the model")
    return ModelLoadError("cannot load the model", hint="see the server's log for the reason")
