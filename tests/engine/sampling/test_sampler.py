"""The tokens of a request do not depend on other requests in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.request import SamplingParams
from modelpack_engine.sampling.plan import WINDOW
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampled, Sampler, SampleRow
from tests.engine.sampling import oracle

VOCAB = 50
EOS = 49
GREEDY = SamplingParams(temperature=0, max_tokens=999)


def sampler(vocab_size: int = VOCAB, max_num_seqs: int = 16) -> Sampler:
    return Sampler(vocab_size, max_num_seqs, {EOS})


def random_logits(rows: int, seed: int = 0, vocab_size: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab_size)) * 3).astype(np.float32)


@dataclass
class Request:
    """A request whose logits depend on its own tokens, as a model's do."""

    params: SamplingParams
    name: int
    prompt: Sequence[int] = (1, 2, 3)
    output: list[int] = field(default_factory=list)

    def logits(self) -> np.ndarray:
        return random_logits(1, seed=hash((self.name, tuple(self.output))) % 2**32)[0]

    def row(self) -> SampleRow:
        return SampleRow(self.name, len(self.prompt) + len(self.output), len(self.output))


def step(running: Sampler, batch: Sequence[Request], num_rows: int | None = None) -> Sampled:
    """Sample a token for each request of the batch, padded to `num_rows`."""
    padding = (num_rows or len(batch)) - len(batch)
    rows = [r.logits() for r in batch] + [np.full(VOCAB, np.nan, np.float32)] * padding
    sampled = running.sample(mx.array(np.stack(rows)), [r.row() for r in batch])
    tokens: Any = sampled.token_ids.tolist()
    for request, token in zip(batch, tokens, strict=False):
        request.output.append(token)
    return sampled


def alone(params: SamplingParams, name: int, count: int) -> list[int]:
    """Return the tokens of a request that runs alone."""
    running, request = sampler(), Request(params, name)
    running.add(name, request.prompt, params)
    for _ in range(count):
        step(running, [request])
    return request.output


def one(params: SamplingParams, row: np.ndarray, *, num_output: int = 0, position: int = 5) -> int:
    """Return the token of a request that runs alone with these logits."""
    running = sampler(len(row))
    running.add(1, [0], params)
    return int(
        running.sample(mx.array(row[None]), [SampleRow(1, position, num_output)]).token_ids.item()
    )


POOL = [
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(seed=1, temperature=0.7, top_p=0.8),
    SamplingParams(seed=2, temperature=1.5, top_k=5),
    SamplingParams(seed=3, min_p=0.1, top_k=20, top_p=0.9),
    SamplingParams(seed=-4, min_p=0.2),
    SamplingParams(seed=2**63, repetition_penalty=1.3, presence_penalty=0.5, top_p=0.95),
    replace(GREEDY, frequency_penalty=1.0, repetition_penalty=1.2),
    replace(GREEDY, logit_bias={3: 5.0, 7: -100.0}, logprobs=2),
    SamplingParams(seed=5, min_tokens=3, stop_token_ids=[4], logit_bias={EOS: 8.0}, logprobs=0),
]
LENGTH = 5
ALONE = [alone(params, name, LENGTH) for name, params in enumerate(POOL)]


