"""Gemma 4's drafter: its files, what it drafts, and unchanged outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4
from mlx_lm.models.cache import KVCache

import modelpack
from modelpack.errors import ModelpackError
from modelpack.operations.drafters import package_drafter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models import LoadedModel, ModelFiles
from modelpack_engine.models.assistant import (
    AssistantHead,
    load_assistant,
    read_assistant_config,
)
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request import EngineRequest
from modelpack_engine.runner import kv_cache_size, model_runner
from modelpack_engine.runner.model_runner import make_runner
from modelpack_engine.speculation import acceptance
from modelpack_engine.speculation.assistant import AssistantProposer
from modelpack_engine.speculation.ngram import NgramProposer
from modelpack_server.stored_models import open_model, with_drafter
from tests.engine.serving.tiny import VOCAB, tiny_loaded, tiny_tokenizer
from tests.engine.speculation.test_draft import LONG, PROMPTS, ask_all
from tests.engine.speculation.test_same_output import check_same
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import COMMON, Configuration

pytestmark = pytest.mark.long

#: Large models have a dense output layer, small ones share keys between layers and score clusters.
KINDS = ["dense", pytest.param("clusters", marks=pytest.mark.long)]
ROPE = {
    "full_attention": {
        "partial_rotary_factor": 0.5, "rope_theta": 1000000.0, "rope_type": "proportional",
    },
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip


def full_rope(**changed: Any) -> dict[str, Any]:
    return ROPE | {"full_attention": ROPE["full_attention"] | changed}


def target_configuration(kind: str) -> Configuration:
    """Return a Gemma 4 of four layers, two sliding and two full."""
    name = "shared keys" if kind == "clusters" else ""
    [found] = [c for c in CATALOGUE if c.architecture == "gemma4_text" and c.name == name]
    sizes = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "rope_parameters": ROPE}
    return replace(found, args={**found.args, **sizes})


def target(kind: str, *, markov: bool = False) -> Any:
    """Return a model; with `markov`, the next token depends on the last token only."""
    model: Any = target_configuration(kind).build()
    if markov:
        silence(model.layers)
    return model


def silence(layers: list[Any]) -> None:
    """Make all layers add nothing to the residual."""
    for layer in layers:
        layer.layer_scalar = mx.ones((1,))
        for name, norm in layer.named_modules():
            if name in SILENCED and norm is not None:
                norm.weight = mx.zeros_like(norm.weight)


SILENCED = ("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm")


def published(kind: str, text: Mapping[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """Return the config.json of a drafter for `target(kind)`; None removes a field."""
    args = target_configuration(kind).args
    layers = {
        "model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 3,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "global_head_dim": args["global_head_dim"], "vocab_size": VOCAB,
        "sliding_window": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "enable_moe_block": False,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": ROPE, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    clusters = {
        "use_ordered_embeddings": True, "num_centroids": VOCAB, "centroid_intermediate_top_k": 40,
    }  # fmt: skip
    found = {
        "architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
        "backbone_hidden_size": 64, "text_config": layers | dict(text or {}),
        "use_ordered_embeddings": False, **(clusters if kind == "clusters" else {}), **changed,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def random_head(kind: str) -> AssistantHead:
    head = AssistantHead(read_assistant_config(published(kind)))
    mx.random.seed(5)
    flat: Any = tree_flatten(head.parameters())
    noise = [(name, mx.random.normal(value.shape)) for name, value in flat]
    weights = [
        (name, 1 + 0.2 * n if n.ndim == 1 else 1.6 * n / n.shape[-1] ** 0.5) for name, n in noise
    ]
    head.load_weights([(name, w) for name, w in weights if name != ORDERING], strict=False)
    if kind == "clusters":
        head.masked_embedding.token_ordering = 3 * mx.arange(VOCAB) % VOCAB
    mx.eval(head.parameters())
    return head


ORDERING = "masked_embedding.token_ordering"


def markov_head(model: Any, kind: str) -> AssistantHead:
    """Return the drafter that computes what a Markov model computes from the newest token."""
    head = random_head(kind)
    size = head.config.text.hidden_size
    head.pre_projection.weight = mx.concatenate([mx.eye(size), mx.zeros((size, size))], axis=1)
    silence(head.model.layers)
    head.model.norm.weight = model.model.norm.weight
    head.model.embed_tokens.weight = model.model.embed_tokens.weight
    if kind == "clusters":
        clusters = head.masked_embedding
        clusters.centroids.weight = model.model.embed_tokens.weight[clusters.token_ordering]
    mx.eval(head.parameters())
    return head


def loaded_from(model: Any) -> LoadedModel:
    config = {"model_type": "gemma4_text", "vocab_size": VOCAB}
    return replace(tiny_loaded(), model=model, config=config, architecture="gemma4_text")


def engine_of(model: Any, head: AssistantHead | None, **given: Any) -> Engine:
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 32, "backend": "mlx",
        "speculative_disable_by_batch_size": 8, "self_test": False,
        "draft_model": None if head is None else "head",
    }  # fmt: skip
    return Engine(loaded_from(model), EngineConfig(**common | given), draft=head)


@cache
def plain(kind: str, *, markov: bool = False) -> list[list[RequestEvent]]:
    return ask_all(engine_of(target(kind, markov=markov), None))


@pytest.fixture(params=["exact", pytest.param("graphs", marks=pytest.mark.long)])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run steps on a CPU as there, or as on a GPU: pools by token, padded, by graphs of shapes.

    MLX would compile these graphs by the C++ compiler for minutes: they are only called.
    """
    if request.param == "graphs":
        as_on_gpu = partial(make_runner, exact=False, compiled=True)
        monkeypatch.setattr(model_runner, "make_runner", as_on_gpu)
        monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
        mx.disable_compile()
    plain.cache_clear()  # logits of other shapes differ in their last digits
    yield
    plain.cache_clear()
    mx.enable_compile()


