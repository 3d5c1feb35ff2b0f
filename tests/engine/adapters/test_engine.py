"""Adapters of an engine: requests by name, the prefix cache, eviction, memory, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from modelpack.errors import NotFoundError
from modelpack.formats.adapter import Adapter, AdapterError, read_adapter
from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.engine import Engine
from modelpack_engine.errors import RequestError
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.patches.lora import LoRALayers, Matrices
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.adapters import random_pairs, write_mlx, write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.serving.test_engine import GREEDY, prompts, run, tokens
from tests.engine.serving.tiny import tiny_engine, tiny_loaded, tiny_model
from tests.engine.zoo.catalogue import CATALOGUE

PROMPT = prompts(4)[3]


def adapter(directory: Path, seed: int, *, rank: int = 2) -> Adapter:
    """Return an adapter of all linear layers of the tiny model."""
    targets = linears(tiny_model())
    return read_adapter(write_peft(directory / str(seed), targets, rank=rank, seed=seed, size=0.3))


def merged_tokens(one: Adapter | None, prompt: list[int], **settings: object) -> list[int]:
    """Return the greedy output of an engine whose model has the adapter merged."""
    loaded = tiny_loaded()
    if one is not None:
        merge(loaded.model, read_layers(one, loaded.model))
    engine = tiny_engine(**settings)
    engine = Engine(loaded, engine.config)
    return tokens(engine.generate([prompt], GREEDY)[0])


def ask(engine: Engine, names: list[str | None], prompt: list[int]) -> list[list[int]]:
    """Return the output of the same prompt with each of these adapters, in one batch."""
    for index, name in enumerate(names):
        engine.add_request(str(index), EngineRequest(prompt, GREEDY, adapter=name))
    found = run(engine)
    return [tokens(found[str(index), 0]) for index in range(len(names))]


def test_a_closed_engine_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Layers whose calls are still replaced would not be fused by the next engine."""
    loaded = tiny_loaded()
    before = classes(loaded.model)
    config = tiny_engine(max_loras=1).config
    one, found = adapter(tmp_path, 1), []
    for _ in range(2):
        engine = Engine(loaded, config)
        engine.add_adapter("one", one, "digest of one")
        found.append(ask(engine, ["one", None], PROMPT))
        assert classes(loaded.model) != before
        engine.close()
        assert classes(loaded.model) == before
    assert found[0] == found[1]


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_an_engine_that_is_closed_leaves_another_one_alone(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    config = tiny_engine(max_loras=1).config
    other, engine = Engine(loaded, config), Engine(loaded, config)
    engine.add_adapter("one", adapter(tmp_path, 1), "digest of one")
    found = ask(engine, ["one", None], PROMPT)
    assert found[0] != found[1]
    other.close()
    assert ask(engine, ["one", None], PROMPT) == found


def test_a_closed_engine_frees_adapters(tmp_path: Path) -> None:
    engine = tiny_engine(max_loras=1)
    engine.add_adapter("one", adapter(tmp_path, 1, rank=64), "digest of one")
    ask(engine, ["one", None], PROMPT)
    assert engine._adapters is not None
    layers = engine._adapters._layers
    assert layers.arrays()
    engine.close()
    assert layers.arrays() == []
    engine.close()  # again


def test_an_engine_that_cannot_be_made_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = tiny_loaded()
    before, config = classes(loaded.model), tiny_engine(max_loras=1).config

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("modelpack_engine.engine.make_speculator", fail)
    with pytest.raises(MemoryError):
        Engine(loaded, config)
    assert classes(loaded.model) == before
    monkeypatch.setattr("modelpack_engine.runner.paged.PagedRunner._allocate", fail)
    with pytest.raises(MemoryError):
        Engine(loaded, config)
    assert classes(loaded.model) == before


def test_requests_by_name(tmp_path: Path) -> None:
    one, two = adapter(tmp_path, 1), adapter(tmp_path, 2, rank=5)
    engine = tiny_engine(max_loras=2)
    before = engine.memory_bytes
    engine.add_adapter("one", one, "digest of one")
    engine.add_adapter("two", two, "digest of two")
    assert engine.memory_bytes > before
    expected = [merged_tokens(each, PROMPT) for each in (one, two, None)]
    assert len({str(each) for each in expected}) == 3
    assert ask(engine, ["one", "two", None], PROMPT) == expected
    engine.remove_adapter("one")
    engine.remove_adapter("two")
    assert engine.memory_bytes == before
    assert ask(engine, [None], PROMPT) == expected[2:]


def test_prefixes_are_not_shared_between_adapters(tmp_path: Path) -> None:
    engine = tiny_engine(max_loras=2)
    engine.add_adapter("one", adapter(tmp_path, 1), "a")
    (first,) = ask(engine, [None], PROMPT)
    assert engine.stats().cached_tokens == 0
    (second,) = ask(engine, ["one"], PROMPT)
    assert engine.stats().cached_tokens == 0
    assert first != second
    assert ask(engine, ["one"], PROMPT) == [second]
    assert engine.stats().cached_tokens == 32
    # Another adapter of the same name does not find the prefixes of the first.
    engine.add_adapter("one", adapter(tmp_path, 2), "b")
    assert ask(engine, ["one"], PROMPT) == [merged_tokens(adapter(tmp_path, 2), PROMPT)]
    assert engine.stats().cached_tokens == 32


def test_a_client_with_several_adapters_is_one_owner(tmp_path: Path) -> None:
    """Its requests wait in one queue, whichever adapters they name."""
    engine = tiny_engine(max_loras=2, max_num_seqs=1)
    for seed, name in enumerate(("one", "two"), start=1):
        engine.add_adapter(name, adapter(tmp_path, seed), name)
    requests = [(b"alice", "one"), (b"alice", "two"), (b"alice", None), (b"bob", None)]
    for index, (owner, name) in enumerate(requests):
        request = EngineRequest(PROMPT, GREEDY, cache_salt=owner, owner=owner, adapter=name)
        engine.add_request(str(index), request)
    order: dict[str, None] = {}
    while engine.has_work:
        order |= dict.fromkeys(event.request_id for event in engine.step())
    assert list(order) == ["0", "3", "1", "2"]


@pytest.mark.parametrize("end", ["finished", "aborted", "never started"])
def test_an_adapter_keeps_no_sequence_that_has_ended(tmp_path: Path, end: str) -> None:
    engine = tiny_engine(max_loras=2)
    engine.add_adapter("a", adapter(tmp_path, 1), "a")
    assert engine._adapters is not None
    known = engine._adapters.find("a")
    engine.add_request("1", EngineRequest(PROMPT, GREEDY, adapter="a"))
    assert known.waiting
    if end == "aborted":
        engine.step()
        assert known.started
    if end != "finished":
        engine.abort("1")
    run(engine)
    assert not known.waiting
    assert not known.started


def test_the_least_recently_used_adapter_is_evicted(tmp_path: Path) -> None:
    engine = tiny_engine(max_loras=2)
    known = {name: adapter(tmp_path, seed) for seed, name in enumerate("abc", start=1)}
    for name, one in known.items():
        engine.add_adapter(name, one, name)
    adapters = engine._adapters
    assert adapters is not None
    assert adapters.loaded() == ["a", "b"]
    ask(engine, ["b"], PROMPT)
    memory = engine.memory_bytes
    expected = merged_tokens(known["c"], PROMPT)
    assert ask(engine, ["c"], PROMPT) == [expected]
    assert adapters.loaded() == ["b", "c"]
    assert engine.memory_bytes == memory
    assert ask(engine, ["a", "c"], PROMPT) == [merged_tokens(known["a"], PROMPT), expected]
    assert sorted(adapters.loaded()) == ["a", "c"]
    assert adapters.names() == ["a", "b", "c"]


@pytest.mark.parametrize("end", ["step", "abort", "failure"])
def test_a_removed_adapter_serves_its_requests_to_the_end(tmp_path: Path, end: str) -> None:
    """Requests keep its matrices; new ones do not find it, and get another one of its name."""
    engine = tiny_engine(max_loras=2)
    without = engine.memory_bytes
    one, two = adapter(tmp_path, 1), adapter(tmp_path, 2)
    engine.add_adapter("a", one, "one")
    size = engine.memory_bytes - without
    assert size > 0
    engine.add_request("0", EngineRequest(PROMPT, GREEDY, adapter="a"))
    found = engine.step()
    engine.remove_adapter("a")
    with pytest.raises(NotFoundError, match="no such adapter: a"):
        engine.add_request("1", EngineRequest(PROMPT, GREEDY, adapter="a"))
    engine.add_adapter("a", two, "two")
    assert engine.memory_bytes == without + 2 * size
    engine.add_request("1", EngineRequest(PROMPT, GREEDY, adapter="a"))
    if end == "step":
        events = [*found, *(event for events in run(engine).values() for event in events)]
        ids = {
            name: [i for event in events if event.request_id == name for i in event.token_ids]
            for name in "01"
        }
        assert ids == {"0": merged_tokens(one, PROMPT), "1": merged_tokens(two, PROMPT)}
    elif end == "abort":
        engine.abort("0")
    else:
        engine.fail_all("it failed")
    assert engine.memory_bytes == without + size
    engine.abort("1")
    engine.remove_adapter("a")
    assert engine.memory_bytes == without


def test_a_refused_request_does_not_hold_its_adapter(tmp_path: Path) -> None:
    engine = tiny_engine(max_loras=1)
    engine.add_adapter("a", adapter(tmp_path, 1), "a")
    with pytest.raises(RequestError, match="max_tokens"):
        engine.add_request("0", EngineRequest(PROMPT, SamplingParams(max_tokens=0), adapter="a"))
    engine.remove_adapter("a")


def test_unknown_and_disabled_adapters(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such adapter: x"):
        tiny_engine(max_loras=1).add_request("0", EngineRequest(PROMPT, GREEDY, adapter="x"))
    with pytest.raises(RequestError, match="without LoRA adapters"):
        tiny_engine().add_request("0", EngineRequest(PROMPT, GREEDY, adapter="x"))
    with pytest.raises(RequestError, match="without LoRA adapters"):
        tiny_engine().add_adapter("x", adapter(tmp_path, 1), "x")


def test_choices_have_the_adapter(tmp_path: Path) -> None:
    engine = tiny_engine(max_loras=1)
    one = adapter(tmp_path, 1)
    engine.add_adapter("one", one, "one")
    engine.add_request("0", EngineRequest(PROMPT, GREEDY, n=3, adapter="one"))
    found = run(engine)
    expected = merged_tokens(one, PROMPT)
    assert [tokens(found["0", index]) for index in range(3)] == [expected] * 3


Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
A, B = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"model.layers.0.self_attn.w_proj": (64, 64)}, "target .*w_proj is not in the model"),
        ({"model.layers.9.self_attn.q_proj": (64, 64)}, r"target .*9.*q_proj is not in the model"),
        ({"model.norm": (64, 64)}, "target model.norm is not in the model"),
        ({Q: (64, 32)}, r"a weight of shape \[64, 32\], but the model has \[64, 64\]"),
    ],
)
def test_adapters_that_do_not_fit(
    targets: Mapping[str, tuple[int, int]], message: str, tmp_path: Path
) -> None:
    engine = tiny_engine(max_loras=1)
    with pytest.raises(AdapterError, match=message):
        engine.add_adapter("x", read_adapter(write_peft(tmp_path, targets)), "x")
    with pytest.raises(NotFoundError, match="no such adapter: x"):
        engine.remove_adapter("x")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    bad = {A: np.full((2, 64), value, np.float32), B: np.zeros((64, 2), np.float32)}
    path = write_peft(tmp_path, {Q: (64, 64)}, extra=bad)
    with pytest.raises(AdapterError, match="values that are not finite"):
        tiny_engine(max_loras=1).add_adapter("x", read_adapter(path), "x")


