"""Layers for multi-token prediction: their tensors, what they draft, and unchanged outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import modelpack
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.models.mtp import PREFIXES, MtpHead, load_mtp_head
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.speculation import eagle
from modelpack_engine.speculation.eagle import EagleProposer
from modelpack_engine.speculation.ngram import NgramProposer
from modelpack_server.stored_models import open_model
from tests.engine.serving.tiny import VOCAB, tiny_loaded, tiny_tokenizer
from tests.engine.speculation.test_draft import LONG, PROMPTS, ask_all
from tests.engine.speculation.test_same_output import check_same
from tests.engine.zoo.configuration import COMMON, Configuration

Arrays = dict[str, mx.array]
PREFIX = PREFIXES["mimo"]


def target(*, tied: bool = False, markov: bool = False) -> Any:
    """Return a MiMo model; with `markov`, the next token depends on the last token only."""
    args = {"vocab_size": VOCAB, "tie_word_embeddings": tied}
    model: Any = Configuration("mimo", args).build()
    if markov:
        for layer in model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight = mx.zeros_like(linear.weight)
    return model


def random_head(model: Any) -> MtpHead:
    head = MtpHead(model)
    mx.random.seed(5)
    flat: Any = tree_flatten(head.parameters())
    noise = [(name, value, mx.random.normal(value.shape)) for name, value in flat]
    head.load_weights(
        [(name, 1 + 0.1 * n if "norm" in name else n / v.shape[-1] ** 0.5) for name, v, n in noise]
    )
    mx.eval(head.parameters())
    return head


def markov_head(model: Any) -> MtpHead:
    """Return the head that computes what a Markov model computes from the next token."""
    head = MtpHead(model)
    size = model.args.hidden_size
    head.input_proj.weight = mx.concatenate([mx.zeros((size, size)), mx.eye(size)], axis=1)
    for linear in (head.self_attn.o_proj, head.mlp.down_proj):
        linear.weight = mx.zeros_like(linear.weight)
    head.final_layernorm.weight = model.model.norm.weight
    mx.eval(head.parameters())
    return head


def loaded_from(model: Any) -> LoadedModel:
    return replace(
        tiny_loaded(), model=model, config={"model_type": "mimo", "vocab_size": VOCAB},
        architecture="mimo",
    )  # fmt: skip


def engine_of(model: Any, head: MtpHead | None, **given: Any) -> Engine:
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 32, "backend": "mlx",
        "speculative_disable_by_batch_size": 8, "self_test": False,
        "speculative_method": "none" if head is None else "mtp",
    }  # fmt: skip
    return Engine(loaded_from(model), EngineConfig(**common | given), draft=head)


@cache
def plain(*, tied: bool = False, markov: bool = False) -> list[list[RequestEvent]]:
    return ask_all(engine_of(target(tied=tied, markov=markov), None))


def write(directory: Path, head: Arrays | None = None, **changed: Any) -> ModelFiles:
    """Write the model and its layer as published; `head` replaces the tensors of the layer."""
    model = target()
    if head is None:
        flat: Any = tree_flatten(random_head(model).parameters())
        head = {PREFIX + name: array for name, array in flat}
    flat = tree_flatten(model.parameters())
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(flat) | head)
    config = {
        **COMMON, "model_type": "mimo", "vocab_size": VOCAB, "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1, "architectures": ["MiMoForCausalLM"], **changed,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return ModelFiles.from_directory(directory)


@pytest.fixture(params=["exact", "bucketed"])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "bucketed":
        monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
        monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: True))


def expected_drafts(tokens: list[int], count: int) -> list[int]:
    """Return what the layer drafts after `tokens`, with mlx-lm's own blocks run from the start.

    It reads the model's state before the last norm, as in Xiaomi's own inference code.
    """
    model = target()
    head = random_head(model)
    block: Any = type(model.layers[0])(model.args)
    own = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    block.update({name: head[name] for name in own})
    states = model.model.embed_tokens(mx.array([tokens[:-1]]))
    for layer in model.layers:
        states = layer(states, "causal")
    ids, drafted = tokens[1:], list[int]()
    for _ in range(count):
        embedded = head.token_layernorm(model.model.embed_tokens(mx.array([ids])))
        both = mx.concatenate([head.hidden_layernorm(states), embedded], axis=-1)
        after = head.final_layernorm(block(head.input_proj(both), "causal"))
        best: Any = mx.argmax(model.lm_head(after)[0, -1]).item()
        drafted.append(best)
        ids = [*ids, best]
        states = mx.concatenate([states, after[:, -1:]], axis=1)
    return drafted


@pytest.mark.usefixtures("shapes")
def test_the_layer_drafts_from_the_models_own_hidden_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever was rejected before, the drafts are those of a layer that read the whole text."""
    monkeypatch.setattr(eagle, "_LEAST_ACCEPTED", -1.0)
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    seen: list[tuple[list[int], list[int]]] = []
    propose = EagleProposer.propose

    def noted(self: EagleProposer, lengths: Mapping[Sequence, int]) -> Any:
        found = propose(self, lengths)
        seen.extend((s.token_ids(0, s.num_known_tokens), t) for s, t in found.items())
        return found

    monkeypatch.setattr(EagleProposer, "propose", noted)
    model = target()
    made = engine_of(model, random_head(model), enable_prefix_caching=False)
    made.generate(PROMPTS[:2], replace(LONG, max_tokens=12))
    assert len(seen) > 10
    for tokens, drafted in seen:
        assert drafted == expected_drafts(tokens, len(drafted))


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("tied", [False, True])
def test_outputs_are_the_same_with_any_layer(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle, "_LEAST_ACCEPTED", -1.0)
    model = target(tied=tied)
    made = engine_of(model, random_head(model))
    for _ in range(2):  # the second time, the layer does not see the prompts' cached blocks
        for found, expected in zip(ask_all(made), plain(tied=tied), strict=True):
            check_same(expected, found)
    assert made.stats().proposed_tokens > 100


