"""Layers with smaller windows have blocks of their own: mlx-lm's tokens, with fewer bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT, FEW
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.kv_cache_size import _Pool, _share_budget
from modelpack_engine.runner.model_layout import ModelLayout, find_layout
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.paged import PagedRunner
from tests.engine.scheduling.real_shapes import real_layout, steps
from tests.engine.serving.tiny import tiny_loaded
from tests.engine.zoo.catalogue import CATALOGUE

pytestmark = pytest.mark.long

FAMILIES = ("gemma3_text", "gpt_oss", "cohere2", "exaone4", "olmo3")
WINDOW, BLOCK, CONTEXT = 8, 4, 512
NUM_TOKENS = 20
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def build(name: str) -> nn.Module:
    """Return the zoo's model of an architecture, with the vocabulary of the tiny tokenizer."""
    (found,) = (one for one in CATALOGUE if one.id == name)
    return replace(found, args={**found.args, "vocab_size": 257}).build()


def some_prompts() -> list[list[int]]:
    """Return prompts that take several steps each; the first two begin with the same 32 tokens."""
    rng = Random(5)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, 250) for _ in range(count)]

    shared = tokens(32)
    return [shared + tokens(30), shared + tokens(9), tokens(75), tokens(3)]


@cache
def references(name: str) -> list[list[int]]:
    """Return the tokens of mlx-lm's path for a single request."""
    model = build(name)
    found = []
    for prompt in some_prompts():
        caches = make_prompt_cache(model)
        steps = generate_step(mx.array(prompt), model, max_tokens=NUM_TOKENS, prompt_cache=caches)
        found.append([int(token) for token, _ in steps])
    return found


def engine(model: nn.Module, num_tokens: int = 1000, **settings: Any) -> Engine:
    """Return an engine whose full layers hold about `num_tokens` tokens."""
    loaded: Any = tiny_loaded()
    names = list(type(loaded).__dataclass_fields__)
    given = {name: getattr(loaded, name) for name in names} | {"model": model, "packed": None}
    given["context_length"] = CONTEXT
    layout = find_layout(model)
    full = layout.bytes_per_token - sum(g.bytes_per_token for g in layout.window_groups)
    config = {
        "max_num_seqs": 4, "max_num_batched_tokens": 32, "device": "cpu", "block_size": BLOCK,
        "kv_cache_bytes": num_tokens * full + 150 * (layout.bytes_per_token - full),
    } | settings  # fmt: skip
    return Engine(type(loaded)(**given), EngineConfig(**config))


def tokens_of(made: Engine) -> list[list[int]]:
    return [
        [token for event in events for token in event.token_ids]
        for events in made.generate(some_prompts(), PARAMS)
    ]


