"""Penalties, and their token counts, which stay on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.request import SamplingParams
from modelpack_engine.sampling.plan import OUTPUT, TokenHistory
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampler, SampleRow
from tests.engine.sampling import oracle

VOCAB = 12
GREEDY = SamplingParams(temperature=0, max_tokens=999)


def expected_tokens(
    steps: np.ndarray, prompt: list[int], params: SamplingParams, output: list[int]
) -> list[int]:
    """Return the oracle's greedy tokens after `output`, for one row of `steps` per step."""
    output = list(output)
    for row in steps.astype(np.float64):
        penalised = oracle.penalised(
            row,
            prompt,
            output,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        output.append(int(penalised.argmax()))
    return output


PENALTIES = [
    replace(GREEDY, repetition_penalty=1.5),
    replace(GREEDY, repetition_penalty=0.7),
    replace(GREEDY, presence_penalty=1.1),
    replace(GREEDY, frequency_penalty=0.6),
    replace(GREEDY, frequency_penalty=-0.4, presence_penalty=-0.3),
    replace(GREEDY, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
]


@pytest.mark.parametrize("ahead", [True, False], ids=["never read", "read each step"])
@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_a_token_in_flight_is_counted(params: SamplingParams, ahead: bool) -> None:
    """Token N is counted in step N + 1, even if nothing is evaluated before the last step."""
    logits = np.random.default_rng(1).normal(size=(15, VOCAB)).astype(np.float32)
    prompt = [3, 3, 5]
    sampler = Sampler(VOCAB, 4, set())
    sampler.add(1, prompt, params)
    lazy = []
    for number, row in enumerate(logits):
        sampled = sampler.sample(mx.array(row[None]), [SampleRow(1, 3 + number, number)])
        lazy.append(sampled.token_ids)
        if not ahead:
            mx.eval(sampled.arrays())
    tokens: Any = mx.concatenate(lazy).tolist()
    assert tokens == expected_tokens(logits, prompt, params, [])
    assert tokens != logits.argmax(-1).tolist(), "the penalty changed nothing"


@pytest.mark.long
@settings(max_examples=40)
@given(st.data())
def test_any_mix_of_requests(data: st.DataObject) -> None:
    """Slots are reused by more requests than there are slots."""
    sampler = Sampler(VOCAB, 2, set())
    seed = data.draw(st.integers(0, 2**32))
    random = np.random.default_rng(seed)
    running: dict[int, tuple[list[int], SamplingParams, list[int], list[int]]] = {}
    for number in range(8):
        if running and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(running)))
            sampler.remove(gone)
            del running[gone]
        for extra in range(data.draw(st.integers(0 if running else 1, 5))):
            name = 100 * number + extra
            prompt = random.integers(0, VOCAB, 4).tolist()
            output = random.integers(0, VOCAB, extra).tolist()
            params = data.draw(st.sampled_from([*PENALTIES, GREEDY]))
            sampler.add(name, prompt, params, output_token_ids=output)
            running[name] = (prompt, params, output, list(output))
        batch = data.draw(st.permutations(sorted(running)))
        batch = batch[: data.draw(st.integers(1, len(batch)))]
        logits = random.normal(size=(data.draw(st.sampled_from([len(batch), 64])), VOCAB))
        logits = logits.astype(np.float32)
        rows = [SampleRow(n, 4 + len(running[n][3]), len(running[n][3])) for n in batch]
        tokens: Any = sampler.sample(mx.array(logits), rows).token_ids.tolist()
        for name, row, token in zip(batch, logits, tokens, strict=False):
            prompt, params, _, output = running[name]
            assert expected_tokens(row[None], prompt, params, output) == [*output, token]
            output.append(token)


def test_penalised_rows_leave_the_others_alone() -> None:
    logits = np.random.default_rng(2).normal(size=(8, VOCAB)).astype(np.float32)
    sampler = Sampler(VOCAB, 8, set())
    for name in range(5):
        sampler.add(name, list(range(VOCAB)), PENALTIES[0] if name == 3 else GREEDY)
    rows = [SampleRow(name, VOCAB, 0) for name in range(5)]
    tokens: Any = sampler.sample(mx.array(logits), rows).token_ids.tolist()
    assert [t for n, t in enumerate(tokens) if n != 3] == np.delete(logits.argmax(-1), 3).tolist()


def test_a_failed_row_does_not_harm_the_next_request_in_its_slot() -> None:
    sampler = Sampler(VOCAB, 1, set())
    sampler.add(1, [2], PENALTIES[2])
    broken = mx.full((1, VOCAB), mx.nan)
    assert sampler.sample(broken, [SampleRow(1, 1, 0)]).token_ids.tolist() == [NO_TOKEN]
    sampler.remove(1)
    sampler.add(2, [2], PENALTIES[2])
    row = np.zeros((1, VOCAB), np.float32)
    row[0, -1] = 0.5  # the place of a count for token -1
    assert sampler.sample(mx.array(row), [SampleRow(2, 1, 0)]).token_ids.tolist() == [VOCAB - 1]


def test_no_request_with_penalties_takes_no_memory() -> None:
    sampler = Sampler(200_000, 64, set())
    before = mx.get_active_memory()
    for name in range(64):
        sampler.add(name, [1, 2, 3], SamplingParams(seed=1))
    assert mx.get_active_memory() - before < 1 << 20


def test_history_counts_prompt_and_output_apart() -> None:
    history = TokenHistory(6, 4)
    slot = history.open([1, 1, 2], [2, 2, 5])
    slots = mx.array([slot])
    assert history.counts(slots).tolist() == [[0, 1, 1 + 2 * OUTPUT, 0, 0, OUTPUT]]
    history.append(slots, mx.array([5]), mx.array([OUTPUT]))
    assert history.counts(slots).tolist() == [[0, 1, 1 + 2 * OUTPUT, 0, 0, 2 * OUTPUT]]
    history.close(slot)
    assert history.open([0], []) == slot
    assert history.counts(slots).tolist() == [[1, 0, 0, 0, 0, 0]]


def test_history_grows_and_keeps_what_it_holds() -> None:
    history = TokenHistory(40, 3)
    slots = [history.open([n], []) for n in range(40)]
    assert len(set(slots)) == 40
    counts = np.array(history.counts(mx.array(slots)))
    assert (counts == np.eye(40, dtype=np.int32)).all()


def test_the_pool_is_updated_in_place() -> None:
    """If steps are built ahead, read, then submitted, the counts are not copied."""
    vocab_size, batch = 50_000, 4
    pool = 8 * vocab_size * 4
    history = TokenHistory(vocab_size, 64)
    slots = mx.array([history.open([1], []) for _ in range(batch)])
    amounts = mx.array([OUTPUT] * batch)

    def build() -> mx.array:
        tokens = mx.argmax(history.counts(slots)[:, :100], axis=-1).astype(mx.int32)
        history.append(slots, tokens, amounts)
        return tokens

    in_flight = build()
    mx.async_eval(in_flight)
    mx.eval(in_flight)
    rows = batch * vocab_size * 4
    for _ in range(3):
        following = build()
        mx.eval(in_flight)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.async_eval(following)
        mx.eval(following)
        assert mx.get_peak_memory() - before < rows + pool // 4
        in_flight = following
    assert history.counts(slots)[0, 1].item() == 1 + 4 * OUTPUT
