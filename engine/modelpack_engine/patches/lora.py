"""LoRA and DoRA adapters on the layers of a model, chosen for each row of a step.

`LoRALayers` replaces the calls of the layers that adapters change. If no row of a step has an
adapter, the original call runs alone. If all rows have the same one, and the step is not compiled,
its two matrices are multiplied with all rows; otherwise the matrices of all adapters are stacked,
their ranks padded, and each row is multiplied with its own. Where a layer's inputs are divided
between devices, each adds its part of the adapter's outputs to its part of the layer's, before
these are added up.

Compiled steps get the stacked matrices as inputs, so that a graph stays right when an adapter takes
another's place. Fused layers do not call their linear layers: they add the joint matrices of these
by a kernel (`layers.adapters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from modelpack_engine.attention.metadata import AdapterRows, JointLayers
from modelpack_engine.errors import EngineError
from modelpack_engine.layers import adapters
from modelpack_engine.layers.blocks import (
    BLOCK_LAYERS,
    BlockEmbedding,
    BlockLinear,
    BlockSwitchLinear,
    layer_values,
)
from modelpack_engine.layers.matmul import multiply
from modelpack_engine.layers.weights import quantised_weights
from modelpack_engine.patches.modules import Call, ClassSwaps

#: Linear layers that add up the outputs of all ranks.
_SUMS = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
LINEARS = (nn.Linear, nn.QuantizedLinear, BlockLinear, *_SUMS)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding, BlockEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear, BlockSwitchLinear)


@dataclass(frozen=True, slots=True)
class Matrices:
    """What an adapter adds to one layer: x @ a @ b, where b includes the adapter's scale.

    `a` is [inputs, rank] and `b` [rank, outputs], both [experts, ...] for experts. With `gain`
    [outputs] (DoRA), the output without its bias is multiplied by it; that of an embedding for a
    token with `token_gain` [inputs, 1] by the token's.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    token_gain: mx.array | None = None

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays that are present, by name."""
        every = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: array for name, array in every if array is not None}

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())


#: The matrices of an adapter, by the path of the layer in the model.
Layers = Mapping[str, Matrices]


class _Stack:
    """The matrices of all adapters for one layer, by slot; slot 0 has no adapter."""

    def __init__(self) -> None:
        self.slots: dict[int, Matrices] = {}
        self._stacked: Matrices | None = None

    def set(self, slot: int, matrices: Matrices | None) -> None:
        """Set or remove the matrices of a slot."""
        self._stacked = None
        if matrices is None:
            self.slots.pop(slot, None)
        else:
            self.slots[slot] = matrices

    def stacked(self, num_slots: int) -> Matrices:
        """Return the matrices as [slots, ...], with zeros for slots without any."""
        if self._stacked is None or self._stacked.a.shape[0] < num_slots:
            self._stacked = self._stack(num_slots)
        return self._stacked

    def hold(self, stacked: Matrices) -> None:
        """Return these as the stacked matrices until an adapter changes."""
        self._stacked = stacked

    def _stack(self, num_slots: int) -> Matrices:
        some = next(iter(self.slots.values()))
        rank = max(one.a.shape[-1] for one in self.slots.values())
        a = mx.zeros((num_slots, *some.a.shape[:-1], rank), some.a.dtype)
        b = mx.zeros((num_slots, *some.b.shape[:-2], rank, some.b.shape[-1]), some.b.dtype)
        for slot, one in self.slots.items():
            own = one.a.shape[-1]
            a[slot, ..., :own] = one.a
            b[slot, ..., :own, :] = one.b
        gains = {}
        for name in ("gain", "token_gain"):
            present = {
                s: one.arrays()[name] for s, one in self.slots.items() if name in one.arrays()
            }
            for slot, gain in present.items():
                if name not in gains:
                    gains[name] = mx.ones((num_slots, *gain.shape), gain.dtype)
                gains[name][slot] = gain
        made = Matrices(a, b, **gains)
        mx.eval(list(made.arrays().values()))
        return made


class _Joint:
    """The matrices of fused layers, which their stacks then are views of."""

    def __init__(self, joint: JointLayers, stacks: Iterable[_Stack | None]) -> None:
        self.joint = joint
        self._all = [stack if stack is not None and stack.slots else None for stack in stacks]
        self.stacks = [stack for stack in self._all if stack is not None]

    def _matrices(self) -> list[Matrices]:
        return [one for stack in self.stacks for one in stack.slots.values()]

    def fits(self) -> bool:
        """Return whether the kernel computes with these matrices."""
        every = self._matrices()
        dtypes = {array.dtype for one in every for array in (one.a, one.b)}
        return (
            len(self._all) <= adapters.MOST_LAYERS
            and all(one.gain is None and one.a.shape[1] <= adapters.MOST_RANK for one in every)
            and len(dtypes) == 1
            and adapters.verdict(*dtypes) is None
        )

    def make(self, num_slots: int) -> None:
        """Join the matrices of all slots; ranks are padded with zeros."""
        every = self._matrices()
        first, step = every[0].a, adapters.RANK_STEP
        rank = -(-max(one.a.shape[1] for one in every) // step) * step
        sizes = self.joint.sizes
        a = mx.zeros((num_slots, len(sizes) * rank, first.shape[0]), first.dtype)
        b = mx.zeros((num_slots, rank, sum(sizes)), first.dtype)
        start = 0
        for index, (stack, size) in enumerate(zip(self._all, sizes, strict=True)):
            for slot, one in ({} if stack is None else stack.slots).items():
                own = one.a.shape[1]
                a[slot, index * rank : index * rank + own] = one.a.T
                b[slot, :own, start : start + size] = one.b
            start += size
        mx.eval(a, b)
        self.hold(a, b)

    def arrays(self) -> list[mx.array]:
        """Return the joint matrices."""
        assert self.joint.matrices is not None, "`make` has joined them"
        return list(self.joint.matrices)

    def hold(self, a: mx.array, b: mx.array) -> None:
        """Compute with these joint matrices."""
        self.joint.matrices = a, b
        rank, start = b.shape[1], 0
        for index, (stack, size) in enumerate(zip(self._all, self.joint.sizes, strict=True)):
            if stack is not None:
                own = a[:, index * rank : (index + 1) * rank].swapaxes(1, 2)
                stack.hold(Matrices(own, b[:, :, start : start + size]))
            start += size


class LoRALayers:
    """The adapters of one model; `rows` says which of them each row of a step has."""

    def __init__(self, model: nn.Module, rows: AdapterRows) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._rows, self._swaps = rows, ClassSwaps()
        self._stacks: dict[str, _Stack] = {}
        self._mixtures: set[int] = set()
        self._num_slots = 1
        #: The layers that an adapter changes, and how often the matrices have changed.
        self.changed: tuple[str, ...] = ()
        self.version = 0
        self._joined = self._fuses = True
        self._changes_bypassed = False
        self._joint: list[_Joint] = []
        self._alone: list[_Stack] = []  # of layers that are not joint

    def set(self, slot: int, layers: Layers) -> None:
        """Put an adapter into a slot, from 1; the previous one is removed."""
        self._rows.matrices = self
        self._num_slots = max(self._num_slots, slot + 1)
        for name in self._stacks.keys() - layers.keys():
            self._stacks[name].set(slot, None)
        for name, matrices in layers.items():
            if name not in self._stacks:
                self._stacks[name] = _Stack()
                self._override(name, self._stacks[name])
            self._stacks[name].set(slot, matrices)
        self.changed = tuple(name for name, stack in self._stacks.items() if stack.slots)
        self._joined = False  # by the next step with adapters: others may follow
        self.version += 1
        if not self.changed:
            self._join()  # frees the joint matrices

    def undo(self) -> None:
        """Restore the calls of all layers, and free the matrices."""
        self._swaps.undo()
        self._stacks.clear()
        self._mixtures.clear()
        self._joint, self._alone, self.changed = [], [], ()
        self._rows.matrices = None
        for layers in self._rows.joint:
            layers.matrices = None

    # The matrices of compiled and fused steps

    @property
    def fuses(self) -> bool:
        """Whether fused layers add all that adapters change in them."""
        self._join()
        return self._fuses

    @property
    def changes_only_fused(self) -> bool:
        """Whether adapters change no other layers than fused ones."""
        self._join()
        return not self._alone

    @property
    def changes_bypassed(self) -> bool:
        """Whether adapters change layers of routers and experts that are fused."""
        self._join()
        return self._changes_bypassed

    def arrays(self) -> list[mx.array]:
        """Return the matrices of all slots, as inputs of a compiled graph."""
        self._join()
        found = [array for one in self._joint for array in one.arrays()]
        for stack in self._alone:
            found += stack.stacked(self._num_slots).arrays().values()
        return found

    @contextmanager
    def replaced(self, arrays: list[mx.array]) -> Iterator[None]:
        """Compute with these in place of what `arrays` returns within the block."""
        before = self.arrays()
        self._hold(arrays)
        try:
            yield
        finally:
            self._hold(before)

    def _hold(self, arrays: list[mx.array]) -> None:
        given = iter(arrays)
        for joint in self._joint:
            joint.hold(next(given), next(given))
        for stack in self._alone:
            names = stack.stacked(self._num_slots).arrays()
            stack.hold(Matrices(**{name: next(given) for name in names}))

    def _join(self) -> None:
        """Join the matrices of fused layers, if the kernel adds all that adapters change."""
        if self._joined:
            return
        stacks = {id(self._modules[name]): stack for name, stack in self._stacks.items()}
        found = []
        for layers in self._rows.joint:
            layers.matrices = None
            own = [stacks.get(id(layer)) for layer in layers.layers]
            if any(stack is not None and stack.slots for stack in own):
                found.append(_Joint(layers, own))
        self._fuses = all(joint.fits() for joint in found)
        self._joint = found if self._fuses else []
        for joint in self._joint:
            joint.make(self._num_slots)
        members = {id(stack) for joint in self._joint for stack in joint.stacks}
        self._alone = [
            stack for stack in self._stacks.values() if stack.slots and id(stack) not in members
        ]
        changed = {id(self._modules[name]) for name in self.changed}
        self._changes_bypassed = any(id(layer) in changed for layer in self._rows.bypassed)
        self._joined = True

    def _override(self, name: str, stack: _Stack) -> None:
        module = self._modules[name]
        if isinstance(module, EMBEDDINGS):
            self._swaps.override(module, partial(self._embed, stack))
            self._swaps.override(module, partial(self._project, stack), "as_linear")
        elif isinstance(module, EXPERTS):
            self._swaps.override(module, partial(self._route, stack))
            owner = self._modules[name.rpartition(".")[0]]
            if isinstance(owner, SwitchGLU | SwitchMLP) and id(owner) not in self._mixtures:
                self._mixtures.add(id(owner))
                self._swaps.override(owner, self._mix)
        else:
            self._swaps.override(module, partial(self._linear, stack))

    # Calls of layers

    def _linear(self, stack: _Stack, original: Call, module: Any, x: mx.array) -> Any:
        if self._is_idle(stack):
            return original(module, x)
        sums = isinstance(module, _SUMS)
        y = _own_part(module, x) if sums else original(module, x)
        if isinstance(y, list):  # afm7's: parts of one matmul
            ends = list(accumulate(part.shape[-1] for part in y))
            y = self._adapted(stack, module, x, mx.concatenate(y, axis=-1), sums=False)
            return mx.split(y, ends[:-1], axis=-1)
        return self._adapted(stack, module, x, y, sums=sums)

    def _adapted(
        self, stack: _Stack, module: Any, x: mx.array, y: mx.array, *, sums: bool
    ) -> mx.array:
        """Return the output of a layer, y, with the adapters of its rows x."""
        one = self._only(stack)
        if one is not None:
            delta, gain = (x @ one.a) @ one.b, one.gain
        else:
            all_, slots = stack.stacked(self._num_slots), self._slots(x)
            delta = _gathered(x.reshape(-1, 1, x.shape[-1]), all_.a, all_.b, slots)
            delta = delta.reshape(y.shape)
            gain = None
            if all_.gain is not None:
                gain = all_.gain[slots].reshape(y.shape)
        if sums:
            y = mx.distributed.all_sum(y + delta, group=module.group)
            y = y if gain is None else y * gain
            biased: mx.array = y + module["bias"] if "bias" in module else y
            return biased
        if gain is None:
            return y + delta
        if "bias" in module:
            bias: mx.array = module["bias"]
            return (y - bias + delta) * gain + bias
        return (y + delta) * gain

    def _embed(self, stack: _Stack, original: Call, module: Any, ids: mx.array) -> Any:
        y = original(module, ids)
        if self._is_idle(stack):
            return y
        one = self._only(stack)
        if one is not None:
            y, gain = y + one.a[ids] @ one.b, one.gain
            token_gain = None if one.token_gain is None else one.token_gain[ids]
        else:
            all_, slots = stack.stacked(self._num_slots), self._slots(ids[..., None])
            flat = ids.reshape(-1)
            rows = all_.a[slots, flat][:, None]
            y = y + mx.gather_mm(rows, all_.b, rhs_indices=slots).reshape(y.shape)
            gain = None if all_.gain is None else all_.gain[slots].reshape(y.shape)
            token_gain = None if all_.token_gain is None else all_.token_gain[slots, flat]
        if gain is not None:
            y = y * gain
        return y if token_gain is None else y * token_gain.reshape(*ids.shape, 1)

    def _project(self, stack: _Stack, original: Call, module: Any, x: mx.array) -> Any:
        """Compute logits by an embedding that the adapter changes."""
        if self._is_idle(stack):
            return original(module, x)
        one = self._only(stack)
        if one is not None:
            x = x if one.gain is None else x * one.gain
            y = original(module, x) + (x @ one.b.T) @ one.a.T
            return y if one.token_gain is None else y * one.token_gain.reshape(-1)
        all_, slots = stack.stacked(self._num_slots), self._slots(x)
        if all_.gain is not None:
            x = x * all_.gain[slots].reshape(x.shape)
        flat = x.reshape(-1, 1, x.shape[-1])
        a, b = all_.a.swapaxes(-1, -2), all_.b.swapaxes(-1, -2)
        y = original(module, x)
        y = y + _gathered(flat, b, a, slots).reshape(y.shape)
        return y if all_.token_gain is None else y * all_.token_gain[slots].reshape(y.shape)

    def _mix(self, original: Call, module: Any, x: mx.array, indices: mx.array) -> Any:
        """Remember the order in which a mixture of experts sorts its rows."""
        rows = self._rows
        if rows.slots is None or rows.same is not None:
            return original(module, x, indices)
        rows.order = mx.argsort(indices.flatten()) // indices.shape[-1]
        try:
            return original(module, x, indices)
        finally:
            rows.order = None

    def _route(
        self,
        stack: _Stack,
        original: Call,
        module: Any,
        x: mx.array,
        indices: mx.array,
        sorted_indices: bool = False,
    ) -> Any:
        y = original(module, x, indices, sorted_indices=sorted_indices)
        if self._is_idle(stack):
            return y
        one, rows = self._only(stack), self._rows
        if one is not None:
            return y + _gathered(x, one.a, one.b, indices)
        slots = rows.slots
        assert slots is not None, "some row has an adapter"
        if not sorted_indices:
            each = indices.shape[-1]
            if indices.size != slots.size * each:  # all rows have the same ones (DeepSeek V4)
                indices = mx.broadcast_to(indices, (slots.size, each))
            slots = mx.broadcast_to(slots.reshape(-1, 1), (slots.size, each))
        elif rows.order is None:
            raise EngineError("an adapter cannot be applied: experts sort rows in an unknown way")
        else:
            slots = slots[rows.order]
        all_ = stack.stacked(self._num_slots)
        experts = all_.a.shape[1]
        chosen = slots.reshape(indices.shape) * experts + indices.astype(mx.int32)
        return y + _gathered(x, all_.a.flatten(0, 1), all_.b.flatten(0, 1), chosen)

    def _is_idle(self, stack: _Stack) -> bool:
        """Return whether no row has an adapter for the layer of `stack`."""
        same = self._rows.same
        none = self._rows.slots is None or not stack.slots
        return none or (same is not None and same not in stack.slots)

    def _only(self, stack: _Stack) -> Matrices | None:
        """Return the matrices of all rows; None if rows differ."""
        same = self._rows.same
        return None if same is None else stack.slots[same]

    def _slots(self, x: mx.array) -> mx.array:
        """Return the slot of each row of x [..., inputs]."""
        slots = self._rows.slots
        assert slots is not None, "some row has an adapter"
        if x.size // x.shape[-1] != slots.size:
            raise EngineError(
                f"an adapter cannot be applied: a layer got {x.size // x.shape[-1]} rows, "
                f"expected {slots.size}"
            )
        return slots


def _own_part(module: Any, x: mx.array) -> mx.array:
    """Return what this rank adds to the outputs of a layer in `_SUMS`."""
    if isinstance(module, nn.ShardedToAllLinear):
        product: mx.array = x @ module["weight"].T
        return product
    weights = replace(quantised_weights(module), bias=None)
    product = multiply(x.reshape(-1, x.shape[-1]), weights)
    return product.reshape(*x.shape[:-1], -1)


def _gathered(x: mx.array, a: mx.array, b: mx.array, indices: mx.array) -> mx.array:
    return mx.gather_mm(mx.gather_mm(x, a, rhs_indices=indices), b, rhs_indices=indices)


def dense_weight(module: Any) -> mx.array:
    """Return the weight of a layer in float32, dequantised if it is quantised."""
    if isinstance(module, BLOCK_LAYERS):
        return layer_values(module, mx.float32)
    if not hasattr(module, "bits"):
        return module.weight.astype(mx.float32)  # type: ignore[no-any-return]
    return mx.dequantize(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits,
        mode=module.mode,
    ).astype(mx.float32)  # fmt: skip


def nbytes(layers: Iterable[Matrices]) -> int:
    """Return the bytes of an adapter's matrices."""
    return sum(one.nbytes for one in layers)
