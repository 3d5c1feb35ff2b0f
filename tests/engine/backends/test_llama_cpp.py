"""llama.cpp's backend: when it is selected, what it rejects, and that its results are equal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import requests

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import Backend, EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, ModelLoadError, OutOfMemoryError
from modelpack_engine.llama_cpp import library
from modelpack_engine.llama_cpp import library as choosing
from modelpack_engine.llama_cpp.engine import LlamaCppEngine
from modelpack_engine.llama_cpp.library import choose_backend
from modelpack_engine.llama_cpp.model import Context, LlamaModel, try_out
from modelpack_engine.models import ModelFiles, load, loader
from modelpack_engine.models.loader import gguf_tokenizer_of
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.cpu import CpuRunner
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import Opened, open_model
from tests.engine.loaders.tiny_models import TINY_MODELS

pytestmark = pytest.mark.long

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(
    ("backend", "format", "device", "installed", "expected"),
    [
        ("auto", "gguf", "cpu", True, "llama.cpp"),
        ("auto", "gguf", "cpu", False, "mlx"),
        ("auto", "gguf", "gpu", True, "mlx"),
        ("auto", "safetensors", "cpu", True, "mlx"),
        ("mlx", "gguf", "cpu", True, "mlx"),
        ("llama.cpp", "gguf", "cpu", True, "llama.cpp"),
        ("llama.cpp", "gguf", "cpu", False, "llama.cpp"),
        ("llama.cpp", "gguf", "gpu", True, "this machine has a GPU"),
        ("llama.cpp", "safetensors", "cpu", True, "this model is safetensors"),
    ],
)
def test_choice(
    backend: Backend,
    format: Literal["gguf", "safetensors"],
    device: Literal["cpu", "gpu"],
    installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "is_installed", lambda: installed)
    files, config = ModelFiles((), format), EngineConfig(backend=backend)
    if expected in ("mlx", "llama.cpp"):
        assert choose_backend(files, config, device) == expected
    else:
        with pytest.raises(EngineError, match=expected) as raised:
            choose_backend(files, config, device)
        assert raised.value.hint


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_cache_dtype": "q8"}, "KV cache of type q8"),
        ({"speculative_method": "ngram"}, "speculative decoding"),
        ({"draft_model": "ai/small"}, "speculative decoding"),
        ({"kv_offload_dir": "/tmp/kv"}, "KV offload"),
        ({"kv_cache_dtype": "fp16"}, None),
    ],
)
def test_what_only_mlx_does(
    settings: dict[str, str], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "is_installed", lambda: True)
    files, config = ModelFiles((), "gguf"), EngineConfig(**settings)  # type: ignore[arg-type]
    assert choose_backend(files, config, "cpu") == ("mlx" if says else "llama.cpp")
    if says:
        with pytest.raises(EngineError, match=says):
            choose_backend(files, replace(config, backend="llama.cpp"), "cpu")


@pytest.fixture
def unknown_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library for CPUs did not know the model."""
    monkeypatch.setattr(loader, "is_packable", lambda *names: False)


@pytest.mark.usefixtures("llama_cpp")
def test_the_library_for_cpus_comes_first(opened: Opened) -> None:
    engine = opened.engine(EngineConfig(device="cpu", max_num_seqs=2))
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, CpuRunner)


@pytest.mark.usefixtures("llama_cpp", "unknown_architecture")
@pytest.mark.parametrize("backend", ["auto", "llama.cpp"])
def test_it_is_taken_and_says_so(opened: Opened, backend: Backend) -> None:
    engine = opened.engine(EngineConfig(device="cpu", backend=backend, max_num_seqs=2))
    assert isinstance(engine, LlamaCppEngine)
    assert any("llama.cpp" in note for note in engine.notes)


