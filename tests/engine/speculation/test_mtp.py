"""Layers for multi-token prediction: their tensors, what they draft, and unchanged outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask

import modelpack
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.models.mtp import LAYOUTS, MtpHead, TextModel, load_mtp_head
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request import EngineRequest
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.model_layout import find_layout
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.speculation import acceptance
from modelpack_engine.speculation.eagle import EagleProposer
from modelpack_engine.speculation.head_runner import HeadRunner
from modelpack_engine.speculation.ngram import NgramProposer
from modelpack_engine.speculation.speculator import Speculator
from modelpack_server.stored_models import open_model
from tests.engine.serving.tiny import VOCAB, tiny_loaded, tiny_tokenizer
from tests.engine.speculation.test_draft import LONG, PROMPTS, ask_all
from tests.engine.speculation.test_same_output import check_same, tokens
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import COMMON, Configuration
from tests.engine.zoo.experts import ROUTED

pytestmark = pytest.mark.long

Arrays = dict[str, mx.array]
OTHERS = [
    "glm4_moe", "glm4_moe_lite", "mimo", "mimo_v2_flash", "nemotron_h", "qwen3_5", "qwen3_5_moe",
]  # fmt: skip
#: One latent, one hybrid; the others take longer than tests of every change may.
KINDS = ["deepseek_v3", "qwen3_next", *(pytest.param(k, marks=pytest.mark.long) for k in OTHERS)]


NEMOTRON = {
    **ROUTED, "hybrid_override_pattern": ["M", "E", "*", "E"], "topk_group": 1, "n_group": 1,
    "moe_shared_expert_intermediate_size": 48,
}  # fmt: skip


#: Fields of a kind of model that the zoo's has not, or has otherwise.
FIELDS: dict[str, dict[str, Any]] = {
    "nemotron_h": NEMOTRON,
    "mimo_v2_flash": {"attention_value_scale": 0.7},
}


def configuration(kind: str, *, tied: bool = False) -> Configuration:
    """Return the zoo's configuration of a kind of model, with this file's vocabulary."""
    found = next((c for c in CATALOGUE if c.architecture == kind), Configuration(kind))
    args = {**found.args, "vocab_size": VOCAB, "tie_word_embeddings": tied}
    return replace(found, args=args | FIELDS.get(kind, {}))


def target(kind: str, *, tied: bool = False, markov: bool = False) -> Any:
    """Return a model; with `markov`, the next token depends on the last token only."""
    model: Any = configuration(kind, tied=tied).build()
    if markov:
        silence(model)
    return model


def silence(module: Any) -> None:
    """Make all layers below `module` add nothing to the residual."""
    for name, part in module.named_modules():
        if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")):
            part.weight = mx.zeros_like(part.weight)


def random_head(model: Any, kind: str) -> MtpHead:
    head = MtpHead(model, LAYOUTS[kind])
    mx.random.seed(5)
    flat: Any = tree_flatten(head.parameters())
    noise = [(name, value, mx.random.normal(value.shape)) for name, value in flat]
    head.load_weights(
        [
            (name, 1 + 0.1 * n if "norm" in name else 1.6 * n / v.shape[-1] ** 0.5)
            for name, v, n in noise
        ]
    )
    mx.eval(head.parameters())
    return head


def markov_head(model: Any, kind: str) -> MtpHead:
    """Return the head that computes what a Markov model computes from the next token."""
    head = MtpHead(model, LAYOUTS[kind])
    text = TextModel.of(model)
    size = text.hidden_size
    parts = [mx.eye(size), mx.zeros((size, size))]
    if LAYOUTS[kind].state_first:
        parts.reverse()
    head.projection.weight = mx.concatenate(parts, axis=1)
    silence(head.block)
    head.norm.weight = text.norm.weight
    mx.eval(head.parameters())
    return head


def loaded_from(model: Any, kind: str) -> LoadedModel:
    return replace(
        tiny_loaded(), model=model, config={"model_type": kind, "vocab_size": VOCAB},
        architecture=kind,
    )  # fmt: skip


def engine_of(model: Any, kind: str, head: MtpHead | None, **given: Any) -> Engine:
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 32, "backend": "mlx",
        "speculative_disable_by_batch_size": 8, "self_test": False,
        "speculative_method": "none" if head is None else "mtp",
    }  # fmt: skip
    return Engine(loaded_from(model, kind), EngineConfig(**common | given), draft=head)


@cache
def plain(kind: str, *, tied: bool = False, markov: bool = False) -> list[list[RequestEvent]]:
    return ask_all(engine_of(target(kind, tied=tied, markov=markov), kind, None))


@pytest.fixture(params=["exact", pytest.param("bucketed", marks=pytest.mark.long)])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "bucketed":
        monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
        monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: True))
    plain.cache_clear()  # logits of other shapes differ in their last digits
    yield
    plain.cache_clear()


def expected_drafts(model: Any, kind: str, head: MtpHead, tokens: list[int]) -> list[int]:
    """Return what the layer drafts after `tokens`, with mlx-lm's own blocks run from the start.

    MiMo's layer reads the model's state before the last norm, as in Xiaomi's own inference code.
    """
    text = TextModel.of(model)
    assert text.head is not None
    inner: Any = find_layout(model).inner
    norm = inner.norm if "mimo" in kind else None
    if norm is not None:
        inner.norm = nn.Identity()
    states = inner(mx.array([tokens[:-1]]))
    if norm is not None:
        inner.norm = norm
    ids, drafted = tokens[1:], list[int]()
    for _ in range(3):
        both = [head.embedding_norm(text.embeddings(mx.array([ids])))]
        both.insert(0 if kind == "mimo" else 1, head.state_norm(states))
        joined = head.projection(mx.concatenate(both, axis=-1))
        mask = create_attention_mask(joined, window_size=head.window, return_array=True)
        after = head.norm(run_block(head, joined, mask))
        best: Any = mx.argmax(text.head(after)[0, -1]).item()
        drafted.append(best)
        ids = [*ids, best]
        states = mx.concatenate([states, after[:, -1:]], axis=1)
    return drafted


def run_block(head: MtpHead, x: mx.array, mask: mx.array) -> Any:
    """Run mlx-lm's block, or Nemotron's two modules that are one."""
    block: Any = head.block
    if "rope" in block.self_attn:
        return block(x, mask)
    x = x + block.self_attn(block.input_layernorm(x), mask)
    return x + block.mlp(block.post_attention_layernorm(x))


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_drafts_from_the_models_own_hidden_states(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was rejected before, the drafts are those of a layer that read the whole text."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    seen: list[tuple[list[int], list[int]]] = []
    propose = EagleProposer.propose

    def noted(self: EagleProposer, lengths: Mapping[Sequence, int]) -> Any:
        found = propose(self, lengths)
        seen.extend((s.token_ids(0, s.num_known_tokens), t) for s, t in found.items())
        return found

    monkeypatch.setattr(EagleProposer, "propose", noted)
    model = target(kind)
    made = engine_of(model, kind, random_head(model, kind), enable_prefix_caching=False)
    made.generate(PROMPTS[:2], replace(LONG, max_tokens=12))
    assert len(seen) > 10
    fresh = target(kind)
    head = random_head(fresh, kind)
    for known, drafted in seen:
        assert drafted == expected_drafts(fresh, kind, head, known)[: len(drafted)]


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("deepseek_v3", False), ("qwen3_next", False), ("qwen3_next", True),
        *(pytest.param(kind, False, marks=pytest.mark.long) for kind in OTHERS),
    ],
)  # fmt: skip
def test_outputs_are_the_same_with_any_layer(
    kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    model = target(kind, tied=tied)
    made = engine_of(model, kind, random_head(model, kind))
    for _ in range(2):  # the second time, the layer does not see the prompts' cached blocks
        for found, expected in zip(ask_all(made), plain(kind, tied=tied), strict=True):
            check_same(expected, found)
    assert made.stats().proposed_tokens > 100


def test_recurrent_state_returns_without_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are rejected all the time, and the prompt's tokens are computed once."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    outputs: list[SchedulerOutput] = []
    emitted = Speculator.emitted

    def noted(self: Speculator, output: SchedulerOutput, now: float) -> None:
        outputs.append(output)
        emitted(self, output, now)

    monkeypatch.setattr(Speculator, "emitted", noted)
    model = target("qwen3_next")
    made = engine_of(model, "qwen3_next", random_head(model, "qwen3_next"))
    made.generate([PROMPTS[1]], replace(LONG, max_tokens=20))
    stats = made.stats()
    assert stats.proposed_tokens - stats.accepted_tokens > 20
    assert sum(chunk.length for output in outputs for chunk in output.prefill) == len(PROMPTS[1])
    rows = sum(output.num_tokens for output in outputs)
    assert rows <= len(PROMPTS[1]) + 20 + stats.proposed_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_knows_the_model_is_accepted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    model = target(kind, markov=True)
    made = engine_of(model, kind, markov_head(model, kind), num_speculative_tokens=3)
    for found, expected in zip(ask_all(made), plain(kind, markov=True), strict=True):
        check_same(expected, found)
    sampled = made.stats()
    made.generate([PROMPTS[0]], LONG)
    proposed = made.stats().proposed_tokens - sampled.proposed_tokens
    accepted = made.stats().accepted_tokens - sampled.accepted_tokens
    assert accepted >= 0.9 * proposed > 20


def test_drafts_are_launched_behind_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the host drafts after the prompts only, and all drafts are as right as there."""
    monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
    monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: True))
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    behind: list[bool] = []
    draft, launch = HeadRunner.draft, EagleProposer.launch

    def drafted(self: HeadRunner, rows: Any, ids: mx.array, *outbox: Any) -> Any:
        behind.append(False)
        return draft(self, rows, ids, *outbox)

    def launched(self: EagleProposer) -> None:
        before = len(behind)
        launch(self)
        behind[before:] = [True] * (len(behind) - before)

    monkeypatch.setattr(HeadRunner, "draft", drafted)
    monkeypatch.setattr(EagleProposer, "launch", launched)
    model = target("mimo", markov=True)
    expected = engine_of(model, "mimo", None).generate(PROMPTS[:2], LONG)
    model = target("mimo", markov=True)
    made = engine_of(model, "mimo", markov_head(model, "mimo"), num_speculative_tokens=3)
    found = made.generate(PROMPTS[:2], LONG)
    assert [tokens(events) for events in found] == [tokens(events) for events in expected]
    assert made.stats().accepted_tokens >= 0.9 * made.stats().proposed_tokens > 20
    first = behind.index(True)  # after the steps that also compute prompts
    assert first <= 6
    assert all(behind[first:])
    assert len(behind) - first > 8


