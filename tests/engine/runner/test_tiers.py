"""The tier chosen for each model, and its logits, which must equal mlx-lm's."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepShape
from modelpack_engine.core.buckets import FEW
from modelpack_engine.errors import ModelLoadError, OutOfMemoryError
from modelpack_engine.runner import model_runner, tiers
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_layout import find_layout
from modelpack_engine.runner.model_runner import ModelRunner, make_engine_runner, make_runner
from tests.engine.runner.models import (
    Attention,
    Copying,
    Crowded,
    Meddling,
    Model,
    decode,
    make_model,
    prefill,
    tiny_llama,
    token_ids,
)

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def answers(runner: ModelRunner) -> list[list[float]]:
    """Return the logits of a prompt's last token and of one more token."""
    found = []
    for batch in (prefill(8, PROMPT, [2]), decode(8, 7, len(PROMPT) + 1, [2])):
        logits = runner.forward(batch, token_ids(batch))
        mx.eval(logits, runner.pools())
        found += logits.tolist()
    return found


def expected(model: nn.Module) -> list[list[float]]:
    logits = model(mx.array([[*PROMPT, 7]]), cache=make_prompt_cache(model))
    return logits[0, -2:].tolist()


def check(model: nn.Module, tier: str, **options: Any) -> ModelRunner:
    wanted = expected(model)
    runner = make_runner(model, num_blocks=8, **options)
    assert runner.tier == tier
    for found, row in zip(answers(runner), wanted, strict=True):
        assert found == pytest.approx(row, abs=1e-4)
    return runner


def test_plain_model_runs_on_handles(caplog: pytest.LogCaptureFixture) -> None:
    runner = check(make_model(Attention, Attention), "paged")
    assert not caplog.messages
    assert runner.notes == ()
    assert runner.supports_prefix_cache


@pytest.mark.parametrize("tested", [True, False])
def test_lost_handles_are_found_with_or_without_the_self_test(
    tested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    runner = check(make_model(Copying), "per-sequence", self_test=tested)
    assert any("attends to something other than" in message for message in caplog.messages)
    assert "Copying x1 sequence by sequence" in runner.notes
    assert runner.supports_prefix_cache


def test_only_modules_that_need_it_run_per_sequence() -> None:
    runner = check(make_model(Attention, Copying, Attention), "per-sequence")
    assert [note for note in runner.notes if "sequence by sequence" in note] == [
        "Copying x1 sequence by sequence"
    ]


def test_wrong_logits_are_found_by_the_self_test(caplog: pytest.LogCaptureFixture) -> None:
    """The model keeps its handles, so that only the logits show the error."""
    runner = check(make_model(Attention, Meddling), "per-sequence")
    assert any("are off by" in note for note in runner.notes)
    assert any(record.levelno == logging.WARNING for record in caplog.records)


def test_what_is_wrong_with_many_rows_is_found_by_a_full_step() -> None:
    options: Any = {"num_blocks": 8, "exact": False}
    right = make_runner(make_model(Attention), full_step=(40, 40), **options)
    assert (right.tier, right.notes) == ("paged", ())
    assert make_runner(make_model(Crowded), full_step=(30, 30), **options).tier == "paged"
    wrong = make_runner(make_model(Crowded), full_step=(40, 40), **options)
    assert wrong.tier == "per-sequence"
    assert "prompts of 80 tokens are off by" in wrong.notes[0]


def test_an_engine_s_runner_is_asked_for_a_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(model_runner, "make_runner", lambda model, **given: asked.update(given))
    sizes = Sizes(100, 200, 400, FEW, max_prefill_chunk=128)
    make_engine_runner(make_model(Attention), sizes, EngineConfig(max_num_seqs=2))
    assert asked["full_step"] == (128, 128)


class Shaky(Attention):
    """Its output depends on the length of the call, as with sums in another order."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return super().__call__(x, mask, cache) + 3e-3 * x.shape[1] * mx.arange(8)


def test_a_model_may_be_as_far_as_it_is_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(make_model(Attention, Shaky), num_blocks=8)
    assert (runner.tier, runner.notes) == ("paged", ())
    monkeypatch.setattr(tiers, "_NOISE", 0)
    runner = make_runner(make_model(Attention, Shaky), num_blocks=8)
    assert any("are off by" in note for note in runner.notes)


class Chunked(Attention):
    """Its output depends on the length of long calls only."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        most = max(x.shape[:2])
        found = super().__call__(x, mask, cache)
        return found + (most > 20) * 0.03 * most * mx.arange(8)


def test_a_full_step_may_be_as_far_as_the_model_is_from_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "_FULL", 1e-9)
    options: Any = {"num_blocks": 16, "exact": False, "full_step": (70, 50)}
    assert make_runner(make_model(Chunked), **options).tier == "paged"
    monkeypatch.setattr(tiers, "_NOISE", 0)
    runner = make_runner(make_model(Chunked), **options)
    assert "prompts of 120 tokens are off by" in runner.notes[0]


