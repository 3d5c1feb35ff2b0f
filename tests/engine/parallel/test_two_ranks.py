"""Two local ranks on CPUs answer as one device does."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.engine import Engine
from tests.engine.parallel import playing
from tests.engine.parallel.rank_process import load
from tests.engine.parallel.ranks import run_ranks
from tests.engine.serving.tiny import tiny_loaded
from tests.engine.zoo.catalogue import CATALOGUE

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    outcome, found = run_ranks("play", 2, tmp_path_factory.mktemp("ranks") / "answers.json")
    assert outcome.code == 0, outcome
    return found


@pytest.fixture(scope="module")
def expected() -> Any:
    found = playing.play(lambda config: Engine(tiny_loaded(), config), 1)
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    "part",
    [
        "seeded",
        "choices",
        "logprobs",
        "prefix",
        "masked",
        "aborted",
        "preempted",
        "proposed",
        "end",
    ],
)
def test_two_ranks_answer_as_one_device(part: str, answers: Any, expected: Any) -> None:
    assert answers[part] == expected[part]


def test_what_does_not_fit_one_device_runs_on_two(answers: Any, expected: Any) -> None:
    assert expected["too large"] is True
    assert answers["too large"] is False


def test_rank_0_says_why_another_rank_cannot_load_and_goes_on(answers: Any) -> None:
    assert answers["refused"] == "rank 1: the disk is on fire (call somebody)"


@pytest.mark.weights
def test_real_weights_on_three_ranks(tmp_path: Path) -> None:
    """SmolLM2 from GGUF: three ranks can share its 9 attention heads and 3 key-value heads."""
    outcome, found = run_ranks("play_smollm2", 3, tmp_path / "answers.json")
    assert outcome.code == 0, outcome
    engine = Engine(load("smollm2", None), playing.config(max_model_len=256))
    assert found["texts"] == playing.run_texts(engine)
    assert "Paris" in found["texts"][0]
    # The embeddings, a fifth of the weights, are whole on every rank.
    assert found["bytes"] < 0.55 * engine.memory_bytes


def test_a_step_that_fails_on_one_rank_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome, found = run_ranks("raise_in_step", 2, tmp_path / "answers.json")
    assert outcome.code != 0
    assert found is None
    errors = capfd.readouterr().err
    assert "error: rank 0 of 2 failed: the sampler is broken" in errors
    assert "error: rank 0 ended" in errors


def shardable() -> list[str]:
    """The zoo's models that mlx-lm can divide."""
    found = []
    for configuration in CATALOGUE:
        module = importlib.import_module(f"mlx_lm.models.{configuration.architecture}")
        if hasattr(module.Model, "shard"):
            found.append(configuration.id)
    return found


#: Models of the zoo whose sizes mlx-lm cannot divide, and their errors.
REFUSED: dict[str, str] = {
    "qwen3_moe, 4 bits": "equal size",  # experts of 32, in groups of 32
}


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Disable fused kernels: g++ would compile them one by one, for most of the test's time."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("uncompiled")
def test_every_architecture_that_can_be_divided(tmp_path: Path) -> None:
    names = [*shardable(), "llama, 4 bits", "qwen3_moe, 4 bits", playing.WIDE]
    assert len(names) > 12
    outcome, found = run_ranks(
        "play_zoo", 2, tmp_path / "answers.json", *names, MLX_DISABLE_COMPILE="1"
    )
    assert outcome.code == 0, outcome
    different = []
    for name in names:
        if name in REFUSED:
            assert REFUSED[name] in found[name]
            continue
        engine = Engine(load(f"zoo {name}", None), playing.zoo_config(name))
        alone = [playing.run_greedy(engine), engine._runner.tier]
        engine._runner.undo()
        if found[name] != alone:
            different.append((name, found[name], alone))
    assert not different