def all_steps(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_a_draft_of_a_step_that_was_not_launched_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
    monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: True))
    model = target("mimo", markov=True)
    [expected] = engine_of(model, "mimo", None).generate([PROMPTS[1]], LONG)
    model = target("mimo", markov=True)
    made = engine_of(model, "mimo", markov_head(model, "mimo"))
    assert made._speculator is not None
    head = made._speculator._proposer.head  # type: ignore[attr-defined]
    launch = mx.async_eval

    def failing(*arrays: Any) -> None:
        if head._next is not None:
            raise RuntimeError("no memory")
        launch(*arrays)

    made.add_request("a", EngineRequest(PROMPTS[0], LONG))
    with monkeypatch.context() as patch:
        patch.setattr(mx, "async_eval", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            all_steps(made)
    made.fail_all("failed")
    [found] = made.generate([PROMPTS[1]], LONG)
    assert tokens(found) == tokens(expected)


def test_a_layer_that_is_mostly_wrong_pauses() -> None:
    model = target("mimo")
    made = engine_of(model, "mimo", random_head(model, "mimo"))
    made.generate([PROMPTS[0]], replace(LONG, max_tokens=100))
    assert 3 <= made.stats().num_proposals < 30


# Files


def published(arrays: Mapping[str, mx.array], kind: str) -> Arrays:
    """Return the tensors of mlx-lm's modules as the model's authors name and store them."""
    found: Arrays = {}
    qwen = kind.startswith("qwen3")
    for name, array in arrays.items():
        start, stacked, rest = name.partition("switch_mlp.")
        if stacked and kind == "qwen3_5_moe":
            projection = rest.removesuffix(".weight")
            if projection == "down_proj":
                found[f"{start}experts.down_proj"] = array
            elif projection == "gate_proj":
                both = [array, arrays[f"{start}switch_mlp.up_proj.weight"]]
                found[f"{start}experts.gate_up_proj"] = mx.concatenate(both, axis=1)
        elif stacked:
            rest = rest.replace("fc1", "up_proj").replace("fc2", "down_proj")
            found |= {f"{start}experts.{n}.{rest}": part for n, part in enumerate(array)}
        elif name.endswith("embed_q.weight"):
            values = arrays[name.replace("embed_q", "unembed_out")]
            joined = mx.concatenate([array.swapaxes(1, 2), values], axis=1)
            found[name.replace("embed_q", "kv_b_proj")] = joined.reshape(-1, joined.shape[-1])
        elif name.endswith("conv1d.weight"):
            found[name] = array.moveaxis(1, 2)
        elif qwen and array.ndim == 1 and "norm" in name and "linear_attn" not in name:
            found[name] = array - 1
        elif not name.endswith("unembed_out.weight"):
            found[name] = array
    return found


def prefix_of(kind: str, layers: int = 4) -> str:
    return LAYOUTS[kind].prefix.format(layers=layers)


def layer_tensors(head: MtpHead, kind: str) -> Arrays:
    """Return the tensors of a layer as its authors name them."""
    flat: Any = tree_flatten(head.parameters())
    found: Arrays = {}
    for name, array in published(dict(flat), kind).items():
        found[layer_name(kind, name)] = array
    return found


def layer_name(kind: str, name: str, layers: int = 4) -> str:
    """Return the published name of a tensor of the head."""
    for module, path in LAYOUTS[kind].names.items():
        if name.startswith(f"{module}."):
            rest = name.removeprefix(f"{module}.")
            return prefix_of(kind, layers) + (f"{path}.{rest}" if path else rest)
    raise AssertionError(name)


def write(directory: Path, kind: str, layer: Arrays | None = None, **changed: Any) -> ModelFiles:
    """Write the model and its layer as published; `layer` replaces the tensors of the layer."""
    model = target(kind)
    if layer is None:
        layer = layer_tensors(random_head(model, kind), kind)
    flat: Any = tree_flatten(model.parameters())
    names = [(n.replace("language_model.model.", "model.language_model."), a) for n, a in flat]
    tensors = {
        n.removeprefix("language_model."): a for n, a in published(dict(names), kind).items()
    }
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors | layer)
    found = configuration(kind)
    config = {**COMMON, **found.args, **changed}
    if found.nested is None:
        config["model_type"] = kind
    else:
        config = {"model_type": kind, found.nested: config}
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return ModelFiles.from_directory(directory)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_next", *OTHERS])
def test_the_layer_is_read_from_published_files(kind: str, tmp_path: Path) -> None:
    loaded = load(write(tmp_path, kind), device="cpu")
    head = load_mtp_head(ModelFiles.from_directory(tmp_path), loaded)
    model = target(kind)
    flat: Any = tree_flatten(random_head(model, kind).parameters())
    found: Any = dict(tree_flatten(head.parameters()))
    assert found.keys() == dict(flat).keys()
    for name, array in flat:
        assert mx.allclose(found[name], array, rtol=1e-6, atol=1e-6).item(), name
    flat = tree_flatten(model.parameters())
    found = dict(tree_flatten(loaded.model.parameters()))
    assert all(mx.allclose(found[name], array, rtol=1e-6, atol=1e-6).item() for name, array in flat)


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
@pytest.mark.parametrize("own", [False, True])
def test_a_vocabulary_of_the_layers_own(name: str, own: bool, tmp_path: Path) -> None:
    """Copies of the model's, which DeepSeek and GLM publish, are not held twice."""
    model = target("glm4_moe")
    module = model.model.embed_tokens if name == "embed_tokens" else model.lm_head
    weight = module.weight + 1 if own else module.weight
    layer = layer_tensors(random_head(model, "glm4_moe"), "glm4_moe")
    files = write(tmp_path, "glm4_moe", layer | {f"{prefix_of('glm4_moe')}{name}.weight": weight})
    head = load_mtp_head(files, load(files, device="cpu"))
    kept = "embed_tokens" if name == "embed_tokens" else "head"
    assert (kept in head) == own
    if own:
        assert mx.array_equal(head[kept].weight, weight).item()
        states = mx.random.normal((2, 64))
        assert (mx.allclose(head.logits(states), states @ weight.T)).item() == (kept == "head")


