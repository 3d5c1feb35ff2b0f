"""The operations of the engine without a GPU, on an emulated GPU, and on a faulty one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from modelpack_engine import kernels
from modelpack_engine.kernels import AttentionShape, launch, operations, plan
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import Body, kernel_source
from tests.engine.kernels.cases import CASES, SOFTCAP, Case, expected, make_inputs
from tests.engine.kernels.onhost import Host, emulated, memory

pytestmark = pytest.mark.long

FLOATS = [case for case in CASES if case.pool == case.q == "float" or case.shape.latent]


@pytest.fixture(autouse=True)
def _nothing_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_verdicts", {})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """An emulated GPU, with smaller probes."""
    monkeypatch.setattr(operations, "_WIDTH", 4)
    monkeypatch.setattr(operations, "_SLOTS", 256)
    with emulated(monkeypatch) as found:
        yield found


def run(case: Case, **more: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the results of `decode_attention` and the reference for a case, in float32."""
    shape = case.shape
    case = Case(case.name, shape, case.context_lens, pool="uint32_t" if shape.bits else "float")
    inputs = make_inputs(case)
    if shape.bits:
        more["quantised"] = Quantisation(shape.bits, shape.group)
        for name in ("k_pool", "v_pool"):
            words = inputs.arrays[name]
            words[words == 0x7FC0] = 0  # no NaN, as below
            inputs.arrays[name] = words[:, None]
    a = {name: mx.array(np.nan_to_num(array)) for name, array in inputs.arrays.items()}
    tables = mx.where(a["block_tables"] == 1 << 30, 0, a["block_tables"])
    out = kernels.decode_attention(
        a["q"], a["k_pool"], a["v_pool"] if shape.extra_dim or not shape.latent else None,
        tables, a["context_lens"],
        scale=inputs.scale, num_kv_heads=shape.num_kv_heads, window=shape.window,
        softcap=SOFTCAP if shape.softcap else None, sinks=a["sinks"] if shape.sinks else None,
        q_more=a["q_more"] if shape.extra_dim else None,
        value_dim=shape.value_dim if shape.latent else None, block_size=shape.block_size, **more,
    )  # fmt: skip
    for name in ("k_pool", "v_pool") if shape.bits else ():
        inputs.arrays[name] = inputs.arrays[name][:, 0]
    return np.array(out), expected(case, inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_a_kernel_mlx_computes_the_same(case: Case) -> None:
    found, wanted = run(case)
    assert np.max(np.abs(found - wanted)) <= 1e-5


@pytest.mark.parametrize("name", ["softcap-window-sinks", "latent-two-pools", "q8"])
def test_a_decode_reaches_the_kernel(host: Host, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    found, wanted = run(case, split=1)
    assert host.calls[-1][0] == "decode"
    assert np.max(np.abs(found - wanted)) <= 1e-5


def test_a_split_decode_reaches_both_kernels(host: Host) -> None:
    case = Case("split", AttentionShape(2, 1, 64, 64, sinks=True), (1, 17, 100))
    found, wanted = run(case, split=2)
    assert [body for body, _ in host.calls[-2:]] == ["decode", "merge"]
    assert np.max(np.abs(found - wanted)) <= 1e-5


def test_small_inputs_make_another_kernel_on_metal(host: Host) -> None:
    # Their address space differs, and MLX would compile the kernel again at each change.
    shape = AttentionShape(2, 1, 64, 64)
    run(Case("few", shape, (1, 2)), split=1)
    run(Case("more", shape, (1, 2) * 4), split=1)
    few, more = (template for _, template in host.calls[-2:])
    assert few.pop("SMALL") != more.pop("SMALL")
    assert few == more


def rows(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_write_in_place_shares_the_pools_memory(host: Host) -> None:
    k_pool, v_pool = mx.zeros((48, 2, 64)), mx.zeros((48, 2, 32))
    k, v = rows(0, 3, 2, 64), rows(1, 3, 2, 32)
    slots = mx.array([17, -1, 4], mx.int32)
    new_k, new_v = kernels.write_kv(k, v, k_pool, v_pool, slots)
    assert host.calls[-1][0] == "write"
    assert new_v is not None
    assert kernels.token_of(new_k) is kernels.token_of(new_v) is not None
    for new, old, wanted in ((new_k, k_pool, k), (new_v, v_pool, v)):
        assert memory(new).ctypes.data == memory(old).ctypes.data
        assert mx.array_equal(new[mx.array([17, 4])], wanted[mx.array([0, 2])])
        assert mx.sum(new != 0).item() == 2 * wanted[0].size


@pytest.mark.parametrize(("width", "by_kernel"), [(4, False), (8, True)])
def test_rows_of_few_elements_are_left_to_mlx(host: Host, width: int, by_kernel: bool) -> None:
    kernels.write_kv(rows(0, 1, 1, 8), rows(1, 1, 1, 8), mx.zeros((16, 1, 8)), mx.zeros((16, 1, 8)),
                     mx.array([3], mx.int32))  # fmt: skip
    count = len(host.calls)
    v = rows(1, 1, 1, width)
    _, new_v = kernels.write_kv(
        rows(0, 1, 1, 8), v, mx.zeros((16, 1, 8)), mx.zeros((16, 1, width)), mx.array([3], mx.int32)
    )
    assert new_v is not None
    assert mx.array_equal(new_v[3], v[0])
    assert (len(host.calls) > count) == by_kernel


def test_quantised_rows_reach_their_kernel(host: Host) -> None:
    kind = Quantisation(4, 64)
    pools = [mx.zeros((48, 1, kind.words(width)), mx.uint32) for width in (128, 64)]
    k, v = rows(0, 3, 2, 64), rows(1, 3, 2, 32)
    slots = mx.array([17, -1, 4], mx.int32)
    new_k, new_v = kernels.write_kv(k, v, *pools, slots, quantised=kind)
    assert host.calls[-1][0] == "quantise"
    assert new_v is not None
    assert kernels.token_of(new_k) is kernels.token_of(new_v) is not None
    for new, old, wanted in ((new_k, pools[0], k), (new_v, pools[1], v)):
        assert memory(new).ctypes.data == memory(old).ctypes.data
        found = kind.decode(new[mx.array([17, 4]), 0], mx.float32)
        assert mx.allclose(found, wanted[mx.array([0, 2])].reshape(2, -1), atol=0.3)
        assert not mx.any(new[mx.array([0, 5, 16])]).item()


@pytest.mark.parametrize("emulated", [True, False], ids=["kernel", "mlx"])
def test_keys_alone_are_written(emulated: bool, request: pytest.FixtureRequest) -> None:
    if emulated:
        request.getfixturevalue("host")
    k = rows(0, 2, 1, 72)
    pool, nothing = kernels.write_kv(
        k, None, mx.zeros((32, 1, 72), mx.bfloat16), None, mx.array([31, 16], mx.int32)
    )
    assert nothing is None
    assert mx.array_equal(pool[mx.array([31, 16])], k.astype(mx.bfloat16))


def test_readers_and_the_next_write_take_the_token(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = host.kernel

    def spy(body: Body, on: Any, *, split: bool = False) -> Any:
        run = real(body, on, split=split)
        source = kernel_source(body, on, split=split)

        def spied(**call: Any) -> Any:
            seen.append((body, dict(zip(source.inputs, call["inputs"], strict=True))))
            return run(**call)

        return spied

    monkeypatch.setattr(launch, "kernel", spy)
    assert operations.may_write(mx.float32, mx.float32)
    shape = AttentionShape(2, 1, 64, 64)
    assert operations.may_decode(shape, mx.float32, mx.float32)
    pools = mx.zeros((32, 1, 64)), mx.zeros((32, 1, 64))
    slots = mx.array([16, 17], mx.int32)
    first = kernels.write_kv(rows(0, 2, 1, 64), rows(1, 2, 1, 64), *pools, slots)
    second = kernels.write_kv(rows(2, 2, 1, 64), rows(3, 2, 1, 64), *first, slots)
    assert seen[-1][1]["previous"] is kernels.token_of(first[0])
    kernels.decode_attention(
        rows(4, 1, 2, 64), second[0], second[1], mx.array([[1]], mx.int32),
        mx.array([2], mx.int32), scale=0.125, num_kv_heads=1,
    )  # fmt: skip
    assert seen[-1][1]["written"] is kernels.token_of(second[0])
    assert mx.array_equal(kernels.after(slots, *second), slots)
    assert kernels.after(slots, *pools) is slots


def test_tokens_are_forgotten_with_their_pools() -> None:
    pool, token = mx.zeros((4, 1, 8)), mx.zeros((1,), mx.int32)
    assert plan.written(pool, token) is pool
    assert kernels.token_of(pool) is token
    newer = mx.zeros((1,), mx.int32)
    plan.written(pool, newer)
    assert kernels.token_of(pool) is newer
    key = id(pool)
    assert key in plan._tokens
    del pool
    assert key not in plan._tokens
    assert kernels.token_of(None) is None


def test_without_a_gpu_rows_are_scattered_and_negative_slots_go_to_the_null_block() -> None:
    k, v = rows(0, 3, 2, 8), rows(1, 3, 2, 4)
    pools = mx.zeros((32, 2, 8)), mx.zeros((32, 2, 4))
    new_k, new_v = kernels.write_kv(k, v, *pools, mx.array([17, -1, 4], mx.int32))
    assert new_v is not None
    for new, wanted in ((new_k, k), (new_v, v)):
        assert kernels.token_of(new) is None
        assert mx.array_equal(new[mx.array([17, 0, 4])], wanted)
        assert mx.sum(new != 0).item() == wanted.size


def test_without_a_gpu_there_is_no_kernel_and_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    if launch.backend() != "none":
        pytest.fail("run gpu_check.py here")
    assert kernels.available() == kernels.KernelSupport("none", decode=False, write=False)
    shape = AttentionShape(2, 1, 64, 64)
    assert kernels.probe([shape]) == kernels.KernelSupport("none", decode=False, write=False)
    assert not caplog.records


def test_good_kernels_pass_their_probes(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    shapes = [
        AttentionShape(2, 1, 64, 64, window=20, sinks=True),
        AttentionShape(2, 1, 64, 64, 8, latent=True),
        AttentionShape(2, 1, 64, 32, softcap=True),
    ]
    found = kernels.probe(shapes, mx.float32, mx.bfloat16)
    assert found == kernels.KernelSupport("metal", decode=True, write=True)
    assert {body for body, _ in host.calls} == {"decode", "merge", "write"}
    count = len(host.calls)
    assert kernels.probe(shapes, mx.float32, mx.bfloat16) == found
    assert len(host.calls) == count, "probed once"
    assert not caplog.records


def wrong(body: Body, old: str, new: str) -> Any:
    def edit(this: Body, source: str) -> str:
        if this != body:
            return source
        assert old in source, f"{old!r} is no longer in the body"
        return source.replace(old, new)

    return edit


@pytest.mark.parametrize(
    ("body", "old", "new", "says"),
    [
        ("decode", "sum[g] += p;", "sum[g] += p * 1.1f;", "off by"),
        ("merge", "o[i] += partial", "o[i] -= partial", "in 4 parts"),
        ("write", "slot * KN", "(slot + 1) * KN", "keys read back"),
        ("write", "slot * VN", "(slot ^ 1) * VN", "values read back"),
    ],
)
def test_a_failed_probe_warns_and_falls_back(
    host: Host, body: Body, old: str, new: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.break_by(wrong(body, old, new))
    shape = AttentionShape(2, 1, 64, 64)
    found = kernels.probe([shape], mx.float32)
    assert found.backend == "metal"
    assert (found.decode, found.write) == (body == "write", body != "write")
    assert len(found.failures) == 1
    assert says in found.failures[0]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert says in record.getMessage()
    # The operation still returns the correct result.
    count = len(host.calls)
    if body == "write":
        k = rows(0, 2, 1, 64)
        pool, _ = kernels.write_kv(k, None, mx.zeros((32, 1, 64)), None, mx.array([3, 4]))
        assert mx.array_equal(pool[3:5], k)
    else:
        result, wanted = run(Case("again", shape, (5, 17)))
        assert np.max(np.abs(result - wanted)) <= 1e-5
    assert len(host.calls) == count


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* inverse + 0.5f", "* inverse + 4.5f"),
        ("step_bits = 0x7fc00000u", "step_bits = 0"),
        ("(size_t)slot *", "(size_t)(slot ^ 1) *"),
        ("higher > high ? higher : high", "high"),
    ],
    ids=["codes", "nan", "slots", "lanes"],
)
def test_a_wrong_quantising_kernel_is_not_used(host: Host, old: str, new: str) -> None:
    kind = Quantisation(8, 64)
    assert operations.may_write(mx.bfloat16, mx.uint32, kind)
    assert {body for body, _ in host.calls} == {"quantise"}
    operations._verdicts.clear()
    host.break_by(wrong("quantise", old, new))
    assert not operations.may_write(mx.bfloat16, mx.uint32, kind)
    assert not operations.may_write(mx.bfloat16, mx.uint32)


def test_a_write_that_copies_fails_its_probe(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = launch.write

    def copying(on: Any, k: Any, v: Any, k_pool: mx.array, *rest: Any) -> mx.array:
        mx.eval(k_pool + 1)
        return real(on, k, v, k_pool, *rest)

    monkeypatch.setattr(launch, "write", copying)
    found = kernels.probe([], mx.float32)
    assert not found.write
    assert "copied" in found.failures[0]


def test_a_kernel_that_does_not_compile_falls_back(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    monkeypatch.setattr(launch, "kernel", broken)
    found = kernels.available()
    assert (found.decode, found.write) == (False, False)
    assert len(found.failures) == len(caplog.records) == 2
    assert all("Unable to build" in failure for failure in found.failures)


@pytest.mark.parametrize("dtype", [mx.float16, mx.int32])
def test_a_shape_without_a_kernel_falls_back(host: Host, dtype: mx.Dtype) -> None:
    odd = AttentionShape(4, 2, 4, 4)
    assert not operations.may_decode(odd, mx.float16, dtype)
    assert not host.calls
    assert kernels.available().failures


@pytest.fixture
def _kernels_off() -> Iterator[None]:
    kernels.enable(False)
    yield
    kernels.enable(True)


@pytest.mark.usefixtures("_kernels_off")
def test_kernels_can_be_turned_off(host: Host) -> None:
    assert kernels.available().backend == "none"
    run(FLOATS[0])
    assert not host.calls
