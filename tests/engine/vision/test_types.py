"""Multimodal types that mlx-lm does not have, with its class for their `text_config`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.models import load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.patches import mlx_vlm_imports
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.layouts import PROCESSORS
from modelpack_engine.vision.models import CLASSES
from modelpack_engine.vision.processor import PictureProcessor
from modelpack_engine.vision.towers import _made_config
from tests.engine.vision import tiny
from tests.engine.vision.specimens import SPECIMENS

WRAPPED = [
    kind for kind in SPECIMENS if CLASSES[tiny.config_of(kind)["model_type"]].language is not None
]


def copied(kind: str, path: Path, change: dict[str, Any]) -> ModelFiles:
    """Return the files of a tiny model in another directory; `change` updates its config.json."""
    for file in tiny.directory(kind).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = tiny.config_of(kind)
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            value = config[name] | value
        config[name] = value
    (path / "config.json").write_text(json.dumps(config))
    return ModelFiles.from_directory(path)


@pytest.mark.parametrize("kind", tiny.kinds(*WRAPPED))
def test_text_needs_no_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of mlx-vlm, with the extra and without it."""
    monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
    loaded = tiny.tiny_loaded(kind)
    assert loaded.vision is None
    assert "pictures are not read: the extra 'vision' is not installed" in loaded.notes[-1]
    engine = Engine(loaded, EngineConfig(device="cpu"))
    ids = engine.tokenizer.encode("hello there", add_special_tokens=False)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    found = tiny.run(engine, EngineRequest(ids, params))
    assert found == [tiny.expected(kind, "hello there", [])]


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["internvl_chat", "llava_next", "lfm2_vl", "mllama"])
def test_the_layout_of_transformers_5(kind: str, tmp_path: Path) -> None:
    """It saves all parts under `model`, and the head beside it."""
    files = copied(kind, tmp_path, {})
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    renamed = {}
    for name, value in weights.items():
        name = f"model.{name}".replace("language_model.model.", "language_model.")
        renamed[name.replace("model.language_model.lm_head", "lm_head")] = value
    mx.save_safetensors(str(tmp_path / "model.safetensors"), renamed)
    loaded = load(files, device="cpu")
    assert loaded.vision is not None, loaded.notes
    engine = Engine(loaded, EngineConfig(device="cpu"))
    made = tiny.request(engine, "<image>What is it?", [tiny.picture(1)])
    assert tiny.run(engine, made) == [tiny.expected(kind, "<image>What is it?", [tiny.picture(1)])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deepstack_layer_map": [[-1, 4]]}, "before layer '4', and there are 4"),
        ({"deepstack_layer_map": [[-1, -1]]}, "before layer '-1', and there are 4"),
        ({"spatial_target_layers": ["a"]}, "before layer 'a', and there are 4"),
        ({"deepstack_layer_map": 3}, "deepstack_layer_map: 'int' object is not iterable"),
    ],
)
def test_layers_that_get_no_pictures(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(copied("granite4_vision", tmp_path, change), device="cpu")


@pytest.mark.long
def test_the_joined_tensors_of_minicpmo(tmp_path: Path) -> None:
    """Its published resampler has one tensor for queries, keys and values. No voice is loaded."""
    files = copied("minicpmo", tmp_path, {})
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"resampler.attn.{part}_proj.{kind}") for part in "qkv"]
        weights[f"resampler.attn.in_proj_{kind}"] = mx.concatenate(parts)
    weights["tts.emb_text.weight"] = mx.zeros((2, 2))
    patches = "vpm.embeddings.patch_embedding.weight"
    weights[patches] = mx.contiguous(weights[patches].transpose(0, 3, 1, 2))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    engine = Engine(load(files, device="cpu"), EngineConfig(device="cpu"))
    text, pictures = "<image>What is it?", [tiny.picture(1)]
    found = tiny.run(engine, tiny.request(engine, text, pictures))
    assert found == [tiny.expected("minicpmo", text, pictures)]


