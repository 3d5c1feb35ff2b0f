"""GGUF models with a projector: as their safetensors, and those that do not run."""

from __future__ import annotations

import importlib
import io
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten
from starlette.testclient import TestClient

from modelpack import PackageRequest, package
from modelpack.errors import PackagingError
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.llama_cpp.library import choose_backend
from modelpack_engine.models import LoadedModel, gguf_projector, load, loader
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.gguf_projector import GGUFProjector
from modelpack_engine.patches.mlx_vlm_imports import prepare
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.models import CLASSES
from modelpack_server.api.app import create_app
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.cli.running import modelpack as run
from tests.engine.vision import projectors, tiny
from tests.engine.vision.media import file_of, url
from tests.engine.vision.tiny import picture

pytestmark = pytest.mark.long

TEXT = "What is <image> here?"
PHOTO = picture(1, 40, 60)


def loaded(kind: str, **changes: Any) -> LoadedModel:
    return load(replace(projectors.files(kind), **changes), device="cpu")


def engine_of(model: LoadedModel) -> Engine:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, device="cpu")
    return Engine(model, config)


def embedded(model: LoadedModel) -> tuple[tuple[int, ...], mx.array]:
    """Return the tokens of a picture, and their embeddings."""
    assert model.vision is not None, model.no_vision
    prompt = [model.vision.processor.image_token_id]
    _, (media,) = model.vision.processor.place(prompt, [PHOTO])
    return media.token_ids, tiny.embeddings(model.vision.encoder, media)


def changed(path: Path, kind: str = "idefics3", **fields: Any) -> Path:
    """Write the projector of a tiny model with other metadata."""
    weights = projectors.weights_of(tiny.directory(kind) / "model.safetensors")
    config, settings = tiny.config_of(kind), tiny.settings_of(kind)
    projectors.write_projector(path, kind, config, settings, weights, **fields)
    return path


@pytest.mark.parametrize("kind", projectors.KINDS)
def test_embeddings_are_those_of_safetensors(kind: str) -> None:
    tokens, embeddings = embedded(loaded(kind))
    expected_tokens, expected = embedded(tiny.tiny_loaded(kind))
    assert tokens == expected_tokens
    assert mx.array_equal(embeddings, expected)


@pytest.mark.parametrize("kind", [kind for kind in projectors.KINDS if kind != "mistral3"])
def test_tokens_are_mlx_vlms(kind: str) -> None:
    engine = engine_of(loaded(kind))
    asked = [(TEXT, [PHOTO]), ("<image> and <image>", [PHOTO, picture(2)]), ("No picture", [])]
    found = tiny.run(engine, *(tiny.request(engine, text, photos) for text, photos in asked))
    assert found == [tiny.expected(kind, text, photos) for text, photos in asked]
    [other] = tiny.run(engine, tiny.request(engine, TEXT, [picture(9, 40, 60)]))
    assert other != found[0]


TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0])
def test_types_of_weights(kind: TYPES, tmp_path: Path) -> None:
    """Matrices are dequantised as gguf-py does."""
    written = {}
    rows = 32 if kind is TYPES.Q8_0 else 1

    def add(writer: gguf.GGUFWriter, name: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value, np.float32)
        if value.ndim < 2 or value.shape[-1] % rows:
            writer.add_tensor(name, value)
            return
        raw = quantize(value, kind)
        written[name] = dequantize(raw, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)

    weights = projectors.weights_of(tiny.directory("idefics3") / "model.safetensors")
    path = tmp_path / "p.gguf"
    config, settings = tiny.config_of("idefics3"), tiny.settings_of("idefics3")
    projectors.write_projector(path, "idefics3", config, settings, weights, add)
    model = tiny.tiny_loaded("idefics3")
    encode = model.tokenizer.encode
    made = GGUFProjector(path, {"model_type": "llama", "hidden_size": 64}, encode)
    found = made.weights(mx.float32)
    name, paths = "v.blk.1.attn_q.weight", "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(np.array(found[paths]), written[name])
    assert len(written) > 5
    assert loaded("idefics3", projector=path).vision is not None