@pytest.mark.parametrize("write", [write_mlx, write_peft])
def test_embeddings(write: Callable[..., Path], tmp_path: Path) -> None:
    """The tiny model's head is its embedding, so that the adapter changes both."""
    path = write(tmp_path / "a", {"model.embed_tokens": (64, 257)}, rank=3, size=0.5)
    other = write(tmp_path / "b", {"model.embed_tokens": (64, 257)}, rank=2, seed=4, size=0.5)
    engine = tiny_engine(max_loras=2)
    adapters = [read_adapter(path), read_adapter(other)]
    for name, one in zip("ab", adapters, strict=True):
        engine.add_adapter(name, one, name)
    expected = [merged_tokens(one, PROMPT) for one in (*adapters, None)]
    assert len({str(each) for each in expected}) == 3
    assert ask(engine, ["a", "b", None], PROMPT) == expected
    assert ask(engine, ["b"], PROMPT) == expected[1:2]


def test_dora_of_embeddings(tmp_path: Path) -> None:
    """Requests with PEFT's magnitudes of outputs and mlx-lm's of tokens share a batch."""
    targets, weight = {"model.embed_tokens": (64, 257)}, tiny_model().model.embed_tokens.weight
    name = "base_model.model.model.embed_tokens.lora_magnitude_vector"
    by_output = {
        name: np.array(mx.linalg.norm(weight, axis=0)) * np.linspace(0.5, 2, 64, dtype="f")
    }
    by_token = {
        "model.embed_tokens.m": np.array(mx.linalg.norm(weight, axis=1))
        * np.linspace(0.5, 2, 257, dtype="f")
    }
    peft, mlx = tmp_path / "peft", tmp_path / "mlx"
    lora = write_peft(tmp_path / "lora", targets, rank=2, seed=4, size=0.2)
    write_peft(peft, targets, rank=3, size=0.2, use_dora=True, extra=by_output)
    write_mlx(mlx, targets, rank=2, size=0.2, fine_tune_type="dora", extra=by_token)
    adapters = [read_adapter(path) for path in (peft, mlx, lora)]
    engine = tiny_engine(max_loras=3)
    for key, one in zip("abc", adapters, strict=True):
        engine.add_adapter(key, one, key)
    expected = [merged_tokens(one, PROMPT) for one in (*adapters, None)]
    assert len({str(each) for each in expected}) == 4
    assert ask(engine, ["a", "b", "c", None], PROMPT) == expected
    assert ask(engine, ["a", "a"], PROMPT) == [expected[0]] * 2
    assert ask(engine, ["b"], PROMPT) == expected[1:2]