@pytest.mark.parametrize("kind", ["deepseek_v3", "mimo_v2_flash"])
def test_a_layer_in_fp8(kind: str, tmp_path: Path) -> None:
    """Both are published as fp8 weights with a scale for each block of 128 x 128."""
    model = target(kind)
    layer = layer_tensors(random_head(model, kind), kind)
    scaled = [name for name, array in layer.items() if array.ndim == 2 and ".mlp." in name]
    scales = {f"{name}_scale_inv": mx.full((1, 1), 0.5) for name in scaled}
    codes = {name: mx.to_fp8(layer[name] * 2) for name in scaled}
    files = write(tmp_path, kind, layer | codes | scales)
    head = load_mtp_head(files, load(files, device="cpu"))
    if kind == "deepseek_v3":
        gate = layer[f"{prefix_of(kind)}mlp.experts.1.gate_proj.weight"]
        found = head.block.mlp.switch_mlp.gate_proj.weight[1].astype(mx.float32)
    else:
        gate = layer[f"{prefix_of(kind)}mlp.gate_proj.weight"]
        found = head.block.mlp.gate_proj.weight.astype(mx.float32)
    assert mx.allclose(found, gate, rtol=0.07, atol=1e-3).item()
    assert not mx.array_equal(found, gate).item()