@pytest.mark.usefixtures("llama_cpp")
def test_the_same_model(opened: Opened) -> None:
    """Both backends return equal log-probabilities for all positions of a prompt."""
    found = []
    for backend in ("mlx", "llama.cpp"):
        engine = opened.engine(EngineConfig(device="cpu", backend=backend, max_num_seqs=2))  # type: ignore[arg-type]
        params = replace(GREEDY, prompt_logprobs=0)
        [events] = engine.generate([list(range(3, 60))], params)
        entries = events[0].prompt_logprobs
        assert entries is not None
        found.append([entry.logprob for entry in entries if entry is not None])
    assert len(found[0]) == 56
    assert np.abs(np.array(found[0]) - np.array(found[1])).max() < 0.02


def test_without_it(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    library.bindings.cache_clear()
    with pytest.raises(EngineError, match="not installed") as raised:
        opened.engine(EngineConfig(device="cpu", backend="llama.cpp"))
    assert "modelpack[llama-cpp]" in (raised.value.hint or "")
    assert isinstance(opened.engine(EngineConfig(device="cpu", max_num_seqs=2)), Engine)


@pytest.mark.usefixtures("llama_cpp")
def test_another_version(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_version", lambda: "0.2.1")
    library.bindings.cache_clear()
    assert not library.is_installed()
    with pytest.raises(EngineError, match=r"0\.2\.1, expected"):
        opened.engine(EngineConfig(device="cpu", backend="llama.cpp"))


@pytest.mark.usefixtures("llama_cpp", "unknown_architecture")
def test_what_it_cannot_load_mlx_is_asked_for(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(weights: Sequence[Path]) -> None:
        raise ModelLoadError("no such architecture")

    monkeypatch.setattr("modelpack_engine.llama_cpp.model.LlamaModel", refuse)
    with caplog.at_level(logging.WARNING):
        engine = opened.engine(EngineConfig(device="cpu", max_num_seqs=2))
    assert isinstance(engine, Engine)
    assert "no such architecture" in caplog.text
    with pytest.raises(ModelLoadError):
        opened.engine(EngineConfig(device="cpu", backend="llama.cpp"))


@pytest.mark.usefixtures("llama_cpp")
def test_damaged_weights(gguf_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[: gguf_file.stat().st_size // 2])
    with pytest.raises(ModelLoadError, match=r"cannot load cut\.gguf"):
        LlamaModel([cut])


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"max_num_seqs": 256}, EngineError, "but llama.cpp allows 255"),
        ({"max_model_len": 10**9}, EngineError, "max_model_len"),
        ({"kv_cache_bytes": 10}, OutOfMemoryError, "KV cache"),
    ],
)
def test_settings_it_refuses(
    opened: Opened, settings: dict[str, int], error: type[EngineError], says: str
) -> None:
    with pytest.raises(error, match=says):
        opened.engine(EngineConfig(device="cpu", backend="llama.cpp", **settings))  # type: ignore[arg-type]


@pytest.mark.usefixtures("llama_cpp")
def test_rows_of_several_sequences(gguf_file: Path) -> None:
    """Logits are in the requested order; sequences are copied, cut and cleared."""
    model = LlamaModel([gguf_file])
    context = Context(model, num_cells=64, num_slots=3, max_rows=16)
    ids = [5, 9, 11, 40]
    whole = context.compute(ids, range(4), [0] * 4, [3, 1])
    assert whole.shape == (2, model.vocab_size)
    context.copy(0, 1, 2)
    again = context.compute(ids[2:], [2, 3], [1, 1], [1])
    assert np.abs(again[0] - whole[0]).max() < 1e-2
    context.cut(1, 1)
    mixed = context.compute([ids[1], 7], [1, 0], [1, 2], [1, 0])
    assert np.abs(mixed[1] - whole[1]).max() < 1e-2
    assert context.compute([1], [1], [2], []).shape == (0, model.vocab_size)
    context.clear()
    for start in range(0, 256, 16):  # llama.cpp rounds up to multiples of 256 cells
        context.compute([1] * 16, range(start, start + 16), [0] * 16, [])
    with pytest.raises(EngineError, match="no room"):
        context.compute([1], [0], [1], [])


@pytest.mark.usefixtures("llama_cpp")
def test_bytes_of_a_token(gguf_file: Path) -> None:
    config = TINY_MODELS["llama"].config
    model = LlamaModel([gguf_file])
    heads = config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    assert model.bytes_per_token == config["num_hidden_layers"] * heads * size * 2 * 2
    assert model.architecture == "llama"


@pytest.mark.usefixtures("llama_cpp")
def test_served(opened: Opened, gguf_file: Path) -> None:
    """A stored model answers over HTTP with a fraction of the memory."""
    store = LayoutStore(gguf_file.parents[2])
    key = str(opened.model.digest)
    catalogues = {
        backend: StoreCatalogue(store, EngineConfig(device="cpu", backend=backend, max_num_seqs=2))
        for backend in get_args(Backend)
    }
    needs = {
        backend: catalogue.needs(catalogue.find(key), ModelSettings())
        for backend, catalogue in catalogues.items()
    }
    assert needs["llama.cpp"] < needs["auto"] < needs["mlx"]
    with ModelServer(lambda: ModelPool(catalogues["llama.cpp"]), address="127.0.0.1:0") as server:
        body = {"model": key, "prompt": [5, 6, 7], "max_tokens": 5, "logprobs": 2, "seed": 1,
                "ignore_eos": True}  # fmt: skip
        answers = [
            requests.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            for _ in range(2)
        ]
    choices = [answer["choices"][0] for answer in answers]
    assert choices[0] == choices[1]
    assert len(choices[0]["logprobs"]["tokens"]) == 5
    assert answers[0]["usage"]["completion_tokens"] == 5


@pytest.mark.weights
@pytest.mark.usefixtures("llama_cpp")
def test_real_weights() -> None:
    """SmolLM2 in Q4_1: both backends score a text and continue it alike."""
    files = ModelFiles.from_directory(smollm2_gguf())
    config = EngineConfig(device="cpu", max_num_seqs=2, max_model_len=512)
    llama = LlamaCppEngine(LlamaModel(files.weights), gguf_tokenizer_of(files), config)
    found = []
    for engine in (llama, Engine(load(files, device="cpu"), config)):
        text = "Water boils at 100 degrees. The capital of France is"
        [events] = engine.generate([text], replace(GREEDY, prompt_logprobs=0))
        assert "".join(event.text for event in events).startswith(" Paris")
        entries = events[0].prompt_logprobs or ()
        found.append([entry.logprob for entry in entries if entry is not None])
    assert np.abs(np.array(found[0]) - np.array(found[1])).mean() < 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 0), ("expert_count", 8), ("attention.layer_norm_rms_epsilon", float("nan"))],
)
@pytest.mark.usefixtures("llama_cpp")
def test_what_ends_llama_cpp_ends_no_server(key: str, value: float, tmp_path: Path) -> None:
    tiny = TINY_MODELS["llama"]

    def keys(writer: Any, config: Any) -> None:
        tiny.keys(writer, config)
        writer.kv_data[0].pop(f"llama.{key}", None)
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"llama.{key}", value)

    store = LayoutStore(tmp_path / "store")
    path = replace(tiny, keys=keys).write(tmp_path / "hostile.gguf")
    made = modelpack.package("hostile", PackageRequest(gguf=path), store=store)
    opened = open_model(str(made.digest), store=store, pull=False)
    config = EngineConfig(device="cpu", backend="llama.cpp", kv_cache_bytes=2**22)
    with pytest.raises(ModelLoadError, match=r"ended its process .* \(exit status -6\)"):
        opened.engine(config)


@pytest.mark.usefixtures("llama_cpp")
def test_a_good_model_passes_its_trial(tmp_path: Path) -> None:
    try_out([TINY_MODELS["llama"].write(tmp_path / "good.gguf")])
    cut = tmp_path / "cut.gguf"  # loading reports the error
    cut.write_bytes(b"GGUF")
    try_out([cut])
