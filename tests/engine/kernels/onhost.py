"""A fake of MLX's custom kernels with the same interface, which runs the host emulator.

So everything between the engine and the GPU is tested without one: which inputs go where, template
arguments, grids, and what happens to the results.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from modelpack_engine.kernels import launch, prefill, reference
from modelpack_engine.kernels.recording import Note
from modelpack_engine.kernels.sources import INPUTS, OUTPUTS, Backend, Body, kernel_source
from tests.engine.kernels.emulator import Edit, build, run_here, unchanged
from tests.engine.kernels.signatures import Instance

C_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t",
           mx.uint32: "uint32_t", mx.int32: "int"}  # fmt: skip
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def memory(array: mx.array) -> npt.NDArray[Any]:
    """Return the memory of an evaluated, contiguous array as bytes that can be written."""
    return view_at(address_of(array), array)


def address_of(array: mx.array) -> int:
    """Return where an evaluated, contiguous array is."""
    mx.eval(array)
    view = memoryview(array.view(UNSIGNED[array.dtype.size]))  # type: ignore[arg-type]
    return int(np.frombuffer(view, np.uint8).ctypes.data) if array.size else 0


def view_at(address: int, like: mx.array) -> npt.NDArray[Any]:
    """Return the memory of an array as `like` at an address, as bytes that can be written."""
    raw = memoryview((ctypes.c_uint8 * like.nbytes).from_address(address))
    found: npt.NDArray[Any] = np.frombuffer(raw, np.uint8)
    return found.reshape(*like.shape, like.dtype.size)


class _Verdict(Protocol):
    def cache_clear(self) -> None: ...


class Host:
    """Replaces `launch.kernel`."""

    def __init__(self) -> None:
        self.edit: Edit = unchanged
        self.calls: list[tuple[Body, dict[str, Any]]] = []

    def break_by(self, edit: Edit) -> None:
        """Run bodies modified by `edit`."""
        self.edit = edit

    def kernel(
        self,
        body: Body,
        on: Backend,
        shared_bytes: int = 0,
        *,
        split: bool = False,
        absent: tuple[str, ...] = (),
    ) -> Any:
        """Return the kernel that MLX would make from a body."""
        source = kernel_source(body, on, split=split, absent=absent)

        def run(
            *,
            inputs: Sequence[mx.array],
            template: Sequence[tuple[str, Any]],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            self.calls.append((body, dict(template)))
            types = tuple((n, C_TYPES[v]) for n, v in template if isinstance(v, mx.Dtype))
            constants = tuple((n, v) for n, v in template if isinstance(v, int))
            instance = Instance(body, types, constants)
            # A pool that is not evaluated has no memory yet: MLX would run what makes it first.
            mx.eval(*inputs)
            inputs = [mx.contiguous(array) for array in inputs]  # as MLX does
            mx.eval(*inputs)
            outputs = [
                mx.full(shape, 7, dtype)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            arrays = dict(zip(source.inputs, inputs, strict=True))
            arrays |= dict(zip(source.outputs, outputs, strict=True))
            views = {name: memory(array) for name, array in arrays.items()}
            groups = tuple(-(-size // per) for size, per in zip(grid, threadgroup, strict=True))
            self._run(instance, views, absent, (groups[0], groups[1], groups[2]), threadgroup[0])
            return outputs

        assert {*source.inputs, *absent} - {*OUTPUTS[body]} == {*INPUTS[body]}
        return run

    def _run(
        self,
        instance: Instance,
        views: dict[str, npt.NDArray[Any]],
        absent: Sequence[str],
        groups: tuple[int, int, int],
        threads: int,
    ) -> None:
        if instance.body == "deliver":  # a program of its own could not write to this one's memory
            (low, high), numbers = views["address"].view(np.uint32).ravel()[:2], views["numbers"]
            ctypes.memmove(int(low) | int(high) << 32, numbers.ctypes.data, numbers.nbytes)
            return
        if instance.body == "fetch":
            low, high, fours = views["source"].view(np.uint32).ravel()[:3].tolist()
            ctypes.memmove(views["out"].ctypes.data, low | high << 32, 16 * fours)
            return
        if instance.body == "prefill":  # tensor cores are not emulated
            _attend(views, dict(instance.types), dict(instance.constants))
            return
        if instance.body == "experts":
            _multiply_experts(views, dict(instance.types), dict(instance.constants))
            return
        for name in (*OUTPUTS[instance.body], *absent):
            alike = views.get(name.removesuffix("_up"), np.zeros((1, 4), np.uint8))
            views.setdefault(name, alike)
        threads = -(-threads // 32) * 32
        if self.edit is unchanged:
            run_here(instance, views, groups, threads)
            return
        # A wrong body may write anywhere: it gets a process of its own.
        with tempfile.TemporaryDirectory() as scratch:
            program = build([instance], edit=self.edit)
            done = program.run(instance, views, groups, threads, Path(scratch))
        # Where it wrote to others' memory, the system may have ended it: outputs stay as they were.
        assert done.returncode <= 0, done.stderr[:2000]

    def run_at(self, note: Note, reads: Sequence[int], writes: Sequence[int]) -> None:
        """Run a recorded kernel, or an operation of MLX, on arrays at these addresses."""
        if note.body == "matmul" or note.body == "join":
            first, second, *bias = given = [
                mx.array(view_at(address, array)).view(array.dtype).reshape(array.shape)
                for address, array in zip(reads, note.inputs, strict=True)
            ]
            if note.body == "join":
                found = mx.concatenate(given)
            else:
                found = mx.addmm(bias[0], first, second.T) if bias else first @ second.T
            view_at(writes[0], found)[:] = memory(found)
            return
        body, source = note.body, note.source
        types = tuple((n, C_TYPES[v]) for n, v in note.template if isinstance(v, mx.Dtype))
        constants = tuple((n, v) for n, v in note.template if isinstance(v, int))
        names, arrays = (*source.inputs, *source.outputs), (*note.inputs, *note.outputs)
        views = {
            name: view_at(address, array)
            for name, array, address in zip(names, arrays, (*reads, *writes), strict=True)
        }
        absent = [name for name in (*INPUTS[body], *OUTPUTS[body]) if name not in names]
        instance = Instance(body, types, constants)
        self._run(instance, views, absent, note.threadgroups, note.threadgroup[0])


def _attend(
    views: dict[str, npt.NDArray[Any]], types: dict[str, str], constants: dict[str, int]
) -> None:
    """Write attention of tiles, by MLX's functions."""
    assert not constants["SPLIT"], "one part"
    dtype = next(each for each, name in C_TYPES.items() if name == types["T"])
    q, keys, values = (
        mx.array(views[name]).view(dtype).squeeze(-1) for name in ("q", "k_pool", "v_pool")
    )
    tables, spans = (
        mx.array(views[name]).view(mx.int32).squeeze(-1) for name in ("tables", "spans")
    )
    tables, lengths = prefill.Tiles(tables, spans).as_rows()
    scale = float(views["params"].view(np.float32).ravel()[0])
    found = reference.decode_attention(
        q, keys, values, tables, lengths, scale=scale, num_kv_heads=constants["HK"],
        window=constants["WINDOW"] or None, softcap=None, sinks=None,
        block_size=constants["BLOCK"],
    )  # fmt: skip
    views["out"][:] = memory(mx.contiguous(found.astype(dtype)))


