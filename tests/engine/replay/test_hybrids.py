"""Steps of models with recurrent layers that the driver launches as graphs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from modelpack.formats.adapter import read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.runner import replay
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.paged import Layout
from modelpack_engine.runner.recurrent import SlotSnapshot, StateRows
from modelpack_engine.runner.replay import Replays
from modelpack_engine.speculation.eagle import EagleProposer
from modelpack_engine.speculation.ngram import NgramProposer
from tests.adapters import write_peft
from tests.engine.replay.conftest import FakeDriver, no_driver
from tests.engine.replay.test_replay import (
    SCENARIOS,
    KernelEngine,
    Scenario,
    Tokens,
    add,
    batches,
    prompts_between,
    step,
)
from tests.engine.serving.tiny import VOCAB, tiny_tokenizer
from tests.engine.speculation.test_eagle import random_head
from tests.engine.zoo.dense import NO_BIAS
from tests.engine.zoo.recurrent import MAMBA2

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
GATED_DELTA: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
}
MODELS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        **NO_BIAS,
        **MAMBA2,
        "hybrid_override_pattern": ["M", "-", "*", "M"],
    },
    "qwen3_5": GATED_DELTA,
    "qwen3_next": {
        **GATED_DELTA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}


def make_engine(name: str, head: EagleHead | None = None, **given: Any) -> KernelEngine:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **COMMON, **MODELS[name]}
    mx.random.seed(1)
    if name == "qwen3_5":
        config = {"model_type": name, "text_config": config}
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    # On a CPU, MLX multiplies by experts in 4 bits or in float32.
    nn.quantize(model, 32, 4, class_predicate=lambda _, module: type(module) is SwitchLinear)
    mx.eval(model.parameters())
    loaded = LoadedModel(model, {"vocab_size": VOCAB}, tiny_tokenizer(), name, 256, (), 0)
    settings = EngineConfig(kv_cache_bytes=1 << 20, max_num_seqs=4, **given)
    return KernelEngine(loaded, settings, draft=head)


def by_mlx(scenario: Scenario, name: str, **given: Any) -> Tokens:
    """Return the tokens without a driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "find_driver", no_driver)
        engine = make_engine(name, **given)
        assert engine._replays is None
        return scenario(engine)


@pytest.mark.parametrize(
    ("name", "scenario", "launches"),
    [
        ("nemotron_h", "batches", 7),
        pytest.param("qwen3_5", "batches", 7, marks=pytest.mark.long),
        pytest.param("qwen3_next", "batches", 7, marks=pytest.mark.long),
        pytest.param("nemotron_h", "drawn", 7, marks=pytest.mark.long),
        pytest.param("nemotron_h", "in turn", 18, marks=pytest.mark.long),
        pytest.param("qwen3_5", "in turn", 18, marks=pytest.mark.long),
    ],
)
def test_the_same_tokens(name: str, scenario: str, launches: int, driver: FakeDriver) -> None:
    wanted = by_mlx(SCENARIOS[scenario], name)
    assert len(set(map(tuple, wanted.values()))) > 2
    engine = make_engine(name)
    assert SCENARIOS[scenario](engine) == wanted
    assert driver.num_launches == launches
    engine.close()
    assert driver.graphs == {}