def test_embeddings_of_both_formats_are_equal(tmp_path: Path) -> None:
    """PEFT's matrices have another order, and the base's weight beside them is not read."""
    targets = {"model.embed_tokens": (64, 257), Q: (64, 64)}
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": np.zeros((257, 64), "f")}
    peft = read_adapter(write_peft(tmp_path / "peft", targets, rank=3, size=0.5, extra=copy))
    mlx = read_adapter(write_mlx(tmp_path / "mlx", targets, rank=3, size=0.5))
    first, second = (read_layers(one, tiny_model()) for one in (peft, mlx))
    assert first.keys() == second.keys() == targets.keys()
    for name, one in first.items():
        assert mx.array_equal(one.a, second[name].a)
        assert mx.array_equal(one.b, second[name].b)


def test_patterns_of_ranks_and_alphas(tmp_path: Path) -> None:
    """Modules with ranks and alphas of their own compute as in an adapter where all have these."""
    wide = random_pairs({Q: (64, 64)}, 6, seed=7, size=0.4)[Q]
    extra = {A: wide[0], B: wide[1]}
    patterns = {"rank_pattern": {Q: 6}, "alpha_pattern": {"q_proj": 18.0}}
    both = write_peft(tmp_path / "both", {Q: (64, 64), K: (32, 64)}, extra=extra, **patterns)
    one = write_peft(tmp_path / "one", {Q: (64, 64)}, rank=6, extra=extra, lora_alpha=18.0)
    layers = read_layers(read_adapter(both), tiny_model())
    (wanted,) = read_layers(read_adapter(one), tiny_model()).values()
    assert mx.array_equal(layers[Q].b, wanted.b)
    assert mx.array_equal(layers[Q].a, wanted.a)
    assert (layers[Q].a.shape, layers[K].a.shape) == ((64, 6), (64, 2))
    assert mx.allclose(layers[Q].b, 3.0 * mx.array(wide[1].T))

    engine = tiny_engine(max_loras=1)
    engine.add_adapter("both", read_adapter(both), "both")
    expected = merged_tokens(read_adapter(both), PROMPT)
    assert expected != merged_tokens(None, PROMPT)
    assert ask(engine, ["both", None], PROMPT) == [expected, merged_tokens(None, PROMPT)]


