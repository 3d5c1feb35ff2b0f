"""The kernel draws the same tokens as MLX's functions, on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from modelpack_engine.platform.device import Staging
from modelpack_engine.request import SamplingParams
from modelpack_engine.sampling import plan
from modelpack_engine.sampling import sampler as drawing
from modelpack_engine.sampling.plan import Draws, Entry, plan_draws
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampler, SampleRow
from tests.engine.kernels.onhost import Host, emulated

pytestmark = pytest.mark.long

WIDE, ODD = 1024, 301


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, drawing.verdict) as found:
        yield found


@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [
        (mx.float32, ODD),
        (mx.bfloat16, WIDE),
        *(
            pytest.param(dtype, size, marks=pytest.mark.long)
            for dtype, size in ((mx.float32, WIDE), (mx.float16, ODD), (mx.bfloat16, ODD))
        ),
    ],
)
def test_the_text_draws_what_mlx_does(host: Host, dtype: mx.Dtype, vocab_size: int) -> None:
    assert drawing.verdict(dtype, vocab_size) is None
    assert {body for body, _ in host.calls} == {"draw"}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("random[1] << by", "random[1] << (by - 1)", "all"),
        ("(unsigned int)(at + HALF)", "(unsigned int)(at)", "all"),
        ("- PA_LOG(-logarithm)", "+ PA_LOG(-logarithm)", "all"),
        ("values[side] / temperature", "values[side]", "hot"),
        ("top_k >= V", "true", "top-k"),
        ("whole[s] < most", "whole[s] < 2.0f * most", "top-k"),
        ("share >= 1.0f", "true", "top-p"),
        ("most *= share", "most *= 0.5f", "top-p"),
        ("min_p * temperature", "min_p", "min-p"),
        ("top + min_p", "top + 0.0f * min_p", "min-p"),
        ("sum[LIMITS] += value > least ? mass", "sum[LIMITS] += value > low ? mass", "top-k and"),
    ],
)
def test_a_wrong_text_is_found(host: Host, old: str, new: str, found: str) -> None:
    def edit(body: str, source: str) -> str:
        assert source.count(old) == 1
        return source.replace(old, new)

    host.break_by(edit)
    assert (drawing.verdict(mx.float32, WIDE) or "").startswith(f"tokens differ with {found}")


def planned(*params: SamplingParams) -> Draws:
    entries = [Entry(one, seed, None, ()) for seed, one in enumerate(params)]
    draws = plan_draws(entries, len(entries), ODD)
    assert draws is not None
    return draws


def keys_of(draws: Draws) -> NDArray[np.uint32]:
    return plan.draw_keys(draws.seeds, np.full(len(draws.seeds), 5, dtype=np.uint64))


def both(logits: mx.array, draws: Draws) -> tuple[list[int], list[int]]:
    kernel, _ = drawing.by_kernel(logits, settings_of(draws))
    return kernel.tolist(), drawing.by_functions(logits, draws, keys_of(draws), Staging()).tolist()


def settings_of(draws: Draws, rows: slice = slice(None)) -> mx.array:
    return mx.array(drawing.settings_of(draws, keys_of(draws))[rows].ravel())


EXTREME = [
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1e-5),
    SamplingParams(temperature=100.0, top_p=0.5),
    SamplingParams(top_k=ODD - 1, top_p=0.999),
    SamplingParams(top_k=7, top_p=0.5, min_p=0.5),
    SamplingParams(top_k=ODD + 1, min_p=0.001),
    SamplingParams(top_k=10**12, top_p=0.9),
    SamplingParams(temperature=0, top_k=3),
]


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "few", "one", "below zero", "large"])
def test_at_the_limits(host: Host, kind: str) -> None:
    normal = mx.random.normal((len(EXTREME), ODD), key=mx.random.key(3))
    hidden = mx.full(normal.shape, -mx.inf)
    logits = {
        "normal": normal,
        "ties": mx.round(normal),
        "equal": mx.zeros(normal.shape),
        "few": mx.where(mx.arange(ODD) % 100 == 3, normal, hidden),
        "one": mx.where(mx.arange(ODD) == 200, normal, hidden),
        "below zero": normal - 50,
        "large": normal * 1e30,
    }[kind]
    kernel, functions = both(logits, planned(*EXTREME))
    assert kernel == functions


def test_a_row_depends_on_itself_alone(host: Host) -> None:
    logits = mx.random.normal((5, ODD), key=mx.random.key(4))
    draws = planned(*[SamplingParams(top_p=0.9, temperature=1 + row / 4) for row in range(5)])
    whole, _ = both(logits, draws)
    for row in range(5):
        one = slice(row, row + 1)
        found, _ = drawing.by_kernel(logits[one], settings_of(draws, one))
        assert found.tolist() == whole[row : row + 1]


def test_rows_that_cannot_be_drawn_from(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with NaN, infinity or no allowed token get no token; other rows are unaffected."""
    monkeypatch.setattr(drawing, "verdict", lambda *_: None)  # other tests check it
    logits = mx.random.normal((4, ODD), key=mx.random.key(6))
    logits[0, 7] = mx.nan
    logits[1, 7] = mx.inf
    logits[2] = -mx.inf
    sampler = Sampler(ODD, 4, ())
    for row in range(4):
        sampler.add(row, [1], SamplingParams(top_p=0.9, top_k=9, seed=row))
    found = sampler.sample(logits, [SampleRow(row, 1, 0) for row in range(4)]).token_ids.tolist()
    assert found[:3] == [NO_TOKEN] * 3
    assert 0 <= found[3] < ODD
    assert "draw" in {body for body, _ in host.calls}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rows_without_a_choice_are_marked(host: Host, dtype: mx.Dtype) -> None:
    maxima = mx.array([1.0, -mx.inf, mx.nan, mx.inf, -2.5], dtype)
    found = drawing._mark(mx.array([7, 8, 9, 10, NO_TOKEN], mx.int32), maxima)
    expected = drawing._usable_compiled(mx.array([7, 8, 9, 10, NO_TOKEN], mx.int32), maxima)
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]
    assert found[0].tolist() == [7, *[NO_TOKEN] * 4]


def test_warming_up_is_for_logits_as_they_are_and_adjusted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(drawing, "verdict", lambda *asking: asked.append(asking))
    Sampler(ODD, 4, ()).warm_up(mx.bfloat16)
    assert asked == [(mx.bfloat16, ODD), (mx.float32, ODD)]


def test_without_a_gpu_there_is_no_kernel() -> None:
    assert drawing.verdict(mx.int32, ODD) is not None
    logits = mx.random.normal((2, ODD), key=mx.random.key(7))
    draws = planned(SamplingParams(), SamplingParams())
    assert drawing.by_functions(logits, draws, keys_of(draws), Staging()).shape == (2,)
