"""The kernels' bodies, run on the host under sanitizers against a naive float64 reference."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from modelpack_engine.kernels.plan import QUANTISED_PART, AttentionShape, plan_write
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import Body
from tests.engine.kernels.cases import CASES, ITEMSIZE, Case, expected, make_inputs, plain, typed
from tests.engine.kernels.emulator import Emulator, build
from tests.engine.kernels.signatures import quantise_instance, write_instance

pytestmark = pytest.mark.long

Array = npt.NDArray[Any]

#: Rows and pools, widths of keys and values (0: none).
WRITES = [
    ("float", "float", 128, 128), ("float", "bfloat16_t", 64, 32),
    ("float16_t", "float16_t", 72, 0), ("bfloat16_t", "float", 20, 12),
]  # fmt: skip
QUANTISED = [
    ("float", 128, 128, Quantisation(8, 64)), ("bfloat16_t", 192, 64, Quantisation(4, 64)),
    ("float16_t", 96, 32, Quantisation(8, 32)), ("float", 64, 96, Quantisation(4, 32)),
]  # fmt: skip
RACED = ("bf16", "split-sinks", "latent-two-pools", "window-sinks-gqa4-80")


def all_instances() -> list[Any]:
    decodes = [instance for case in CASES for instance in case.instances]
    writes = [write_instance(k, v, rows=r, pool=p) for r, p, k, v in WRITES]
    return [*decodes, *writes, *(quantise_instance(k, v, q, rows=r) for r, k, v, q in QUANTISED)]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return build(all_instances(), "address,undefined")


def decode(emulator: Emulator, case: Case, directory: Path) -> tuple[Array, Array]:
    """Return the results of the emulator and the reference; fail on a sanitizer's report."""
    inputs = make_inputs(case)
    plan = case.plan
    groups = case.shape.num_kv_heads * plan.groups
    grid = (groups, len(case.context_lens), plan.parts)
    done = emulator.run(case.instances[0], inputs.arrays, grid, plan.threads, directory / "decode")
    check(done)
    out = inputs.arrays["out"]
    if case.parts > 1:
        shape = (len(case.context_lens), case.shape.num_heads, case.shape.value_dim)
        final = typed(np.full(shape, np.nan, np.float32), case.q)
        arrays = {
            "partial": out, "stats": inputs.arrays["stats"], "sinks": inputs.arrays["sinks"],
            "out": final,
        }  # fmt: skip
        merge = case.instances[1]
        threads = 32 * int(dict(merge.constants)["NSG"])
        grid = (case.shape.num_heads, len(case.context_lens), 1)
        check(emulator.run(merge, arrays, grid, threads, directory / "merge"))
        out = final
    return plain(out, case.q), expected(case, inputs)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[:4000]


