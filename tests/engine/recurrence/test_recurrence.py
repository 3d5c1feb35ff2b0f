"""State spaces and delta rules against mlx-lm's operations; the kernels on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gated_delta, ssm

from modelpack_engine.kernels import launch
from modelpack_engine.layers import (
    convolution,
    delta_rule,
    gated_norm,
    linear_attention,
    state_space,
)
from modelpack_engine.patches import functions
from tests.engine.kernels.onhost import Host, emulated

pytestmark = pytest.mark.long


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(
        monkeypatch,
        *(
            each.verdict
            for each in (state_space, delta_rule, convolution, gated_norm, linear_attention)
        ),
        delta_rule.wide_verdict,
        state_space.wide_verdict,
    ) as found:
        yield found


def state_space_inputs(
    batch: int, tokens: int, heads: int, groups: int, *, started: bool
) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any]:
    """Return random arguments of mlx-lm's `ssm_attn`."""
    keys = mx.random.split(mx.random.key(11), 7)
    dim, size = 8, 16
    return (
        mx.random.normal((batch, tokens, heads, dim), key=keys[0]),
        mx.log(mx.arange(1, heads + 1, dtype=mx.float32)),
        mx.random.normal((batch, tokens, groups, size), key=keys[1]),
        mx.random.normal((batch, tokens, groups, size), key=keys[2]),
        mx.random.normal((heads,), key=keys[3]),
        mx.random.normal((batch, tokens, heads), key=keys[4]) - 2,
        mx.random.normal((heads,), key=keys[5]) / 4,
        mx.random.normal((batch, heads, dim, size), key=keys[6]) if started else None,
    )


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "groups", "started"),
    [
        (1, 1, 4, 2, True),
        (3, 1, 4, 1, True),
        (2, 1, 6, 3, True),
        (1, 1, 4, 2, False),
        (1, 7, 4, 2, False),
        (1, 7, 4, 2, True),
        (2, 300, 4, 2, False),  # more than a chunk
        (2, 513, 4, 4, True),
    ],
)
def test_state_spaces_are_those_of_mlx_lm(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    tokens: int,
    heads: int,
    groups: int,
    started: bool,
) -> None:
    inputs = state_space_inputs(batch, tokens, heads, groups, started=started)
    expected = functions.native_ssm_attn(*inputs)
    functions.install()
    monkeypatch.setattr(functions, "native_ssm_attn", None)
    with functions.fast_recurrence():
        found = ssm.ssm_attn(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("started", [False, True])
def test_padding_after_a_prompt_leaves_the_state(*, started: bool) -> None:
    lengths = [2, 5, 4]
    inputs = state_space_inputs(3, 5, 4, 2, started=started)
    mask = mx.arange(5) < mx.array(lengths)[:, None]
    functions.install()
    with functions.fast_recurrence():
        found = ssm.ssm_attn(*inputs, (0.001, 100.0), mask, mx.array(lengths))
    x, a_log, b, c, d, dt, bias, state = inputs
    for row, length in enumerate(lengths):
        one, some = slice(row, row + 1), slice(length)
        before = None if state is None else state[one]
        of_row = (x[one, some], a_log, b[one, some], c[one, some], d, dt[one, some], bias, before)
        expected = functions.native_ssm_attn(*of_row)
        np.testing.assert_allclose(found[0][one, some], expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1][one], expected[1], rtol=1e-4, atol=1e-4)


def test_outside_of_steps_mlx_lm_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    functions.install()
    monkeypatch.setattr(functions, "native_ssm_attn", lambda *_: "mlx-lm's")
    monkeypatch.setattr(functions, "native_gated_delta_ops", lambda *_: "mlx-lm's")
    with functions.fast_recurrence():
        pass
    found: list[Any] = [
        ssm.ssm_attn(*state_space_inputs(1, 1, 4, 2, started=True)),
        gated_delta.gated_delta_ops(*delta_rule_inputs(1, every=True)),
    ]
    assert found == ["mlx-lm's"] * 2


def delta_rule_inputs(tokens: int, *, every: bool, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(12), 6)
    batch, key_heads, heads, key_dim, dim = 2, 2, 4, 32, 8
    q, k = (mx.random.normal((batch, tokens, key_heads, key_dim), key=i) / 8 for i in keys[:2])
    v = mx.random.normal((batch, tokens, heads, dim), key=keys[2])
    shape = (batch, tokens, heads, key_dim) if every else (batch, tokens, heads)
    g = mx.random.uniform(0.5, 1, shape, key=keys[3])
    beta = mx.random.uniform(0, 1, (batch, tokens, heads), key=keys[4]).astype(dtype)
    state = mx.random.normal((batch, heads, dim, key_dim), key=keys[5])
    return [*(a.astype(dtype) for a in (q, k, v)), g, beta, state]


