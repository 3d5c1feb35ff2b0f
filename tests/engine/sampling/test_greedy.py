"""The kernel chooses the same most likely tokens as MLX's functions, on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from modelpack_engine.kernels.sources import body_text
from modelpack_engine.request import SamplingParams
from modelpack_engine.sampling import sampler as sampling
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampler, SampleRow
from tests.engine.kernels.onhost import Host, emulated

pytestmark = pytest.mark.long


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, sampling.greedy_verdict) as found:
        yield found


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("vocab_size", [301, 1024, 5000])
def test_the_kernel_chooses_as_mlx_does(host: Host, dtype: mx.Dtype, vocab_size: int) -> None:
    assert sampling.greedy_verdict(dtype, vocab_size) is None
    assert {body for body, _ in host.calls} == {"greedy"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (value > top)", "if (value >= top)"),
        ("if (other > top || (other == top && place < at))", "if (other > top)"),
        ("if (!(value < infinity)) broken = 1;", "if (value == infinity) broken = 1;"),
        ("if (!(value < infinity)) broken = 1;", "if (value != value) broken = 1;"),
        ("broken == 0 && at < V", "broken == 0"),
        ("next[row] = best < 0 ? 0 : best", "next[row] = best"),
    ],
)
def test_a_wrong_kernel_is_not_used(host: Host, old: str, new: str) -> None:
    assert old in body_text("greedy")

    def edit(_: str, source: str) -> str:
        return source.replace(old, new)

    host.break_by(edit)
    assert "differ" in str(sampling.greedy_verdict(mx.float32, 1024))


def test_rows_without_changed_logits_are_chosen_by_the_kernel(host: Host) -> None:
    sampler = Sampler(1024, 4, ())
    for seq_id, bias in ((0, {}), (1, {}), (2, {5: 30.0})):
        sampler.add(seq_id, [1], SamplingParams(temperature=0, logit_bias=bias))
    logits = mx.zeros((2, 1024))
    logits[0, 9], logits[1, 3] = 1.0, mx.nan
    sampling.greedy_verdict(logits.dtype, 1024)
    host.calls.clear()
    sampled = sampler.sample(logits, [SampleRow(0, 1, 0), SampleRow(1, 1, 0)])
    assert sampled.token_ids.tolist() == [9, NO_TOKEN]
    assert sampled.next_ids.tolist() == [9, 0]
    assert [body for body, _ in host.calls] == ["greedy"]
    sampled = sampler.sample(logits[:1], [SampleRow(2, 1, 0)])
    assert sampled.token_ids.tolist() == [5]
    assert len(host.calls) == 1
