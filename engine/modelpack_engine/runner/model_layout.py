"""ModelLayout: what a model caches in each layer, found by running it on caches that record it.

MLX only builds the graph of this run, whose shapes and types are known; nothing is computed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.config import KVCacheDtype
from modelpack_engine.errors import EngineError
from modelpack_engine.kernels.quantised import GROUPS, quantisation
from modelpack_engine.platform import device

#: Bytes of all snapshots, or the share of a GPU's memory if that is more.
_SNAPSHOT_BYTES, _SNAPSHOT_SHARE = 256 * 1024**2, 64

#: The fewest and the most tokens between two snapshots.
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 512, 4096


class UnknownCacheError(EngineError):
    """A model uses a cache of a kind that cannot be paged."""


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The recurrent state of one sequence in one layer: shapes with batch size 1, and types."""

    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[mx.Dtype | None, ...]

    @property
    def bytes_per_sequence(self) -> int:
        """The bytes of a sequence's state in this layer, which do not depend on its length."""
        return sum(
            math.prod(shape) * dtype.size
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
            if shape is not None and dtype is not None
        )


@dataclass(frozen=True, slots=True)
class Leaf:
    """One cache of the model: its content (None if it is unused), and the module that uses it."""

    layer: int
    content: KVLayout | StateLayout | None
    owner: nn.Module | None

    @property
    def name(self) -> str:
        """Return the name of this layer for messages."""
        kind = type(self.owner).__name__ if self.owner is not None else "unused"
        return f"layer {self.layer} ({kind})"


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """The layers that see `window` tokens, and the bytes of a token's keys and values in them."""

    window: int
    bytes_per_token: int


