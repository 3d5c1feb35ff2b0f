"""Masks in the engine: mixed batches, choices, preemption, failure."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest, LogitsMask, SamplingParams
from modelpack_server.structured_output import Constraint, compile_constraint, grammar_vocabulary
from tests.engine.serving.tiny import EOS, VOCAB, tiny_engine, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REGEXES = ["[a-f]{3,20}", r"(\d{1,3}, ){2,6}\d", "é(東|京){2,5}!", "(no|yes){1,9}"]


def grammar(regex: str) -> Callable[[], LogitsMask]:
    constraint = Constraint("regex", regex)
    return compile_constraint(constraint, grammar_vocabulary(TOKENIZER, VOCAB)).mask


MASKS = [grammar(regex) for regex in REGEXES]
FREE = [
    SamplingParams(max_tokens=14, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=11, temperature=1.2, top_p=0.9, seed=4, ignore_eos=True),
    SamplingParams(max_tokens=17, temperature=0, repetition_penalty=1.3, presence_penalty=0.4),
    SamplingParams(max_tokens=9, seed=8, min_p=0.02, logprobs=2, ignore_eos=True),
]
MASKED = [
    SamplingParams(max_tokens=60, temperature=1.5, seed=number, mask=mask)
    for number, mask in enumerate(MASKS)
]
Events = dict[tuple[str, int], list[RequestEvent]]


def prompt(number: int) -> list[int]:
    chooser = random.Random(number)
    return [chooser.randrange(256) for _ in range(chooser.choice([2, 7, 30, 50]))]


def run(engine: Engine) -> Events:
    found: Events = {}
    while engine.has_work:
        step(engine, found)
    assert engine.stats().blocks_used == 0
    return found


def step(engine: Engine, found: Events) -> None:
    for event in engine.step():
        found.setdefault((event.request_id, event.index), []).append(event)


def text(events: list[RequestEvent]) -> str:
    return "".join(event.text for event in events)


def tokens(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """The tokens of each request when it runs alone."""
    engine = tiny_engine()
    return [
        tokens(engine.generate([prompt(number)], params)[0])
        for number, params in enumerate(FREE + MASKED)
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize("arrivals", range(6))
def test_everyone_in_a_mixed_batch_gets_what_it_gets_alone(
    arrivals: int, alone: list[list[int]]
) -> None:
    """Masked, greedy, seeded and penalised requests that start and end at random."""
    chooser = random.Random(arrivals)
    waiting = list(enumerate(FREE + MASKED))
    chooser.shuffle(waiting)
    engine, found = tiny_engine(), Events()
    while waiting:
        for _ in range(chooser.randrange(1, 4)):
            if waiting:
                number, params = waiting.pop()
                engine.add_request(str(number), EngineRequest(prompt(number), params))
        for _ in range(chooser.randrange(7)):
            step(engine, found)
    for key, events in run(engine).items():
        found.setdefault(key, []).extend(events)
    for number, expected in enumerate(alone):
        assert tokens(found[str(number), 0]) == expected, number


def test_masked_texts_match_and_end_where_their_grammar_does() -> None:
    engine = tiny_engine()
    for number, params in enumerate(MASKED):
        engine.add_request(str(number), EngineRequest(prompt(number), params))
    found = run(engine)
    for number, regex in enumerate(REGEXES):
        events = found[str(number), 0]
        assert re.fullmatch(regex, text(events))
        assert events[-1].finish_reason is FinishReason.STOP
        assert events[-1].stop_reason is None
        assert tokens(events)[-1] == EOS


def test_every_choice_has_a_place_of_its_own() -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=40, temperature=1.5, seed=3, mask=MASKS[0])
    engine.add_request("r", EngineRequest(prompt(1), params, n=4))
    texts = [text(events) for events in run(engine).values()]
    assert all(re.fullmatch(REGEXES[0], found) for found in texts)
    assert len({len(found) for found in texts}) > 1
    assert len(set(texts)) == 4


def test_too_few_tokens_end_a_text_by_length() -> None:
    [events] = tiny_engine().generate([prompt(1)], replace(MASKED[0], max_tokens=2))
    assert re.fullmatch("[a-f]{2}", text(events))
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_preemption_keeps_the_place_in_the_grammar(alone: list[list[int]]) -> None:
    per_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, dim, bytes
    engine = tiny_engine(kv_cache_bytes=7 * 16 * per_token)
    for number, params in enumerate(FREE + MASKED):
        engine.add_request(str(number), EngineRequest(prompt(number), params))
    found = run(engine)
    assert engine.stats().num_preemptions > 0
    for number, expected in enumerate(alone):
        assert tokens(found[str(number), 0]) == expected, number


def test_an_abort_leaves_the_neighbours_alone(alone: list[list[int]]) -> None:
    engine, found = tiny_engine(), Events()
    for number, params in enumerate(FREE + MASKED):
        engine.add_request(str(number), EngineRequest(prompt(number), params))
    for count in range(9):
        step(engine, found)
        if count in (3, 6):
            engine.abort(str(len(FREE) + count // 3))
    for key, events in run(engine).items():
        found.setdefault(key, []).extend(events)
    for number, expected in enumerate(alone):
        if number not in (len(FREE) + 1, len(FREE) + 2):
            assert tokens(found[str(number), 0]) == expected, number


class Breaks:
    """A mask that allows any token, twice."""

    def __init__(self) -> None:
        self.left = 2

    def allowed(self) -> bytes | None:
        if not self.left:
            raise EngineError("the grammar became too complex")
        return None

    def accept(self, token_id: int) -> None:
        self.left -= 1


def test_a_mask_that_fails_ends_its_choice_only(alone: list[list[int]]) -> None:
    engine = tiny_engine()
    engine.add_request(
        "bad", EngineRequest(prompt(9), SamplingParams(max_tokens=9, temperature=0, mask=Breaks))
    )
    for number, params in enumerate(FREE + MASKED):
        engine.add_request(str(number), EngineRequest(prompt(number), params))
    found = run(engine)
    last = found.pop(("bad", 0))
    assert [event.finish_reason for event in last] == [None, None, FinishReason.ERROR]
    assert last[-1].error == "the grammar became too complex"
    for number, expected in enumerate(alone):
        assert tokens(found[str(number), 0]) == expected, number


class Raises(Breaks):
    """A mask with a bug."""

    def allowed(self) -> bytes | None:
        raise ZeroDivisionError


def test_the_engine_goes_on_after_a_mask_that_raises(alone: list[list[int]]) -> None:
    engine = tiny_engine()
    engine.add_request("bad", EngineRequest(prompt(9), SamplingParams(max_tokens=9, mask=Raises)))
    engine.add_request("other", EngineRequest(prompt(0), FREE[0]))
    with pytest.raises(ZeroDivisionError):
        run(engine)
    failed = engine.fail_all("it broke")
    assert {event.request_id for event in failed} == {"bad", "other"}
    run(engine)
    for number, params in enumerate(FREE + MASKED):
        engine.add_request(str(number), EngineRequest(prompt(number), params))
    found = run(engine)
    for number, expected in enumerate(alone):
        assert tokens(found[str(number), 0]) == expected, number


def test_a_mask_that_cannot_be_made_queues_nothing() -> None:
    def impossible() -> LogitsMask:
        raise RequestError("no mask")

    engine = tiny_engine()
    with pytest.raises(RequestError, match="no mask"):
        engine.add_request("r", EngineRequest([1], SamplingParams(mask=impossible), n=2))
    assert not engine.has_work
    assert not engine.is_known("r")


@pytest.mark.parametrize("name", ["ignore_eos", "min_tokens"])
def test_what_keeps_a_text_from_ending_is_refused(name: str) -> None:
    value: dict[str, int] = {name: 1}
    with pytest.raises(RequestError, match=name) as caught:
        tiny_engine().add_request("r", EngineRequest([1], replace(MASKED[0], **value)))  # type: ignore[arg-type]
    assert caught.value.param == name


def test_masks_are_asked_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is built before the last one is read, and launched before its masks are read."""
    engine, order = tiny_engine(), list[str]()

    class Watched:
        def __init__(self) -> None:
            self.mask = MASKS[0]()

        def allowed(self) -> bytes | None:
            order.append("mask")
            return self.mask.allowed()

        def accept(self, token_id: int) -> None:
            order.append("accept")
            self.mask.accept(token_id)

    for name in ("_schedule", "_collect", "_launch"):
        method = getattr(engine, name)

        def watched(
            *given: object, name: str = name, method: Callable[..., object] = method
        ) -> object:
            order.append(name)
            return method(*given)

        monkeypatch.setattr(engine, name, watched)
    engine.add_request("free", EngineRequest(prompt(1), replace(FREE[0], max_tokens=30)))
    engine.add_request("masked", EngineRequest(prompt(0)[:1], replace(MASKED[0], mask=Watched)))
    for _ in range(4):
        engine.step()
    del order[:]
    engine.step()
    assert order == ["_schedule", "_collect", "_launch", "accept", "mask"]


def test_json_in_single_bytes_is_valid_at_any_temperature() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}, "on": {"type": "boolean"}},
        "required": ["n", "on"],
        "additionalProperties": False,
    }
    constraint = Constraint("json_schema", schema)
    mask = compile_constraint(constraint, grammar_vocabulary(TOKENIZER, VOCAB)).mask
    engine = tiny_engine()
    params = SamplingParams(max_tokens=200, temperature=1.5, seed=1, mask=mask)
    engine.add_request("r", EngineRequest(prompt(3), params, n=8))
    ended = [e for e in run(engine).values() if e[-1].finish_reason is FinishReason.STOP]
    assert len(ended) > 4
    for events in ended:
        found = json.loads(text(events))
        assert set(found) == {"n", "on"}
        assert isinstance(found["on"], bool)