def test_scales_of_fp8_that_are_too_short(tmp_path: Path) -> None:
    layer = layer_tensors(random_head(target("deepseek_v3"), "deepseek_v3"), "deepseek_v3")
    name = f"{prefix_of('deepseek_v3')}mlp.experts.1.gate_proj.weight"
    short = {name: mx.to_fp8(layer[name]), f"{name}_scale_inv": mx.zeros((0, 1))}
    files = write(tmp_path, "deepseek_v3", layer | short)
    with pytest.raises(ModelLoadError, match=r"_scale_inv is \[0, 1\], expected \[1, 1\]"):
        load_mtp_head(files, load(files, device="cpu"))


@pytest.mark.parametrize("kind", ["glm4_moe_lite", "qwen3_next"])
def test_a_layer_that_is_quantised_as_mlx_lm_does(kind: str, tmp_path: Path) -> None:
    head = random_head(target(kind), kind)
    chosen = ("gate_proj", "up_proj", "down_proj")
    nn.quantize(head, 32, 4, class_predicate=lambda path, module: path.endswith(chosen))
    flat: Any = tree_flatten(head.parameters())
    layer = {layer_name(kind, name): array for name, array in flat}
    loaded = load(write(tmp_path, kind, {}), device="cpu")
    config = {**loaded.config, "quantization": {"group_size": 32, "bits": 4}}
    files = write(tmp_path, kind, layer)
    found = load_mtp_head(files, replace(loaded, config=config))
    projection = found.block.mlp.switch_mlp.up_proj
    assert projection.bits == 4
    assert mx.array_equal(projection.weight, head.block.mlp.switch_mlp.up_proj.weight).item()
    config = {**loaded.config, "quantization": {"group_size": 32, "bits": 8}}
    with pytest.raises(ModelLoadError, match=r"gate_proj.weight is \[8, 32, 8\], expected"):
        load_mtp_head(files, replace(loaded, config=config))
    config = {**loaded.config, "quantization": {"group_size": 7, "bits": 4}}
    with pytest.raises(ModelLoadError, match="cannot be quantised"):
        load_mtp_head(files, replace(loaded, config=config))