def reference(model: Any, kind: str, head: AssistantHead) -> Any:
    """Return mlx-vlm's drafter with the weights of `head`, bound to the model."""
    from mlx_vlm.speculative.drafters.gemma4_assistant.config import Gemma4AssistantConfig
    from mlx_vlm.speculative.drafters.gemma4_assistant.gemma4_assistant import (
        Gemma4AssistantDraftModel,
    )

    drafter = Gemma4AssistantDraftModel(Gemma4AssistantConfig.from_dict(published(kind)))
    drafter.load_weights(tree_flatten(head.parameters()))
    return drafter.bind(model)


def expected_drafts(model: Any, drafter: Any, tokens: list[int]) -> list[int]:
    """Return what mlx-vlm's drafter drafts after `tokens`, with mlx-lm's model run from the start.

    The keys are those of all tokens but the newest, whose state the model does not have.
    """
    inner, count = model.model, len(tokens) - 1
    caches = [KVCache() for _ in model.make_cache()]
    states = inner(mx.array([tokens[:-1]]), cache=caches)
    owners = zip(inner.layers, inner.previous_kvs, strict=True)
    keys = {
        layer.layer_type: (caches[owner].keys[:, :, :count], caches[owner].values[:, :, :count])
        for layer, owner in owners
    }
    drafter.set_shared_kv(keys, count, position=count - 1, kv_valid_len=count)
    found = drafter.draft_block(tokens[-1], states[:, -1:], None, 4, argmax)
    drafted: list[int] = found[0].tolist()
    return drafted