class Single(Attention):
    """Its output differs for a single token that sees several."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        several = (mx.array(cache.offset) > 2).reshape(-1, 1, 1)
        found = super().__call__(x, mask, cache)
        return found + several * 0.02 * mx.arange(8) if x.shape[1] == 1 else found


def test_single_tokens_may_be_computed_otherwise() -> None:
    runner = make_runner(make_model(Attention, Single), num_blocks=8)
    assert (runner.tier, runner.notes) == ("paged", ())


class Odd(Model):
    """Has a cache class of its own."""

    class Cache(KVCache):
        pass

    def make_cache(self) -> list[Any]:
        return [self.Cache() for _ in self.layers]


def odd_model() -> Odd:
    model = Odd(Attention)
    mx.eval(model.parameters())
    return model


def test_unknown_cache_runs_request_by_request(caplog: pytest.LogCaptureFixture) -> None:
    runner = check(odd_model(), "fallback")
    assert any("in a Cache" in message for message in caplog.messages)
    assert not runner.supports_prefix_cache
    assert runner.layout is None
    runner.warm_up([StepShape(4, 2), StepShape(0, 1, 8)])  # as on a GPU; it does nothing
    assert answers(runner)


def test_fallback_tier_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny_llama(), "fallback", paged=False)
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    check(tiny_llama(), "fallback")
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "1")
    check(tiny_llama(), "paged")


class Keeping(Model):
    """Has a rotating cache that keeps the first tokens."""

    def make_cache(self) -> list[Any]:
        return [RotatingKVCache(32, keep=4) for _ in self.layers]


def test_cache_that_keeps_its_first_tokens_is_not_paged() -> None:
    check(Keeping(Attention), "fallback")


class Broken(Model):
    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        raise ValueError("no such thing")


def test_model_that_cannot_run_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="no such thing"):
        make_runner(Broken(Attention), num_blocks=8)


def test_model_is_as_before_when_a_runner_is_undone() -> None:
    model = make_model(Attention, Copying)
    kinds = [type(module) for module in model.modules()]
    runner = make_runner(model, num_blocks=8)
    assert [type(module) for module in model.modules()] != kinds
    runner.undo()
    assert [type(module) for module in model.modules()] == kinds


def test_adapted_model_still_answers_with_its_own_cache() -> None:
    model = make_model(Attention, Copying)
    before = expected(model)
    make_runner(model, num_blocks=8)
    assert expected(model) == before


def test_too_large_a_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    model = tiny_llama()
    monkeypatch.setattr(mx, "eval", refuse)
    with pytest.raises(OutOfMemoryError, match=r"8 blocks .* Unable to allocate"):
        make_runner(model, num_blocks=8)


def test_layout() -> None:
    model = tiny_llama(
        sliding_window=8, layer_types=["sliding_attention", "full_attention", "full_attention"]
    )
    layout = find_layout(model)
    contents = [leaf.content for leaf in layout.leaves()]
    assert [content.window for content in contents] == [8, None, None]  # type: ignore[union-attr]
    assert layout.inner is model.model
    assert layout.vocab_size == 64
    assert not layout.recurrent
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    assert layout.bytes_per_token == per_token
    assert layout.with_dtype(mx.bfloat16).bytes_per_token == per_token // 2


def test_pools_of_another_type() -> None:
    model = tiny_llama()
    runner = make_runner(model, num_blocks=8, dtype=mx.bfloat16, self_test=False)
    assert {pool.dtype for pool in runner.pools()} == {mx.bfloat16}
    assert runner.layout is not None
    assert runner.layout.bytes_per_token == find_layout(model).bytes_per_token // 2
    assert answers(runner)[0] == pytest.approx(expected(model)[0], abs=0.2)