@pytest.mark.parametrize("kind", ["mimo", "deepseek_v3", "qwen3_next"])
def test_a_stored_model_drafts_with_its_own_layer(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "files", kind)
    store = modelpack.Store(tmp_path / "store")
    request = modelpack.PackageRequest(safetensors_dir=tmp_path / "files")
    modelpack.package("ai/model", request, store=store)
    config = EngineConfig(
        device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False, backend="mlx",
        speculative_method="mtp",
    )  # fmt: skip
    opened = open_model("ai/model", pull=False, store=store)
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


@pytest.mark.parametrize(
    ("kind", "name", "array", "says"),
    [
        ("mimo", "", None, r"the files have no tensors model\.mtp_layers\.0\."),
        ("deepseek_v3", "", None, r"the files have no tensors model\.layers\.4\."),
        ("qwen3_next", "", None, r"the files have no tensors mtp\."),
        ("mimo", "input_proj.weight", None, "has no tensor model.mtp_layers.0.input_proj.weight"),
        (
            "mimo",
            "input_proj.weight",
            mx.zeros((64, 64)),
            r"input_proj.weight is \[64, 64\], expected \[64, 128\]",
        ),
        (
            "mimo",
            "input_proj.weight",
            mx.zeros((64, 128), mx.uint8),
            "input_proj.weight is stored as uint8, expected floats",
        ),
        ("deepseek_v3", "shared_head.norm.weight", None, "no tensor model.layers.4.shared_head"),
        (
            "deepseek_v3",
            "mlp.experts.7.down_proj.weight",
            None,
            "no tensor model.layers.4.mlp.experts.7.down_proj.weight",
        ),
        (
            "deepseek_v3",
            "self_attn.kv_b_proj.weight",
            mx.zeros((96, 32)),
            r"kv_b_proj.weight is \[96, 32\], expected \[128, 32\]",
        ),
        (
            "glm4_moe",
            "shared_head.head.weight",
            mx.zeros((5, 64)),
            r"shared_head.head.weight is \[5, 64\], expected \[257, 64\]",
        ),
        ("mimo_v2_flash", "", None, r"the files have no tensors model\.mtp\.layers\.0\."),
        (
            "mimo_v2_flash",
            "pre_mlp_layernorm.weight",
            None,
            "no tensor model.mtp.layers.0.pre_mlp_layernorm.weight",
        ),
        (
            "mimo_v2_flash",
            "self_attn.attention_sink_bias",
            mx.zeros((2,)),
            r"attention_sink_bias is \[2\], expected \[4\]",
        ),
        ("nemotron_h", "1.final_layernorm.weight", None, "no tensor mtp.layers.1.final_layernorm"),
        ("nemotron_h", "1.mixer.experts.3.up_proj.weight", None, "no tensor mtp.layers.1.mixer.ex"),
        ("qwen3_next", "fc.weight", None, "no tensor mtp.fc.weight"),
        ("qwen3_next", "layers.0.self_attn.q_norm.weight", None, "no tensor mtp.layers.0.self_at"),
        (
            "qwen3_5_moe",
            "layers.0.mlp.experts.gate_up_proj",
            mx.zeros((8, 32, 64)),
            r"experts.gate_up_proj is \[8, 32, 64\], expected \[8, 64, 64\]",
        ),
    ],
)
def test_files_without_the_layer(
    kind: str, name: str, array: mx.array | None, says: str, tmp_path: Path
) -> None:
    """`array` replaces the tensor `name` of the layer, or all are left out."""
    layer = layer_tensors(random_head(target(kind), kind), kind) if name else {}
    layer.pop(prefix_of(kind) + name, None)
    if array is not None:
        layer[prefix_of(kind) + name] = array
    files = write(tmp_path, kind, layer)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_mtp_head(files, load(files, device="cpu"))
    assert caught.value.hint or "expected" in says


