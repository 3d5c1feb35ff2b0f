"""Recurrent layers compute prompts of different lengths together, and decode rows beside them."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.patches import recurrent
from modelpack_engine.patches.recurrent import KNOWN
from modelpack_engine.runner.adapted import Prompts
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.driving import Setting
from tests.engine.zoo.specimen import make_specimen

pytestmark = pytest.mark.long

NAMES = sorted({module for (module, _), how in KNOWN.items() if how.padded} - {"lfm2_moe"})
MODELS = {configuration.id: configuration for configuration in CATALOGUE}


def batch(lengths: list[int], decode: int, padding: int = 0) -> StepBatch:
    """A step of chunks, with rows of padding after each."""
    chunks, row = [], decode
    for seq_id, length in enumerate(lengths):
        chunks.append(Chunk(row, length, length + padding, length, (1,), seq_id))
        row += length + padding
    return StepBatch(
        [0] * row, [0] * row, [0] * row, (), decode, [[1]] * decode, [1] * decode, (),
        tuple(chunks), (), (),
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [[3, 5], [1, 9, 2, 8], [4, 4], [20, 1], [99, 60, 90, 99, 64]])
@pytest.mark.parametrize("padding", [0, 2])
def test_rows_come_back_in_order(lengths: list[int], padding: int) -> None:
    step = StepInputs(16, exact=True)
    step.begin(made := batch(lengths, 3, padding), [])
    prompts = Prompts(step)
    rows = mx.arange(made.num_rows)[:, None, None] * 10.0
    cut = [group.cut(rows) for group in prompts.groups]
    for group, array in zip(prompts.groups, cut, strict=True):
        assert array.shape[:2] == (len(group.indices), group.width)
        assert max(group.lengths) <= (2 if group.width <= 64 else 1) * min(group.lengths)
    found = np.array(prompts.join(cut))[:, 0, 0]
    for chunk in made.chunks:
        start = chunk.row - 3
        expected = range(10 * chunk.row, 10 * (chunk.row + chunk.length), 10)
        assert found[start : start + chunk.length].tolist() == list(expected)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_a_step_run_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts, in chunks and mixed with decode rows, get the tokens of mlx-lm."""
    seen: Counter[str] = Counter()
    real = Prompts.states

    def states(self: Prompts, views: list[ArraysCache]) -> list[ArraysCache]:
        seen["groups"] += len(self.groups)
        seen["chunks"] += sum(len(group.indices) for group in self.groups)
        seen["padded"] += sum(group.mask is not None for group in self.groups)
        seen["decode"] += bool(self.first)
        return real(self, views)

    monkeypatch.setattr(Prompts, "states", states)
    specimen = make_specimen(MODELS[name])
    for rows in (40, 24, 100):
        driver = specimen.drive(Setting(rows=rows))
        assert driver.tokens == specimen.reference.tokens
    assert seen["groups"] < seen["chunks"]
    assert min(seen["padded"], seen["decode"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_states_are_those_of_each_prompt_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name].build()
    runner = make_runner(model, num_blocks=16, exact=True, self_test=False)
    together = logits_of(runner)
    monkeypatch.setattr(recurrent, "KNOWN", {})
    recurrent._known.cache_clear()
    try:
        alone = logits_of(runner)
    finally:
        recurrent._known.cache_clear()
    np.testing.assert_allclose(together, alone, rtol=2e-3, atol=2e-4)


def logits_of(runner: ModelRunner) -> np.ndarray:
    """Run three prompts in two steps of chunks of different lengths; return the logits, stacked."""
    found = []
    done = [0, 0, 0]
    for lengths in ([5, 9, 7], [8, 4, 15]):
        chunks, sampled, row = list[Chunk](), list[int](), 0
        ids, positions, slots = list[int](), list[int](), list[int]()
        for seq_id, length in enumerate(lengths):
            start, stop = done[seq_id], done[seq_id] + length
            table = tuple(range(1 + 2 * seq_id, 3 + 2 * seq_id))
            chunks.append(Chunk(row, length, length, stop, table[: -(-stop // 16)], seq_id))
            ids += [(7 * i + 11 * seq_id) % 250 + 1 for i in range(start, stop)]
            positions += range(start, stop)
            slots += [table[i // 16] * 16 + i % 16 for i in range(start, stop)]
            row += length
            sampled.append(row - 1)
            done[seq_id] = stop
        step = StepBatch(
            ids, positions, slots, (), 0, [], [], (), tuple(chunks), tuple(sampled), ()
        )
        logits = runner.forward(step, mx.array(ids, mx.int32))
        mx.eval(logits, runner.pools())
        found.append(np.array(logits))
    runner.release([0, 1, 2])
    return np.stack(found)
