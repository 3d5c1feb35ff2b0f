"""Counts of proposals in usage and metrics."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest

from modelpack_engine.core.metrics import Meter
from modelpack_engine.outputs import RequestEvent, Usage
from modelpack_server.api.metrics import ModelMetrics
from modelpack_server.api.openai.replies import total_usage
from modelpack_server.conversation.spec import ChatUsage
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.entry import Entry
from tests.engine.serving.tiny import tiny_engine
from tests.engine.speculation.oracle import Oracle, speculate
from tests.engine.speculation.test_same_output import LONG, tokens


def test_usage_of_several_choices() -> None:
    usages = [Usage(5, 9, 0, 4, 1), ChatUsage(5, 7, 0, 2, 3, reasoning_tokens=6)]
    details = total_usage(usages)["completion_tokens_details"]
    assert details == {
        "reasoning_tokens": 6,
        "accepted_prediction_tokens": 6,
        "rejected_prediction_tokens": 4,
    }
    assert total_usage([Usage(5, 9)])["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_metrics() -> None:
    [plain] = tiny_engine().generate([[1, 2, 3]], LONG)
    engine = tiny_engine()
    speculate(engine, Oracle({("generate-0", 0): tokens(plain)}), num_tokens=4)
    engine.generate([[1, 2, 3]], LONG)
    entry = Entry(StoredModel("k", ("m",)), 1.0)
    entry.past = engine.stats().counters()
    shown = generate_latest(ModelMetrics([entry])).decode()
    for name, value in (("drafts", 8), ("draft_tokens", 31), ("accepted_tokens", 31)):
        assert (
            f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="m"}} {value}.0\n' in shown
        )


def test_tokens_that_come_together_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    # The process's own clock stays as it is: the loop of a server that another test has started
    # would wait by it for hours.
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("modelpack_engine.core.metrics.time", clock)
    meter = Meter()
    meter.stepped([RequestEvent("r", token_ids=(1,))])
    now = 10.36
    meter.stepped([RequestEvent("r", token_ids=(token,)) for token in range(4)])
    histogram = meter.histograms["inter_token_latency_seconds"]
    assert histogram.total == pytest.approx(0.36)
    assert sum(histogram.counts) == 4
    assert histogram.counts[list(histogram.bounds).index(0.1)] == 4


def test_tokens_after_the_end_were_not_accepted() -> None:
    """A proposal may go on after a stop token: the completion has no more of it."""
    [plain] = tiny_engine().generate([[1, 2, 3]], LONG)
    ids = tokens(plain)
    places = [place for place in range(5, len(ids)) if ids[place] not in ids[:place]]
    assert len(places) > 3
    for place in places:
        engine = tiny_engine()
        speculate(engine, Oracle({("generate-0", 0): ids}), num_tokens=9)
        params = replace(LONG, stop_token_ids=(ids[place],))
        [found] = engine.generate([[1, 2, 3]], params)
        usage = found[-1].usage
        assert usage is not None
        assert usage.completion_tokens == place + 1
        assert usage.accepted_tokens < usage.completion_tokens  # the first is sampled
        assert usage.accepted_tokens + usage.rejected_tokens == engine.stats().proposed_tokens