def test_models_without_a_layer(tmp_path: Path) -> None:
    files = write(tmp_path, "mimo")
    with pytest.raises(ModelLoadError, match="layers of 'llama' are not supported") as caught:
        load_mtp_head(files, replace(tiny_loaded(), config={"model_type": "llama"}))
    assert caught.value.hint


def test_the_drafter_of_gemma_4_is_another_model(tmp_path: Path) -> None:
    files = write(tmp_path, "mimo")
    with pytest.raises(ModelLoadError, match="is a drafter of its own files") as caught:
        load_mtp_head(files, replace(tiny_loaded(), config={"model_type": "gemma4_text"}))
    assert caught.value.hint == "choose it with --draft-model REF"


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("nemotron_h", {"mtp_hybrid_override_pattern": "*E"}, None),
        ("nemotron_h", {"mtp_layers_block_type": ["attention", "moe"]}, None),
        ("nemotron_h", {"mtp_hybrid_override_pattern": "*EM"}, r"has the blocks \*EM"),
        ("qwen3_5", {"mtp_use_dedicated_embeddings": False}, None),
        ("qwen3_5", {"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is not"),
    ],
)
def test_fields_of_the_layer(
    kind: str, fields: dict[str, Any], says: str | None, tmp_path: Path
) -> None:
    files = write(tmp_path, kind, **fields)
    loaded = load(files, device="cpu")
    if says is None:
        load_mtp_head(files, loaded)
        return
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_mtp_head(files, loaded)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("nemotron_h", {"n_routed_experts": None, "hybrid_override_pattern": list("M-*M")}),
        ("qwen3_next", {"full_attention_interval": 5}),
    ],
)
def test_configurations_without_what_the_layer_needs(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """A model of no experts has none in its layer, and one of no attention no rotation."""
    found = configuration(kind)
    found = replace(found, args={**found.args, **fields})
    files = write(tmp_path, kind, {f"{prefix_of(kind)}0.enorm.weight": mx.zeros((64,))})
    loaded = replace(load(files, device="cpu"), model=found.build())
    with pytest.raises(ModelLoadError, match=r"the configuration describes no layer: .+"):
        load_mtp_head(files, loaded)


def test_mtp_requires_the_layer() -> None:
    with pytest.raises(EngineError, match="layer for multi-token prediction is not loaded"):
        engine_of(target("mimo"), "mimo", None, speculative_method="mtp")