def test_quantised_base(tmp_path: Path) -> None:
    """An adapter of a quantised model computes as with the same weights unpacked and merged."""
    one, model = adapter(tmp_path, 1), tiny_model()
    nn.quantize(model, group_size=32, bits=8)
    layers, layer = read_layers(one, model), model.model.layers[0].self_attn.q_proj
    dense = nn.Linear(64, 64, bias=False)
    dense.weight = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 8)
    merge(dense_only := nn.Sequential(dense), {"layers.0": layers[Q]})
    rows = AdapterRows()
    loras = LoRALayers(model, rows)
    loras.set(1, layers)
    x = mx.random.normal((3, 1, 64))
    rows.begin([1, 1, 1])
    assert mx.allclose(layer(x), dense_only(x), atol=1e-4)
    rows.begin([0, 1, -1])
    assert mx.allclose(layer(x)[1], dense_only(x)[1], atol=1e-4)
    rows.begin([])
    without = layer(x)
    assert not mx.allclose(without, dense_only(x), atol=1e-2)
    loras.undo()
    merge(model, {Q: layers[Q]})
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear), "merged layers are dense"
    assert isinstance(model.model.layers[0].self_attn.k_proj, nn.QuantizedLinear)
    assert mx.allclose(layer(x), dense_only(x), atol=1e-4)


def test_experts_that_are_modules(tmp_path: Path) -> None:
    """PEFT's modules of single experts are stacked; other experts have no adapter."""
    configuration = next(each for each in CATALOGUE if each.id == "mixtral")
    model = configuration.build()
    block = "model.layers.1.block_sparse_moe"
    count, outputs, inputs = model.model.layers[
        1
    ].block_sparse_moe.switch_mlp.gate_proj.weight.shape
    path = write_peft(tmp_path, {f"{block}.experts.2.w1": (outputs, inputs)})
    one = read_adapter(path)
    ((name, found),) = read_layers(one, model).items()
    assert name == f"{block}.switch_mlp.gate_proj"
    assert isinstance(found, Matrices)
    assert found.a.shape == (count, inputs, 2)
    used = mx.any(found.a != 0, axis=(1, 2)).tolist()
    assert used == [index == 2 for index in range(count)]
    bad = read_adapter(write_peft(tmp_path, {f"{block}.experts.{count}.w1": (outputs, inputs)}))
    with pytest.raises(AdapterError, match=f"the model has {count} experts"):
        read_layers(bad, model)
