"""An adapter that is merged as its base is loaded gives the tokens of the adapter unmerged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import modelpack
from modelpack.artifacts import media_types
from modelpack.errors import UnsupportedError
from modelpack.formats.adapter import Adapter, AdapterError, read_adapter
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.cpu.library import library
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import open_model
from tests.adapters import random_pairs, write_gguf_pairs, write_mlx, write_peft
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import PROMPT, TINY_MODELS
from tests.operations.test_foreign import keep, keep_ollama

TINY = TINY_MODELS["llama"]
SIZE = 0.15
CONFIG = EngineConfig(
    device="cpu", max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=2**21, self_test=False
)
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
#: Linear layers in the names of mlx-lm and of GGUF.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def targets() -> dict[str, tuple[int, int]]:
    """Return the shapes of all linear layers, without the head."""
    return {
        name: tuple(module.weight.shape)
        for name, module in TINY.build().named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def lora(at: Path) -> Path:
    return write_peft(at, targets(), rank=3, lora_alpha=6, size=SIZE)


def rslora(at: Path) -> Path:
    return write_peft(at, targets(), rank=3, size=SIZE, use_rslora=True)


def dora(at: Path) -> Path:
    weights = dict(TINY.build().named_modules())
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": np.array(
            mx.linalg.norm(weights[name].weight, axis=1) * 1.3
        )
        for name in targets()
    }
    return write_peft(at, targets(), rank=3, size=SIZE, use_dora=True, extra=magnitudes)


def embeddings(at: Path) -> Path:
    model = TINY.build()
    tokens, width = model.model.embed_tokens.weight.shape
    shapes = {"model.embed_tokens": (width, tokens), "lm_head": (tokens, width)}
    return write_mlx(at, shapes, rank=2, size=0.4)


def dora_embeddings(at: Path) -> Path:
    """DoRA of mlx-lm, whose magnitudes of an embedding are those of tokens."""
    model = TINY.build()
    tokens, width = model.model.embed_tokens.weight.shape
    shapes = {"model.embed_tokens": (width, tokens), "lm_head": (tokens, width)}
    magnitudes = {
        "model.embed_tokens.m": np.linspace(0.5, 2, tokens, dtype=np.float32),
        "lm_head.m": np.linspace(0.5, 2, tokens, dtype=np.float32),
    }
    return write_mlx(at, shapes, rank=2, size=0.4, fine_tune_type="dora", extra=magnitudes)


def dora_peft_embeddings(at: Path) -> Path:
    """DoRA of PEFT, whose magnitudes of an embedding are those of its outputs."""
    tokens, width = TINY.build().model.embed_tokens.weight.shape
    name = "base_model.model.model.embed_tokens.lora_magnitude_vector"
    extra = {name: np.linspace(0.5, 2, width, dtype=np.float32)}
    shapes = {"model.embed_tokens": (width, tokens)}
    return write_peft(at, shapes, rank=2, size=0.4, use_dora=True, extra=extra)


def as_gguf(at: Path) -> Path:
    """The adapter of `lora` as llama.cpp's converter writes it."""
    pairs = {}
    for name, (a, b) in random_pairs(targets(), 3, 0, SIZE).items():
        _, _, layer, module = name.split(".", 3)
        ((_, rows),) = TINY.converted(TINY.config, {f"{name}.weight": b}).items()
        pairs[f"blk.{layer}.{NAMES[module]}"] = (a, rows)
    at.mkdir()
    return write_gguf_pairs(at / "lora.gguf", pairs, alpha=6.0)


ADAPTERS = {
    "lora": lora, "rslora": rslora, "dora": dora, "embeddings": embeddings,
    "dora of embeddings": dora_embeddings, "peft's dora of embeddings": dora_peft_embeddings,
}  # fmt: skip


@dataclass
class Bases:
    """The tiny model as safetensors, in 4 bits too, and as GGUF."""

    safetensors: Path
    quantised: Path
    gguf: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    root = tmp_path_factory.mktemp("bases")
    found = Bases(root / "safetensors", root / "quantised", root / "gguf" / "m.gguf")
    for path in (found.safetensors, found.quantised, found.gguf.parent):
        path.mkdir()
    model = TINY.build()
    save(found.safetensors, model, TINY.config)
    nn.quantize(model, group_size=32, bits=4)
    quantization = {"group_size": 32, "bits": 4}
    save(found.quantised, model, {**TINY.config, "quantization": quantization})
    TINY.write(found.gguf)
    return found


def tokens(base: Path, adapter: Adapter | None, *, merge: bool = True, **options: Any) -> list[int]:
    """Return the greedy tokens of an engine with the adapter, merged or not."""
    given = {"adapter": adapter} if merge else {}
    loaded = load(ModelFiles.from_directory(base), device="cpu", **given, **options)
    assert (loaded.packed is not None) == options.get("packed", False)
    engine = Engine(loaded, replace(CONFIG, max_loras=0 if merge else 1))
    if adapter is not None and not merge:
        engine.add_adapter("x", adapter, "x")
    return tokens_of(engine, "x" if adapter is not None and not merge else None)


def tokens_of(engine: Engine, adapter: str | None = None) -> list[int]:
    engine.add_request("0", EngineRequest(PROMPT, GREEDY, adapter=adapter))
    found: list[int] = []
    while engine.has_work:
        found += [token for event in engine.step() for token in event.token_ids]
    return found


