"""How far quantised keys and values change what SmolLM2 would say next.

benchmarks/kv_cache.py measures the same over longer texts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import KVCacheDtype
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.runner.model_runner import make_runner
from tests.engine.real.prompts import PROMPTS
from tests.engine.runner.models import prefill, token_ids


def read(loaded: Any, kind: KVCacheDtype, text: list[int]) -> mx.array:
    """Return log-probabilities [tokens, vocabulary] of what comes after each token."""
    runner = make_runner(loaded.model, num_blocks=32, kv_cache_dtype=kind)
    batch = prefill(1, text, list(range(1, 32)))
    batch = replace(batch, sample_rows=tuple(range(len(text))))
    logits = runner.forward(batch, token_ids(batch))
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found, runner.pools())
    runner.undo()
    return found


@pytest.mark.long
def test_quantised_caches_stay_close() -> None:
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    text = loaded.tokenizer.encode("".join(PROMPTS))[:128]
    assert len(text) == 128
    plain = read(loaded, "auto", text)
    limits: dict[KVCacheDtype, tuple[float, float]] = {"q8": (0.95, 0.003), "q4": (0.65, 0.3)}
    for kind, (same, divergence) in limits.items():
        quantised = read(loaded, kind, text)
        agreement = mx.mean(mx.argmax(plain, axis=-1) == mx.argmax(quantised, axis=-1)).item()
        mean = mx.mean(mx.sum(mx.exp(plain) * (plain - quantised), axis=-1)).item()
        assert same <= agreement <= 1, kind  # type: ignore[operator]
        assert 0 < mean <= divergence, kind  # type: ignore[operator]
