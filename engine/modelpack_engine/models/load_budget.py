"""LoadBudget: limits on the time and the number of modules of loading one model.

The pool sets the budget of a load with `applied`; loaders call `checkpoint` between their steps,
and `count_modules` bounds the module tree while mlx-lm's constructor builds it.
"""

from __future__ import annotations

import contextvars
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from modelpack_engine.errors import LoadCancelledError, ModelLoadError

#: Seconds that one load may take: 400 GB from a disk that reads 250 MB/s.
LOAD_SECONDS = 1800.0


class LoadBudget:
    """The budget of one load. Any thread may cancel it; the thread that loads checks it."""

    def __init__(
        self, seconds: float = LOAD_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._deadline = clock() + seconds
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Make the next check raise `LoadCancelledError`."""
        self._cancelled.set()

    def remaining(self) -> float:
        """Return the seconds until the deadline."""
        return max(0.0, self._deadline - self._clock())

    def check(self) -> None:
        """Raise `LoadCancelledError` if nobody waits, `ModelLoadError` after the deadline."""
        if self.is_cancelled:
            raise LoadCancelledError("the load was cancelled: nobody waits for the model any more")
        if self._clock() >= self._deadline:
            raise self.expired()

    def expired(self) -> ModelLoadError:
        """Return the error of a load that takes too long."""
        return ModelLoadError(f"loading took longer than {self.seconds:.0f} s")


_budget: contextvars.ContextVar[LoadBudget | None] = contextvars.ContextVar(
    "load_budget", default=None
)
_counter: contextvars.ContextVar[_ModuleCounter | None] = contextvars.ContextVar(
    "module_counter", default=None
)


class _ModuleCounter:
    def __init__(self, limit: int, what: str) -> None:
        self.limit = limit
        self.what = what
        self.count = 0

    def add(self) -> None:
        self.count += 1
        if self.count > self.limit:
            raise ModelLoadError(
                f"{self.what}: the sizes in the configuration need more than {self.limit}"
                " modules, which the tensors in the files do not justify"
            )
        if self.count % 256 == 0:
            checkpoint()


@contextmanager
def applied(budget: LoadBudget) -> Iterator[LoadBudget]:
    """Make `budget` the current one; threads started by `asyncio.to_thread` inherit it."""
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


def checkpoint() -> None:
    """Raise if the current budget is spent or cancelled; does nothing without one."""
    budget = _budget.get()
    if budget is not None:
        budget.check()


@contextmanager
def count_modules(limit: int, what: str) -> Iterator[None]:
    """Raise `ModelLoadError` once this thread creates more than `limit` modules of MLX.

    MLX's arrays are lazy, its modules are not: a layer takes memory as soon as it is built.
    """
    with _install_lock:
        _install()
    token = _counter.set(_ModuleCounter(limit, what))
    try:
        yield
    finally:
        _counter.reset(token)


_install_lock = threading.Lock()


@cache
def _install() -> None:
    """Make the constructor of modules count them inside `count_modules`."""
    from mlx.nn.layers.base import Module

    original = Module.__init__

    def __init__(self: Module) -> None:
        counter = _counter.get()
        if counter is not None:
            counter.add()
        original(self)

    Module.__init__ = __init__


#: The longest context: positions are 32-bit integers.
MAX_POSITIONS = 2**31 - 1
# The most packed weights in a word of 32 bits.
_PACKED = 32
# The modules allowed per tensor: its own, and containers, rotations and activations.
_MODULES_PER_TENSOR = 8
_MODULES = 1024
_SMALL = 4096  # sizes up to this need no tensor to justify them: kernels, groups, chunks
_MAX_DEPTH = 16

_LAYERS = re.compile(r"(num_|n_)(hidden_|transformer_|decoder_|encoder_)?layers?|block_count|depth")
_POSITIONS = re.compile(r".*(position|context|ctx|seq_?len|seq_length|max_length|window).*")
# Numbers that are not sizes: ids, bases of rotations, scales, and settings of the training.
_NOT_SIZES = re.compile(
    r".*(token|_ids?$|^id2|theta|base|freq|scal|factor|seed|coef|loss|version|param|flops|global_step"
    r"|limit|budget|pixels|timeout|checkpoint|epoch|memory|transformers).*"
)
# Parts that are not loaded: encoders of images and sound.
_LEFT_OUT = re.compile(r".*(vision|audio|image|video|speech|visual|projector|talker|code2wav).*")
_INDEX = re.compile(r"(?<![^._])\d+(?![^._])")


@dataclass(frozen=True, slots=True)
class TensorBounds:
    """The number of layers and of tensors in the files, and the largest dimension of a tensor."""

    layers: int
    tensors: int
    largest: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Iterable[int]]]) -> TensorBounds:
        """Return the bounds of tensors with these names and shapes."""
        indices: dict[str, set[str]] = defaultdict(set)
        count, largest = 0, 1
        for name, shape in shapes:
            count += 1
            largest = max(largest, *shape, 1)
            if found := _INDEX.search(name):
                indices[name[: found.start()]].add(found.group())
        return cls(max(map(len, indices.values()), default=0), count, largest)

    def check(self, config: Mapping[str, Any], what: str = "config.json") -> None:
        """Raise `ModelLoadError`, naming the field, for a size that no tensor justifies."""
        for name, value in _integers(config, 0):
            key = name.rpartition(".")[2]
            if value < -_SMALL:
                raise ModelLoadError(f"{what}: {name} is {_shown(value)}, which is negative")
            if _NOT_SIZES.fullmatch(key):
                continue
            if _POSITIONS.fullmatch(key):
                limit, why = MAX_POSITIONS, "positions are 32-bit integers"
            elif _LAYERS.fullmatch(key):
                limit, why = 2 * self.layers, f"the tensors belong to {self.layers} layers"
            else:
                limit = max(_SMALL, _PACKED * self.largest)
                why = f"the largest dimension of a tensor is {self.largest}"
            if value > limit:
                raise ModelLoadError(
                    f"{what}: {name} is {_shown(value)}, but {why}",
                    hint="check that the configuration belongs to these weights",
                )

    @contextmanager
    def building(self, what: str) -> Iterator[None]:
        """Limit the modules that this context creates, by the number of tensors."""
        checkpoint()
        with count_modules(_MODULES + _MODULES_PER_TENSOR * self.tensors, what):
            yield


def _integers(config: Mapping[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, int]]:
    if depth > _MAX_DEPTH:
        raise ModelLoadError(f"config.json: {prefix[:100]} is nested too deeply")
    for key, value in config.items():
        if _LEFT_OUT.fullmatch(key):
            continue
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, dict):
                yield from _integers(item, depth + 1, f"{prefix}{key}.")
            elif isinstance(item, int) and not isinstance(item, bool):
                yield f"{prefix}{key}", item
            elif isinstance(item, float) and item.is_integer() and abs(item) < 1e300:
                yield f"{prefix}{key}", int(item)


def _shown(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