def test_a_layer_that_knows_the_model_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    model = target(markov=True)
    made = engine_of(model, markov_head(model), num_speculative_tokens=3)
    for found, expected in zip(ask_all(made), plain(markov=True), strict=True):
        check_same(expected, found)
    sampled = made.stats()
    made.generate([PROMPTS[0]], LONG)
    proposed = made.stats().proposed_tokens - sampled.proposed_tokens
    accepted = made.stats().accepted_tokens - sampled.accepted_tokens
    assert accepted >= 0.9 * proposed > 20


def test_a_layer_that_is_mostly_wrong_pauses() -> None:
    model = target()
    made = engine_of(model, random_head(model))
    made.generate([PROMPTS[0]], replace(LONG, max_tokens=100))
    assert 3 <= made.stats().num_proposals < 30


def test_a_stored_model_drafts_with_its_own_layer(tmp_path: Path) -> None:
    write(tmp_path / "files")
    store = modelpack.Store(tmp_path / "store")
    request = modelpack.PackageRequest(safetensors_dir=tmp_path / "files")
    modelpack.package("ai/mimo", request, store=store)
    config = EngineConfig(
        device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False,
        speculative_method="mtp",
    )  # fmt: skip
    opened = open_model("ai/mimo", pull=False, store=store)
    made = opened.engine(config)
    assert isinstance(made, Engine)
    params = replace(LONG, max_tokens=20)
    without = opened.engine(replace(config, speculative_method="none"))
    assert made.weight_bytes > without.weight_bytes
    for one, other in zip(
        made.generate(PROMPTS[:2], params), without.generate(PROMPTS[:2], params), strict=True
    ):
        assert [e.token_ids for e in one if e.token_ids] != []
        assert sum((e.token_ids for e in one), ()) == sum((e.token_ids for e in other), ())
    assert made.stats().num_proposals > 0


def tensors(**changed: mx.array | None) -> Arrays:
    flat: Any = tree_flatten(random_head(target()).parameters())
    both = dict(flat) | {name.replace("__", "."): array for name, array in changed.items()}
    return {PREFIX + name: array for name, array in both.items() if array is not None}


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({}, r"the files have no tensors model\.mtp_layers\.0\."),
        (tensors(input_proj__weight=None), "has no tensor model.mtp_layers.0.input_proj.weight"),
        (
            tensors(input_proj__weight=mx.zeros((64, 64))),
            r"input_proj.weight is \[64, 64\], expected \[64, 128\]",
        ),
        (
            tensors(input_proj__weight=mx.zeros((64, 128), mx.uint8)),
            "input_proj.weight is stored as uint8, expected floats",
        ),
    ],
)
def test_files_without_the_layer(tmp_path: Path, head: Arrays, says: str) -> None:
    files = write(tmp_path, head)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_mtp_head(files, load(files, device="cpu"))
    assert caught.value.hint or "expected" in says


def test_models_without_a_layer(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="layers of 'llama' are not supported") as caught:
        load_mtp_head(write(tmp_path), replace(tiny_loaded(), config={"model_type": "llama"}))
    assert caught.value.hint


def test_mtp_requires_the_layer() -> None:
    with pytest.raises(EngineError, match="layer for multi-token prediction is not loaded"):
        engine_of(target(), None, speculative_method="mtp")
