"""Kernels of fused layers on an emulated GPU: compared with MLX's functions, and in a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen2_vl

from modelpack_engine.attention.kv_pools import KVLayout, TokenMajorPools
from modelpack_engine.core.batch import build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.kernels import launch, operations
from modelpack_engine.layers import kernels
from modelpack_engine.layers.kernels import Rotation
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.model_runner import make_runner
from modelpack_engine.runner.paged import PagedRunner
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.runner.models import tiny_llama

pytestmark = pytest.mark.long


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(operations, "_verdicts", {})
    monkeypatch.setattr(operations, "_WIDTH", 4)
    monkeypatch.setattr(operations, "_SLOTS", 256)
    with emulated(monkeypatch, kernels.verdict, kernels.own_values_verdict) as found:
        yield found


def test_kernels_agree_with_mlx(host: Host) -> None:
    assert kernels.verdict(mx.float32) is None
    assert kernels.own_values_verdict(mx.float32) is None
    assert kernels.own_values_verdict(mx.bfloat16) is None
    assert {body for body, _ in host.calls} == {
        "add_norm",
        "swiglu",
        "gate",
        "dequantise",
        "rotate",
        "angles",
        "rows",
    }


@pytest.mark.parametrize("shape", [(7, 8), (3, 7, 8), (2, 3, 7, 8), (5, 1)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rows_of_each_part(host: Host, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    table = mx.random.normal(shape, key=mx.random.key(4)).astype(dtype)
    index = mx.array([3, 0, 3, 4], mx.int32)
    assert mx.array_equal(kernels.take_rows(table, index), mx.take(table, index, axis=-2)).item()
    assert [body for body, _ in host.calls] == ["rows"]


def test_tokens_are_taken_by_the_kernel(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(kernels, "_takes_numbers", lambda dtype: None)
    tokens, index = mx.array([70, 71, 72, 73], mx.int32), mx.array([3, 3, 0], mx.int32)
    assert kernels.take(tokens, index).tolist() == [73, 73, 70]
    assert [body for body, _ in host.calls] == ["rows"]
    monkeypatch.setattr(kernels, "_takes_numbers", lambda dtype: "it does not run")
    assert kernels.take(tokens, index).tolist() == [73, 73, 70]
    assert len(host.calls) == 1


def test_angles_by_axes(host: Host) -> None:
    inverse = mx.power(mx.array(10000.0), -mx.arange(0, 32, 2, dtype=mx.float32) / 32)
    axes = np.array([[0, 1, 17, 400], [3, 2, 90, 401], [7, 5, 11, 402]])
    axis_of = np.arange(16) % 3
    found = Rotation(inverse, 32, 1.0, False).angles_by_axes(
        [mx.array(axis, mx.int32) for axis in axes], mx.array(axis_of, mx.int32)
    )
    angles = axes[axis_of].T * np.array(inverse, np.float64)
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-4)
    assert [body for body, _ in host.calls] == ["angles"]


@pytest.mark.parametrize(("dims", "factor"), [(64, 1.0), (32, 1.25)])
def test_angles(host: Host, dims: int, factor: float) -> None:
    inverse = mx.power(mx.array(10000.0), -mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    positions = np.array([0, 1, 17, 4000, 32000])
    found = np.array(Rotation(inverse, dims, factor, False).angles(mx.array(positions, mx.int32)))
    angles = positions[:, None] * np.array(inverse, np.float64)
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * factor
    assert found.shape == (5, dims // 2, 2)
    assert np.abs(found - expected).max() < 4e-3  # float32 angles of up to 32,000


@pytest.mark.parametrize(
    ("dim", "dims", "interleaved", "normed", "parts"),
    [
        (64, 64, True, False, 1),
        pytest.param(96, 96, False, True, 1, marks=pytest.mark.long),
        pytest.param(96, 32, False, False, 2, marks=pytest.mark.long),
        pytest.param(128, 64, True, True, 1, marks=pytest.mark.long),
        pytest.param(256, 64, False, True, 4, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("how", ["joint", "gated", "own values", "gated, own values"])
def test_rotation_and_kv_write(
    host: Host,
    dim: int,
    dims: int,
    interleaved: bool,
    normed: bool,
    parts: int,
    table: bool,
    how: str,
) -> None:
    heads, rows = (3, 2), 3
    positions, slots = mx.array([0, 700, 31], mx.int32), mx.array([18, -1, 33], mx.int32)
    keys = mx.random.split(mx.random.key(dim + dims), 3)
    joint = mx.random.normal((parts, rows, (heads[0] + 2 * heads[1]) * dim), key=keys[0])
    norms = None
    if normed:
        one, two = (mx.random.uniform(0.5, 1.5, (dim,), key=key) for key in keys[1:])
        norms = one, two, 1e-6
    inverse = mx.power(mx.array(10000.0), -mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    rotation = Rotation(inverse, dims, 1.0, interleaved)
    pools = TokenMajorPools(KVLayout(heads[1], dim, heads[1], dim, mx.float32), 3, 16)
    mx.eval(joint, pools.keys, pools.values)
    given, values = joint, None
    if "own values" in how:
        given, values = mx.split(joint, [(heads[0] + heads[1]) * dim], axis=-1)
        values = values.sum(axis=0)
    if "gated" in how:  # each query is followed by its gate
        split = heads[0] * dim
        queries = given[..., :split].reshape(parts, rows, heads[0], dim)
        pairs = mx.concatenate([queries, queries + 9], axis=-1).reshape(parts, rows, -1)
        given = mx.concatenate([pairs, given[..., split:]], axis=-1)
    q = kernels.rotate_and_write(
        given, parts, mx.float32, pools, positions, slots, rotation, heads, norms,
        rotation.angles(positions) if table else None, gated="gated" in how, values=values,
    )  # fmt: skip
    mx.eval(q)

    def expected(some: mx.array, weight: mx.array | None) -> mx.array:
        some = some if weight is None else mx.fast.rms_norm(some, weight, 1e-6)
        return mx.fast.rope(
            some[:, :, None], dims, traditional=interleaved, base=10000.0, scale=1.0,
            offset=positions,
        )[:, :, 0]  # fmt: skip

    whole = joint.sum(axis=0).reshape(rows, -1, dim)
    queries, new_keys, new_values = mx.split(whole, [heads[0], heads[0] + heads[1]], axis=1)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    close(q, expected(queries, norms and norms[0]))
    wanted = mx.zeros_like(pools.keys), mx.zeros_like(pools.values)
    new_keys = expected(new_keys, norms and norms[1])
    for row, slot in ((0, 18), (2, 33)):
        wanted[0][slot], wanted[1][slot] = new_keys[row], new_values[row]
    close(pools.keys, wanted[0])
    close(pools.values, wanted[1])


@pytest.mark.parametrize(
    ("body", "wrong", "found"),
    [
        ("normed", ("squares / D", "squares / (D + 9)"), "norm"),
        ("swiglu", ("1.44269504f", "1.5f"), "SwiGLU"),
        ("dequantise", ("+ bias", "- bias"), "4 bits"),
        ("rotate", ("y * c", "y * s"), "queries"),
        ("rotate", ("(kind - 1) * HK", "(kind - 1)"), "values"),
        ("rotate", ("s = inverse[at + 1]", "s = inverse[at]"), "queries by a table"),
        ("rows", ("index[line % rows]", "line % rows"), "rows"),
    ],
)
def test_the_verdict_names_a_wrong_kernel(
    host: Host, body: str, wrong: tuple[str, str], found: str
) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    verdict = kernels.verdict(mx.float32)
    assert verdict is not None
    assert verdict.startswith(found)


def test_a_model_runs_on_fused_kernels(host: Host) -> None:
    model = tiny_llama(head_dim=32)
    runner = make_runner(model, num_blocks=8, exact=False, compiled=False)
    assert runner.notes == ()
    assert set(runner.fused) == {"attention", "block", "MLP"}
    assert {"rotate", "add_norm", "swiglu", "decode", "rows"} <= {body for body, _ in host.calls}


@pytest.mark.parametrize("wrong", [False, True])
def test_values_of_another_matmul_are_written_in_the_kernel(host: Host, wrong: bool) -> None:
    """GGUF's mixes hold values in more bits. A kernel that is wrong for these is not used."""
    if wrong:
        host.break_by(lambda _, text: text.replace("head - HQ - HK) * D", "0) * D"))
    found = []
    for fused in (False, True):
        model = tiny_llama(head_dim=32)
        for layer in model.layers:
            layer.self_attn.v_proj = nn.QuantizedLinear.from_linear(layer.self_attn.v_proj, 32, 8)
        runner = make_runner(model, num_blocks=8, exact=not fused, compiled=False)
        assert ("attention" in runner.fused) is (fused and not wrong)
        before = len(host.calls)
        found.append(logits_of(runner))
        rotated = [call["OWN_VALUES"] for body, call in host.calls[before:] if body == "rotate"]
        assert rotated == [True] * len(model.layers) * (fused and not wrong)
        runner.undo()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