@pytest.mark.long
def test_a_layer_that_predicts_the_next_token_is_left_out(tmp_path: Path) -> None:
    """GLM-OCR's files have one after the layers of the model."""
    files = copied("glm_ocr", tmp_path, {})
    path = str(tmp_path / "model.safetensors")
    weights: Any = mx.load(path)
    one = weights["language_model.model.layers.1.input_layernorm.weight"]
    weights["language_model.model.layers.2.input_layernorm.weight"] = one
    mx.save_safetensors(path, weights)
    loaded = load(files, device="cpu")
    assert loaded.vision is not None
    assert len(loaded.model.layers) == 2


@pytest.mark.parametrize("kind", ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.long)])
def test_a_text_model_in_files_of_its_own(kind: str, tmp_path: Path) -> None:
    """Qwen3_5ForCausalLM: the fields of text_config, and tensors without a prefix."""
    files = copied(kind, tmp_path, {})
    config = tiny.config_of(kind)["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").unlink()
    weights: Any = mx.load(str(tmp_path / "model.safetensors"))
    text = {
        name.removeprefix("language_model."): value
        for name, value in weights.items()
        if name.startswith("language_model.")
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), text)
    engine = Engine(load(files, device="cpu"), EngineConfig(device="cpu"))
    assert engine._runner.tier == "paged"
    ids = engine.tokenizer.encode("hello there", add_special_tokens=False)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    found = tiny.run(engine, EngineRequest(ids, params))
    assert found == [tiny.expected(kind, "hello there", [])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm_config": {"model_type": "gemma"}}, "llm_config.model_type 'gemma' is not supported"),
        ({"llm_config": {"model_type": "../qwen2"}}, "is not supported for internvl_chat"),
        ({"llm_config": {"model_type": None}}, "is not supported for internvl_chat"),
        ({"llm_config": None}, "text_config is missing"),
        ({"llm_config": {"hidden_act": "gelu"}}, "llm_config.hidden_act .*changes the model"),
        ({"llm_config": {"hidden_size": 10**9}}, "config.json"),
        ({"llm_config": {"num_hidden_layers": 10**6}}, "config.json"),
    ],
)
def test_language_models_that_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(copied("internvl_chat", tmp_path, change), device="cpu")


@pytest.mark.parametrize(
    ("most", "grids"),
    [
        (4, {(1, 1): (1, 1), (20, 30): (2, 2), (16, 64): (1, 4), (100, 10): (4, 1)}),
        (4, {(33, 47): (2, 2), (17, 17): (2, 2), (200, 300): (2, 2), (16, 16): (1, 1)}),
        (16, {(10, 100): (1, 7), (200, 300): (3, 5), (640, 480): (4, 3), (33, 47): (3, 3)}),
    ],
)
def test_llama_4_cuts_pictures_as_transformers(
    most: int, grids: dict[tuple[int, int], tuple[int, int]]
) -> None:
    """Rows and columns of transformers 5.19.0 for a height and a width, in tiles of 16 pixels."""
    settings = {"size": {"height": 16, "width": 16}, "max_patches": most}
    processor = PROCESSORS["llama4"]({}, settings)
    for (height, width), grid in grids.items():
        made = processor([Image.fromarray(tiny.picture(1, height, width).pixels)])
        assert made["aspect_ratios"] == [grid]
        tiles = grid[0] * grid[1]
        assert made["pixel_values"].shape == (tiles + (tiles > 1), 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_after": True}, "norm_after is not False: only Molmo 7B-D and 72B are supported"),
        ({"attention_layer_norm": True}, "attention_layer_norm is not False"),
        ({"qkv_bias": False}, "qkv_bias is not True"),
        ({"intermediate_size": 100}, "cannot|shape|config.json"),
        ({"hidden_size": 10**9}, "config.json"),
        ({"additional_vocab_size": 16}, "embed_tokens|shape"),
    ],
)
def test_molmos_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(copied("molmo", tmp_path, change), device="cpu")


def test_a_published_molmo_has_the_sizes_of_its_language_model() -> None:
    """Its config.json says nothing about the tower, and mlx-vlm would take those of 7B-D."""
    config = {
        "model_type": "molmo", "hidden_size": 8192, "intermediate_size": 59136,
        "image_token_id": 152066, "vision_config": {},
    }  # fmt: skip
    package: Any = importlib.import_module("mlx_vlm.models.molmo")
    vision = _made_config(package, config).vision_config
    assert (vision.d_model, vision.hidden_size) == (8192, 29568)
    assert (vision.image_num_layers, vision.image_default_input_size) == (23, (336, 336))