def conversation(engine: KernelEngine, **params: Any) -> Tokens:
    """Prompts that continue from the snapshots of others, beside rows that decode."""
    found: Tokens = {}
    start = [7 * i % 200 for i in range(70)]
    for number in range(8):
        add(engine, f"{number}", [*start, number, 3], 6, **params, seed=number)
        add(engine, f"{number} b", [*start[: 3 + number % 2], number], 3, **params, seed=number)
        step(engine, found, 3)
    return step(engine, found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "scenario", [prompts_between, conversation], ids=["prompts", "conversation"]
)
@pytest.mark.long
def test_prompts_within_graphs(
    name: str, scenario: Any, driver: FakeDriver, launched: list[Layout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ModelLayout, "num_snapshots", 6)
    wanted = by_mlx(scenario, name)
    engine = make_engine(name)
    assert scenario(engine) == wanted
    with_prompts = [layout for layout in launched if layout.tiles]
    assert len(with_prompts) > 3
    assert len(launched) > len(with_prompts)
    bodies = {call.note.body for calls in driver.graphs.values() for call in calls}
    experts = {"route", "dispatch", "experts", "combine"}
    assert bodies & experts == (experts if name == "qwen3_next" else set())
    if scenario is conversation:
        snapshots = engine._runner.snapshots
        assert snapshots is not None
        assert {type(state) for _, state in snapshots.items()} == {SlotSnapshot}
        assert engine.stats().cached_tokens > 100


@pytest.mark.long
def test_graphs_are_dropped_when_the_states_move(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More sequences than before need larger arrays: graphs read and write the old ones."""

    def one_and_more(engine: Engine) -> Tokens:
        add(engine, "one", [1, 2, 3], 24)
        found = step(engine, {}, 8)
        for name in ("two", "three"):
            add(engine, name, [9, 8, 7], 4)
        return step(engine, found)

    wanted = by_mlx(one_and_more, "nemotron_h")
    engine = make_engine("nemotron_h")
    found = one_and_more(engine)
    assert found == wanted
    assert min(driver.graphs) > 1  # the first one was dropped
    monkeypatch.setattr(Replays, "forget", lambda self: None)
    assert one_and_more(make_engine("nemotron_h")) != wanted


@pytest.mark.long
def test_a_step_that_runs_again_does_not_read_what_it_wrote(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is recorded runs three times, so states are not replaced where they are."""
    wanted = by_mlx(batches, "nemotron_h")
    segments = StateRows.segments

    def in_place(self: StateRows, *given: Any) -> Any:
        runs, owners = segments(self, *given)
        for run in runs:
            if run[0] >= 0:
                run[5] = run[0]
        self._next_rows = (
            dict(self.rows)
            | {seq_id: int(runs[row, 5]) for row, seq_id in enumerate(given[0].decode_seq_ids)}
            | {chunk.seq_id: self._next_rows[chunk.seq_id] for chunk in given[0].chunks}
        )
        return runs, owners

    monkeypatch.setattr(StateRows, "segments", in_place)
    assert by_mlx(batches, "nemotron_h") == wanted
    assert batches(make_engine("nemotron_h")) != wanted


@pytest.mark.long
def test_proposals_with_states(launched: list[Layout], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of a proposal has a state of its own, from which the next step continues."""
    prompts = {"one": [5, 6, 7, 5], "two": [9, 8, 9, 8, 9]}

    def scenario(engine: Engine) -> Tokens:
        for name, prompt in prompts.items():
            add(engine, name, prompt, 60)
        return step(engine, {})

    wanted = by_mlx(scenario, "nemotron_h")

    def propose(self: NgramProposer, lengths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Propose three tokens now and then, of which the last or all are wrong."""
        found = {}
        for sequence in lengths:
            name = next(n for n, prompt in prompts.items() if sequence.prompt_token_ids == prompt)
            done = sequence.num_known_tokens - len(prompts[name])
            if done % 5 and done % 7:
                right = wanted[name][done : done + 3]
                found[sequence] = [*right[:2], 1] if done % 2 else [right[0] + 1, 2, 3]
        return found

    monkeypatch.setattr(NgramProposer, "propose", propose)
    monkeypatch.setattr(NgramProposer, "expects", lambda self, sequences: True)
    engine = make_engine("nemotron_h", speculative_method="ngram", num_speculative_tokens=3)
    assert scenario(engine) == wanted
    assert 0 < engine.stats().accepted_tokens < engine.stats().proposed_tokens
    assert any(layout.decode > 2 for layout in launched)


def test_no_draft_is_prepared_for_a_graph_that_has_none(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recurrent models verify proposals in steps that MLX launches."""
    asked: list[object] = []
    monkeypatch.setattr(EagleProposer, "draft_within", lambda *given, **more: asked.append(given))
    engine = make_engine(
        "nemotron_h",
        head=random_head(num_heads=2, num_kv_heads=1, head_dim=32),
        draft_model="head", speculative_method="eagle3", num_speculative_tokens=4,
    )  # fmt: skip
    assert engine._replays is not None
    add(engine, "one", [1, 2, 3], 12)
    assert len(step(engine, {})["one"]) == 12
    assert not asked


@pytest.mark.long
def test_experts_stay_in_graphs_with_adapters_of_other_layers(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replay, "_SETTLED_STEPS", 0)
    targets = {f"model.layers.{index}.self_attn.o_proj": (64, 64) for index in (1, 3)}
    read = read_adapter(write_peft(tmp_path, targets, rank=3, seed=1, size=2))

    def scenario(engine: Engine) -> Tokens:
        engine.add_adapter("a", read, "a")
        for name, adapter in (("with", "a"), ("without", None)):
            add(engine, name, [1, 2, 3], 10, adapter)
        return step(engine, {})

    wanted = by_mlx(scenario, "qwen3_next", max_loras=1)
    assert wanted["with"] != wanted["without"]
    assert scenario(make_engine("qwen3_next", max_loras=1)) == wanted
    assert driver.num_launches > 4
    recorded = [{call.note.body for call in calls} for calls in driver.graphs.values()]
    assert any({"adapters_norm", "route", "dots"} <= bodies for bodies in recorded)