@pytest.mark.parametrize("every", [False, True])
def test_the_delta_rule_by_definition_is_that_of_mlx_lm(every: bool) -> None:
    inputs = delta_rule_inputs(5, every=every)
    found = delta_rule.by_definition(*inputs)
    expected = functions.native_gated_delta_ops(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_a_kernel_the_delta_rule_stays_with_mlx_lm() -> None:
    inputs = delta_rule_inputs(3, every=False)
    functions.install()
    with functions.fast_recurrence():
        found = gated_delta.gated_delta_ops(*inputs)
    for ours, theirs in zip(found, functions.native_gated_delta_ops(*inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("channels", "size", "length"), [(6, 4, 4), (6, 4, 11), (3, 2, 5), (1, 1, 3)]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_convolutions_are_those_of_mlx(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, channels: int, size: int, length: int
) -> None:
    x = mx.random.normal((2, length, channels)).astype(dtype)
    weight = mx.random.normal((channels, size, 1)).astype(dtype)
    expected = functions.native_conv1d(x, weight, groups=channels)
    functions.install()
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(functions, "native_conv1d", None)
    with functions.fast_recurrence():
        found = mx.conv1d(x, weight, 1, 0, 1, channels)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    tolerance = 1e-5 if dtype == mx.float32 else 4e-2
    np.testing.assert_allclose(
        found.astype(mx.float32), expected.astype(mx.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("how", "size"),
    [
        ((2, 0, 1, 4), 3),
        ((1, 1, 1, 4), 3),
        ((1, 0, 2, 4), 3),
        ((1, 0, 1, 2), 3),
        ((1, 0, 1, 4), 9),
    ],
)
def test_other_convolutions_stay_with_mlx(
    monkeypatch: pytest.MonkeyPatch, how: tuple[int, int, int, int], size: int
) -> None:
    x, weight = mx.random.normal((1, 12, 4)), mx.random.normal((4, size, 4 // how[3]))
    functions.install()
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    with functions.fast_recurrence():
        found = mx.conv1d(x, weight, *how)
    np.testing.assert_array_equal(found, functions.native_conv1d(x, weight, *how))


def test_the_texts_compute_what_mlx_does(host: Host) -> None:
    assert state_space.verdict(mx.float32) is None
    assert delta_rule.verdict(mx.float32) is None
    assert convolution.verdict(mx.float32) is None
    assert gated_norm.verdict(mx.float32) is None
    assert linear_attention.verdict(mx.float32) is None
    assert linear_attention.verdict(mx.bfloat16) is None
    assert {body for body, _ in host.calls} == {
        "state_space", "delta_rule", "convolve", "gated_norm", "linear_attention",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("state_space", ("input[r] * through", "through")),
        ("state_space", ("s[r][i].e[e] * decay +", "s[r][i].e[e] +")),
        ("state_space", ("source != -1 && row < P", "source > 0 && row < P")),
        ("state_space", ("source < -1 ? pool : state", "state")),
        ("state_space", ("t + 1 == marked", "false")),
        ("state_space", ("t + 1 == marked", "t + 2 == marked")),
        ("state_space", ("(size_t)start + t + 1", "(size_t)start + t")),
        ("state_space", ("owners[row] < 0", "false")),
        ("delta_rule", ("- known[r]", "")),
        ("delta_rule", ("-2 - source", "-1 - source")),
        ("delta_rule", ("(size_t)slot * HV", "(size_t)head * HV")),
        ("delta_rule", ("head / (HV / HK)", "0")),
        ("delta_rule", ("g[((at * EACH + i) * LANES + part) * VEC + e]", "g[at * DK]")),
        ("delta_rule", ("next_rate = float(beta[at])", "next_rate = float(beta[head])")),
        ("delta_rule", ("owners[row] < 0", "false")),
        ("convolve", ("back <= before || source != -1", "back <= before")),
        ("convolve", ("KEEP + before - back", "before")),
        ("convolve", ("if (row >= 0)", "if (row > 0)")),
        ("convolve", ("owner >= 0", "owner > 0")),
        ("convolve", ("i ? marked :", "i ? marked / 2 :")),
        (
            "convolve",
            ("(const PA_DEVICE Vec*)(source < -1 ? pool : state)", "(const PA_DEVICE Vec*)state"),
        ),
        ("convolve", ("KEEP + row) * N", "KEEP - 1) * N")),
        ("convolve", ("columns[at]", "at * V")),
        ("convolve", ("BIAS &&", "!BIAS &&")),
        ("convolve", ("ACTIVATE ?", "!ACTIVATE ?")),
        ("delta_rule", ("known[r] * by_key) * rate * by_key", "known[r]) * rate * by_key")),
        ("delta_rule", ("pa_float(EPSILON)) * DK", "pa_float(EPSILON))")),
        ("delta_rule", ("token * KEYS + K_AT", "token * KEYS")),
        ("state_space", ("token * GROUPS + C_AT", "token * GROUPS")),
        ("delta_rule", ("head / PER * 2 * PER", "0")),
        ("delta_rule", ("+ biases[head]", "")),
        ("delta_rule", ("rates[head] * passed", "passed")),
        ("state_space", ("+ biases[head]", "")),
        ("state_space", ("+ DT_AT", "")),
        ("state_space", ("next_step > pa_float(HIGH)", "false")),
        ("gated_norm", ("columns[group]", "group * D")),
        ("linear_attention", ("+ known[r] * change", "")),
        ("linear_attention", ("s[r][i] * kept", "s[r][i]")),
        ("linear_attention", ("EVERY ? keys + i : head", "EVERY ? keys : head")),
        ("linear_attention", ("EVERY ? keys + i : head", "EVERY ? keys + i : 0")),
        ("linear_attention", ("TURNED ? 1 : DK", "DK")),
        ("linear_attention", ("source < -1 ? pool : state", "state")),
        ("linear_attention", ("t + 1 == marked", "t == marked")),
        ("linear_attention", ("owners[row] < 0", "false")),
        ("gated_norm", ("BEFORE ? activated : 1.0f", "1.0f")),
        ("gated_norm", ("SAME ? 0 : group * D", "0")),
    ],
)
def test_a_wrong_text_is_found(host: Host, body: str, wrong: tuple[str, str]) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    module: Any = {
        "state_space": state_space,
        "delta_rule": delta_rule,
        "convolve": convolution,
        "gated_norm": gated_norm,
        "linear_attention": linear_attention,
    }[body]
    verdict = module.verdict(mx.float32)
    assert verdict is not None
    assert " is off by " in verdict


WIDE = [
    ("delta_tiles", ("2 * PER + head % PER", "2 * PER")),
    ("delta_tiles", ("column[t] -= lower", "column[t] += lower")),
    ("delta_tiles", ("s <= t ? by * lengths[ROWS + t]", "s < t ? by * lengths[ROWS + t]")),
    ("delta_tiles", ("T(column[t] * beta)", "T(column[t])")),
    ("delta_tiles", ("PA_EXP2(last - sums[lane])", "PA_EXP2(last)")),
    ("delta_tiles", ("own >= LONG", "own > 48")),
    ("delta_wide", ("s[tile + n][i] *= whole", "s[tile + n][i] *= 1.0f")),
    ("delta_wide", ("at + TOKENS == mark", "at == mark")),
    ("delta_wide", ("out[n][i] *= by[1]", "out[n][i] *= by[0]")),
    ("delta_wide", ("from_row < -1 ? pool : state", "state")),
    ("delta_wide", ("stage ^= 1", "stage ^= 0")),
]


def test_long_segments_are_right_on_tensor_cores(host: Host) -> None:
    for key_dim, dim in ((64, 64), (128, 128)):
        assert delta_rule.wide_verdict(mx.bfloat16, key_dim, dim) is None
    assert {body for body, _ in host.calls} == {"delta_tiles", "delta_wide"}


@pytest.mark.parametrize(("text", "wrong"), WIDE)
def test_a_wrong_text_of_tensor_cores_is_found(
    host: Host, text: str, wrong: tuple[str, str]
) -> None:
    host.break_by(lambda name, found: found.replace(*wrong) if name == text else found)
    verdict = delta_rule.wide_verdict(mx.bfloat16, 64, 64)
    assert verdict is not None
    assert " is off by " in verdict


@pytest.mark.parametrize(
    ("dtype", "dim", "size"),
    [(mx.bfloat16, 64, 128), (mx.float16, 48, 64), (mx.bfloat16, 32, 256)],
    ids=["bf16", "f16, 16 channels a block", "bf16, 256 states"],
)
def test_the_text_on_tensor_cores_computes_what_mlx_does(
    host: Host, dtype: mx.Dtype, dim: int, size: int
) -> None:
    assert state_space.wide_verdict(dtype, dim, size) is None
    assert {body for body, _ in host.calls} == {"state_space_wide"}


@pytest.mark.parametrize(
    "wrong",
    [
        ("PA_EXP2(until[i % 4 / 2])", "1.0f"),
        ("until[i % 4 / 2] - sums[other]", "until[i % 4 / 2]"),
        (") * steps[other]", ")"),
        ("other <= row", "other < row"),
        ("other <= row", "other <= row + 1"),
        ("if (base > strip) continue", "if (base > 0) continue"),
        ("const float decay = PA_EXP2(sums[ROWS - 1])", "const float decay = 1.0f"),
        ("PA_EXP2(total - to[0])", "1.0f"),
        ("weights + k", "weights"),
        ("lane * 2 + i < there ? raw[i]", "true ? raw[i]"),
        ("RAW && lane * 2 + i < there", "RAW"),
        ("(lane & mask)", "(lane & 1)"),
        ("marked < to ? marked : to", "false ? marked : to"),
        ("to == marked", "false"),
        ("to == marked", "to - 1 == marked"),
        ("from < count; stage", "to < count; stage"),
        ("stage ^= 1", "stage = 0"),
        ("(source < -1 ? pool : state)", "state"),
        ("(source != -1)", "(source > 0)"),
        ("-2 - source", "-1 - source"),
        ("owners[row] < 0", "false"),
        ("through * float(given.e[0])", "0.0f"),
        ("through * float(input[", "0.0f * float(input["),
        ("cell * decay", "cell"),
        ("!is_long; row++", "false; row++"),
        ("b + B_AT", "b"),
        ("c + C_AT + head / (H / G) * N", "c + C_AT"),
        ("head * P + first, INPUTS", "head * P, INPUTS"),
        ("RAW ? DT_AT", "RAW ? 0"),
        ("RAW ? biases[head]", "RAW ? 0.0f"),
        ("step[i] > pa_float(HIGH)", "false"),
    ],
    ids=lambda wrong: f"{wrong[0]} -> {wrong[1]}",
)
def test_a_wrong_text_on_tensor_cores_is_found(host: Host, wrong: tuple[str, str]) -> None:
    def edit(name: str, text: str) -> str:
        assert wrong[0] in text
        return text.replace(*wrong)

    host.break_by(edit)
    verdict = state_space.wide_verdict(mx.float16, 48, 64)
    assert verdict is not None
    assert " is off by " in verdict


@pytest.mark.parametrize(
    ("tokens", "dtype", "dim", "size", "wide"),
    [
        (17, mx.bfloat16, 16, 64, True),
        (8, mx.bfloat16, 16, 64, False),
        (1, mx.bfloat16, 16, 64, False),
        (17, mx.float32, 16, 64, False),
        (17, mx.bfloat16, 8, 64, False),
        (17, mx.bfloat16, 16, 32, False),
        (17, mx.bfloat16, 16, 320, False),
    ],
)
def test_prompts_run_on_tensor_cores(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    dtype: mx.Dtype,
    dim: int,
    size: int,
    wide: bool,
) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(state_space, "wide_verdict", lambda *_: None)
    monkeypatch.setattr(state_space, "takes", lambda *_: True)
    x = mx.random.normal((2, tokens, 2, dim)).astype(dtype)
    b = mx.random.normal((2, tokens, 1, size)).astype(dtype)
    dt, d = mx.ones((2, tokens, 2)), mx.ones((2,))
    state_space.attend(x, mx.zeros((2,)), b, b, d, dt, None, 256)
    rule = "state_space_wide" if wide else "state_space"
    assert [body for body, _ in host.calls] == [rule, "gate"]  # which copies the states


def test_padding_leaves_the_state_of_the_delta_rule(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions.install()
    monkeypatch.setattr(functions, "native_gated_delta_ops", None)
    monkeypatch.setattr(delta_rule, "takes", lambda *_: True)
    mask = mx.arange(6) < mx.array([4, 6])[:, None]
    for every in (False, True):
        q, k, v, g, beta, before = delta_rule_inputs(6, every=every)
        with functions.fast_recurrence():
            y, state = gated_delta.gated_delta_ops(q, k, v, g, beta, before, mask)
        for row, length in enumerate((4, 6)):
            one, some = slice(row, row + 1), slice(length)
            wanted, after = delta_rule.by_definition(
                q[one, some], k[one, some], v[one, some], g[one, some], beta[one, some], before[one]
            )
            np.testing.assert_allclose(y[row : row + 1, :length], wanted, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(state[row : row + 1], after, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_as_its_tokens_one_by_one(host: Host) -> None:
    q, k, v, g, beta, state = delta_rule_inputs(6, every=False)
    whole, last = delta_rule.update(q, k, v, g, beta, state)
    for t in range(6):
        some = slice(t, t + 1)
        y, state = delta_rule.update(
            q[:, some], k[:, some], v[:, some], g[:, some], beta[:, some], state
        )
        np.testing.assert_array_equal(y, whole[:, some])
    np.testing.assert_array_equal(state, last)