def test_molmo_reads_pictures_before_the_text() -> None:
    vision = tiny.tiny_loaded("molmo").vision
    assert vision is not None
    text = "User: <|image|>What is <|image|>it? Assistant:"
    spaced = vision.processor.with_spaces(text)
    assert spaced == "<|endoftext|><|image|><|image|> User: What is it? Assistant:"
    assert vision.processor.with_spaces(spaced) == spaced


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("internvl_chat", {"vision_config": {"hidden_size": 10**9}}, "config.json|cannot build"),
        ("internvl_chat", {"vision_config": {"patch_size": 0}}, "cannot|config.json|processed"),
        ("internvl_chat", {"vision_config": None}, "vision_config is missing"),
        ("internvl_chat", {"max_dynamic_patch": 0}, "max_patches is 0"),
        ("internvl_chat", {"ps_version": "v1"}, "ps_version is not 'v2', which mlx-vlm computes"),
        ("internvl_chat", {"use_thumbnail": False}, "use_thumbnail is not True"),
        ("internvl_chat", {"force_image_size": 10**6}, "size is 1000000, the limit is 8192"),
        ("llava_next", {"image_grid_pinpoints": [[10**6, 16]]}, "not a list of sizes"),
        ("llava_next", {"image_grid_pinpoints": "all"}, "not a list of sizes"),
        ("llava_next", {"image_token_index": 3}, "'<image>' is not the token 3 of config.json"),
        ("deepseek_vl_v2", {"tile_tag": "1D"}, "cannot build mlx-vlm's deepseek_vl_v2"),
        ("deepseek_vl_v2", {"vision_config": {"width": 10**9}}, "config.json|cannot build"),
        ("idefics2", {"perceiver_config": {"resampler_n_latents": "x"}}, "cannot build mlx-vlm's"),
        ("molmo", {"vision_config": {"image_num_layers": 2, "vit_layers": [-9]}}, "cannot"),
        ("molmo", {"vision_config": {"image_padding_embed": "other"}}, "cannot"),
        ("molmo", {"vision_config": 3}, "vision_config is missing"),
        ("kimi_k25", {"vision_config": {"num_heads": 1.5}}, "cannot build mlx-vlm's kimi_k25"),
        ("glm4v", {"text_config": {"partial_rotary_factor": 0.25}}, "not M-RoPE"),
    ],
)
def test_towers_that_are_refused(
    kind: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The model then reads text only."""
    loaded = load(copied(kind, tmp_path, change), device="cpu")
    assert loaded.vision is None
    assert re.search(reason, loaded.no_vision), loaded.no_vision


def test_deepseek_cuts_two_pictures_and_not_three() -> None:
    loaded = tiny.tiny_loaded("deepseek_vl_v2")
    assert loaded.vision is not None
    processor, encoder = loaded.vision.processor, loaded.vision.encoder
    wide = tiny.picture(1, 16, 32)
    for count, views in ((1, 3), (2, 3), (3, 2)):
        _, placed = processor.place([processor.image_token_id] * count, [wide] * count)
        for media in placed:
            assert media.inputs["pixel_values"].shape == (1, views, 3, 16, 16)
            assert len(tiny.embeddings(encoder, media)) == len(media.token_ids)


def test_a_model_without_tiles(tmp_path: Path) -> None:
    loaded = load(copied("internvl_chat", tmp_path, {"dynamic_image_size": False}), device="cpu")
    assert loaded.vision is not None
    processor = loaded.vision.processor
    _, (media,) = processor.place([processor.image_token_id], [tiny.picture(1, 16, 64)])
    assert media.inputs["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("aya_vision", {"max_patches": 10**9}, "max_patches is 1000000000, expected 1 to 64"),
        ("aya_vision", {"max_patches": 64, "size": {"height": 2048.0, "width": 16}}, "for tiles"),
        ("idefics3", {"size": None, "max_image_size": {"longest_edge": 16}}, "8281 tiles of 16"),
        ("idefics3", {"size": {"longest_edge": 5460}, "max_image_size": None}, "225 tiles of 364"),
        ("qwen2_vl", {"min_pixels": 4 * 10**6, "max_pixels": 10**7}, "min_pixels is 4000000"),
        ("lfm2_vl", {"tile_size": 10**6}, "tile_size is 1000000, the limit is 8192"),
        ("minicpmv4_6", {"scale_resolution": 10**6}, "scale_resolution is 1000000, the limit"),
        ("phi3_v", {"num_crops": 10**6}, "num_crops is 1000000, for tiles of 336 pixels a side"),
        ("phi3_v", {"num_crops": 0}, "num_crops is 0, for tiles"),
        ("llama4", {"max_patches": 10**6, "size": {}}, "max_patches is 1000000, expected 1 to 64"),
        ("llama4", {"max_patches": 1e6}, "max_patches is 1000000.0, expected 1 to 64"),
        ("llama4", {"max_patches": "65"}, "max_patches is 65, expected 1 to 64"),
        ("llama4", {"max_patches": 32, "size": {"height": 2048, "width": 2048}}, "for tiles of"),
        ("llama4", {"size": {"height": 16, "width": 8}}, "tiles that are not square"),
        ("llama4", {"resize_to_max_canvas": True}, "resize_to_max_canvas"),
        ("mage_vl", {"max_pixels": 10**9}, "max_pixels is 1000000000, the limit is 67108864"),
        ("muse_glimmer", {"max_image_tokens": 10**7}, "max_image_tokens is 10000000, for tokens"),
        ("molmo", {"max_crops": 65}, "max_crops is 65, expected 1 to 64"),
        ("molmo", {"max_crops": 1e6}, "max_crops is 1000000.0, expected 1 to 64"),
        ("molmo", {"image_token_length_w": 10**9}, "image_token_length_w is 1000000000, expected"),
        ("molmo", {"overlap_margins": [-(10**6), 0]}, "overlap_margins are"),
        ("molmo", {"base_image_input_size": [10**6] * 2}, "max_crops is 4, for tiles of 1000000"),
        ("molmo", {"base_image_input_size": 5}, "preprocessor_config.json"),
        ("minicpmv4_6", {"max_slice_nums": 10**9}, "max_slice_nums is 1000000000, expected"),
    ],
)
def test_settings_that_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    loaded = tiny.tiny_loaded(kind)
    settings = {k: v for k, v in (tiny.settings_of(kind) | change).items() if v is not None}
    with pytest.raises(ModelLoadError, match=message):
        PictureProcessor(tiny.config_of(kind), settings, loaded.tokenizer.encode)


def test_pictures_smaller_than_a_patch(tmp_path: Path) -> None:
    """Kimi-VL cuts pictures to whole patches; others are scaled up."""
    for kind in ("kimi_vl", "internvl_chat", "lfm2_vl", "llava_next", "minicpmv4_6"):
        loaded = tiny.tiny_loaded(kind)
        assert loaded.vision is not None
        processor: PictureProcessor = loaded.vision.processor
        prompt, dot = [processor.image_token_id], tiny.picture(1, 1, 1)
        if kind == "kimi_vl":
            with pytest.raises(RequestError, match="smaller than 8 pixels on a side"):
                processor.place(prompt, [dot])
        else:
            _, (media,) = processor.place(prompt, [dot])
            made = tiny.embeddings(loaded.vision.encoder, media)
            assert made.shape[-2] == len(media.token_ids)


@pytest.mark.long
@pytest.mark.parametrize("kind", SPECIMENS)
def test_embeddings_match_tokens_at_all_sizes(kind: str) -> None:
    """Of pictures with sides from 1 to 4 tiles, wide and narrow."""
    loaded = tiny.tiny_loaded(kind)
    assert loaded.vision is not None
    processor, encoder = loaded.vision.processor, loaded.vision.encoder
    for height, width in [(8, 8), (9, 33), (40, 11), (63, 64), (17, 50), (64, 9), (31, 47)]:
        picture = tiny.picture(height, height, width)
        _, (media,) = processor.place([processor.image_token_id], [picture])
        made = tiny.embeddings(encoder, media)
        count = len(media.token_ids)
        if kind == "mllama":  # each tile is its patches, and a class
            count = int(media.inputs["aspect_ratio_mask"].sum()) * 17
        assert made.shape[-2] == count, (height, width)
        assert mx.all(mx.isfinite(made))