def logits_of(runner: Any, *, mrope: bool = False) -> mx.array:
    """Return the logits of a prompt's step, with `mrope` at other positions on each axis."""
    scheduler = Scheduler(SchedulerConfig(2, 32, 100), BlockManager(8))
    scheduler.add(Sequence("r", list(range(13)), SamplingParams()))
    output = scheduler.schedule()
    assert output is not None
    batch = build_batch(output, None, runner.buckets, 16)
    if mrope:
        axes = tuple([place * n // 2 for place in batch.positions] for n in (2, 1, 3))
        batch = replace(batch, rope_positions=axes)
    logits = runner.forward(batch, mx.array(batch.token_ids, mx.int32))
    mx.eval(logits)
    return cast("mx.array", logits)


def tiny_qwen2_vl(*, interleaved: bool = False) -> Any:
    """Return a random Qwen2-VL of mlx-lm, whose heads have sections of 4, 6 and 6 pairs."""
    mx.random.seed(1)
    text = {
        "model_type": "qwen2_vl", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "mrope", "mrope_section": [4, 6, 6], "mrope_interleaved": interleaved,
        },
    }  # fmt: skip
    model = qwen2_vl.Model(qwen2_vl.ModelArgs.from_dict(text))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mrope", [False, True])
def test_steps_with_mrope_positions_rotate_in_the_kernel(
    host: Host, mrope: bool, interleaved: bool
) -> None:
    """The step of a picture has the same logits as unfused."""
    found = []
    for fused in (False, True):
        model = tiny_qwen2_vl(interleaved=interleaved)
        runner = make_runner(model, num_blocks=8, exact=not fused, compiled=False)
        assert runner.tier == "paged"
        assert set(runner.fused) == ({"attention", "block", "MLP"} if fused else set())
        before = len(host.calls)
        found.append(logits_of(runner, mrope=mrope))
        bodies = {body for body, _ in host.calls[before:]}
        assert ("rotate" in bodies) == fused
        assert ("angles" in bodies) == (fused and mrope)
        assert ("swiglu" in bodies) == fused
        runner.undo()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_hidden_states_after_the_last_layer_have_all_rows(host: Host) -> None:
    """The fused last layer computes the sampled rows only, unless its output is recorded."""
    states = []
    for fused in (False, True):
        model: Any = tiny_llama(head_dim=32, tie_word_embeddings=True)
        runner = make_runner(model, num_blocks=8, exact=not fused, compiled=False)
        assert isinstance(runner, PagedRunner)
        assert bool(runner.fused) is fused
        runner.record_hidden([len(model.layers)], model.model.norm)
        scheduler = Scheduler(SchedulerConfig(2, 32, 100), BlockManager(8))
        scheduler.add(Sequence("r", list(range(13)), SamplingParams()))
        output = scheduler.schedule()
        assert output is not None
        batch = build_batch(output, None, runner.buckets, 16)
        logits = runner.forward(batch, mx.array(batch.token_ids, mx.int32))
        hidden = runner.hidden_rows()
        assert hidden is not None
        states.append(hidden.cut(batch.chunks[0].row, 13))
        expected = model.model.embed_tokens.as_linear(states[-1][-1:])
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
        runner.undo()
    np.testing.assert_allclose(states[0], states[1], rtol=1e-3, atol=1e-3)
