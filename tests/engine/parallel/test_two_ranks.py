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
from tests.adapters import write_mlx, write_peft
from tests.engine.adapters.test_zoo import linears
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


def test_adapters_of_requests(tmp_path: Path) -> None:
    """Two ranks answer as one device: mixed, unloaded while used, evicted, refused."""
    model = tiny_loaded().model
    directory = tmp_path / "adapters"
    playing.write_adapters(directory, model)
    write_peft(directory / "large", linears(model), rank=7, size=0.3)
    write_peft(directory / "wide", {"model.layers.0.self_attn.o_proj": (64, 32)})
    write_mlx(directory / "embedded", {"model.embed_tokens": (64, 257)}, rank=3, size=0.5)
    outcome, found = run_ranks("play_adapters", 2, tmp_path / "answers.json", str(directory))
    assert outcome.code == 0, outcome
    no_memory = "rank 1: no memory for it"
    assert found.pop("refused by rank 1") == [no_memory, no_memory]
    assert found.pop("ends") == {"large": "error", "two": "length"}
    engine = Engine(tiny_loaded(), playing.config(max_loras=2))
    alone = json.loads(json.dumps(playing.run_adapters(engine, directory)))
    assert "a weight of shape [64, 32], but the model has [64, 64]" in alone["refused"]
    assert found == alone


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
    adapters = tmp_path / "adapters"
    for name in names:
        playing.write_adapters(adapters / name, load(f"zoo {name}", None).model)
    out = tmp_path / "answers.json"
    outcome, found = run_ranks("play_zoo", 2, out, str(adapters), *names, MLX_DISABLE_COMPILE="1")
    assert outcome.code == 0, outcome
    different = []
    for name in names:
        if name in REFUSED:
            assert REFUSED[name] in found[name]
            continue
        engine = Engine(load(f"zoo {name}", None), playing.zoo_config(name))
        alone = [
            playing.run_greedy(engine),
            json.loads(json.dumps(playing.run_adapted(engine, adapters / name))),
            engine._runner.tier,
        ]
        engine.close()
        if found[name] != alone:
            different.append((name, found[name], alone))
    assert not different