def argmax(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def noted_drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Have the drafter draft always, and note the tokens before and those that it drafts."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    seen: list[tuple[list[int], list[int]]] = []
    propose = AssistantProposer.propose

    def noted(self: AssistantProposer, lengths: Mapping[Sequence, int]) -> Any:
        found = propose(self, lengths)
        seen.extend((s.token_ids(0, s.num_known_tokens), t) for s, t in found.items())
        return found

    monkeypatch.setattr(AssistantProposer, "propose", noted)
    return seen


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("kind", ["dense", "clusters"])
def test_it_drafts_what_mlx_vlm_drafts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was rejected before, and also where the prefix cache has the prompts."""
    seen = noted_drafts(monkeypatch)
    model, head = target(kind), random_head(kind)
    made = engine_of(model, head)
    for _ in range(2):
        made.generate(PROMPTS[:2], replace(LONG, max_tokens=12))
    assert len(seen) > 20
    fresh = target(kind)
    drafter = reference(fresh, kind, random_head(kind))
    different = {tuple(drafted) for _, drafted in seen}
    assert len(different) > 3, "the drafts say nothing"
    for tokens, drafted in seen:
        assert drafted == expected_drafts(fresh, drafter, tokens)[: len(drafted)]


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_same_with_any_drafter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    made = engine_of(target(kind), random_head(kind))
    for found, expected in zip(ask_all(made), plain(kind), strict=True):
        check_same(expected, found)
    assert made.stats().proposed_tokens > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_that_knows_the_model_is_accepted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    model = target(kind, markov=True)
    made = engine_of(model, markov_head(model, kind), speculative_min_acceptance=0.01)
    for found, expected in zip(ask_all(made), plain(kind, markov=True), strict=True):
        check_same(expected, found)
    sampled = made.stats()
    made.generate([PROMPTS[0]], LONG)
    proposed = made.stats().proposed_tokens - sampled.proposed_tokens
    accepted = made.stats().accepted_tokens - sampled.accepted_tokens
    assert accepted >= 0.9 * proposed > 20


def test_the_text_model_of_one_that_reads_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = noted_drafts(monkeypatch)
    text = {**COMMON, **target_configuration("dense").args, "model_type": "gemma4_text"}
    whole = {"model_type": "gemma4", "text_config": text, "vocab_size": VOCAB}
    model = gemma4.Model(gemma4.ModelArgs.from_dict(whole))
    model.language_model.update(target("dense").parameters())
    engine_of(model, random_head("dense")).generate(PROMPTS[:1], replace(LONG, max_tokens=12))
    fresh = target("dense")
    drafter = reference(fresh, "dense", random_head("dense"))
    assert seen
    for tokens, drafted in seen:
        assert drafted == expected_drafts(fresh, drafter, tokens)[: len(drafted)]


def test_improbable_tokens_are_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = noted_drafts(monkeypatch)
    made = engine_of(target("dense"), random_head("dense"), speculative_min_acceptance=1.0)
    made.generate([PROMPTS[0]], LONG)
    assert not seen


def test_no_drafts_of_a_batch_that_was_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of a step that was not recorded are missing, and older ones are not used."""
    seen = noted_drafts(monkeypatch)
    made = engine_of(target("dense"), random_head("dense"), speculative_disable_by_batch_size=1)
    for number, count in enumerate((20, 7, 13)):
        params = replace(LONG, max_tokens=count)
        made.add_request(str(number), EngineRequest(PROMPTS[number], params))
    while made.has_work:
        made.step()
    fresh = target("dense")
    drafter = reference(fresh, "dense", random_head("dense"))
    assert seen
    for tokens, drafted in seen:
        assert drafted == expected_drafts(fresh, drafter, tokens)[: len(drafted)]


# Files


def write_drafter(
    directory: Path, kind: str = "dense", tensors: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None, **changed: Any,
) -> ModelFiles:  # fmt: skip
    """Write a drafter as published ones are; None in `tensors` removes one."""
    flat: Any = tree_flatten(random_head(kind).parameters())
    arrays = {**dict(flat), **(tensors or {})}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    (directory / "config.json").write_text(json.dumps(published(kind, text, **changed)))
    return ModelFiles.from_directory(directory)


def write_target(directory: Path, kind: str) -> Path:
    flat: Any = tree_flatten(target(kind).parameters())
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), dict(flat))
    config = {**COMMON, **target_configuration(kind).args, "model_type": "gemma4_text"}
    del config["rope_theta"]
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return directory


