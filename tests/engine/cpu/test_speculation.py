"""Proposals are verified by the library for CPUs, which computes their rows as a chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.cpu import CpuRunner
from tests.engine.loaders.tiny_models import TINY_MODELS
from tests.engine.speculation.oracle import Oracle, speculate

pytestmark = pytest.mark.usefixtures("built")
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=0.3, seed=5)])
def test_proposals_change_no_output(name: str, params: SamplingParams, tmp_path: Path) -> None:
    loaded = load(
        ModelFiles.from_directory(TINY_MODELS[name].write(tmp_path / "m.gguf")),
        device="cpu", packed=True,
    )  # fmt: skip
    prompts = [[3, 4, 5, 6, 7, 8] * 3, [9, 10, 11, 9, 10]]
    config = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=128, self_test=False)
    without = outputs(Engine(loaded, config), prompts, params)
    engine = Engine(loaded, config)
    assert isinstance(engine._runner, CpuRunner)
    answers = {(f"generate-{n}", 0): tokens for n, tokens in enumerate(without)}
    speculate(engine, Oracle(answers, wrong=0.2), num_tokens=7)
    assert outputs(engine, prompts, params) == without
    stats = engine.stats()
    assert 20 < stats.accepted_tokens < stats.proposed_tokens
    assert stats.num_steps < 40
    looking = Engine(loaded, replace(config, speculative_method="ngram"))
    assert outputs(looking, prompts, params) == without


def outputs(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Return the tokens of each prompt's output."""
    return [
        [token for event in events for token in event.token_ids]
        for events in engine.generate(prompts, params)
    ]
