"""Layers for multi-token prediction in GGUF: llama.cpp's logits, equal outputs, bad files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import modelpack
from modelpack_engine.config import EngineConfig
from modelpack_engine.cpu.weights import PackedWeights
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.layers.blocks import BlockLinear, BlockSwitchLinear
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.models.mtp import LAYOUTS, MtpHead, TextModel, load_mtp_head
from modelpack_engine.runner.model_layout import find_layout
from modelpack_engine.speculation import acceptance
from modelpack_engine.speculation.ngram import NgramProposer
from modelpack_server.stored_models import open_model
from tests.engine.loaders.test_architectures import distance, load_tiny, quantizer
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import PREDICTING, PROMPT, TINY_MODELS, TinyModel, Weights
from tests.engine.loaders.vocabularies import golden
from tests.engine.speculation.test_draft import LONG, PROMPTS, ask_all
from tests.engine.speculation.test_mtp import layer_name
from tests.engine.speculation.test_same_output import check_same

Q = gguf.GGMLQuantizationType


def opened(path: Path, **options: Any) -> tuple[LoadedModel, MtpHead]:
    files = ModelFiles.from_directory(path)
    loaded = load(files, device="cpu", **options)
    return loaded, load_mtp_head(files, loaded)


def predicted(model: Any, head: MtpHead) -> np.ndarray:
    """Return the logits [tokens, vocabulary] of the head after `PROMPT`."""
    text, inner = TextModel.of(model), find_layout(model).inner
    assert inner is not None
    states, embedded = inner(mx.array([PROMPT[:-1]]))[0], text.embeddings(mx.array(PROMPT[1:]))
    positions = mx.arange(len(states))
    carried, *heads = head.project(states, embedded, positions)
    queries, keys, values = (part.swapaxes(0, 1)[None] for part in heads)
    attended = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=head.scale, mask="causal"
    )
    found = head.finish(carried, attended[0].swapaxes(0, 1).reshape(len(states), -1))
    return np.array(head.logits(found).astype(mx.float32))


def quantised(type: Q) -> Callable[[str, np.ndarray], Any]:
    """Quantise what llama.cpp does: no convolutions, whose rows are too short."""
    quantize = quantizer(type)
    return lambda name, values: None if values.shape[-1] % 32 else quantize(name, values)


def parameters(head: MtpHead) -> dict[str, mx.array]:
    flat: Any = tree_flatten(head.parameters())
    return dict(flat)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", PREDICTING)
def test_the_logits_of_llama_cpp(name: str, tmp_path: Path) -> None:
    loaded, head = opened(TINY_MODELS[name].write_predicting(tmp_path / "m.gguf"))
    if name == "nemotron_h_moe":
        # llama.cpp 0.3.36 subtracts the mean in the last norm, which is an RMSNorm in vLLM.
        weight, head.norm = head.norm.weight, nn.LayerNorm(64, 1e-5, bias=False)
        head.norm.weight = weight
    expected = golden("predictions")[name]
    assert distance(predicted(loaded.model, head)[-1], expected) < 1e-6
    head._state_first = True
    assert distance(predicted(loaded.model, head)[-1], expected) > 0.01


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [*PREDICTING, "deepseek-v3-old"])
def test_logits_are_those_of_safetensors(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    kind, layers = tiny.config["model_type"], tiny.config["num_hidden_layers"]
    weights = tiny.head()
    loaded, head = opened(tiny.write(tmp_path / "m.gguf", predicting=weights))
    directory = tmp_path / "safetensors"
    directory.mkdir()
    save(directory, tiny.build(), tiny.config)
    # The class of GLM-4.7-Flash has this norm as a constant.
    other = load_tiny(directory, ignored_fields={"rms_norm_eps"})
    layer = {layer_name(kind, name, layers): mx.array(array) for name, array in weights.items()}
    mx.save_safetensors(str(directory / "model-2.safetensors"), layer)
    expected = load_mtp_head(ModelFiles.from_directory(directory), other)
    found = parameters(head)
    assert found.keys() == parameters(expected).keys() == weights.keys()
    for key, array in parameters(expected).items():
        assert mx.array_equal(found[key], array).item(), key
    logits = predicted(other.model, expected)
    assert np.abs(predicted(loaded.model, head) - logits).max() < 1e-4


@pytest.mark.parametrize("type", [Q.Q4_0, Q.Q8_0, Q.Q5_0])
def test_quantised_weights_are_held_as_those_of_other_layers(type: Q, tmp_path: Path) -> None:
    tiny = TINY_MODELS["qwen35moe"]
    tiny = replace(tiny, config={**tiny.config, "hidden_size": 256})
    path = tiny.write(tmp_path / "m.gguf", quantised(type), predicting=tiny.head())
    loaded, dense = opened(path, dense=True)
    expected = predicted(loaded.model, dense)
    blocks = {"Q5_0"} if type is Q.Q5_0 else ()
    packed, head = opened(path, dense=False, dtype=mx.float32, blocks=blocks)
    assert head.weight_bytes < dense.weight_bytes / 2
    model: dict[str, Any] = dict(packed.model.named_modules())
    modules: dict[str, Any] = dict(head.named_modules())
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.switch_mlp.up_proj", "mlp.gate"):
        other = model[f"language_model.model.layers.1.{name}"]
        assert modules[f"block.{name}"].__class__ is other.__class__
    if type is Q.Q5_0:
        assert isinstance(head.projection, BlockLinear)
        assert isinstance(head.block.mlp.switch_mlp.up_proj, BlockSwitchLinear)
    else:
        assert head.projection.bits == (4 if type is Q.Q4_0 else 8)
    assert np.abs(predicted(packed.model, head) - expected).max() < 1e-3


def test_the_biases_of_the_router_stay_exact(tmp_path: Path) -> None:
    tiny = TINY_MODELS["glm4moe"]
    weights = tiny.head()
    _, head = opened(tiny.write(tmp_path / "m.gguf", predicting=weights), dtype=mx.bfloat16)
    exact = {name for name, array in parameters(head).items() if array.dtype == mx.float32}
    assert exact == {"block.mlp.gate.e_score_correction_bias"}
    [bias] = exact
    assert np.array_equal(np.array(parameters(head)[bias]), weights[bias])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["embed_tokens", "head"])
def test_a_vocabulary_of_the_layers_own(name: str, own: bool, tied: bool, tmp_path: Path) -> None:
    """Copies of the model's are not held twice; others are held in the type of the file."""
    tiny = TINY_MODELS["qwen35"]
    tiny = replace(tiny, config={**tiny.config, "tie_word_embeddings": tied})
    text = TextModel.of(tiny.build())
    embeds = name == "embed_tokens" or text.head is None
    module: Any = text.embeddings if embeds else text.head
    weight = module.weight
    weights = {**tiny.head(), f"{name}.weight": np.array(weight) + own}
    path = tiny.write(tmp_path / "m.gguf", quantised(Q.Q8_0), predicting=weights)
    loaded, head = opened(path, dense=False, dtype=mx.float32)
    assert (name in head) == own
    if own:
        assert head[name].bits == 8
        states = mx.random.normal((2, 64))
        shared = TextModel.of(loaded.model).head or TextModel.of(loaded.model).embeddings.as_linear
        assert mx.allclose(head.logits(states), shared(states)).item() == (name != "head")


