"""The contract of every backend: equal requests have equal results."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

import pytest

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.base_engine import BaseEngine
from tests.engine.backends.conftest import MakeEngine

pytestmark = pytest.mark.long

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=0.9, seed=5, ignore_eos=True)


def prompts(count: int, seed: int = 5) -> list[list[int]]:
    generator = random.Random(seed)
    lengths = [3, 17, 40, 1, 33, 64, 5, 16]
    return [[generator.randrange(3, 200) for _ in range(lengths[i % 8])] for i in range(count)]


def tokens(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def run(engine: BaseEngine) -> dict[tuple[str, int], list[RequestEvent]]:
    found: dict[tuple[str, int], list[RequestEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append(event)
    return found


def check_idle(engine: BaseEngine) -> None:
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.blocks_used, stats.num_running, stats.num_waiting) == (0, 0, 0)


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_together_as_alone(make_engine: MakeEngine, params: SamplingParams) -> None:
    engine = make_engine(enable_prefix_caching=False)
    alone = [tokens(engine.generate([prompt], params)[0]) for prompt in prompts(6)]
    together = [tokens(events) for events in engine.generate(prompts(6), params)]
    assert together == alone
    assert all(len(ids) == 12 for ids in alone)
    assert len({tuple(ids) for ids in alone}) > 1
    assert engine.stats().num_mixed_steps > 0
    check_idle(engine)


def test_prefixes_change_nothing_but_the_time(make_engine: MakeEngine) -> None:
    cold, warm = make_engine(enable_prefix_caching=False), make_engine()
    [first] = prompts(1, seed=9)
    shared = [(prompts(1, seed=1)[0] * 20)[:48] + tail for tail in prompts(4, seed=2)]
    for prompt in ([*first], *shared):
        [expected], [got] = cold.generate([prompt], GREEDY), warm.generate([prompt], GREEDY)
        assert tokens(got) == tokens(expected)
    said = shared[-1] + tokens(got) + [7, 8, 9]
    [expected], [got] = cold.generate([said], GREEDY), warm.generate([said], GREEDY)
    assert tokens(got) == tokens(expected)
    usage = got[-1].usage
    assert usage is not None
    assert len(said) - 20 <= usage.cached_tokens < len(said)
    assert warm.stats().cached_tokens >= 3 * 48 + usage.cached_tokens - 16
    assert cold.stats().cached_tokens == 0
    check_idle(warm)


def test_salts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    found = []
    for name, salt in (("a", b""), ("b", b"b"), ("c", b"b"), ("d", b"")):
        engine.add_request(name, EngineRequest(prompts(6)[5], GREEDY, cache_salt=salt))
        [events] = run(engine).values()
        assert events[-1].usage is not None
        found.append((tokens(events), events[-1].usage.cached_tokens > 0))
    assert [cached for _, cached in found] == [False, False, True, True]
    assert all(ids == found[0][0] for ids, _ in found)


def test_preemption_changes_nothing(make_engine: MakeEngine) -> None:
    """A cache for about one and a half of the requests that run."""
    roomy, half = make_engine(max_model_len=128), make_engine(max_model_len=64)
    blocks = roomy.stats().blocks_total - half.stats().blocks_total
    per_block = (roomy.memory_bytes - half.memory_bytes) // blocks
    small = make_engine(max_model_len=128, kv_cache_bytes=10 * per_block)
    params = replace(GREEDY, max_tokens=50)
    expected = [tokens(events) for events in roomy.generate(prompts(4), params)]
    assert [tokens(events) for events in small.generate(prompts(4), params)] == expected
    assert small.stats().num_preemptions > 0
    check_idle(small)


def test_seeds_and_choices(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = prompts(2)[1]
    engine.add_request("a", EngineRequest(prompt, DRAWN, n=3))
    engine.add_request("b", EngineRequest(prompt, replace(DRAWN, seed=6)))
    found = {name: tokens(events) for name, events in run(engine).items()}
    assert set(found) == {("a", 0), ("a", 1), ("a", 2), ("b", 0)}
    assert found["a", 1] == found["b", 0], "choices count the seed up"
    assert found["a", 0] != found["a", 1]


def test_ends(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=128)
    prompt = prompts(2)[1]
    [events] = engine.generate([prompt], GREEDY)
    ids, last = tokens(events), events[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (17, 12)
    stop = next(token for token in ids if ids.index(token) > 0)
    at = ids.index(stop)
    [events] = engine.generate([prompt], replace(GREEDY, stop_token_ids=[stop]))
    assert (tokens(events), events[-1].stop_reason) == (ids[: at + 1], stop)
    [events] = engine.generate(
        [prompt], replace(GREEDY, stop_token_ids=[stop], min_tokens=at + 1, max_tokens=at + 2)
    )
    assert stop not in tokens(events)[: at + 1], "it is forbidden until then"
    text = "".join(e.text for e in engine.generate([prompt], GREEDY)[0])
    word = text[len(text) // 2 :][:2]
    [events] = engine.generate([prompt], replace(GREEDY, stop=[word]))
    assert "".join(e.text for e in events) == text[: text.index(word)]
    assert events[-1].stop_reason == word
    [events] = engine.generate([prompt], replace(GREEDY, max_tokens=10**6, stop_token_ids=[]))
    assert len(prompt) + len(tokens(events)) == engine.max_model_len


def test_logprobs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = prompts(3)[2]
    # Prompt log-probabilities need cached tokens to be computed again.
    engine.generate([prompt], GREEDY)
    [events] = engine.generate([prompt], replace(GREEDY, logprobs=3, prompt_logprobs=2))
    found = [entry for event in events for entry in event.logprobs or ()]
    assert [entry.token_id for entry in found] == tokens(events)
    assert all(entry.token_id == entry.top[0][0] for entry in found), "greedy"
    assert all(entry.logprob == pytest.approx(entry.top[0][1], abs=1e-5) for entry in found)
    asked = events[0].prompt_logprobs
    assert asked is not None
    assert asked[0] is None
    assert [entry.token_id for entry in asked[1:] if entry] == prompt[1:]
    assert all(len(entry.top) == 2 for entry in asked[1:] if entry)


def test_penalties_and_biases(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = prompts(2)[1]
    [events] = engine.generate([prompt], replace(GREEDY, logit_bias={9: 100.0}))
    assert tokens(events) == [9] * 12
    [events] = engine.generate([prompt], replace(GREEDY, repetition_penalty=1e6))
    assert len(set(tokens(events))) == 12, "no token comes twice"


@dataclass
class Alternating:
    """A mask that allows 5 and 6 in turn."""

    taken: int = 0
    fails_at: int = 99

    def allowed(self) -> bytes | None:
        if self.taken == self.fails_at:
            raise EngineError("the grammar is lost")
        return bytes([1 << (5 + self.taken % 2)])

    def accept(self, token_id: int) -> None:
        self.taken += 1


def test_masks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=6, temperature=0, mask=Alternating)
    engine.add_request("masked", EngineRequest(prompts(1)[0], params))
    engine.add_request("free", EngineRequest(prompts(2)[1], GREEDY))
    engine.add_request(
        "lost", EngineRequest(prompts(1)[0], replace(params, mask=lambda: Alternating(fails_at=2)))
    )
    found = run(engine)
    assert tokens(found["masked", 0]) == [5, 6, 5, 6, 5, 6]
    assert tokens(found["lost", 0]) == [5, 6]
    assert found["lost", 0][-1].error == "the grammar is lost"
    assert len(tokens(found["free", 0])) == 12
    check_idle(engine)


def test_aborts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    long = replace(GREEDY, max_tokens=60)
    for name in ("a", "b", "c"):
        engine.add_request(name, EngineRequest(prompts(1)[0], long, n=2))
    engine.step()
    engine.step()
    [event] = engine.abort("a", 1)
    assert (event.index, event.finish_reason) == (1, FinishReason.ABORT)
    assert len(engine.abort("b")) == 2
    assert engine.abort("unknown") == []
    assert engine.is_known("a")
    assert not engine.is_known("b")
    found = run(engine)
    assert found["a", 0][-1].finish_reason is FinishReason.LENGTH
    assert found["c", 1][-1].finish_reason is FinishReason.LENGTH
    check_idle(engine)


def test_going_on_after_a_failure(make_engine: MakeEngine) -> None:
    engine = make_engine()
    expected = tokens(engine.generate([prompts(2)[1]], GREEDY)[0])
    engine.add_request("a", EngineRequest(prompts(2)[1], GREEDY))
    engine.add_request("b", EngineRequest(prompts(3)[2], GREEDY))
    engine.step()
    engine.step()
    events = engine.fail_all("it broke")
    assert {event.request_id for event in events} == {"a", "b"}
    assert {event.error for event in events} == {"it broke"}
    run(engine)
    check_idle(engine)
    assert tokens(engine.generate([prompts(2)[1]], GREEDY)[0]) == expected


@pytest.mark.parametrize(
    ("prompt", "params", "n", "error", "says"),
    [
        ([], GREEDY, 1, RequestError, "empty"),
        ([10**7], GREEDY, 1, RequestError, "vocabulary"),
        ([1], replace(GREEDY, top_p=7), 1, RequestError, "top_p"),
        ([1], replace(GREEDY, repetition_penalty=1e-320), 1, RequestError, "repetition_penalty"),
        ([1], GREEDY, 0, RequestError, "n is 0"),
        ([1] * 400, GREEDY, 1, ContextLengthError, "maximum context length is 128"),
        ([1], GREEDY, 3, QueueFullError, "the queue is full"),
    ],
)
def test_what_is_refused(
    make_engine: MakeEngine,
    prompt: list[int],
    params: SamplingParams,
    n: int,
    error: type[EngineError],
    says: str,
) -> None:
    engine = make_engine(max_model_len=128, max_waiting=3)
    engine.add_request("waits", EngineRequest([1], GREEDY))
    with pytest.raises(error, match=says):
        engine.add_request("a", EngineRequest(prompt, params, n=n))
    run(engine)
    check_idle(engine)


def test_streams_and_their_end(make_engine: MakeEngine) -> None:
    """In an AsyncEngine, one client reads to the end, and one disconnects."""
    engine = AsyncEngine(make_engine)
    engine.wait_until_ready(60)

    async def read() -> tuple[list[int], int]:
        stream = await engine.submit(EngineRequest(prompts(2)[1], GREEDY))
        leaving = await engine.submit(
            EngineRequest(prompts(1)[0], replace(GREEDY, max_tokens=10**5))
        )
        async with leaving:
            async for _ in leaving:
                break
        found = [token async for event in stream for token in event.token_ids]
        return found, leaving.num_tokens

    try:
        found, left = asyncio.run(read())
        assert len(found) == 12
        assert 0 < left < 12
    finally:
        engine.close()