#: One entry per layer, or per member of a layer's CacheList.
Tree = tuple["Leaf | tuple[Leaf, ...]", ...]


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The caches of a model in its order, and its inner model: all layers but the head."""

    tree: Tree
    inner: nn.Module | None
    vocab_size: int
    #: Whether tokens of prompts see more than the window of their cache: blocks must be kept.
    sees_past_window: bool = False

    def leaves(self) -> Iterator[Leaf]:
        """Yield all leaves in order."""
        for entry in self.tree:
            if isinstance(entry, Leaf):
                yield entry
            else:
                yield from entry

    def kv_layouts(self) -> list[KVLayout]:
        """Return the keys and values of all leaves that have any, in order."""
        return [leaf.content for leaf in self.leaves() if isinstance(leaf.content, KVLayout)]

    def with_kv(self, change: Callable[[Leaf, KVLayout], KVLayout]) -> ModelLayout:
        """Return this layout with the keys and values of every leaf replaced by `change`."""

        def changed(leaf: Leaf) -> Leaf:
            if not isinstance(leaf.content, KVLayout):
                return leaf
            return replace(leaf, content=change(leaf, leaf.content))

        tree = tuple(
            changed(entry) if isinstance(entry, Leaf) else tuple(map(changed, entry))
            for entry in self.tree
        )
        return replace(self, tree=tree)

    def with_dtype(self, dtype: mx.Dtype) -> ModelLayout:
        """Return this layout with keys and values of `dtype`."""
        return self.with_kv(lambda _, kv: replace(kv, dtype=dtype))

    def without_quantisation(self) -> ModelLayout:
        """Return this layout with keys and values that are not quantised."""
        return self.with_kv(lambda _, kv: replace(kv, quantised=None))

    @property
    def quantised(self) -> bool:
        """Whether the keys and values of any layer are quantised."""
        return any(kv.quantised is not None for kv in self.kv_layouts())

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one token's keys and values in all layers."""
        return sum(kv.bytes_per_token for kv in self.kv_layouts())

    @property
    def window(self) -> int | None:
        """The largest attention window of all layers; None if a layer has no window."""
        windows = [kv.window for kv in self.kv_layouts()]
        known = [window for window in windows if window is not None]
        return max(known) if known and len(known) == len(windows) else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers, the largest first; None is the largest."""
        found = {kv.window for kv in self.kv_layouts()}
        return tuple(sorted(found, key=lambda window: -math.inf if window is None else -window))

    @property
    def window_groups(self) -> tuple[WindowGroup, ...]:
        """The groups of layers with a smaller window than the others, the largest first."""
        if self.sees_past_window:
            return ()
        return tuple(
            WindowGroup(
                window,
                sum(kv.bytes_per_token for kv in self.kv_layouts() if kv.window == window),
            )
            for window in self.windows[1:]
            if window is not None
        )

    @property
    def bytes_per_sequence(self) -> int:
        """The bytes of one sequence's recurrent state in all layers."""
        contents = (leaf.content for leaf in self.leaves())
        return sum(c.bytes_per_sequence for c in contents if isinstance(c, StateLayout))

    @property
    def num_snapshots(self) -> int:
        """The number of recurrent snapshots to keep: as many as fit in their memory, at least 4."""
        if not self.bytes_per_sequence:
            return 0
        room = _SNAPSHOT_BYTES
        if mx.default_device() != mx.Device(mx.cpu):
            room = max(room, device.total_memory() // _SNAPSHOT_SHARE)
        return min(max(room // self.bytes_per_sequence, 4), 256)

    def snapshot_interval(self, block_size: int) -> int:
        """Return the tokens between two snapshots of a sequence: 0 without recurrent state.

        The tokens' keys and values take as much memory as the state, within limits.
        """
        if not self.bytes_per_sequence:
            return 0
        tokens = self.bytes_per_sequence // max(self.bytes_per_token, 1)
        tokens = min(max(tokens, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        step = math.lcm(_SHORTEST_INTERVAL, block_size)  # where chunks of prompts end
        return -(-tokens // step) * step

    @property
    def snapshot_bytes(self) -> int:
        """The bytes of all snapshots together."""
        return self.num_snapshots * self.bytes_per_sequence

    @property
    def recurrent(self) -> bool:
        """Whether any layer has recurrent state."""
        return any(isinstance(leaf.content, StateLayout) for leaf in self.leaves())


@dataclass(slots=True)
class _Record:
    """The last keys and values that a cache received, and the modules that used it.

    `stack` has the modules that were running in every use of the cache, outermost first.
    """

    stack: list[nn.Module] = field(default_factory=list)
    keys: mx.array | None = None
    values: mx.array | None = None
    window: int = 0  # the largest that a mask was requested for

    def note_use(self) -> None:
        """Record which modules are running."""
        running = _modules_on_stack()
        if self.stack:
            running = [a for a, b in zip(self.stack, running, strict=False) if a is b]
        self.stack = running


def _modules_on_stack() -> list[nn.Module]:
    """Return the modules whose `__call__` is on the stack, outermost first."""
    found: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if frame.f_code.co_name == "__call__" and isinstance(module, nn.Module):
            found.append(module)
        frame = frame.f_back
    return found[::-1]


def _watch(cache: Any, records: dict[int, _Record]) -> Any:
    """Swap the class of a new cache for one that records each use in `records`, by id."""
    if isinstance(cache, CacheList):
        for member in cache.caches:
            _watch(member, records)
        return cache
    kind = type(cache)
    record = records.setdefault(id(cache), _Record())
    if kind is ArraysCache:

        def touch(self: Any, index: int, *value: Any) -> Any:
            record.note_use()
            return (kind.__setitem__ if value else kind.__getitem__)(self, index, *value)

        methods: dict[str, Any] = {"__getitem__": touch, "__setitem__": touch}
    elif kind in (KVCache, RotatingKVCache, ChunkedKVCache):

        def update(self: Any, keys: mx.array, values: mx.array) -> Any:
            record.note_use()
            record.keys, record.values = keys, values
            return kind.update_and_fetch(self, keys, values)

        def make_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
            record.window = max(record.window, kwargs.get("window_size") or 0)
            return kind.make_mask(self, *args, **kwargs)

        methods = {"update_and_fetch": update, "make_mask": make_mask}
    else:
        raise UnknownCacheError(f"the model keeps its keys and values in a {kind.__name__}")
    cache.__class__ = type(kind.__name__, (kind,), methods)
    return cache


def find_layout(model: nn.Module) -> ModelLayout:
    """Run `model` on two tokens, then one, and return the layout of its caches.

    Raises `UnknownCacheError` for caches of kinds that cannot be paged.
    """
    records: dict[int, _Record] = {}
    caches = [_watch(cache, records) for cache in make_prompt_cache(model)]
    for tokens in ([[0, 0]], [[0]]):
        logits = model(mx.array(tokens), cache=caches)

    def leaf(layer: int, cache: Any) -> Leaf:
        record = records[id(cache)]
        owner = record.stack[-1] if record.stack else None
        return Leaf(layer, _content(cache, record), owner)

    tree: list[Leaf | tuple[Leaf, ...]] = []
    for layer, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            tree.append(tuple(leaf(layer, member) for member in cache.caches))
        else:
            tree.append(leaf(layer, cache))
    caches = [member for cache in caches for member in getattr(cache, "caches", [cache])]
    sees_past_window = any(
        isinstance(cache, RotatingKVCache) and records[id(cache)].window > cache.max_size
        for cache in caches
    )
    stacks = [record.stack for record in records.values() if record.stack]
    inner = _inner_model(stacks)
    return ModelLayout(tuple(tree), inner, logits.shape[-1], sees_past_window)


def layout_of(model: nn.Module) -> ModelLayout | None:
    """Return the layout of a model's caches; None if a cache cannot be paged."""
    try:
        return find_layout(model)
    except UnknownCacheError:
        return None


def _content(cache: Any, record: _Record) -> KVLayout | StateLayout | None:
    if isinstance(cache, ArraysCache):
        arrays = cache.cache
        if all(array is None for array in arrays):
            return None
        return StateLayout(
            tuple(None if a is None else tuple(a.shape) for a in arrays),
            tuple(None if a is None else a.dtype for a in arrays),
        )
    if record.keys is None or record.values is None:
        return None
    if isinstance(cache, ChunkedKVCache):
        raise UnknownCacheError("the model attends in chunks of its context")
    window = None
    if isinstance(cache, RotatingKVCache):
        if cache.keep:
            raise UnknownCacheError(f"a rotating cache keeps its first {cache.keep} tokens")
        window = cache.max_size
    keys, values = record.keys, record.values
    return KVLayout(
        keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, window
    )


def _inner_model(stacks: list[list[nn.Module]]) -> nn.Module | None:
    """Return the module that runs the layers: it calls a member of a list that it holds."""
    for stack in stacks:
        for module, called in pairwise(stack):
            for value in module.values():
                if isinstance(value, list) and any(member is called for member in value):
                    return module
    return None


_FLOATS = {"bf16": mx.bfloat16, "fp16": mx.float16}
_BITS = {"q8": 8, "q4": 4}


def layout_with_cache_type(model: nn.Module, kind: KVCacheDtype) -> ModelLayout | None:
    """Return a model's layout with keys and values of type `kind`; None if it cannot be paged."""
    layout = layout_of(model)
    return None if layout is None else with_cache_type(layout, kind)


def with_cache_type(layout: ModelLayout, kind: KVCacheDtype) -> ModelLayout:
    """Return `layout` with keys and values of the type `kind`.

    Raises `EngineError` for a model whose cache cannot be quantised: it caches latents, which serve
    as keys and values and are compressed already, or no group size divides its heads.
    """
    if kind in _FLOATS:
        return layout.with_dtype(_FLOATS[kind])
    if kind not in _BITS:
        return layout

    def quantise(leaf: Leaf, content: KVLayout) -> KVLayout:
        problem = None
        found = quantisation(_BITS[kind], content.key_dim, content.value_dim)
        if getattr(leaf.owner, "kv_lora_rank", None) in (content.key_dim, content.value_dim):
            problem = "it caches latents, which keys and values share"
        elif found is None or content.value_dim == 0:
            dims = f"{content.key_dim}/{content.value_dim}"
            problem = f"heads have {dims} elements, expected multiples of {GROUPS[-1]}"
        if problem is not None:
            raise EngineError(
                f"{leaf.name} cannot have its keys and values in {kind}: {problem}",
                hint="use --kv-cache-dtype auto, bf16 or fp16 for this model",
            )
        return replace(content, quantised=found)

    return layout.with_kv(quantise)
