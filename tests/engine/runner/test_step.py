"""The steps of a runner: logits, recurrent state, and memory."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import mamba2

from modelpack_engine.core.batch import StepShape, same_rows
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.errors import EngineError
from modelpack_engine.platform.device import Staging
from modelpack_engine.runner.kv_cache_size import step_shapes
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.step import row_token_ids
from modelpack_engine.sampling.sampler import Sampled
from tests.engine.runner.models import decode, prefill, tiny_llama, token_ids

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def tiny_mamba() -> nn.Module:
    mx.random.seed(2)
    model: nn.Module = mamba2.Model(
        mamba2.ModelArgs.from_dict(
            {
                "model_type": "mamba2",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_heads": 4,
                "head_dim": 16,
                "state_size": 8,
                "conv_kernel": 4,
                "n_groups": 1,
                "expand": 2,
                "use_bias": False,
                "use_conv_bias": True,
                "vocab_size": 64,
                "layer_norm_epsilon": 1e-5,
                "time_step_limit": (0.001, 100.0),
                "time_step_rank": "auto",
                "intermediate_size": 64,
                "tie_word_embeddings": True,
            }
        )
    )
    mx.eval(model.parameters())
    return model


def run(runner: ModelRunner, *batches: object) -> mx.array:
    logits = mx.zeros(())
    for batch in batches:
        logits = runner.forward(batch, token_ids(batch))  # type: ignore[arg-type]
        mx.eval(logits, runner.pools())
    return logits


def test_only_sampled_rows_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    head = nn.Embedding.as_linear

    def counted(self: nn.Embedding, x: mx.array) -> mx.array:
        seen.append(x.shape[0])
        return head(self, x)

    monkeypatch.setattr(nn.Embedding, "as_linear", counted)
    runner = make_runner(tiny_llama(), num_blocks=4)
    seen.clear()
    assert run(runner, prefill(1, PROMPT, [1])).shape == (1, 64)
    assert seen == [1]


@pytest.mark.parametrize("rows", [(), (7,), (3, 5), tuple(range(8)), (7, 0, 1)])
def test_logits_are_of_the_sampled_rows_in_order(rows: tuple[int, ...]) -> None:
    runner = make_runner(tiny_llama(), num_blocks=4, buckets=Buckets(rows=(4, 16)))
    whole = replace(prefill(1, PROMPT, [1]), sample_rows=tuple(range(8)))
    expected = run(runner, whole)
    found = run(runner, replace(whole, sample_rows=rows))
    assert found.shape == (len(rows), 64)
    if rows:
        assert mx.allclose(found, expected[mx.array(rows)], atol=1e-5).item()


def test_pools_are_written_in_place() -> None:
    """No pool is copied if step N + 1 is built while N runs, and submitted when N is read."""
    runner = make_runner(tiny_llama(), num_blocks=4096)
    pools = sum(pool.nbytes for pool in runner.pools())
    run(runner, prefill(1, PROMPT, [1]))
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    pending = None
    for length in range(9, 30):
        batch = decode(1, 5, length, [1, 2])
        tokens = mx.argmax(runner.forward(batch, token_ids(batch)), axis=-1)
        if pending is not None:
            pending.tolist()
        mx.async_eval(tokens, runner.pools())
        pending = tokens
    assert pending is not None
    pending.tolist()
    assert pools > 20e6
    assert mx.get_peak_memory() - base < pools / 12, "not even one of the pools was copied"


def test_scrubbed_blocks_hold_no_nan() -> None:
    model = tiny_llama()
    runner = make_runner(model, num_blocks=4)
    good = run(runner, prefill(1, PROMPT, [1]), decode(1, 5, 9, [1]))
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.full(weight.shape, mx.nan)
    bad = prefill(2, PROMPT * 2, [2])
    assert mx.all(mx.isnan(run(runner, bad))).item()
    model.model.embed_tokens.weight = weight
    # The next prompt fills half of the block. Masked NaN in the other half would still spread.
    steps = prefill(3, PROMPT[:3], [2]), prefill(4, PROMPT, [3])
    runner.scrub([2])
    run(runner, *steps)
    both = decode(3, 5, 4, [2])
    pair = replace(
        both,
        token_ids=[5, 5],
        positions=[3, 8],
        slots=[2 * 16 + 3, 3 * 16 + 8],
        num_decode=2,
        decode_tables=[[2], [3]],
        decode_lengths=[4, 9],
        decode_seq_ids=(3, 4),
        sample_rows=(0, 1),
    )
    logits = run(runner, pair)
    assert not mx.any(mx.isnan(logits)).item()
    assert mx.allclose(logits[1], good[0], atol=1e-5).item()


def test_nan_that_is_not_scrubbed_would_spread() -> None:
    """Without `scrub`, masked NaN values would reach the next sequence in their block."""
    weights, values = mx.array([[1.0, 0.0]]), mx.array([[2.0], [mx.nan]])
    assert mx.isnan(weights @ values).item()


def test_recurrent_state_is_kept_until_released() -> None:
    model = tiny_mamba()
    runner = make_runner(model, num_blocks=4)
    run(runner, prefill(1, PROMPT, [1]), decode(1, 5, 9, [1]))
    runner.release([1])
    with pytest.raises(EngineError, match="sequence 1 has no recurrent state"):
        runner.forward(decode(1, 5, 10, [1]), mx.array([5]))


def test_released_by_a_batch() -> None:
    runner = make_runner(tiny_mamba(), num_blocks=4)
    run(runner, prefill(1, PROMPT, [1]), replace(prefill(2, PROMPT, [2]), released=(1,)))
    with pytest.raises(EngineError, match="sequence 1 has no recurrent state"):
        runner.forward(decode(1, 5, 9, [1]), mx.array([5]))


def test_sequence_that_starts_again_starts_with_nothing() -> None:
    runner = make_runner(tiny_mamba(), num_blocks=4)
    first = run(runner, prefill(1, PROMPT, [1]))
    again = run(runner, decode(1, 5, 9, [1]), prefill(1, PROMPT, [1]))
    assert mx.array_equal(first, again).item()


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
@pytest.mark.parametrize("exact", [True, False])
def test_warm_up_leaves_no_trace(make: object, exact: bool) -> None:
    buckets = Buckets(rows=(2, 4), chunk=(8,), table_width=(1, 2))
    model = make()  # type: ignore[operator]
    runner = make_runner(model, num_blocks=4, buckets=buckets, exact=exact)
    before = run(runner, prefill(1, PROMPT, [1]))
    runner.warm_up(
        step_shapes(buckets, max_num_seqs=4, max_chunk=8, max_model_len=32, block_size=16)
    )
    assert mx.allclose(run(runner, prefill(1, PROMPT, [1])), before, atol=1e-6).item()


def test_step_shapes() -> None:
    buckets = Buckets(rows=(2, 4), chunk=(8, 16), table_width=(1, 2))
    shapes = step_shapes(buckets, max_num_seqs=3, max_chunk=16, max_model_len=20, block_size=16)
    assert shapes == [
        StepShape(2, 1),
        StepShape(2, 2),
        StepShape(4, 1),
        StepShape(4, 2),
        StepShape(0, 1, 8),
        StepShape(0, 2, 8),
        StepShape(0, 1, 16),
        StepShape(0, 2, 16),
    ]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (same_rows(3), [5, 6, 7, 8]),  # the last row is padding: it may have any token
        (((0, 2), (1, 0), (2, 1)), [7, 5, 6, 0]),
        (((0, 0), (2, 1)), [5, 9, 6, 0]),
    ],
)
def test_rows_continue_the_tokens_of_the_previous_step(
    pairs: tuple[tuple[int, int], ...], expected: list[int]
) -> None:
    batch = replace(decode(1, 5, 9, [1]), token_ids=[0, 9, 0, 0], from_previous=pairs)
    sampled = Sampled.of(mx.array([5, 6, 7, 8], mx.int32))
    assert row_token_ids(batch, sampled, Staging()).tolist() == expected
