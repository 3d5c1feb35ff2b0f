"""With other options of scheduling, one architecture of each kind generates the same tokens.

test_answers.py runs the whole zoo with buckets and preemption.
"""

from __future__ import annotations

import pytest

from modelpack_engine.core.buckets import Buckets
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.driving import Setting
from tests.engine.zoo.specimen import NUM_TOKENS, Specimen, make_specimen

pytestmark = pytest.mark.long

#: One architecture of each tier and each common kind of attention, cache, state and experts.
KINDS = {
    "deepseek_v3",
    "gemma2",
    "gpt_oss",
    "llama",
    "llama: sliding windows",
    "mamba2",
    "nemotron_h",
    "qwen3_moe",
    "qwen3_next",
    "rwkv7",
}


@pytest.fixture(
    scope="module",
    params=[each for each in CATALOGUE if each.id in KINDS],
    ids=lambda each: each.id,
)
def specimen(request: pytest.FixtureRequest, uncompiled: None) -> Specimen:
    return make_specimen(request.param)


def test_the_kinds_are_in_the_zoo() -> None:
    assert {each.id for each in CATALOGUE} >= KINDS


def test_one_at_a_time(specimen: Specimen) -> None:
    driver = specimen.drive(Setting(max_num_seqs=1, prefix_cache=False, rows=64))
    assert driver.tokens == specimen.reference.tokens
    assert driver.scheduler.stats().num_mixed_steps == 0


def test_preemption(specimen: Specimen) -> None:
    driver = specimen.drive(Setting(blocks=7))
    assert driver.tokens == specimen.reference.tokens
    assert driver.scheduler.stats().num_preemptions > 0


def test_end_of_sequence_is_seen_late(specimen: Specimen) -> None:
    tokens = specimen.reference.tokens
    eos = tokens[1][NUM_TOKENS // 2]
    driver = specimen.drive(Setting(eos=frozenset([eos])))
    expected = [t[: t.index(eos) + 1] if eos in t else t for t in tokens]
    assert driver.tokens == expected
    assert driver.num_sampled > sum(map(len, expected)), "a step was under way when it was seen"


def test_bucketed_without_prefix_cache(specimen: Specimen) -> None:
    buckets = Buckets(rows=(4, 8), chunk=(8, 16), table_width=(2, 8))
    driver = specimen.drive(Setting(buckets=buckets, prefix_cache=False, exact=False, rows=32))
    assert driver.tokens == specimen.reference.tokens
    stats = driver.scheduler.stats()
    assert stats.num_mixed_steps >= 3
    assert stats.cached_tokens == 0