@pytest.mark.long
@settings(max_examples=60)
@given(st.data())
def test_tokens_are_the_same_alone_and_in_any_batch(data: st.DataObject) -> None:
    """Requests start, end and change rows, and rows are padded; tokens stay the same."""
    running = sampler()
    requests = {name: Request(params, name) for name, params in enumerate(POOL)}
    added: set[int] = set()
    for _ in range(6):
        due = [r for r in requests.values() if len(r.output) < LENGTH]
        batch = data.draw(st.lists(st.sampled_from(due), unique_by=id, min_size=1)) if due else []
        if not batch:
            break
        for request in batch:
            if request.name in added and data.draw(st.booleans()):
                running.remove(request.name)  # preempted, and back again
                added.remove(request.name)
            if request.name not in added:
                running.add(
                    request.name,
                    request.prompt,
                    request.params,
                    output_token_ids=tuple(request.output),
                )
                added.add(request.name)
        step(running, batch, num_rows=data.draw(st.sampled_from([len(batch), 12, 16])))
    for request in requests.values():
        assert request.output == ALONE[request.name][: len(request.output)]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    row = np.zeros(VOCAB, np.float32)
    tokens = [[one(SamplingParams(seed=s), row, position=p) for p in range(12)] for s in (1, 1, 2)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert len(set(tokens[0])) > 4


def test_requests_without_a_seed_differ() -> None:
    row = np.zeros((1, 5000), np.float32)
    assert len({one(SamplingParams(), row[0]) for _ in range(5)}) > 1


def test_choices_of_a_request_differ_and_the_first_is_the_request_alone() -> None:
    running, params = sampler(5000), SamplingParams(seed=9)
    for index in range(4):
        running.add(index, [1], params, index=index)
    rows = [SampleRow(index, 1, 0) for index in range(4)]
    tokens: Any = running.sample(mx.zeros((4, 5000)), rows).token_ids.tolist()
    assert len(set(tokens)) > 1
    assert tokens[0] == one(params, np.zeros(5000, np.float32), position=1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_is_argmax(dtype: mx.Dtype, rows: int) -> None:
    running, x = sampler(), mx.array(random_logits(8)).astype(dtype)
    for name in range(rows):
        running.add(name, [1], GREEDY)
    sampled = running.sample(x, [SampleRow(name, 1, 0) for name in range(rows)])
    assert sampled.token_ids.dtype == mx.int32
    assert sampled.token_ids.tolist() == np.array(x.astype(mx.float32)).argmax(-1).tolist()
    assert sampled.logprobs is None


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 9e-6, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = random_logits(1)[0]
    assert one(SamplingParams(temperature=temperature, seed=1), row) == row.argmax()


def test_ties_go_to_the_first_token() -> None:
    row = np.array([0, 7, 1, 7, 7], np.float32)
    assert one(GREEDY, row) == 1
    assert one(replace(GREEDY, logit_bias={0: 1.0}), row) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=6),
        SamplingParams(temperature=0.8, top_p=0.7),
        SamplingParams(temperature=1.2, min_p=0.05, top_k=9, top_p=0.9),
    ],
    ids=lambda p: f"T={p.temperature} k={p.top_k} p={p.top_p} m={p.min_p}",
)
@pytest.mark.parametrize("vocab_size", [20, 1200], ids=["sorted", "windowed"])
def test_draws_follow_the_distribution(params: SamplingParams, vocab_size: int) -> None:
    """Filters apply after the temperature; 2 ** 12 rows draw in one call."""
    count = 4096
    row = np.full(vocab_size, -60, np.float32)
    row[:20] = np.random.default_rng(6).normal(size=20) * 2
    running = sampler(vocab_size, count)
    for name in range(count):
        running.add(name, [1], replace(params, seed=17))
    rows = [SampleRow(name, name + 1, 0) for name in range(count)]
    tokens = running.sample(mx.broadcast_to(mx.array(row), (count, vocab_size)), rows).token_ids
    scaled = row.astype(np.float64) / params.temperature
    kept = oracle.kept(scaled, params.top_k, params.top_p, params.min_p)
    probabilities = oracle.softmax(np.where(kept, scaled, -np.inf))
    counts = np.bincount(np.array(tokens), minlength=vocab_size)
    assert counts[20:].sum() == 0
    assert oracle.chi_square(counts[:20], probabilities[:20]) < 5


def test_bias_is_added_before_the_choice() -> None:
    row = random_logits(1)[0]
    target = int(row.argmin())
    assert one(replace(GREEDY, logit_bias={target: 100.0}), row) == target
    best = int(row.argmax())
    assert one(replace(GREEDY, logit_bias={best: -100.0}), row) == row.argsort()[-2]


@pytest.mark.parametrize(("num_output", "expected"), [(0, 3), (1, 3), (2, EOS), (9, EOS)])
def test_min_tokens_keeps_ends_away(num_output: int, expected: int) -> None:
    row = np.zeros(VOCAB, np.float32)
    row[EOS], row[8], row[3] = 9, 8, 7
    params = replace(GREEDY, min_tokens=2, stop_token_ids=[8])
    assert one(params, row, num_output=num_output) == expected


def test_min_tokens_lets_an_ignored_end_be_chosen() -> None:
    row = np.zeros(VOCAB, np.float32)
    row[EOS] = 9
    assert one(replace(GREEDY, min_tokens=2, ignore_eos=True), row) == EOS


def bits(tokens: Sequence[int], size: int = VOCAB) -> bytes:
    """Return the bits of a mask that allows `tokens`."""
    allowed = np.zeros(size, np.uint8)
    allowed[list(tokens)] = 1
    return np.packbits(allowed, bitorder="little").tobytes()


@pytest.mark.parametrize("temperature", [0, 1])
def test_masks_hold_for_their_own_rows(temperature: float) -> None:
    x = random_logits(6, seed=3)
    running = sampler()
    masks = [None, bits([4]), None, bits([11, 48]), None, bits([2, 9], size=16)]
    for name in range(6):
        running.add(name, [1], SamplingParams(temperature=temperature, seed=name))
    rows = [SampleRow(name, 1, 0, mask) for name, mask in enumerate(masks)]
    tokens: Any = running.sample(mx.array(x), rows).token_ids.tolist()
    unmasked = [
        one(SamplingParams(temperature=temperature, seed=n), x[n], position=1) for n in range(6)
    ]
    for name in (0, 2, 4):
        assert tokens[name] == unmasked[name]
    assert tokens[1] == 4
    assert tokens[3] in (11, 48)
    assert tokens[5] in (2, 9)