def error(found: Array, wanted: Array, c_type: str) -> float:
    """Return the largest difference in units of the tolerance: 1e-5, or the output's rounding."""
    rounding = {"float": 0.0, "float16_t": 2.0**-11, "bfloat16_t": 2.0**-8}[c_type]
    return float(np.max(np.abs(found - wanted) / (1e-5 + rounding * np.abs(wanted))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode_equals_the_naive_result(emulator: Emulator, case: Case, tmp_path: Path) -> None:
    found, wanted = decode(emulator, case, tmp_path)
    assert error(found, wanted, case.q) <= 1


@pytest.mark.parametrize("write", WRITES, ids=lambda w: f"{w[0]}-{w[1]}-{w[2]}-{w[3]}")
def test_write_changes_its_slots_and_nothing_else(
    emulator: Emulator, write: tuple[str, str, int, int], tmp_path: Path
) -> None:
    rows_type, pool_type, key_width, value_width = write
    rng = np.random.default_rng(1)
    slots = np.array([5, -1, 0, 11, 2], np.int32)
    arrays = {"slots": slots, "previous": np.zeros(1, np.int32), "token": np.ones(1, np.int32)}
    wanted = {}
    for rows_name, name, width in (("k", "k_pool", key_width), ("v", "v_pool", value_width)):
        rows = typed(rng.standard_normal((len(slots), max(width, 1))), rows_type)
        pool = typed(rng.standard_normal((12, max(width, 1))), pool_type)
        arrays[rows_name], arrays[name] = rows, pool
        wanted[name] = pool.copy()
        if width:
            kept = slots >= 0
            wanted[name][slots[kept]] = typed(plain(rows, rows_type), pool_type)[kept]
    instance = write_instance(key_width, value_width, rows=rows_type, pool=pool_type)
    itemsize = max(ITEMSIZE[rows_type], ITEMSIZE[pool_type])
    _, threads = plan_write(itemsize, key_width, value_width)
    grid = (-(-len(slots) * threads // 32), 1, 1)
    check(emulator.run(instance, arrays, grid, 32, tmp_path))
    assert arrays["token"] == 0
    for name, pool in wanted.items():
        assert np.array_equal(arrays[name], pool), name


@pytest.mark.parametrize("write", QUANTISED, ids=lambda w: f"{w[0]}-{w[1]}-{w[2]}-{w[3].bits}")
def test_quantised_rows_are_those_of_mlx_s_functions(
    emulator: Emulator, write: tuple[str, int, int, Quantisation], tmp_path: Path
) -> None:
    rows_type, key_width, value_width, kind = write
    rng = np.random.default_rng(1)
    slots = np.array([5, -1, 0, 11, 2, 7, 8], np.int32)
    arrays = {"slots": slots, "previous": np.zeros(1, np.int32), "token": np.ones(1, np.int32)}
    wanted = {}
    kept = slots >= 0
    for rows_name, name, width in (("k", "k_pool", key_width), ("v", "v_pool", value_width)):
        values = rng.standard_normal((len(slots), width)) * np.exp(rng.uniform(-9, 9, (7, 1)))
        values[2] = 0.0
        values[3] = -2.5
        values[4, 7] = np.nan
        values[5, 9] = -np.inf
        rows = typed(values, rows_type)
        arrays[rows_name] = rows
        arrays[name] = np.full((12, kind.words(width)), 9, np.uint32)
        words = kind.encode(mx.array(plain(rows, rows_type).astype(np.float32)))
        wanted[name] = arrays[name].copy()
        wanted[name][slots[kept]] = np.array(words)[kept]
    instance = quantise_instance(key_width, value_width, kind, rows=rows_type)
    threads = (key_width + value_width) // QUANTISED_PART
    grid = (-(-len(slots) * threads // 32), 1, 1)
    check(emulator.run(instance, arrays, grid, 32, tmp_path))
    assert arrays["token"] == 0
    for name, pool in wanted.items():
        unwritten = np.setdiff1d(np.arange(12), slots)
        assert np.all(arrays[name][unwritten] == 9), name
        found, read = (
            np.array(kind.decode(mx.array(words), mx.float32)) for words in (arrays[name], pool)
        )
        finite = np.isfinite(read)
        assert np.array_equal(np.isfinite(found), finite), name
        # Halfway between two codes either will do; apart from that, the bits are the same.
        assert np.mean(arrays[name] == pool) > 0.9, name
        assert np.all((found == read) | ~finite | (np.abs(found - read) <= limit(read, kind))), name


def limit(read: Array, kind: Quantisation) -> Array:
    """Return an upper bound of each row's scale: the row's range divided by the codes."""
    rows = np.nan_to_num(read, nan=0.0, posinf=0.0, neginf=0.0)
    span: Array = (rows.max(-1) - rows.min(-1))[:, None]
    return span / (2**kind.bits - 1) * 1.02


@pytest.fixture(scope="module")
def raced() -> Emulator:
    instances = [i for case in CASES if case.name in RACED for i in case.instances]
    return build(instances, "thread")


@pytest.mark.parametrize("name", RACED)
def test_threads_do_not_race(raced: Emulator, name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    found, wanted = decode(raced, case, tmp_path)
    assert error(found, wanted, case.q) <= 1


SMALL = Case("small", AttentionShape(2, 1, 64, 64, window=9, sinks=True), (17, 40))


def edited(old: str, new: str, count: int = 1) -> Any:
    """Return an edit of the decode body that replaces `old`, which must be present, by `new`."""

    def edit(body: Body, source: str) -> str:
        if body != "decode":
            return source
        assert old in source, f"{old!r} is no longer in the body"
        return source.replace(old, new, count)

    return edit


def test_a_missing_barrier_is_noticed(tmp_path: Path) -> None:
    case = SMALL
    racing = build(case.instances, "thread", edited("  PA_SYNC();\n", "", 1))
    inputs = make_inputs(case)
    done = racing.run(case.instances[0], inputs.arrays, (1, 2, 1), case.plan.threads, tmp_path)
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("end > WINDOW ? end - WINDOW", "end > WINDOW + 1 ? end - WINDOW - 1"),
        ("whole = PA_EXP2(sink - highest)", "whole = 0.0f"),
        ("sum[g] *= keep", "sum[g] *= 1.0f"),
        ("bias[u] = token == wanted ? 0.0f : 4.0f * LOWEST", "bias[u] = 0.0f"),
    ],
    ids=["window", "sink", "rescale", "mask"],
)
def test_a_wrong_body_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    case = SMALL
    broken = build(case.instances, edit=edited(old, new))
    found, wanted = decode(broken, case, tmp_path)
    assert not error(found, wanted, case.q) <= 1
