"""Keys and values in 8 and 4 bits: their bytes, their error, and the supported models."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.errors import UsageError
from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype
from modelpack_engine.core.buckets import EXACT
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.kernels.quantised import GROUPS, Quantisation
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.model_layout import find_layout, with_cache_type
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from tests.engine.runner.models import Attention as Narrow
from tests.engine.runner.models import decode, make_model, prefill, tiny_llama, token_ids
from tests.engine.runner.test_paged_attention import BLOCK, BUCKETS, CASES, Case, build, expected
from tests.engine.serving.tiny import tiny_loaded

pytestmark = pytest.mark.long

KINDS = [Quantisation(bits, group) for bits in (8, 4) for group in GROUPS]
MODEL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_no_element_is_off_by_more_than_half_a_step(kind: Quantisation, size: float) -> None:
    rows = mx.random.normal((5, 3, 128), key=mx.random.key(1)) * size
    words = kind.encode(rows)
    assert words.dtype == mx.uint32
    assert words.shape == (5, 3, kind.words(128))
    assert kind.width(words.shape[-1]) == 128
    found = kind.decode(words, mx.float32)
    groups = np.array(rows).reshape(5, 3, -1, kind.group)
    # A little more than half a scale: bias and scale are rounded so that codes cover all values.
    step = (np.ptp(groups, axis=-1) + np.abs(groups).max(-1) / 64) / (2**kind.bits - 1)
    error = np.abs(np.array(found).reshape(groups.shape) - groups).max(-1)
    assert np.all(error <= step * 0.51)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_words_are_mlx_s_codes(kind: Quantisation) -> None:
    """MLX dequantises the codes, scales and biases to the same values."""
    words = kind.encode(mx.random.normal((6, 128), key=mx.random.key(2)))
    codes, scales = words[:, : 128 * kind.bits // 32], words[:, 128 * kind.bits // 32 :]
    wanted = mx.dequantize(
        codes,
        (scales << 16).view(mx.float32),
        (scales & 0xFFFF0000).view(mx.float32),
        group_size=kind.group,
        bits=kind.bits,
    )
    assert mx.allclose(kind.decode(words, mx.float32), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_elements_are_kept_and_zero_words_are_zero(kind: Quantisation) -> None:
    rows = mx.broadcast_to(mx.array([[0.0], [-1.5], [2.0**-100], [-(2.0**40)]]), (4, 64))
    assert mx.array_equal(kind.decode(kind.encode(rows), mx.float32), rows)
    nothing = mx.zeros((2, kind.words(64)), mx.uint32)
    assert mx.array_equal(kind.decode(nothing, mx.float32), mx.zeros((2, 64)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_its_group_and_no_other(kind: Quantisation, wrong: float) -> None:
    rows = mx.random.normal((2, 128), key=mx.random.key(3))
    rows[1, 100] = wrong
    found = kind.decode(kind.encode(rows), mx.float32)
    finite = np.array(mx.isfinite(found))
    assert finite[0].all()
    assert finite[1, :64].all()
    assert not finite[1, 100 // kind.group * kind.group :][: kind.group].any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("exact", [True, False])
@settings(max_examples=8, deadline=None)
@given(case=CASES, window=st.sampled_from([None, 1, 9]))
def test_attention_reads_what_was_written(
    kind: Quantisation, exact: bool, case: Case, window: int | None
) -> None:
    """Attention over quantised pools equals attention over encoded and decoded rows."""
    mx.random.seed(1)
    heads, key_dim, value_dim = 2, 64, 128
    step = StepInputs(BLOCK, exact=exact)
    batch, tables = build(case, EXACT if exact else BUCKETS)
    layout = KVLayout(heads, key_dim, heads, value_dim, mx.float32, window, kind)
    paged = PagedKV(layout, step, num_blocks=64)

    def through(rows: mx.array) -> mx.array:
        return kind.decode(kind.encode(rows), mx.float32)

    sequences = []
    for table, length in zip(tables, case.lengths, strict=True):
        keys = mx.random.normal((length, heads, key_dim))
        values = mx.random.normal((length, heads, value_dim))
        slots = mx.array([table[p // BLOCK] * BLOCK + p % BLOCK for p in range(length)])
        paged.pools.write(keys, values, slots, None)
        sequences.append((through(keys), through(values)))
    step.begin(batch, [0])
    rows = batch.num_rows
    queries = mx.random.normal((rows, 4, 1, key_dim))
    keys = mx.random.normal((rows, heads, 1, key_dim))
    values = mx.random.normal((rows, heads, 1, value_dim))
    paged.update_and_fetch(keys, values)
    output = paged.attend(queries, scale=0.1)
    paged.close()
    pieces = [(row, 1) for row in range(len(case.decode))]
    pieces += [(chunk.row, chunk.length) for chunk in batch.chunks]
    for (row, count), (old_keys, old_values) in zip(pieces, sequences, strict=True):
        new = slice(row, row + count)
        all_keys = mx.concatenate([old_keys[:-count], through(keys[new, :, 0])]).swapaxes(0, 1)
        all_values = mx.concatenate([old_values[:-count], through(values[new, :, 0])])
        wanted = expected(
            queries[new, :, 0].swapaxes(0, 1), all_keys, all_values.swapaxes(0, 1),
            scale=0.1, window=window,
        )  # fmt: skip
        assert mx.allclose(output[new, :, 0].swapaxes(0, 1), wanted, atol=1e-4).item()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("kind", "gain", "close"), [("q8", 1.88, 0.02), ("q4", 3.55, 0.5)])
def test_a_model_runs_on_quantised_pools(exact: bool, kind: Any, gain: float, close: float) -> None:
    model = tiny_llama(**MODEL)
    plain = make_runner(model, num_blocks=8, exact=exact)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 3
    batches = [prefill(8, prompt, [2, 5]), decode(8, 7, len(prompt) + 1, [2, 5])]

    def answers(runner: ModelRunner) -> mx.array:
        found = []
        for batch in batches:
            found.append(runner.forward(batch, token_ids(batch)))
            mx.eval(found[-1], runner.pools())
        return mx.concatenate(found)

    wanted = answers(plain)
    plain.undo()
    runner = make_runner(model, num_blocks=8, exact=exact, kv_cache_dtype=kind, full_step=(40, 40))
    assert runner.tier == "paged"
    assert runner.notes == ()
    assert {pool.dtype for pool in runner.pools()} == {mx.uint32}
    found = answers(runner)
    assert 0 < mx.max(mx.abs(found - wanted)).item() < close  # type: ignore[operator]
    # The pools have the bytes of the layout; the ratio is relative to bfloat16.
    stored = sum(pool.nbytes for pool in runner.pools())
    assert plain.layout is not None
    assert runner.layout is not None
    assert stored == 8 * 16 * runner.layout.bytes_per_token
    ratio = plain.layout.bytes_per_token / 2 / runner.layout.bytes_per_token
    assert ratio == pytest.approx(gain, abs=0.01)
    runner.scrub([2, 5])
    for pool in runner.pools():
        left = pool[:, 32:48] if exact else pool[32:48]
        assert mx.all(left == 0)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("auto", "auto"), ("bfloat16", "bf16"), ("half", "fp16"), ("FP16", "fp16"), ("q8_0", "q8"),
     ("q4", "q4")],
)  # fmt: skip
def test_names_of_types(text: str, kind: str) -> None:
    assert parse_kv_cache_dtype(text) == kind


@pytest.mark.parametrize(
    ("text", "hint"), [("fp8", "q8"), ("fp8_e4m3", "q8"), ("int3", "auto, bf16"), ("", "q4")]
)
def test_names_of_no_type(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="no such KV cache type") as caught:
        parse_kv_cache_dtype(text)
    assert hint in (caught.value.hint or "")


def test_models_that_cannot_be_quantised_say_so() -> None:
    with pytest.raises(EngineError, match=r"8/8 elements, expected multiples of 32") as caught:
        with_cache_type(find_layout(make_model(Narrow)), "q8")
    assert "bf16" in (caught.value.hint or "")
    latents = find_layout(tiny_llama(**MODEL))
    for leaf in latents.leaves():
        object.__setattr__(leaf.owner, "kv_lora_rank", 64)
    with pytest.raises(EngineError, match="caches latents"):
        with_cache_type(latents, "q4")
    assert with_cache_type(latents, "bf16").bytes_per_token * 2 == latents.bytes_per_token


def wide_engine(**settings: Any) -> Engine:
    """An engine over a tiny model whose heads a group size divides."""
    model = tiny_llama(**MODEL, vocab_size=257, max_position_embeddings=256)
    loaded = tiny_loaded()
    given = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "device": "cpu"} | settings
    return Engine(type(loaded)(model, *_rest(loaded)), EngineConfig(**given))


def _rest(loaded: Any) -> list[Any]:
    names = list(type(loaded).__dataclass_fields__)[1:]
    return [getattr(loaded, name) for name in names]


def test_the_engine_has_room_for_more_and_everything_goes_on() -> None:
    """More blocks fit in the same bytes; prefix hits and preemptions change no token."""
    memory = 14 * 16 * 3 * 2 * 64 * 4  # 14 blocks of float32
    plain = wide_engine(kv_cache_bytes=memory)
    shared = list(range(40))
    prompts = [[*shared, i] for i in range(60, 66)]
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    tokens: dict[bool, Any] = {}
    for caching in (False, True):
        engine = wide_engine(
            kv_cache_bytes=memory // (3 if caching else 1), kv_cache_dtype="q8",
            enable_prefix_caching=caching,
        )  # fmt: skip
        if not caching:
            ratio = engine.stats().blocks_total / plain.stats().blocks_total
            assert ratio > 3.4, "of float32"
        tokens[caching] = [
            [token for event in events for token in event.token_ids]
            for events in engine.generate(prompts, params)
        ]
        stats = engine.stats()
        assert stats.num_finished == 6
        if caching:
            assert stats.cached_tokens > 0
            assert stats.num_preemptions > 0
    assert tokens[True] == tokens[False]