needs_library = pytest.mark.skipif(library() is None, reason="the library for CPUs is not built")
PACKED = [False, pytest.param(True, marks=needs_library)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_tokens_are_those_of_the_adapter(
    kind: str, packed: bool, bases: Bases, tmp_path: Path
) -> None:
    adapter = read_adapter(ADAPTERS[kind](tmp_path / "adapter"))
    expected = tokens(bases.safetensors, adapter, merge=False)
    assert tokens(bases.safetensors, adapter, packed=packed) == expected
    assert tokens(bases.safetensors, None, packed=packed) != expected


@pytest.mark.parametrize("packed", PACKED)
def test_gguf(packed: bool, bases: Bases, tmp_path: Path) -> None:
    """The adapter in GGUF gives the tokens of PEFT's, with bases of both formats."""
    peft = read_adapter(lora(tmp_path / "peft"))
    adapter = read_adapter(as_gguf(tmp_path / "gguf"))
    expected = tokens(bases.safetensors, peft, merge=False)
    for base in (bases.safetensors, bases.gguf):
        assert tokens(base, adapter, merge=False) == expected
        assert tokens(base, adapter, packed=packed) == expected
    assert tokens(bases.gguf, None, packed=packed) != expected


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_gguf_base(kind: str, packed: bool, bases: Bases, tmp_path: Path) -> None:
    """Adapters of PEFT and mlx-lm give the tokens that they give with a base of safetensors."""
    adapter = read_adapter(ADAPTERS[kind](tmp_path / "adapter"))
    expected = tokens(bases.safetensors, adapter, merge=False)
    assert tokens(bases.gguf, adapter, merge=False) == expected
    assert tokens(bases.gguf, adapter, packed=packed) == expected
    assert tokens(bases.gguf, None, packed=packed) != expected


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    "kind", ["lora", "dora", "dora of embeddings", "peft's dora of embeddings"]
)
def test_a_quantised_base(kind: str, packed: bool, bases: Bases, tmp_path: Path) -> None:
    """The layers that the adapter changes are dense, with the adapter added in full."""
    adapter = read_adapter(ADAPTERS[kind](tmp_path / "adapter"))
    expected = tokens(bases.quantised, adapter, merge=False, dense=False)
    dense = {} if packed else {"dense": False}
    assert tokens(bases.quantised, adapter, packed=packed, **dense) == expected
    assert tokens(bases.quantised, None, packed=packed, **dense) != expected


def test_other_layers_stay_quantised(bases: Bases, tmp_path: Path) -> None:
    path = write_peft(tmp_path, {"model.layers.0.self_attn.q_proj": (64, 64)}, size=SIZE)
    files = ModelFiles.from_directory(bases.quantised)
    loaded = load(files, device="cpu", dense=False, adapter=read_adapter(path))
    attention = loaded.model.layers[0].self_attn
    assert isinstance(attention.q_proj, nn.Linear)
    assert isinstance(attention.k_proj, nn.QuantizedLinear)
    sizes = [array.nbytes for _, array in tree_flatten(loaded.model.parameters())]
    assert loaded.weight_bytes == sum(sizes)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("base", ["safetensors", "gguf"])
def test_an_adapter_that_does_not_fit(
    base: str, packed: bool, bases: Bases, tmp_path: Path
) -> None:
    path = write_peft(tmp_path, {"model.layers.0.self_attn.q_proj": (64, 32)})
    files = ModelFiles.from_directory(getattr(bases, base))
    with pytest.raises(AdapterError, match=r"a weight of shape \[64, 32\], but the model has"):
        load(files, device="cpu", packed=packed, adapter=read_adapter(path))


DOCKER_CONFIG: dict[str, Any] = {
    "config": {"format": "gguf"}, "rootfs": {"type": "rootfs", "diff_ids": []},
}  # fmt: skip


@pytest.mark.parametrize("tool", ["ollama", "docker"])
def test_an_adapter_in_a_layer_of_its_base(tool: str, bases: Bases, tmp_path: Path) -> None:
    """A model of Ollama or Docker with an adapter is loaded with it."""
    store = LayoutStore(tmp_path / "store")
    adapter = as_gguf(tmp_path / "gguf")
    files = (bases.gguf.read_bytes(), adapter.read_bytes())
    if tool == "ollama":
        kinds = media_types.OLLAMA_MODEL, media_types.OLLAMA_ADAPTER
        keep_ollama(store, list(zip(kinds, files, strict=True)))
    else:
        kinds = media_types.DOCKER_GGUF, media_types.DOCKER_GGUF_LORA
        layers = list(zip(kinds, files, strict=True))
        keep(store, (media_types.DOCKER_CONFIG_V01, DOCKER_CONFIG), layers)
    opened = open_model("x/m:v1", pull=False, store=store)
    assert not opened.model.is_adapter
    assert opened.model.has_adapter
    expected = tokens(bases.safetensors, read_adapter(lora(tmp_path / "peft")), merge=False)
    engine = opened.engine(CONFIG)
    assert isinstance(engine, Engine)
    assert tokens_of(engine) == expected
    catalogue = StoreCatalogue(store, CONFIG)
    need = catalogue.needs(catalogue.find("x/m:v1"), ModelSettings())
    assert need > bases.gguf.stat().st_size
    # Another is applied to requests, but not merged too.
    other = read_adapter(dora(tmp_path / "other"))
    with pytest.raises(ModelLoadError, match="has an adapter of its own"):
        opened.with_adapter(other, "other").engine(CONFIG)
    with pytest.raises(UnsupportedError, match="a LoRA adapter in a layer of its own"):
        modelpack.bundle("x/m:v1", tmp_path / "bundle", store=store)
