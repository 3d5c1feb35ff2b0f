"""Compare the paged kernels on a GPU with gathering, and with attention over contiguous K and V.

Prints one JSON object per line: `ms` is the time of a call, `tb_s` the rate at which it reads K and
V once. Calls are chained, with the output of each as the query of the next, and rotate over pools
that together exceed the GPU's caches. Needs only mlx and the engine's kernels, ends within 90
seconds, and reports failed cases and continues.

    PYTHONPATH=engine python benchmarks/kernels.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from modelpack_engine import kernels
from modelpack_engine.kernels import launch, reference
from modelpack_engine.kernels.plan import (
    AttentionShape,
    DecodePlan,
    accumulators,
    plan_decode,
    simdgroups,
)

BLOCK = 16
#: Seconds after which no new measurement starts, and bytes of K and V to rotate over.
DEADLINE = 75
ROTATE_BYTES = 256 << 20
STARTED = time.monotonic()

Call = Callable[[mx.array, int], mx.array]


@dataclass(frozen=True)
class Case:
    """One decode step: token rows and their context, heads, KV heads and head size."""

    name: str
    rows: int
    context: int
    num_heads: int = 32
    num_kv_heads: int = 8
    dim: int = 64
    extra_dim: int = 0
    window: int | None = None
    sinks: bool = False
    mixed: bool = False

    @property
    def shape(self) -> AttentionShape:
        """The parameters that are compiled into the kernel."""
        return AttentionShape(
            self.num_heads, self.num_kv_heads, self.dim, self.dim, self.extra_dim,
            latent=bool(self.extra_dim), window=self.window, sinks=self.sinks,
        )  # fmt: skip

    @property
    def lengths(self) -> list[int]:
        """The context lengths of the rows: all equal, or from an eighth to the full length."""
        if not self.mixed:
            return [self.context] * self.rows
        low = self.context // 8
        return [low + (i * 7919) % (self.context - low) for i in range(self.rows)]

    @property
    def bytes(self) -> int:
        """The bytes of keys and values to read."""
        tokens = sum(min(n, self.window or n) for n in self.lengths)
        per_token = self.dim + self.extra_dim if self.extra_dim else 2 * self.dim
        return tokens * self.num_kv_heads * per_token * 2


CASES = [
    Case("128x544", 128, 544),
    Case("32x4096", 32, 4096),
    Case("1x8192", 1, 8192),
    Case("64x2048-d128", 64, 2048, dim=128),
    Case("128x128..1024", 128, 1024, mixed=True),
    Case("8x4096-g8-sinks", 8, 4096, 64, 8, sinks=True),
    Case("64x2048-window128-sinks", 64, 2048, 64, 8, window=128, sinks=True),
    Case("16x4096-latent576", 16, 4096, 16, 1, 512, 64),
]


class Pools:
    """Randomly filled pools and tables of a case; `copies` stands for the number of layers."""

    def __init__(self, case: Case) -> None:
        """Allocate and fill."""
        width = -(-case.context // BLOCK)
        blocks = case.rows * width + 1
        self.copies = max(1, min(16, -(-ROTATE_BYTES // case.bytes)))
        more = case.extra_dim or case.dim
        slots = blocks * BLOCK
        keys = mx.random.split(mx.random.key(3), 4 * self.copies)
        self.k, self.v = (
            [
                mx.random.normal((slots, case.num_kv_heads, dim), mx.bfloat16, key=key)
                for key in keys[start : start + self.copies]
            ]
            for start, dim in ((0, case.dim), (self.copies, more))
        )
        order = mx.random.permutation(blocks - 1, key=keys[-1]).astype(mx.int32) + 1
        self.tables = order.reshape(case.rows, width)
        self.lens = mx.array(case.lengths, mx.int32)
        self.q = mx.random.normal((case.rows, case.num_heads, case.dim), mx.bfloat16, key=keys[-2])
        self.q_more = None
        if case.extra_dim:
            shape = case.rows, case.num_heads, case.extra_dim
            self.q_more = mx.random.normal(shape, mx.bfloat16, key=keys[-3])
        self.sinks = mx.random.normal((case.num_heads,)) if case.sinks else None
        mx.eval(self.k, self.v, self.tables, self.lens, self.q)


class Results:
    """Prints result lines and keeps them."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def add(self, **line: Any) -> dict[str, Any]:
        """Print a line; return it."""
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        return line

    def measure(self, case: str, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add the result or the error of `work`; skip it when the time is up."""
        if time.monotonic() - STARTED > DEADLINE:
            return self.add(case=case, what=what, skipped="no time left")
        try:
            return self.add(case=case, what=what, **work())
        except Exception as error:
            return self.add(case=case, what=what, error=f"{type(error).__name__}: {error}"[:500])

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Report errors within the block, such as lack of memory, and continue."""
        try:
            yield
        except Exception as error:
            self.add(case=name, error=f"{type(error).__name__}: {error}"[:500])
        mx.clear_cache()


def timed(call: Call, start: mx.array, calls: int) -> float:
    """Return the milliseconds of one call: the median of five chains after a warm-up."""
    found = []
    for _ in range(6):
        mx.synchronize()
        began = time.perf_counter()
        x = start
        for i in range(calls):
            x = call(x, i)
        mx.eval(x)
        found.append((time.perf_counter() - began) / calls * 1e3)
    return statistics.median(found[1:])


def decode_plan(case: Case, pools: Pools, **plan: Any) -> DecodePlan:
    """Return the engine's plan for a case on this GPU, with the changes `plan`."""
    width, on = pools.tables.shape[1] * BLOCK, launch.backend()
    plan = {"simdgroups": simdgroups(on), "max_accumulators": accumulators(on), **plan}
    return plan_decode(case.shape, 2, case.rows, width, **plan)


def decode_call(case: Case, pools: Pools, **plan: Any) -> Call:
    """Return a call of the decode kernel with the default plan and the changes `plan`."""
    made = decode_plan(case, pools, **plan)

    def call(q: mx.array, i: int) -> mx.array:
        i %= pools.copies
        return launch.decode(
            made, case.shape, launch.backend(), q, pools.k[i], pools.v[i], pools.tables, pools.lens,
            scale=case.dim**-0.5, sinks=pools.sinks, q_more=pools.q_more,
        )  # fmt: skip

    return call


def gather_call(case: Case, pools: Pools) -> Call:
    """Return a call that gathers the blocks and attends with MLX's own function."""
    width = pools.tables.shape[1] * BLOCK
    mask = None
    if case.mixed:
        mask = (mx.arange(width)[None] < pools.lens[:, None])[:, None, None]

    def call(q: mx.array, i: int) -> mx.array:
        i %= pools.copies
        k, v = (
            mx.contiguous(
                pool.reshape(-1, BLOCK * case.num_kv_heads * case.dim)[pools.tables]
                .reshape(case.rows, width, case.num_kv_heads, case.dim)
                .swapaxes(1, 2)
            )
            for pool in (pools.k[i], pools.v[i])
        )
        found = mx.fast.scaled_dot_product_attention(
            q[:, :, None], k, v, scale=case.dim**-0.5, mask=mask, sinks=pools.sinks
        )
        return found[:, :, 0]

    return call


def native_call(case: Case) -> Call:
    """Return a call of MLX's own attention over contiguous keys and values."""
    copies = max(1, min(16, -(-ROTATE_BYTES // case.bytes)))
    shape = case.rows, case.num_kv_heads, case.context, case.dim
    layers = [
        [mx.random.normal(shape, mx.bfloat16, key=mx.random.key(2 * i + j)) for j in (0, 1)]
        for i in range(copies)
    ]
    mx.eval(layers)

    def call(q: mx.array, i: int) -> mx.array:
        k, v = layers[i % copies]
        found = mx.fast.scaled_dot_product_attention(
            q[:, :, None], k, v, scale=case.dim**-0.5, sinks=None
        )
        return found[:, :, 0]

    return call


def speed(call: Call, case: Case, start: mx.array) -> dict[str, Any]:
    """Return milliseconds and terabytes per second of a call."""
    began = time.perf_counter()
    mx.eval(call(start, 0))
    first = time.perf_counter() - began
    calls = max(10, min(200, int(0.02 / (case.bytes / 2e12))))
    ms = timed(call, start, calls)
    return {
        "ms": round(ms, 4),
        "tb_s": round(case.bytes / ms / 1e9, 3),
        "first_call_s": round(first, 2),
    }


def check(case: Case, pools: Pools) -> dict[str, Any]:
    """Return the largest difference from the naive result, over up to four token rows."""
    rows = min(4, case.rows)
    latent = case.dim if case.extra_dim else None
    more = None if pools.q_more is None else pools.q_more[:rows]
    found = decode_call(case, pools)(pools.q, 0)[:rows]
    wanted = reference.decode_attention(
        pools.q[:rows].astype(mx.float32), pools.k[0], pools.v[0], pools.tables[:rows],
        pools.lens[:rows], scale=case.dim**-0.5, num_kv_heads=case.num_kv_heads,
        window=case.window, sinks=pools.sinks, q_more=more, value_dim=latent,
    )  # fmt: skip
    return {"max_error": float(mx.max(mx.abs(found - wanted)).item())}  # type: ignore[arg-type]


def attention(case: Case, results: Results) -> None:
    """Measure our kernel and the two alternatives."""
    pools = Pools(case)
    plan = decode_plan(case, pools)
    measure = partial(results.measure, case.name)
    measure("error of decode", lambda: check(case, pools))
    ours = measure("decode", lambda: speed(decode_call(case, pools), case, pools.q))
    others = {}
    if not case.extra_dim and case.window is None:
        others["gather"] = measure(
            "gather and attention", lambda: speed(gather_call(case, pools), case, pools.q)
        )
        if not case.mixed and not case.sinks:
            others["native"] = measure(
                "native on contiguous", lambda: speed(native_call(case), case, pools.q)
            )
    ratios = {
        f"{name}_over_ours": round(other["ms"] / ours["ms"], 2)
        for name, other in others.items()
        if "ms" in other and "ms" in ours
    }
    megabytes = round(case.bytes / 1e6, 1)
    results.add(case=case.name, what="summary", parts=plan.parts, mb=megabytes, **ratios)


def variants(case: Case, results: Results) -> None:
    """Measure the kernel with other plans than the default."""
    pools = Pools(case)
    parts = decode_plan(case, pools).parts
    plans: list[dict[str, int]] = [
        {}, {"simdgroups": 8}, {"simdgroups": 2}, {"max_steps": 2},
        {"simdgroups": 8, "max_steps": 2}, {"split": 2 * parts}, {"split": 4 * parts},
        {"split": max(1, parts // 2)}, {"simdgroups": 8, "split": max(1, parts // 2)},
    ]  # fmt: skip
    for plan in plans:
        named = ", ".join(f"{name}={value}" for name, value in plan.items()) or "default plan"
        call = decode_call(case, pools, **plan)
        results.measure(case.name, named, partial(speed, call, case, pools.q))


def writes(results: Results) -> None:
    """Measure KV writes of a step, in place and with MLX's scatter, into pools of 67 MB each."""
    rows, heads, dim, slots_total = 128, 8, 64, 65536
    k = mx.random.normal((rows, heads, dim), mx.bfloat16)
    slots = mx.random.permutation(slots_total)[:rows].astype(mx.int32)
    pools = [mx.zeros((slots_total, heads, dim), mx.bfloat16) for _ in range(2)]
    mx.eval(k, slots, pools)

    def in_place() -> dict[str, Any]:
        on = launch.backend()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        rows_flat = k.reshape(rows, heads * dim)
        mx.eval(rows_flat)
        token = launch.write(on, rows_flat, rows_flat, pools[0], pools[1], slots, None)
        mx.eval(token)
        copied = max(0, mx.get_peak_memory() - before)
        ms = timed(
            lambda token, _: launch.write(
                on, rows_flat, rows_flat, pools[0], pools[1], slots, token
            ),
            token,
            100,
        )
        return {"ms": round(ms, 4), "extra_bytes": copied}

    def scatter() -> dict[str, Any]:
        held = list(pools)
        found = []
        pools.clear()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(20):
            began = time.perf_counter()
            for pool in held:
                pool[slots] = k
            mx.eval(held)
            found.append((time.perf_counter() - began) * 1e3)
        copied = max(0, mx.get_peak_memory() - before)
        return {"ms": round(statistics.median(found), 4), "extra_bytes": copied}

    results.measure("write-128", "write in place", in_place)
    results.measure("write-128", "scatter, evaluated each step", scatter)


def host(results: Results) -> None:
    """Measure the host's time for a call: building the graph without running it."""
    case = CASES[0]
    pools = Pools(case)
    k = mx.zeros((case.rows, case.num_kv_heads, case.dim), mx.bfloat16)
    slots = mx.arange(case.rows, dtype=mx.int32)

    def layer(q: mx.array, i: int) -> mx.array:
        k_pool, v_pool = kernels.write_kv(k, k, pools.k[0], pools.v[0], slots)
        return kernels.decode_attention(
            q, k_pool, v_pool, pools.tables, pools.lens,
            scale=0.125, num_kv_heads=case.num_kv_heads,
        )  # fmt: skip

    def built() -> dict[str, Any]:
        mx.eval(layer(pools.q, 0))
        found = []
        for _ in range(5):
            began = time.perf_counter()
            x = pools.q
            for i in range(50):
                x = layer(x, i)
            found.append((time.perf_counter() - began) / 50 * 1e6)
            mx.eval(x)
        return {"us": round(statistics.median(found), 1)}

    results.measure("128x544", "host time of a write and a decode", built)


def main() -> None:
    """Measure everything, in order of interest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    options = parser.parse_args()
    if launch.backend() == "none":
        sys.exit("MLX has no GPU here")
    results = Results()
    results.add(
        mlx=version("mlx"), python=platform.python_version(), backend=launch.backend(),
        device={name: str(value) for name, value in mx.device_info().items()},
    )  # fmt: skip
    shapes = [case.shape for case in CASES[:4]]
    results.measure("all", "probes", lambda: {"support": str(kernels.probe(shapes))})
    for case in CASES[:4]:
        with results.case(case.name):
            attention(case, results)
    with results.case("writes"):
        writes(results)
    with results.case("host"):
        host(results)
    for case in CASES[4:]:
        with results.case(case.name):
            attention(case, results)
    for case in CASES[:4]:
        with results.case(case.name):
            variants(case, results)
    results.add(seconds=round(time.monotonic() - STARTED, 1))
    if options.json:
        text = "".join(json.dumps(line) + "\n" for line in results.lines)
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
