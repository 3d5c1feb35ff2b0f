"""The engine as a whole, over a tiny model."""

from __future__ import annotations

import random
from dataclasses import replace

import mlx.core as mx
import pytest

from modelpack_engine import engine as engine_module
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ContextLengthError, QueueFullError, RequestError
from modelpack_engine.outputs import FinishReason, RequestEvent, TokenLogprob
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.output_processor import SequenceOutput
from tests.engine.launching import WAYS, launch
from tests.engine.serving.tiny import (
    CONTEXT,
    EOS,
    VOCAB,
    reference_tokens,
    tiny_engine,
    tiny_tokenizer,
)

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def prompts(count: int, seed: int = 5) -> list[list[int]]:
    generator = random.Random(seed)
    lengths = [1, 3, 17, 40, 33, 64, 5, 16]
    return [[generator.randrange(256) for _ in range(lengths[i % 8])] for i in range(count)]


def tokens(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: list[RequestEvent]) -> str:
    return "".join(event.text for event in events)


def check_idle(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.stats().blocks_used == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def run(engine: Engine) -> dict[tuple[str, int], list[RequestEvent]]:
    found: dict[tuple[str, int], list[RequestEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append(event)
    return found


@pytest.fixture(autouse=True, params=WAYS)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(request.param, monkeypatch)


@pytest.mark.sample(1)
def test_many_at_once_are_each_what_mlx_lm_gives_alone() -> None:
    engine = tiny_engine()
    wanted = prompts(8)
    answers = engine.generate(wanted, GREEDY)
    assert [tokens(events) for events in answers] == [reference_tokens(p, 12) for p in wanted]
    assert all(events[-1].finish_reason is FinishReason.LENGTH for events in answers)
    assert engine.stats().num_mixed_steps > 0
    check_idle(engine)


@pytest.mark.sample(1)
def test_a_shared_prefix_changes_nothing_but_the_work() -> None:
    prefix = prompts(6)[5]
    wanted = [[*prefix, 1, 2, 3], [*prefix, 9]]
    with_cache, without = tiny_engine(), tiny_engine(enable_prefix_caching=False)
    for prompt in wanted:
        [ours], [plain] = with_cache.generate([prompt], GREEDY), without.generate([prompt], GREEDY)
        assert tokens(ours) == tokens(plain) == reference_tokens(prompt, 12)
    assert with_cache.stats().cached_tokens == 64
    assert without.stats().cached_tokens == 0


@pytest.mark.sample(1)
def test_preemption_changes_nothing() -> None:
    per_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, dim, bytes
    engine = tiny_engine(kv_cache_bytes=9 * 16 * per_token)
    wanted = [p for p in prompts(8) if len(p) <= 40]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    answers = engine.generate(wanted, params)
    assert engine.stats().num_preemptions > 0
    assert [tokens(events) for events in answers] == [reference_tokens(p, 40) for p in wanted]
    check_idle(engine)


@pytest.mark.sample(1)
def test_a_background_request_gives_its_place_up() -> None:
    """It stops for a request that needs its place, and then goes on with the same text."""
    engine = tiny_engine(max_num_seqs=1)
    line, chat = prompts(6)[5], prompts(4)[3]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    engine.add_request("line", EngineRequest(line, params, background=True))
    before = [event for _ in range(12) for event in engine.step()]
    assert before
    engine.add_request("chat", EngineRequest(chat, params))
    events = []
    while engine.has_work:
        events += engine.step()
    assert engine.stats().num_preemptions == 1
    ends = [event.request_id for event in events if event.finish_reason is not None]
    assert ends == ["chat", "line"]
    for name, prompt in (("line", line), ("chat", chat)):
        found = [event for event in [*before, *events] if event.request_id == name]
        assert tokens(found) == reference_tokens(prompt, 40)
    check_idle(engine)


@pytest.mark.sample(1)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_seed_gives_the_same_text_alone_and_in_any_batch(temperature: float) -> None:
    engine = tiny_engine()
    prompt = prompts(3)[2]
    params = SamplingParams(
        max_tokens=20, temperature=temperature, top_p=0.9, top_k=50, seed=42, ignore_eos=True
    )
    [alone] = engine.generate([prompt], params)
    engine.add_request("mine", EngineRequest(prompt, params))
    for i, other in enumerate(prompts(6, seed=9)):
        engine.add_request(f"other-{i}", EngineRequest(other, SamplingParams(max_tokens=9 + i)))
    together = run(engine)["mine", 0]
    assert tokens(together) == tokens(alone)
    [other_seed] = engine.generate([prompt], SamplingParams(**{**asdict(params), "seed": 43}))
    assert tokens(other_seed) != tokens(alone)


def asdict(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


def test_choices_differ_and_share_their_prompt() -> None:
    engine = tiny_engine()
    prompt = prompts(6)[5]
    engine.add_request(
        "r", EngineRequest(prompt, SamplingParams(max_tokens=8, seed=1, ignore_eos=True), n=3)
    )
    found = run(engine)
    assert sorted(index for _, index in found) == [0, 1, 2]
    assert len({tuple(tokens(events)) for events in found.values()}) == 3
    usages = [events[-1].usage for events in found.values()]
    assert all(usage and usage.prompt_tokens == len(prompt) for usage in usages)
    assert sum(usage.cached_tokens for usage in usages if usage) > 0
    check_idle(engine)


def test_stop_strings_across_tokens() -> None:
    engine = tiny_engine()
    prompt = prompts(4)[3]
    [whole] = engine.generate([prompt], GREEDY)
    full = bytes(tokens(whole)).decode("latin-1")
    expected = text(whole)
    stop = expected[3:6]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=[stop])
    [stopped] = engine.generate([prompt], params)
    assert text(stopped) == expected[: expected.index(stop)]
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert stopped[-1].stop_reason == stop
    assert len(tokens(stopped)) < len(full)
    check_idle(engine)


def test_stop_tokens_and_min_tokens() -> None:
    engine = tiny_engine()
    prompt = prompts(2)[1]
    [whole] = engine.generate([prompt], GREEDY)
    stop = tokens(whole)[2]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    [stopped] = engine.generate([prompt], params)
    assert tokens(stopped) == tokens(whole)[: tokens(whole).index(stop) + 1]
    assert stopped[-1].stop_reason == stop
    later = SamplingParams(
        max_tokens=12, min_tokens=6, temperature=0, ignore_eos=True, stop_token_ids=[stop]
    )
    [longer] = engine.generate([prompt], later)
    assert len(tokens(longer)) > 6
    assert stop not in tokens(longer)[:6]


def test_logprobs_and_prompt_logprobs() -> None:
    engine = tiny_engine()
    prompt = prompts(4)[3]
    params = SamplingParams(
        max_tokens=3, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
    [events] = engine.generate([prompt], params)
    reported = [entry for event in events for entry in event.logprobs or ()]
    assert [entry.token_id for entry in reported] == tokens(events)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in reported)
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in reported)
    first = events[0].prompt_logprobs
    assert first is not None
    assert first[0] is None
    assert [entry.token_id for entry in first[1:] if entry] == prompt[1:]


def test_abort_frees_blocks_within_a_step() -> None:
    engine = tiny_engine(enable_prefix_caching=False)
    engine.add_request(
        "a", EngineRequest(prompts(6)[5], SamplingParams(max_tokens=100, ignore_eos=True))
    )
    engine.add_request("b", EngineRequest(prompts(4)[3], GREEDY))
    for _ in range(6):
        engine.step()
    used = engine.stats().blocks_used
    engine.abort("a")
    engine.step()
    assert engine.stats().blocks_used < used
    assert not engine.is_known("a")
    found = run(engine)
    assert set(found) == {("b", 0)}
    check_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], GREEDY, "prompt"),
        ([VOCAB], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([1], SamplingParams(temperature=-1), "temperature"),
        ([1], SamplingParams(temperature=float("nan")), "temperature"),
        ([1], SamplingParams(top_p=0), "top_p"),
        ([1], SamplingParams(max_tokens=0), "max_tokens"),
        ([1], SamplingParams(logit_bias={VOCAB: 1}), "logit_bias"),
        ([1], SamplingParams(stop=[""]), "stop"),
        ([1], SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused(prompt: list[int], params: SamplingParams, param: str) -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError) as caught:
        engine.add_request("r", EngineRequest(prompt, params))
    assert caught.value.param == param
    check_idle(engine)


def test_a_prompt_over_the_context() -> None:
    engine = tiny_engine()
    with pytest.raises(ContextLengthError, match=str(CONTEXT)):
        engine.add_request("r", EngineRequest([1] * CONTEXT, GREEDY))
    # A prompt that just fits ends by length.
    [events] = engine.generate([[1] * (CONTEXT - 1)], GREEDY)
    assert len(tokens(events)) == 1


def test_the_queue_is_bounded() -> None:
    engine = tiny_engine(max_waiting=2)
    engine.add_request("a", EngineRequest([1], GREEDY))
    engine.add_request("b", EngineRequest([2], GREEDY))
    with pytest.raises(QueueFullError):
        engine.add_request("c", EngineRequest([3], GREEDY))
    assert len(run(engine)) == 2


def test_logits_that_are_no_numbers_fail_their_request_only() -> None:
    engine = tiny_engine()
    weight = engine._runner.model.model.embed_tokens
    weight.weight = mx.where((mx.arange(VOCAB) == 200)[:, None], mx.array(mx.nan), weight.weight)
    # The head shares the weights: every row's logit of token 200 is NaN.
    bad = [1, 200, 3]
    engine.add_request("bad", EngineRequest(bad, GREEDY))
    found = run(engine)
    assert found["bad", 0][-1].finish_reason is FinishReason.ERROR
    assert "not numbers" in (found["bad", 0][-1].error or "")
    check_idle(engine)


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on() -> None:
    engine = tiny_engine()
    wanted = prompts(4)
    engine.add_request("a", EngineRequest(wanted[3], GREEDY))
    engine.step()
    forward, engine._runner.forward = engine._runner.forward, None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        engine.step()
    engine._runner.forward = forward  # type: ignore[method-assign]
    [event] = engine.fail_all("it broke")
    assert event.finish_reason is FinishReason.ERROR
    assert event.error == "it broke"
    run(engine)
    check_idle(engine)
    [after] = engine.generate([wanted[2]], GREEDY)
    assert tokens(after) == reference_tokens(wanted[2], 12)


def test_a_launch_that_fails_ends_all_requests_and_leaves_nothing_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine()
    wanted = prompts(4)
    engine.add_request(
        "short", EngineRequest(wanted[0], SamplingParams(max_tokens=2, temperature=0))
    )
    engine.add_request("long", EngineRequest(wanted[2], GREEDY))
    told: list[RequestEvent] = []
    while sum(len(event.token_ids) for event in told if event.request_id == "short") < 1:
        told += engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_launch", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
    told += engine.fail_all("it broke")
    ends = {event.request_id: event for event in told if event.finished}
    assert set(ends) == {"short", "long"}
    assert ends["long"].error == "it broke"
    check_idle(engine)
    [after] = engine.generate([wanted[2]], GREEDY)
    assert tokens(after) == reference_tokens(wanted[2], 12)


def test_what_a_step_told_before_it_raised_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processing one request's token fails in the step that ends another request."""
    engine = tiny_engine()
    wanted = prompts(2)
    last = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    for name, prompt in zip("ab", wanted, strict=True):
        engine.add_request(name, EngineRequest(prompt, last))
    told: list[RequestEvent] = []
    while len(tokens(told)) < 2:
        told += engine.step()
    take = SequenceOutput.take

    def takes(choice: SequenceOutput, token_id: int, logprob: TokenLogprob | None) -> object:
        return broken() if choice.sequence.request_id == "b" else take(choice, token_id, logprob)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceOutput, "take", takes)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
    told += engine.fail_all("it broke")
    of_a = [event for event in told if event.request_id == "a"]
    assert tokens(of_a) == reference_tokens(wanted[0], 2)
    assert of_a[-1].finish_reason is FinishReason.LENGTH
    assert [event.error for event in told if event.finished and event.request_id == "b"] == [
        "it broke"
    ]
    check_idle(engine)