@dataclass(frozen=True)
class Markov(TinyModel):
    """A model whose next token depends on the last token only, as its layers add nothing."""

    def weights(self, model: Any) -> Weights:
        ends = tuple(f"{name}.weight" for name in ("o_proj", "out_proj", "down_proj", "fc2"))
        made = super().weights(model)
        return {n: 0 * v if n.endswith(ends) else v for n, v in made.items()}

    def head(self) -> Weights:
        """Return the layer that computes what the model computes from the next token."""
        model = self.build()
        size, weights = self.config["hidden_size"], super().head()
        half = np.eye(size, dtype=np.float32)
        weights["projection.weight"] = np.concatenate([half, 0 * half], axis=1)
        weights["embedding_norm.weight"] = np.ones(size, np.float32)
        return {**weights, "norm.weight": np.array(TextModel.of(model).norm.weight)}


def engine_of(loaded: LoadedModel, head: MtpHead | None) -> Engine:
    config = EngineConfig(
        device="cpu", max_num_seqs=8, max_num_batched_tokens=32, backend="mlx", self_test=False,
        speculative_disable_by_batch_size=8,
        speculative_method="none" if head is None else "mtp",
    )  # fmt: skip
    return Engine(loaded, config, draft=head)


@pytest.mark.long
@pytest.mark.parametrize("name", PREDICTING)
def test_a_layer_that_knows_the_model_is_accepted(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    tiny = TINY_MODELS[name]
    markov = Markov(tiny.arch, tiny.config, tiny.keys, tiny.converted)
    path = markov.write(tmp_path / "m.gguf", predicting=markov.head())
    expected = ask_all(engine_of(opened(path)[0], None))
    made = engine_of(*opened(path))
    for found, plain in zip(ask_all(made), expected, strict=True):
        check_same(plain, found)
    before = made.stats()
    made.generate([PROMPTS[0]], LONG)
    proposed = made.stats().proposed_tokens - before.proposed_tokens
    assert made.stats().accepted_tokens - before.accepted_tokens >= 0.9 * proposed > 20


@pytest.mark.long
@pytest.mark.parametrize("name", PREDICTING)
def test_outputs_are_the_same_with_any_layer(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    path = TINY_MODELS[name].write_predicting(tmp_path / "m.gguf")
    expected = ask_all(engine_of(opened(path)[0], None))
    made = engine_of(*opened(path))
    for found, plain in zip(ask_all(made), expected, strict=True):
        check_same(plain, found)
    assert made.stats().proposed_tokens > 100


@pytest.mark.long
@pytest.mark.parametrize("name", ["glm4moe", "qwen35"])
def test_a_stored_model_drafts_with_its_own_layer(name: str, tmp_path: Path) -> None:
    path = TINY_MODELS[name].write_predicting(tmp_path / "m.gguf")
    store = modelpack.Store(tmp_path / "store")
    modelpack.package("ai/model", modelpack.PackageRequest(gguf=path), store=store)
    config = EngineConfig(
        device="cpu", max_num_seqs=2, kv_cache_bytes=2**20, self_test=False, backend="mlx",
        speculative_method="mtp",
    )  # fmt: skip
    stored = open_model("ai/model", pull=False, store=store)
    made, without = stored.engine(config), stored.engine(replace(config, speculative_method="none"))
    assert isinstance(made, Engine)
    assert made.weight_bytes > without.weight_bytes
    params = replace(LONG, max_tokens=20)
    for one, other in zip(
        made.generate(PROMPTS[:2], params), without.generate(PROMPTS[:2], params), strict=True
    ):
        assert sum((e.token_ids for e in one), ()) == sum((e.token_ids for e in other), ()) != ()
    assert made.stats().num_proposals > 0


# Files with errors

Change = Callable[[Weights], Any]
MISSING = "the tensors do not match the model: missing"
BAD: dict[str, tuple[str, Change, str]] = {
    "a tensor is missing": (
        "qwen35",
        lambda w: w.pop("projection.weight"),
        rf"m\.gguf: blk\.4: {MISSING} projection\.weight",
    ),
    "its last norm is missing": (
        "glm4moe",
        lambda w: w.pop("norm.weight"),
        rf"blk\.2: {MISSING} norm\.weight",
    ),
    "a tensor of the block is missing": (
        "deepseek-v3",
        lambda w: w.pop("block.self_attn.embed_q.weight"),
        rf"blk\.2: {MISSING} block\.self_attn\.embed_q\.weight",
    ),
    "experts are missing": (
        "nemotron_h_moe",
        lambda w: w.pop("block.mlp.switch_mlp.fc1.weight"),
        rf"blk\.4: {MISSING} block\.mlp\.switch_mlp\.fc1\.weight",
    ),
    "a projection of another shape": (
        "glm4moe",
        lambda w: w.update({"projection.weight": np.zeros((64, 64), np.float32)}),
        r"blk\.2: projection\.weight has the shape \[64, 64\], expected \[64, 128\]",
    ),
    "another vocabulary": (
        "qwen35",
        lambda w: w.update({"embed_tokens.weight": np.zeros((5, 64), np.float32)}),
        r"embed_tokens\.weight has the shape \[5, 64\], expected \[435, 64\]",
    ),
    "a tensor of a recurrent layer": (
        "nemotron_h_moe",
        lambda w: w.update({"block.mlp.in_proj.weight": np.zeros((8, 64), np.float32)}),
        r"nemotron_h_moe has no such tensors: blk\.4\.ssm_in\.weight",
    ),
    "no tensors": (
        "glm4moe",
        lambda w: w.clear(),
        r"name a layer for multi-token prediction, but there are no tensors blk\.2\.\*",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_files_without_the_layer(what: str, tmp_path: Path) -> None:
    """The model itself loads."""
    name, change, says = BAD[what]
    weights = TINY_MODELS[name].head()
    change(weights)
    path = TINY_MODELS[name].write(tmp_path / "m.gguf", predicting=weights)
    files = ModelFiles.from_directory(path)
    loaded = load(files, device="cpu")
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_mtp_head(files, loaded)
    assert caught.value.hint or "expected" in says


def test_a_file_that_names_no_layer(tmp_path: Path) -> None:
    path = TINY_MODELS["qwen35"].write(tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match="the file has no layer for multi-token") as caught:
        opened(path)
    assert "nextn_predict_layers" in (caught.value.hint or "")


def test_a_model_that_mlx_does_not_run(tmp_path: Path) -> None:
    files = ModelFiles.from_directory(TINY_MODELS["qwen35"].write_predicting(tmp_path / "m.gguf"))
    loaded = replace(load(files, device="cpu"), packed=PackedWeights())
    with pytest.raises(ModelLoadError, match="speculative method mtp: needs MLX") as caught:
        load_mtp_head(files, loaded)
    assert "--backend mlx" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["exaone-moe", "bailingmoe2", "glm4"])
def test_architectures_whose_layer_is_not_read(name: str, tmp_path: Path) -> None:
    """llama.cpp writes layers of these too; the model runs without."""

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        tiny.keys(writer, config)
        writer.kv_data[0][f"{tiny.arch}.block_count"].value += 1
        writer.add_nextn_predict_layers(1)

    tiny = TINY_MODELS[name]
    kind = tiny.config["model_type"]
    path = replace(tiny, keys=keys).write(tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match=f"layers of '{kind}' are not supported") as caught:
        opened(path)
    assert caught.value.hint


def test_heads_of_all_kinds_are_read() -> None:
    """llama.cpp writes MiMo as qwen2, without its layer, and MiMo-V2 does not load from GGUF."""
    kinds = {TINY_MODELS[name].config["model_type"] for name in PREDICTING}
    assert LAYOUTS.keys() - kinds == {"mimo", "mimo_v2_flash"}