def test_a_mask_that_allows_nothing_fails_its_row_only() -> None:
    running = sampler()
    running.add(0, [1], GREEDY)
    running.add(1, [1], GREEDY)
    x = random_logits(2)
    tokens = running.sample(
        mx.array(x), [SampleRow(0, 1, 0, bits([])), SampleRow(1, 1, 0)]
    ).token_ids
    assert tokens.tolist() == [NO_TOKEN, x[1].argmax()]


@pytest.mark.parametrize("broken", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["whole row", "one logit"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_p=0.9),
        SamplingParams(seed=1, top_k=3, min_p=0.1, logprobs=2),
        replace(GREEDY, presence_penalty=1, logit_bias={1: 1.0}),
    ],
    ids=["greedy", "random", "top-p", "filters", "penalties"],
)
@pytest.mark.parametrize("allowed", [None, bits([1, 2])], ids=["free", "masked"])
def test_broken_logits_fail_their_row_only(
    params: SamplingParams, dtype: mx.Dtype, whole: bool, broken: float, allowed: bytes | None
) -> None:
    x = random_logits(4, seed=8)
    running, sound = sampler(), sampler()
    rows = [SampleRow(name, 1, 0, allowed) for name in range(4)]
    for name in range(4):
        running.add(name, [1], params)
        sound.add(name, [1], params)
    expected: Any = sound.sample(mx.array(x).astype(dtype), rows).token_ids.tolist()
    x[2, slice(None) if whole else slice(30, 31)] = broken
    tokens: Any = running.sample(mx.array(x).astype(dtype), rows).token_ids.tolist()
    assert tokens[2] == NO_TOKEN
    assert tokens[:2] + tokens[3:] == expected[:2] + expected[3:]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """Temperature, bias and penalties change the choice, but not the log-probabilities."""
    x = random_logits(4, seed=4)
    wanted = [2, None, 0, 20]
    running = sampler()
    for name, count in enumerate(wanted):
        params = replace(GREEDY, logit_bias={6: 50.0}, presence_penalty=1, logprobs=count)
        running.add(name, [1, 2], params)
    sampled = running.sample(mx.array(x), [SampleRow(name, 2, 0) for name in range(4)])
    tokens: Any = sampled.token_ids.tolist()
    assert tokens == [6] * 4
    assert sampled.logprobs is not None
    expected = oracle.log_softmax(x.astype(np.float64))
    for row, found in enumerate(sampled.logprobs.read(tokens, wanted)):
        if wanted[row] is None:
            assert found is None
            continue
        assert found is not None
        assert found.token_id == 6
        assert found.logprob == pytest.approx(expected[row, 6], abs=1e-4)
        assert [t for t, _ in found.top] == (-expected[row]).argsort()[: wanted[row]].tolist()
        assert [p for _, p in found.top] == pytest.approx(
            [expected[row, t] for t, _ in found.top], abs=1e-4
        )


def test_nothing_is_evaluated() -> None:
    """Arrays have no values in a traced function: reading one raises."""
    running = sampler()
    for name, params in enumerate(POOL):
        running.add(name, [1], params)
    rows = [
        SampleRow(name, 1, 0, bits([1, 2, 3]) if name % 3 == 0 else None)
        for name in range(len(POOL))
    ]
    traced = mx.compile(lambda x: running.sample(x, rows).arrays())
    assert [a.shape[0] for a in traced(mx.array(random_logits(len(POOL))))] == [len(POOL)] * 5


def test_the_callers_logits_stay_as_they_were() -> None:
    before = random_logits(len(POOL))
    x = mx.array(before)
    running = sampler()
    for name, params in enumerate(POOL):
        running.add(name, [1], params)
    rows = [SampleRow(name, 1, 0, bits([1, 2, 3])) for name in range(len(POOL))]
    mx.eval(running.sample(x, rows).arrays())
    assert (np.array(x) == before).all()


@pytest.mark.parametrize("top_k", [WINDOW - 24, WINDOW + 1000])
def test_top_k_within_and_beyond_the_window(top_k: int) -> None:
    """Almost equal logits, so that every kept token is drawn sometimes."""
    count, vocab_size = 512, 3 * WINDOW
    row = np.linspace(1, 0.999, vocab_size, dtype=np.float32)
    running = sampler(vocab_size, count)
    for name in range(count):
        running.add(name, [1], SamplingParams(top_k=top_k, seed=name))
    rows = [SampleRow(name, 1, 0) for name in range(count)]
    x = mx.broadcast_to(mx.array(row), (count, vocab_size))
    tokens = np.array(running.sample(x, rows).token_ids)
    assert top_k * 0.97 < tokens.max() < top_k


def test_a_sequence_that_comes_back_has_its_new_parameters() -> None:
    running, x = sampler(), mx.array(random_logits(1))
    for params, expected in ((GREEDY, None), (replace(GREEDY, logit_bias={6: 90.0}), 6)):
        running.add(1, [1], params)
        token = running.sample(x, [SampleRow(1, 1, 0)]).token_ids.item()
        assert token == (x.argmax().item() if expected is None else expected)
        running.remove(1)
