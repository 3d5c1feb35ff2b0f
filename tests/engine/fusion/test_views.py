"""Parts of a step's numbers are views: an index or a copy would be a kernel of its own on a GPU."""

from __future__ import annotations

import io
import re
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models import ssm

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.layers import convolution, delta_rule, state_space
from modelpack_engine.layers.drafts import Places
from modelpack_engine.patches import functions
from modelpack_engine.patches.functions import fast_recurrence
from modelpack_engine.patches.fused_layers import _ExpertRows

#: Operations that compute nothing.
VIEWS = {"Slice", "Reshape", "Squeeze", "ExpandDims"}


def operations(*arrays: mx.array) -> set[str]:
    """Return the operations that compute these arrays from evaluated ones."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return set(re.findall(r'label ?="(\w+)", shape=rectangle', graph.getvalue()))


def test_an_index_would_be_an_operation() -> None:
    numbers = mx.arange(12, dtype=mx.int32).reshape(3, 4)
    mx.eval(numbers)
    assert "Gather" in operations(numbers[1])
    assert operations(numbers[1:2].reshape(-1)) == {"Slice", "Reshape"}


@pytest.mark.parametrize("axes", [1, 3])
def test_positions_of_rows(axes: int) -> None:
    step = StepInputs(16, exact=False)
    follower = step.of_group(1)
    rotations = mx.arange(5 * axes, dtype=mx.int32).reshape(axes, 5)
    slots, tables = mx.zeros((5,), mx.int32), mx.zeros((5, 2), mx.int32)
    mx.eval(rotations, slots, tables)
    step.begin_rows(rotations, slots, (tables, slots), None)
    follower.follow_rows(step, slots, (tables, slots), None)
    assert operations(step.positions.rows) <= VIEWS
    assert follower.positions.rows is step.positions.rows
    assert step.positions.rows.tolist() == step.positions.tolist() == [0, 1, 2, 3, 4]
    expected = rotations.tolist() if axes > 1 else []
    assert [each.tolist() for each in step.positions.axes] == expected


def batch_of(seq_ids: tuple[int, ...]) -> StepBatch:
    count = len(seq_ids)
    return StepBatch(
        token_ids=[0] * count, positions=[0] * count, slots=[0] * count, from_previous=(),
        num_decode=count, decode_tables=[[1]] * count, decode_lengths=[1] * count,
        decode_seq_ids=seq_ids, chunks=(), sample_rows=tuple(range(count)), sample_seqs=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seq_ids", "proposes", "alone"),
    [((1, 2, 3), False, True), ((1, 2, 2), False, False), ((1, 2, 3), True, False)],
)
def test_rows_of_a_proposal_are_not_alone(
    seq_ids: tuple[int, ...], proposes: bool, alone: bool
) -> None:
    """They attend to each other's keys, which must be written before."""
    batch, step = batch_of(seq_ids), StepInputs(16, exact=False)
    follower, step.proposes = step.of_group(1), proposes
    step.begin(batch, [0, 1, 2])
    assert step.rows_alone is alone
    numbers = mx.zeros((3,), mx.int32)
    decode = mx.zeros((3, 1), mx.int32), numbers
    for given in (True, False):
        step.begin_rows(numbers[None], numbers, decode, None, alone=given)
        follower.follow_rows(step, numbers, decode, None)
        assert step.rows_alone is follower.rows_alone is (given and not proposes)
    step.exact = True
    step.begin_rows(numbers[None], numbers, decode, None, alone=True)
    assert not step.rows_alone, "rows attend by MLX's functions"


def test_places_of_a_draft() -> None:
    tokens, sequences = 4, 3
    numbers = mx.arange((3 * tokens + 1) * sequences, dtype=mx.int32).reshape(-1, sequences)
    mx.eval(numbers)
    places = Places(mx.zeros((sequences, 1 + tokens), mx.int32), numbers)
    for token in range(tokens):
        found = places.of_token(token)
        assert operations(*found) <= VIEWS
        assert [each.tolist() for each in found] == numbers[3 * token : 3 * token + 3].tolist()
    assert operations(places.last) <= VIEWS
    assert places.last.tolist() == numbers[-1].tolist()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_the_sum_over_experts(dtype: mx.Dtype) -> None:
    given, scores = mx.ones((5, 2, 8), mx.bfloat16), mx.ones((5, 2), dtype)
    sums = {each: mx.full((5, 8), 3, each) for each in (mx.bfloat16, mx.float32)}
    mx.eval(given, scores, *sums.values())
    rows = _ExpertRows.of(given, lambda by, as_type: sums[as_type])
    combined = (rows * scores[..., None]).sum(axis=-2)
    assert combined.dtype == dtype
    for each, expected in sums.items():
        found = combined.astype(each)
        assert operations(found) <= VIEWS
        assert found.dtype == each
        assert found.tolist() == expected.tolist()


def test_rows_of_recurrent_layers() -> None:
    """Functions of mlx-lm get [1, rows, ...]; kernels get [rows, ...]."""
    given: list[tuple[mx.array, ...]] = []

    class States:
        def replace(self, shape: tuple[int, ...], compute: Any) -> mx.array:
            made: mx.array = compute(None, None)
            return made

    def by_segments(*arrays: mx.array) -> mx.array:
        given.append(arrays)
        return arrays[0]

    x, b = mx.ones((1, 5, 4, 8)), mx.ones((1, 5, 1, 16))
    dt, each = mx.ones((1, 5, 4)), mx.ones((4,))
    weight, joint = mx.ones((32, 4, 1)), mx.ones((1, 8, 32))
    mx.eval(x, b, dt, each, weight, joint)
    with pytest.MonkeyPatch.context() as patch, fast_recurrence(cast("Any", States())):
        for module in (state_space, delta_rule, convolution):
            patch.setattr(module, "by_segments", by_segments)
        patch.setattr(ssm, "compute_dt", lambda dt, *by: dt)
        functions._state_space(x, each, b, b, each, dt, each)
        functions._delta_rule(x, x, x, dt, dt)
        functions._convolution(joint, weight, groups=32)
    assert [len(arrays) for arrays in given] == [8, 7, 4]
    for arrays, count in zip(given, (4, 5, 1), strict=True):
        assert operations(*arrays[:count]) <= VIEWS
        assert all(array.shape[0] in (5, 8) for array in arrays[:count])