def num_used(made: Engine) -> list[int]:
    return [pool.num_used for pool in (made._blocks.pool, *made._blocks.window_pools)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_mlx_lm(name: str) -> None:
    """Prompts run in chunks beside each other, then again from the prefix cache."""
    made = engine(build(name))
    assert [pool.window for pool in made._blocks.window_pools] == [WINDOW]
    assert made._runner.tier in ("paged", "patched")
    assert tokens_of(made) == references(name)
    cached = made.stats().cached_tokens
    assert tokens_of(made) == references(name)
    assert made.stats().cached_tokens - cached == 60 + 40 + 72, "all but the last tokens"
    assert num_used(made) == [0, 0], "blocks leak"


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_same_without_prefix_caching(name: str) -> None:
    made = engine(build(name), enable_prefix_caching=False)
    assert tokens_of(made) == references(name)
    assert made.stats().cached_tokens == 0
    assert num_used(made) == [0, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_same_after_preemptions(name: str) -> None:
    made = engine(build(name), num_tokens=70, max_model_len=100)
    assert tokens_of(made) == references(name)
    assert made.stats().num_preemptions > 0
    assert num_used(made) == [0, 0]


def test_n_gram_proposals_do_not_change_tokens() -> None:
    made = engine(build("gemma3_text"), speculative_method="ngram")
    assert tokens_of(made) == references("gemma3_text")
    assert num_used(made) == [0, 0]


def test_aborted_requests_return_the_blocks_of_all_pools() -> None:
    made = engine(build("gemma3_text"))
    rng = Random(2)
    for index in range(30):
        prompt = some_prompts()[index % 4]
        made.add_request(str(index), EngineRequest(prompt, PARAMS))
        for _ in range(rng.randrange(6)):
            made.step()
        made.abort(str(rng.randrange(index + 1)))
    for index in range(30):
        made.abort(str(index))
    while made.has_work:
        made.step()
    assert num_used(made) == [0, 0], "blocks leak"


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_bytes_of_a_long_request_are_near_the_minimum(name: str) -> None:
    """At most 1.1 times the bytes of all tokens in full layers, and of a window in the others."""
    model = build(name)
    made, layout = engine(model), find_layout(model)
    (group,) = layout.window_groups
    full = layout.bytes_per_token - group.bytes_per_token
    made.add_request("long", EngineRequest(some_prompts()[0] * 6, PARAMS))
    checked = 0
    while made.has_work:
        made.step()
        for sequence in made._scheduler._running:
            tokens = sequence.num_computed_tokens
            if tokens < 300:
                continue
            checked += 1
            of_full, of_sliding = num_used(made)
            held = BLOCK * (of_full * full + of_sliding * group.bytes_per_token)
            assert held <= 1.1 * (tokens * full + WINDOW * group.bytes_per_token)
    assert checked > NUM_TOKENS


@pytest.mark.parametrize(
    ("name", "full", "sliding", "kv_heads", "head_dim", "window"),
    [("gemma3_text", 10, 52, 16, 128, 1024), ("gpt_oss", 12, 12, 8, 64, 128)],
    ids=["Gemma 3 27B", "gpt-oss 20B"],
)
def test_bytes_of_real_models_at_32k_tokens(
    name: str, full: int, sliding: int, kv_heads: int, head_dim: int, window: int
) -> None:
    """The same for real layers: blocks are held for a window, a chunk and a block's rest."""
    layout, tokens, block = real_layout(name), 32_768, 16
    layer = 2 * kv_heads * head_dim * 2
    (group,) = layout.window_groups
    assert (group.window, group.bytes_per_token) == (window, sliding * layer)
    assert layout.bytes_per_token == (full + sliding) * layer

    blocks = BlockManager(2100, block, window_pools=((window, 200),))
    scheduler = Scheduler(SchedulerConfig(4, 1024, 40_000, 512), blocks)
    scheduler.add(Sequence("long", [1] * (tokens - 600), SamplingParams(max_tokens=700)))
    (pool,) = blocks.window_pools
    checked = []
    for _ in steps(scheduler, blocks):
        checked += [
            (sequence.num_computed_tokens, blocks.pool.num_used, pool.num_used)
            for sequence in scheduler._running
        ]
    for count, of_full, of_sliding in checked:
        held = block * (of_full * full + of_sliding * sliding) * layer
        if count >= tokens - 1200:  # the last chunks of the prompt, and the response
            assert held <= 1.1 * (count * full + window * sliding) * layer
    at_32k = next(held for held in checked if held[0] == tokens)
    # Blocks before the window were released.
    assert at_32k[1] == tokens // block
    assert at_32k[2] <= window // block + 1


def test_the_cache_has_the_bytes_that_are_reported() -> None:
    made = engine(build("gemma3_text"))
    assert isinstance(made._runner, PagedRunner)
    pools = made._runner.pools()
    assert sum(pool.nbytes for pool in pools) == made.kv_cache_bytes
    assert len({pool.shape for pool in pools}) == 2, "of full and of sliding layers"


def test_short_requests_have_one_table() -> None:
    """They would release no blocks."""
    made = engine(build("gemma3_text"), max_model_len=2 * WINDOW)
    assert made._blocks.window_pools == ()
    assert made._runner.layout is not None


def test_windows_that_are_wider_than_the_cache_keep_all_blocks() -> None:
    """Tokens of plamo3's prompts see more than its caches keep."""
    layout = find_layout(build("plamo3"))
    assert layout.windows == (None, 8)
    assert layout.sees_past_window
    assert layout.window_groups == ()


def test_a_llama_of_windows_has_groups() -> None:
    layout = find_layout(build("llama: sliding windows"))
    (group,) = layout.window_groups
    assert group.window == 8
    assert group.bytes_per_token * 2 == layout.bytes_per_token


@examples(max_examples=200, deadline=None)
@given(
    own=st.integers(1, 20),
    windows=st.lists(st.tuples(st.integers(1, 60), st.integers(2, 100)), min_size=1, max_size=2),
    held=st.integers(100, 9000),
    num_seqs=st.integers(1, 300),
    budget=st.integers(2000, 10**7),
    required=st.booleans(),
)
@example(own=1, windows=[(10, 50), (10, 2)], held=1000, num_seqs=2, budget=1600, required=True)
def test_a_request_that_fits_in_equal_pools_fits(
    own: int, windows: list[tuple[int, int]], held: int, num_seqs: int, budget: int, required: bool
) -> None:
    """And one fits if the budget is enough for exactly one request."""
    pools = [_Pool(*window) for window in windows]
    full, *others = _share_budget(budget, num_seqs, _Pool(own, held), pools, required=required)
    sliding_bytes = sum(pool.block_bytes for pool in pools)
    assert own * full + sum(p.block_bytes * n for p, n in zip(pools, others, strict=True)) <= budget
    equal = budget // (own + sliding_bytes)
    assert full >= min(equal, num_seqs * held + 1)
    for pool, count in zip(pools, others, strict=True):
        assert count >= min(equal, pool.held + 1)
    one = own * (held + 1) + sum(pool.block_bytes * (pool.held + 1) for pool in pools)
    if required and equal > max(pool.held for pool in pools) and one <= budget:
        assert full > held
    shared = sum(p.block_bytes * max(p.held + 1, (held + 1) // 4) for p in pools)
    if equal > max(pool.held for pool in pools) and own * (held + 1) + shared <= budget:
        assert full > held, "the default of a CPU"
    if not required:  # short requests run side by side
        assert all(4 * count + 4 >= min(equal, num_seqs * held + 1) for count in others)


def test_blocks_of_gemma_3_27b() -> None:
    """The numbers beside `_FULL_PER_SLIDING`: 2.7 times, and 67%, of equal pools' blocks."""
    layer = 16 * 2 * 16 * 128 * 2
    own, window = _Pool(10 * layer, 2048), _Pool(52 * layer, 97)
    full, sliding = _share_budget(20 * 10**9, 256, own, [window], required=False)
    equal = 20 * 10**9 // (62 * layer)
    assert 2.65 < full / equal < 2.75
    assert 0.66 < sliding / equal < 0.68
    # With less memory than a request of 32768 tokens needs, the context is shorter, unless it is
    # required: then the window pool has the blocks of one request.
    assert _share_budget(2 * 10**9, 256, own, [window], required=False) == [667, 165]
    assert _share_budget(2 * 10**9, 256, own, [window], required=True)[1] == 98


def logits_of_a_run(runner: ModelRunner, layout: ModelLayout, *, grouped: bool) -> list[mx.array]:
    """Serve the prompts, adding one at each step; return the logits of each step."""
    windows = [(group.window, 20) for group in layout.window_groups]
    blocks = BlockManager(64, 16, window_pools=windows if grouped else ())
    blocks.pool._free.reverse()  # the ids of the groups differ
    scheduler = Scheduler(SchedulerConfig(8, 48, 200, 48, buckets=runner.buckets), blocks)
    waiting = [
        Sequence(f"r{i}", prompt, SamplingParams(max_tokens=40))
        for i, prompt in enumerate(some_prompts())
    ]
    found = []
    for _ in range(14):
        if waiting:
            scheduler.add(waiting.pop(0))
        output = scheduler.schedule()
        assert output is not None
        batch = build_batch(output, None, runner.buckets, 16)
        logits = runner.forward(batch, mx.array(batch.token_ids, mx.int32))
        mx.eval(logits, runner.pools())
        found.append(logits[: len(batch.sample_rows)])
        scheduler.submitted(output)
        scheduler.collect(output, [(5 * len(found) + i) % 60 for i in range(len(output.sampled))])
    return found


@pytest.mark.parametrize("how", ["exact", "bucketed", "compiled", "sequence by sequence"])
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_logits_do_not_depend_on_groups(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    layout = find_layout(model)
    runs = []
    for grouped in (False, True):
        exact = how in ("exact", "sequence by sequence")
        runner = make_runner(
            model,
            num_blocks=64,
            window_blocks=(20,) if grouped else (),
            exact=exact,
            buckets=EXACT if exact else FEW,
            compiled=how == "compiled",
        )
        assert isinstance(runner, PagedRunner)
        assert (runner.compiled is not None) is (how == "compiled")
        if how == "sequence by sequence":
            step, classes = runner._step, runner.adapted.attention_classes()
            runner.undo()
            runner = PagedRunner(
                model, layout, step, staging=runner.staging, num_blocks=64,
                window_blocks=(20,) if grouped else (), buckets=EXACT, per_sequence=classes,
                fold=False, fused=False, compiled=False,
            )  # fmt: skip
            assert runner.tier == "per-sequence"
        runs.append(logits_of_a_run(runner, layout, grouped=grouped))
        runner.undo()
    for one, other in zip(*runs, strict=True):
        assert one.shape == other.shape
        assert mx.allclose(one, other, atol=2e-4).item()


def test_blocks_of_a_group_are_scrubbed_in_its_layers_only() -> None:
    runner = make_runner(build("gemma3_text"), num_blocks=64, window_blocks=(20,))
    assert isinstance(runner, PagedRunner)

    def filled() -> list[bool]:
        return [bool(np.array(kv.pools.keys[:, 3 * 16 : 4 * 16]).any()) for kv in paged]

    paged: list[PagedKV] = runner.adapted.paged
    windows = [kv.layout.window for kv in paged]
    for kv in paged:
        kv.pools.keys = mx.ones_like(kv.pools.keys)
    runner.scrub([3], 1)
    assert filled() == [window is None for window in windows]
    runner.scrub([3])
    assert not any(filled())