@pytest.mark.parametrize("kind", ["dense", "clusters"])
def test_it_is_read_from_published_files(kind: str, tmp_path: Path) -> None:
    """Published files may have the output layer a second time, and 64-bit token ids."""
    expected: Any = dict(tree_flatten(random_head(kind).parameters()))
    more = {"lm_head.weight": expected["model.embed_tokens.weight"]}
    if kind == "clusters":
        more[ORDERING] = expected[ORDERING].astype(mx.int64)
    head = load_assistant(write_drafter(tmp_path, kind, more))
    found: Any = dict(tree_flatten(head.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], array).item() for name, array in expected.items())
    assert head.weight_bytes == sum(array.nbytes for array in expected.values())


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    weight = mx.random.normal((VOCAB, 64))
    files = write_drafter(tmp_path, tensors={"lm_head.weight": weight}, tie_word_embeddings=False)
    head, hidden = load_assistant(files), mx.random.normal((2, 64))
    tokens, probabilities = head.best(hidden)
    assert tokens.tolist() == mx.argmax(hidden @ weight.T, axis=-1).tolist()
    likely = mx.softmax(hidden @ weight.T, axis=-1).max(axis=-1)
    assert mx.allclose(probabilities, likely).item()


@pytest.mark.parametrize("kind", ["dense", "clusters"])
def test_the_store_has_it_beside_its_model(kind: str, tmp_path: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    files = write_target(tmp_path / "files", kind)
    modelpack.package("ai/gemma", modelpack.PackageRequest(safetensors_dir=files), store=store)
    write_drafter(tmp_path / "drafter", kind)
    config = EngineConfig(
        device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False, backend="mlx"
    )
    opened = open_model("ai/gemma", pull=False, store=store)
    without = opened.engine(config)
    made = package_drafter("ai/gemma:drafter", tmp_path / "drafter", "ai/gemma", store=store)
    assert made.manifest.annotations["org.modelpack.drafter"] == "gemma4-assistant"
    assert with_drafter(config, opened.model, store, None).draft_model == str(made.digest)
    engine = opened.engine(config)
    assert isinstance(engine, Engine)
    assert engine.weight_bytes > without.weight_bytes
    params = replace(LONG, max_tokens=20)
    for one, other in zip(
        engine.generate(PROMPTS[:2], params), without.generate(PROMPTS[:2], params), strict=True
    ):
        assert sum((e.token_ids for e in one), ()) == sum((e.token_ids for e in other), ())
    assert engine.stats().num_proposals > 0
    with pytest.raises(ModelLoadError, match=r"is a drafter \(gemma4-assistant\), which cannot"):
        open_model("ai/gemma:drafter", pull=False, store=store).engine(config)
    with pytest.raises(EngineError, match="method eagle3: the draft model is no EAGLE-3 head"):
        opened.engine(replace(config, speculative_method="eagle3"))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"pre_projection.weight": None}, "has no tensor pre_projection.weight"),
        ({"model.layers.2.layer_scalar": None}, "has no tensor model.layers.2.layer_scalar"),
        (
            {"pre_projection.weight": mx.zeros((64, 64))},
            r"pre_projection.weight is \[64, 64\], expected \[64, 128\]",
        ),
        (
            {"pre_projection.weight": mx.zeros((64, 128), mx.uint8)},
            "pre_projection.weight is stored as uint8, expected floats",
        ),
        (
            {"model.layers.0.self_attn.k_proj.weight": mx.zeros((32, 64))},
            "has an unknown tensor: model.layers.0.self_attn.k_proj.weight",
        ),
        ({ORDERING: mx.full((VOCAB,), VOCAB, mx.int64)}, "token_ordering names tokens outside"),
        ({ORDERING: mx.full((VOCAB,), -1, mx.int64)}, "token_ordering names tokens outside"),
        ({ORDERING: mx.zeros((VOCAB,))}, "token_ordering has no integers"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Any], says: str, tmp_path: Path) -> None:
    kind = "clusters" if ORDERING in tensors else "dense"
    with pytest.raises(ModelLoadError, match=says):
        load_assistant(write_drafter(tmp_path, kind, tensors))