@contextmanager
def emulated(patch: pytest.MonkeyPatch, *verdicts: _Verdict) -> Iterator[Host]:
    """Run kernels on the host; clear the cached `verdicts` before and after."""
    found = Host()
    patch.setattr(
        launch, "made_kernel",
        lambda body, on, shared_bytes=0, **how: (
            found.kernel(body, on, shared_bytes, **how), kernel_source(body, on, **how)
        ),
    )  # fmt: skip
    patch.setattr(launch, "backend", lambda: "metal")
    for verdict in verdicts:
        verdict.cache_clear()
    yield found
    for verdict in verdicts:
        verdict.cache_clear()


def _multiply_experts(
    views: dict[str, npt.NDArray[Any]], types: dict[str, str], constants: dict[str, int]
) -> None:
    """Write rows times the weights of their experts, by MLX's functions."""
    dtype = next(each for each, name in C_TYPES.items() if name == types["T"])
    bits, group = constants["BITS"], constants["GROUP"]

    def given(name: str, of: mx.Dtype = dtype) -> mx.array:
        return mx.array(views[name]).view(of).squeeze(-1)

    def weights(up: str) -> mx.array:
        if bits == 16:
            return given(f"weight{up}").astype(mx.float32)
        packed, scales, biases = (
            given(f"{name}{up}", of)
            for name, of in (("weight", mx.uint32), ("scales", dtype), ("biases", dtype))
        )
        return mx.dequantize(packed, scales, biases, group, bits).astype(mx.float32)

    x, source = given("x").astype(mx.float32), given("source", mx.int32)
    x = x[source] if constants["GATHER"] else x
    ups = ("", "_up") if constants["SWIGLU"] else ("",)
    every = [weights(up) for up in ups]
    found = np.zeros(views["out"].shape[:-1], np.float32)
    for expert, first, count in np.array(given("spans", mx.int32)):
        rows = x[int(first) : int(first + count)]
        outputs = [rows @ one[int(expert)].T for one in every]
        if constants["BIAS"]:
            outputs = [
                y + given(f"bias{up}")[int(expert)] for y, up in zip(outputs, ups, strict=True)
            ]
        gate, *up = outputs
        found[first : first + count] = gate * mx.sigmoid(gate) * up[0] if up else gate
    views["out"][:] = memory(mx.array(found).astype(dtype))