def test_a_step_that_cannot_be_read_fails_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    engine.add_request("a", EngineRequest(prompts(4)[3], GREEDY))
    while not tokens(engine.step()):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "read_step", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
    [event] = engine.fail_all("it broke")
    assert event.error == "it broke"
    check_idle(engine)


def broken(*args: object) -> None:
    raise RuntimeError("no memory")


class OnlyLetters:
    """A mask that allows `allowed`, one byte after the other, then the end."""

    def __init__(self, letters: bytes) -> None:
        self.letters = letters
        self.accepted: list[int] = []

    def allowed(self) -> bytes:
        bits = bytearray(VOCAB // 8 + 1)
        left = self.letters[len(self.accepted) :]
        token = TOKENS.encode(chr(left[0]))[0] if left else EOS
        bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


TOKENS = tiny_tokenizer()


def test_a_mask_decides_every_token_in_a_mixed_batch() -> None:
    engine = tiny_engine()
    mask = OnlyLetters(b"yes")
    engine.add_request("free", EngineRequest(prompts(4)[3], GREEDY))
    engine.add_request(
        "masked", EngineRequest(prompts(3)[2], SamplingParams(max_tokens=9, mask=lambda: mask))
    )
    found = run(engine)
    assert text(found["masked", 0]) == "yes"
    assert found["masked", 0][-1].finish_reason is FinishReason.STOP
    assert tokens(found["free", 0]) == reference_tokens(prompts(4)[3], 12)


def test_a_stop_string_that_the_last_token_completes() -> None:
    prompt, letters = [65, 66, 67, 68] * 5, dict.fromkeys(range(65, 69), 90.0)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logit_bias=letters)
    [plain] = tiny_engine().generate([prompt], params)
    stop = text(plain)[3:6]
    count = text(plain).index(stop) + 3  # every token is a letter
    for most in (count, count + 1):
        [found] = tiny_engine().generate([prompt], replace(params, max_tokens=most, stop=(stop,)))
        assert (found[-1].finish_reason, found[-1].stop_reason) == (FinishReason.STOP, stop)
        assert stop not in text(found)


def test_generate_leaves_nothing_behind() -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate([[1, 2, 3], []], GREEDY)
    [found] = engine.generate([[1, 2, 3]], GREEDY)
    assert found[-1].finished
    engine.add_request("mine", EngineRequest([1, 2, 3], GREEDY))
    with pytest.raises(RequestError, match="other requests"):
        engine.generate([[4, 5]], GREEDY)
    engine.step()
    engine.step()
    engine.abort("mine")  # a token is in flight
    assert engine.generate([[4, 5]], GREEDY)
    engine.add_request("mine", EngineRequest([1, 2, 3], GREEDY))
    assert run(engine)["mine", 0][-1].finished


def test_all_choices_have_the_prompts_log_probabilities() -> None:
    engine = tiny_engine(max_num_batched_tokens=32)
    engine.generate([list(range(1, 60))], GREEDY)  # others could share it
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1)
    engine.add_request("a", EngineRequest(list(range(1, 60)), params, n=3))
    found: dict[int, object] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.index, event.prompt_logprobs)
    assert len(found) == 3
    for entries in found.values():
        assert isinstance(entries, tuple)
        assert entries[0] is None
        assert [entry.token_id for entry in entries[1:]] == list(range(2, 60))