@pytest.mark.parametrize(
    ("text", "changed", "says"),
    [
        ({}, {"architectures": None, "model_type": "gemma4"}, "is not that of Gemma 4's drafter"),
        ({}, {"text_config": [1]}, "text_config is not an object"),
        ({}, {"backbone_hidden_size": None}, "backbone_hidden_size is 'None', expected a size"),
        ({}, {"backbone_hidden_size": 2**40}, "backbone_hidden_size is '1099511627776'"),
        ({"hidden_size": 0}, {}, "hidden_size is '0', expected a size"),
        ({"num_attention_heads": "4"}, {}, "num_attention_heads is '4', expected a size"),
        ({"num_hidden_layers": 2}, {}, "layer_types is .*, expected 2 of full_attention"),
        ({"layer_types": ["linear"] * 3}, {}, "layer_types is"),
        ({"layer_types": None}, {}, "layer_types is None"),
        ({"enable_moe_block": True}, {}, "enable_moe_block is True"),
        ({"hidden_size_per_layer_input": 8}, {}, "hidden_size_per_layer_input is 8"),
        (
            {"num_hidden_layers": 65, "layer_types": ["full_attention"] * 65}, {},
            "65 layers, Gemma 4's drafter has at most 64",
        ),
        ({"rope_parameters": [1]}, {}, "text_config describes no layers"),
        ({"num_attention_heads": 2**20, "head_dim": 2**20}, {}, "text_config describes no layers"),
        (
            {"rope_parameters": full_rope(rope_type="linear", factor=0)}, {},
            "text_config describes no layers",
        ),
        ({"rope_parameters": full_rope(rope_theta=10**400)}, {}, "text_config describes no layers"),
        ({}, {"use_ordered_embeddings": True, "num_centroids": 2}, "cannot divide 257 tokens"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(
    text: dict[str, Any], changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=says):
        load_assistant(write_drafter(tmp_path, text=text, **changed))


@pytest.mark.parametrize("length", [0, 7, 60, 5000])
def test_a_truncated_file(length: int, tmp_path: Path) -> None:
    write_drafter(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    with pytest.raises(ModelpackError):
        load_assistant(ModelFiles.from_directory(tmp_path))


@pytest.mark.parametrize(
    ("text", "changed", "says"),
    [
        ({}, {"backbone_hidden_size": 32}, "hidden states of 32, this model has 64"),
        ({"vocab_size": 300}, {}, "a vocabulary of 300 tokens, this model has 257"),
        ({"head_dim": 8}, {}, "4 heads of 8 for sliding_attention, the model has keys of 2 heads"),
        ({"num_attention_heads": 3}, {}, "3 heads of 16 for sliding_attention"),
    ],
)
def test_a_drafter_of_another_model(
    text: dict[str, Any], changed: dict[str, Any], says: str
) -> None:
    head = AssistantHead(read_assistant_config(published("dense", text, **changed)))
    with pytest.raises(ModelLoadError, match=says) as caught:
        engine_of(target("dense"), head)
    assert caught.value.hint


def test_another_architecture() -> None:
    head = random_head("dense")
    config = EngineConfig(device="cpu", self_test=False, backend="mlx", draft_model="head")
    with pytest.raises(ModelLoadError, match="needs Gemma 4, the model is LlamaModel"):
        Engine(tiny_loaded(), config, draft=head)