def test_names_that_older_converters_swapped(tmp_path: Path, monkeypatch: Any) -> None:
    """clip.cpp: ffn_down was the first layer of an MLP."""
    tensors = projectors.projector_tensors

    def swapped(*arguments: Any) -> projectors.Weights:
        other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        return {
            ".".join(other.get(part, part) for part in name.split(".")): value
            for name, value in tensors(*arguments).items()
        }

    monkeypatch.setattr(projectors, "projector_tensors", swapped)
    path = changed(tmp_path / "p.gguf")
    found = embedded(loaded("idefics3", projector=path))
    assert mx.array_equal(found[1], embedded(tiny.tiny_loaded("idefics3"))[1])


def test_a_projector_without_a_type_is_llavas(tmp_path: Path) -> None:
    """The oldest files name no type, and all blocks that they have are read."""
    change = {"clip__projector_type": None, "clip__has_llava_projector": True}
    path = changed(tmp_path / "p.gguf", "llava", **change)
    assert mx.array_equal(
        embedded(loaded("llava", projector=path))[1], embedded(loaded("llava"))[1]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip__vision__image_grid_pinpoints": [16, 32]}, "tiles (LLaVA 1.6) are not supported"),
        ({"clip__vision__feature_layer": [0, 2]}, "features of the layers [0, 2]"),
        ({"clip__vision__feature_layer": [9]}, "features of the layers [9]"),
    ],
)
def test_llavas_that_do_not_run(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "p.gguf", "llava", **fields)
    assert message in loaded("llava", projector=path).no_vision


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("qwen2_5_vl", {"clip__vision__n_wa_pattern": None}, "has no 'clip.vision.n_wa_pattern'"),
        ("qwen2_5_vl", {"clip__vision__n_wa_pattern": 0}, "clip.vision.n_wa_pattern is 0"),
        ("qwen2_5_vl", {"clip__vision__window_size": 0}, "cannot encode this picture"),
        ("idefics3", {"clip__vision__preproc_image_size": 4128}, "66564 tiles of 16, the limit"),
        ("qwen2_5_vl", {"clip__vision__image_min_pixels": 525_312}, "min_pixels is 525312"),
        (
            "qwen2_5_vl",
            {"clip__vision__image_min_pixels": 525_312, "clip__vision__image_max_pixels": 2**25},
            "min_pixels is 525312, the limit is 262144",
        ),
        ("qwen3_vl", {"clip__vision__is_deepstack_layers": [True, False, False]}, "v.deepstack.1"),
        ("qwen3_vl", {"clip__vision__spatial_merge_size": 0}, "cannot build|cannot be processed"),
        ("pixtral", {"clip__vision__image_size": 2**20}, "limits are 1024 patches and 8192 pixels"),
        ("pixtral", {"clip__vision__image_size": 8000}, "patches of 4 in pictures of 8000 pixels"),
    ],
)
def test_settings_of_single_types(
    kind: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = loaded(kind, projector=changed(tmp_path / "p.gguf", kind, **fields))
    assert re.search(message, model.no_vision), model.no_vision


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clip__projector_type": "ldp"}, "the projector type 'ldp' is not supported; supported types"),
    (
        {"clip__projector_type": "qwen2vl_merger"},
        "the tensors are not those of .* 'qwen2vl_merger'",
    ),
    ({"clip__has_vision_encoder": None}, "has no encoder of pictures"),
    ({"clip__has_vision_encoder": False}, "has no encoder of pictures"),
    ({"general__architecture": "llama"}, "architecture 'llama', expected 'clip'"),
    ({"clip__use_gelu": None}, "the activation gelu_quick is not supported: mlx-vlm's idefics3"),
    ({"clip__vision__image_mean": None}, "the metadata has no 'clip.vision.image_mean'"),
    ({"clip__vision__image_mean": [0.5, 0.5]}, "expected three numbers"),
    ({"clip__vision__image_std": [0.5, 0.0, 0.5]}, "expected above 0"),
    ({"clip__vision__patch_size": 0}, "patches of 0 in pictures of 16 pixels"),
    ({"clip__vision__block_count": 5}, "name 5 blocks, the tensors are of 2"),
    ({"clip__vision__block_count": 1}, "name 1 blocks, the tensors are of 2"),
    ({"clip__vision__block_count": 2**31 - 1}, "name 2147483647 blocks"),
    ({"clip__vision__embedding_length": 10**9}, "hidden_size is 1000000000"),
    ({"clip__vision__attention__head_count": 0}, "cannot build"),
    ({"clip__vision__attention__head_count": "x"}, "expected a whole number"),
    ({"clip__vision__preproc_image_size": 10**6}, "the limit is 8192"),
    ({"clip__vision__projector__scale_factor": 3}, "cannot build"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_projectors_that_do_not_run(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The model reads text, and says why it reads no pictures."""
    model = loaded("idefics3", projector=changed(tmp_path / "p.gguf", **fields))
    assert model.vision is None
    assert len(model.no_vision) < 600
    assert f"pictures are not read: {model.no_vision}" in model.notes
    assert re.search(message, model.no_vision), model.no_vision
    assert "p.gguf" not in model.no_vision  # clients of a server read it
    assert answered(model, "No picture") == tiny.expected("idefics3", "No picture", [])


def answered(model: LoadedModel, text: str) -> list[int]:
    """Return the tokens after a text without pictures."""
    engine = engine_of(model)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    [tokens] = tiny.run(engine, EngineRequest(ids, params))
    return tokens


def test_a_projector_of_another_width(tmp_path: Path) -> None:
    weights = projectors.weights_of(tiny.directory("idefics3") / "model.safetensors")
    name = "connector.modality_projection.proj.weight"
    weights[name] = weights[name][:32]
    path = tmp_path / "p.gguf"
    config, settings = tiny.config_of("idefics3"), tiny.settings_of("idefics3")
    projectors.write_projector(path, "idefics3", config, settings, weights)
    model = loaded("idefics3", projector=path)
    assert "makes embeddings of width 32, the model takes 64" in model.no_vision
    request = PackageRequest(gguf=projectors.files("idefics3").weights[0], mmproj=path)
    with pytest.raises(PackagingError, match=r"p\.gguf does not fit .* width 32, .* takes 64"):
        package("m", request, store=LayoutStore(tmp_path / "store"))


@pytest.mark.parametrize("size", [0, 20, 1000, -1, -4000])
def test_truncated_projectors(size: int, tmp_path: Path) -> None:
    source = projectors.files("idefics3").projector
    assert source is not None
    (tmp_path / "p.gguf").write_bytes(source.read_bytes()[:size])
    model = loaded("idefics3", projector=tmp_path / "p.gguf")
    assert model.vision is None
    assert model.no_vision.startswith("the projector at byte ")
    assert answered(model, "No picture") == tiny.expected("idefics3", "No picture", [])


@pytest.mark.parametrize("kind", ["idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_damaged_projectors(kind: str, tmp_path: Path) -> None:
    """A model with changed bytes in its projector's header loads, with or without vision."""
    source = projectors.files(kind).projector
    assert source is not None
    raw, random = source.read_bytes(), Random(kind)
    reasons = set()
    for number in range(15):
        damaged = bytearray(raw)
        for _ in range(1 + number % 3):
            damaged[random.randrange(4000)] ^= 1 << random.randrange(8)
        (tmp_path / "p.gguf").write_bytes(damaged)
        model = loaded(kind, projector=tmp_path / "p.gguf")
        assert (model.vision is None) == bool(model.no_vision)
        reasons.add(model.no_vision)
    assert len(reasons) > 5


def test_tensors_of_other_models(tmp_path: Path) -> None:
    """An unknown tensor, and one with infinite values, are named."""

    def add(writer: gguf.GGUFWriter, name: str, value: np.ndarray) -> None:
        projectors.add_array(writer, name, value * np.inf if name == "v.patch_embd.bias" else value)

    weights = projectors.weights_of(tiny.directory("idefics3") / "model.safetensors")
    config, settings = tiny.config_of("idefics3"), tiny.settings_of("idefics3")
    path = tmp_path / "p.gguf"
    projectors.write_projector(path, "idefics3", config, settings, weights, add)
    assert "same or infinite embeddings" in loaded("idefics3", projector=path).no_vision
    weights["vision_model.encoder.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    names = {"v.blk.0.attn_q_norm.weight": weights.popitem()[1]}

    def more(writer: gguf.GGUFWriter, name: str, value: np.ndarray) -> None:
        projectors.add_array(writer, name, value)
        while names:
            projectors.add_array(writer, *names.popitem())

    projectors.write_projector(path, "idefics3", config, settings, weights, more)
    assert (
        "no such tensors: v.blk.0.attn_q_norm.weight"
        in loaded("idefics3", projector=path).no_vision
    )


@pytest.mark.parametrize(
    ("text", "eyes", "message"),
    [
        (
            "idefics3",
            "qwen2_vl",
            "'qwen2vl_merger' does not fit a language model of the class 'llama'",
        ),
        (
            "qwen2_vl",
            "qwen3_vl",
            "'qwen3vl_merger' does not fit a language model of the class 'qwen2_vl'",
        ),
    ],
)
def test_a_projector_of_another_model(text: str, eyes: str, message: str) -> None:
    model = loaded(text, projector=projectors.files(eyes).projector)
    assert message in model.no_vision
    assert answered(model, "No picture") == tiny.expected(text, "No picture", [])


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "is_installed", lambda: False)
    monkeypatch.setattr(gguf_projector, "is_installed", lambda: False)
    model = loaded("qwen2_vl")
    assert "'vision' is not installed (run pip install 'modelpack[vision]')" in model.no_vision
    assert model.config["model_type"] == "qwen2"
    assert choose_backend(projectors.files("idefics3"), EngineConfig(), "cpu") != "mlx"


def test_only_mlx_reads_pictures() -> None:
    files = projectors.files("idefics3")
    assert choose_backend(files, EngineConfig(), "cpu") == "mlx"
    assert choose_backend(replace(files, projector=None), EngineConfig(), "cpu") != "mlx"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(file_of(PHOTO))
    return path


def renamed(kind: str, path: Path) -> tuple[Path, Path]:
    """Copy the files of a tiny model; their names say nothing of a projector."""
    files = projectors.files(kind)
    assert files.projector is not None
    for name, source in (("one.gguf", files.weights[0]), ("two.gguf", files.projector)):
        (path / name).write_bytes(source.read_bytes())
    return path / "one.gguf", path / "two.gguf"


@pytest.mark.parametrize("format", ["docker", "cncf"])
@pytest.mark.parametrize("kind", ["idefics3", "qwen2_5_vl"])
def test_packaged_and_served(kind: str, format: Literal["docker", "cncf"], tmp_path: Path) -> None:
    """The media type or the content says which file is the projector; names have no say."""
    gguf_, projector = renamed(kind, tmp_path)
    store = LayoutStore(tmp_path / "store")
    both = PackageRequest(gguf=gguf_, mmproj=projector, format=format)
    package("seeing", both, store=store)
    package("blind", PackageRequest(gguf=gguf_, format=format), store=store)
    content = [
        {"type": "image_url", "image_url": {"url": url(file_of(PHOTO))}},
        {"type": "text", "text": "What?"},
    ]
    body = {
        "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    with TestClient(create_app(ModelPool(StoreCatalogue(store)))) as http:
        listed = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
        abilities = {name: each["capabilities"] for name, each in listed.items()}
        assert ["vision" in abilities[name] for name in sorted(abilities)] == [False, True]
        shown = [
            http.post("/api/show", json={"model": name}).json()["capabilities"]
            for name in ("blind", "seeing")
        ]
        assert ["vision" in each for each in shown] == [False, True]
        answer = http.post("/v1/chat/completions", json={"model": "seeing", **body})
        assert answer.status_code == 200, answer.text
        refused = http.post("/v1/chat/completions", json={"model": "blind", **body})
        assert refused.status_code == 400
    text = answer.json()["choices"][0]["message"]["content"]
    prompt = "user: <image>What?\nassistant:"
    expected = tiny.expected(kind, prompt, [PHOTO])
    assert text == loaded(kind).tokenizer.decode(expected)


@pytest.mark.parametrize("as_directory", [False, True])
def test_run_with_a_photo(
    as_directory: bool, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the store, and from a directory with both files."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    source = tmp_path / "files"
    source.mkdir()
    gguf_, projector = renamed("idefics3", source)
    store = ("--store", tmp_path / "store")
    name: object = source
    if not as_directory:
        name = "seeing"
        made = run("package", "--gguf", gguf_, "--mmproj", projector, name, *store)
        assert made.code == 0, made.err
    found = run(
        "run", name, "What?", photo, "--temperature", "0", "--max-tokens", "8", "--json",
        "--device", "cpu", "--kv-cache-bytes", "2000000", *store,
    )  # fmt: skip
    assert found.code == 0, found.err
    prompt = "user: <image>What?\nassistant:"
    expected = loaded("idefics3").tokenizer.decode(tiny.expected("idefics3", prompt, [PHOTO]))
    assert expected.startswith(found.json["text"])
    assert found.json["text"]


def test_files_of_models(tmp_path: Path) -> None:
    """Of several projectors one is used; weights of safetensors use none."""
    gguf_, projector = renamed("idefics3", tmp_path)
    files = ModelFiles((gguf_,), "gguf")
    assert files.with_projectors([]) is files
    two = files.with_projectors([projector, gguf_])
    assert two.projector == projector
    assert two.notes == ("the first of 2 multimodal projectors is used",)
    other = replace(files, format="safetensors").with_projectors([projector])
    assert other.projector is None
    assert other.notes == ("the multimodal projector is left out: only GGUF weights use one",)


TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"model_type": "siglip_vision_model", "image_size": 32, "layer_norm_eps": 1e-6},
        {"mm_tokens_per_image": 4},
    ),
    "internvl": (
        {"model_type": "intern_vit_6b", "image_size": 16, "layer_norm_eps": 1e-6},
        {"downsample_ratio": 0.5},
    ),
}


class Tower(nn.Module):
    """The parts of mlx-vlm's Gemma 3 and InternVL without a language model."""

    def __init__(self, kind: str, vision: dict[str, Any], extra: dict[str, Any]) -> None:
        super().__init__()
        prepare()
        folder = {"gemma3": "gemma3", "internvl": "internvl_chat"}[kind]
        package: Any = importlib.import_module(f"mlx_vlm.models.{folder}")
        config = package.VisionConfig.from_dict(vision)
        if kind == "gemma3":
            self.vision_tower = package.VisionModel(config)
            text = SimpleNamespace(hidden_size=64, **extra)
            parts = SimpleNamespace(vision_config=config, text_config=text)
            self.multi_modal_projector = package.gemma3.Gemma3MultiModalProjector(parts)
        else:
            self.vision_model = package.VisionModel(config)
            width = vision["hidden_size"] * int(1 / extra["downsample_ratio"]) ** 2
            layers = [nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 64)]
            self.mlp1 = layers
        self.eval()  # InternVL has dropout

    def __call__(self, pixels: mx.array) -> mx.array:
        if "vision_tower" in self:
            return self.multi_modal_projector(self.vision_tower(pixels)[0])
        shuffle: Any = importlib.import_module("mlx_vlm.models.base").pixel_shuffle
        rows = self.vision_model(pixels, output_hidden_states=True)[0][:, 1:]
        rows = shuffle(rows, shuffle_ratio=0.5)
        for layer in self.mlp1:
            rows = layer(rows)
        return rows


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers of classes that need more than `open_tower` from the engine."""
    vision, extra = TOWERS[kind]
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_channels": 3,
        "num_hidden_layers": 2, "patch_size": 4, **vision,
    }  # fmt: skip
    tower = Tower(kind, vision, extra)
    mx.random.seed(3)
    names = [name for name, _ in tree_flatten(tower.parameters())]
    shapes = [value.shape for _, value in tree_flatten(tower.parameters())]
    values = [mx.random.normal(shape) * 0.2 for shape in shapes]
    tower.load_weights(list(zip(names, values, strict=True)))
    mx.save_safetensors(str(tmp_path / "w.safetensors"), dict(zip(names, values, strict=True)))
    config = {"vision_config": vision, "text_config": {"hidden_size": 64, **extra}, **extra}
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    weights = projectors.weights_of(tmp_path / "w.safetensors")
    projectors.write_projector(tmp_path / "p.gguf", kind, config, settings, weights)
    row = gguf_projector.PROJECTORS[kind]
    if row.model_type not in CLASSES:
        monkeypatch.setitem(CLASSES, row.model_type, CLASSES["llava"])  # type: ignore[arg-type]
    projector = GGUFProjector(
        tmp_path / "p.gguf", {"model_type": "qwen2", "hidden_size": 64}, lambda text: [7]
    )
    made = {name: value for name, value in projector.config.items() if name in extra}
    assert made == extra
    other = Tower(kind, projector.config["vision_config"], made)
    part: Any = other.vision_tower if kind == "gemma3" else other.vision_model
    other.load_weights(list(part.sanitize(projector.weights(mx.float32)).items()))
    side = vision["image_size"]
    pixels = mx.random.normal((1, side, side, 3))
    assert mx.allclose(other(pixels), tower(pixels), rtol=1e-5, atol=1e-6)
    assert not mx.allclose(other(pixels), other(pixels * 0.5), rtol=1e-2)
