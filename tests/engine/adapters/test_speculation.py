"""Drafters together with adapters: requests get the tokens that they get without drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelpack.formats.adapter import Adapter, read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import EXACT, FEW, Buckets
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request import EngineRequest
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.paged import PagedRunner
from tests.adapters import write_mlx, write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.serving.tiny import VOCAB, tiny_loaded
from tests.engine.speculation import test_eagle, test_mtp
from tests.engine.speculation.test_draft import LONG, PROMPTS, noisy
from tests.engine.speculation.test_same_output import check_same, run

SAMPLED = [
    LONG,
    replace(LONG, temperature=0.8, seed=3, logprobs=1),
    replace(LONG, temperature=1.2, top_p=0.9, seed=4),
    LONG,
]
NAMES = ("one", None, "two", "one")


def ask_all(engine: Engine, adapters: dict[str, Adapter]) -> list[list[RequestEvent]]:
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter, name)
    for number, (prompt, params) in enumerate(zip(PROMPTS, SAMPLED, strict=True)):
        request = EngineRequest(prompt, params, adapter=NAMES[number])
        engine.add_request(str(number), request)
    found = run(engine, [], {})
    return [found[str(number), 0] for number in range(len(PROMPTS))]


def made(method: str) -> tuple[LoadedModel, Any, dict[str, Any]]:
    """Return a model, its drafter, and the options of the engine."""
    if method == "draft":
        return tiny_loaded(), noisy(0.05), {"speculative_method": "draft"}
    if method == "eagle3":
        return tiny_loaded(), test_eagle.random_head(), {"draft_model": "head"}
    if method.startswith("mtp of "):
        kind = method.removeprefix("mtp of ")
        model = test_mtp.target(kind, markov=True)
        head = test_mtp.markov_head(model, kind)
        return test_mtp.loaded_from(model, kind), head, {"speculative_method": "mtp"}
    return tiny_loaded(), None, {"speculative_method": "ngram"}


@pytest.mark.long
@pytest.mark.parametrize("buckets", [EXACT, FEW], ids=["exact", "bucketed"])
@pytest.mark.parametrize("method", ["ngram", "draft", "eagle3", "mtp of mimo", "mtp of qwen3_next"])
def test_outputs_are_the_same(
    method: str, buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache_size, "EXACT", buckets)
    monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: buckets is FEW))
    loaded, drafter, options = made(method)
    width = loaded.model.model.embed_tokens.weight.shape[1]
    adapters = {
        "one": read_adapter(write_peft(tmp_path / "one", linears(loaded.model), size=0.2)),
        "two": read_adapter(
            write_mlx(tmp_path / "two", {"model.embed_tokens": (width, VOCAB)}, size=0.5)
        ),
    }
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 32, "self_test": False,
        "backend": "mlx", "max_loras": 2,
    }  # fmt: skip
    plain = ask_all(Engine(loaded, EngineConfig(**common)), adapters)
    loaded, drafter, options = made(method)
    config = EngineConfig(**common, **options, speculative_disable_by_batch_size=8)
    engine = Engine(loaded, config, draft=drafter)
    assert engine._speculator is not None
    found = ask_all(engine, adapters)
    for ours, theirs in zip(found, plain, strict=True):
        check_same(theirs, ours)
    usages = [events[-1].usage for events in found]
    assert sum(u.accepted_tokens + u.rejected_tokens for u in usages if u is not None) > 0
