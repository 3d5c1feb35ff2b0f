"""A rank's part of an adapter, in this process: messages, refusals, and what is left after them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.distributed.adapters import (
    AdapterParts,
    DividedAdapters,
    pack_layer,
    unpack_layer,
)
from modelpack_engine.distributed.channel import Kind, WireError
from modelpack_engine.distributed.follower import Follower, _Held
from modelpack_engine.distributed.sharding import shard
from modelpack_engine.patches.lora import Matrices
from tests.engine.parallel.test_sharding import group
from tests.engine.serving.tiny import tiny_loaded

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def rank() -> tuple[Follower, list[Any]]:
    """Rank 1 of 2 with the tiny model and slots for adapters, and what it responds."""
    loaded, answers = tiny_loaded(), []
    divisions = shard(loaded.model, loaded.config, group(1, 2))
    channel: Any = SimpleNamespace(
        answer=lambda number, **answer: answers.append((number, answer)),
        refuse=lambda number, error: answers.append((number, str(error))),
    )
    one = Follower(SimpleNamespace(rank=1, mlx=None), channel)  # type: ignore[arg-type]
    one._held = _Held(loaded)
    one._held.adapters = AdapterParts(loaded.model, AdapterRows(), divisions)
    return one, answers


def matrices(inputs: int, outputs: int) -> Matrices:
    mx.random.seed(0)
    return Matrices(mx.random.normal((inputs, 3)), mx.random.normal((3, outputs)))


def place(slot: int, layers: int) -> bytes:
    return json.dumps({"number": 9, "slot": slot, "layers": layers}).encode()


def test_a_rank_keeps_its_part(rank: tuple[Follower, list[Any]]) -> None:
    follower, answers = rank
    q, down = matrices(64, 64), matrices(128, 64)
    for number, (name, whole) in enumerate([(Q, q), (DOWN, down)]):
        follower._handle(Kind.ADAPTER_LAYER, pack_layer(number, name, whole))
    follower._handle(Kind.ADAPTER, place(1, 2))
    assert answers == [(0, {}), (1, {}), (9, {})]
    assert follower._held is not None
    assert follower._held.adapters is not None
    stacks = follower._held.adapters.layers._stacks
    assert mx.array_equal(stacks[Q].slots[1].a, q.a)
    assert mx.array_equal(stacks[Q].slots[1].b, q.b[:, 32:])  # the outputs of rank 1
    assert mx.array_equal(stacks[DOWN].slots[1].a, down.a[64:])  # its inputs
    assert mx.array_equal(stacks[DOWN].slots[1].b, down.b)
    follower._handle(Kind.ADAPTER, place(1, 0))
    assert not stacks[Q].slots


def test_a_layer_that_does_not_arrive_is_not_placed(rank: tuple[Follower, list[Any]]) -> None:
    """Rank 0 hears of it, and the next adapter is not mixed with what is left."""
    follower, answers = rank
    follower._handle(Kind.ADAPTER_LAYER, pack_layer(1, Q, matrices(64, 64)))
    follower._handle(Kind.ADAPTER, place(1, 2))
    follower._handle(Kind.ADAPTER_LAYER, pack_layer(2, "model.layers.7.mlp", matrices(4, 4)))
    follower._handle(Kind.ADAPTER, place(1, 1))
    assert answers[0] == (1, {})
    assert answers[1] == (9, "an adapter of 2 layers, but 1 arrived")
    assert answers[2] == (2, "'model.layers.7.mlp'")
    assert answers[3] == (9, "an adapter of 1 layers, but 0 arrived")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_all_ranks_forget_an_adapter_after_any_error(error: type[BaseException]) -> None:
    loaded, sent = tiny_loaded(), []

    def gather(number: int, **_types: type) -> list[Any]:
        if len(sent) == 2:
            raise error
        return []

    channel: Any = SimpleNamespace(send=lambda *message: sent.append(message), gather=gather)
    divisions = shard(loaded.model, loaded.config, group(0, 2))
    made = DividedAdapters(
        loaded.model, loaded.config, AdapterRows(), 1, divisions, channel, lambda: 9
    )
    with pytest.raises(error):
        made.place(1, {Q: matrices(64, 64), DOWN: matrices(128, 64)})
    assert [kind for kind, _ in sent] == [Kind.ADAPTER_LAYER, Kind.ADAPTER_LAYER, Kind.ADAPTER]
    assert sent[-1][1] == {"number": 9, "slot": 1, "layers": 0}
    assert not made._parts._arriving


def test_the_norms_of_its_part(rank: tuple[Follower, list[Any]]) -> None:
    follower, answers = rank
    q = matrices(64, 64)
    follower._handle(Kind.ADAPTER_NORMS, pack_layer(3, Q, q))
    weight = tiny_loaded().model.model.layers[0].self_attn.q_proj.weight + (q.a @ q.b).T
    ((number, answer),) = answers
    assert (number, answer["rows"]) == (3, list(range(32, 64)))
    expected = mx.sum(mx.square(weight), axis=1)[32:]
    assert mx.allclose(mx.array(answer["squares"]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", pack_layer(1, Q, matrices(4, 4))[:-8]],
    ids=["empty", "no safetensors", "truncated"],
)
def test_bytes_that_are_no_layer(body: bytes) -> None:
    with pytest.raises(WireError, match="the layer of an adapter is invalid"):
        unpack_layer(body)


def test_dora_of_an_embedding_arrives_whole(rank: tuple[Follower, list[Any]]) -> None:
    """Embeddings are not divided: all ranks have the gains of all tokens and outputs."""
    follower, answers = rank
    held = follower._held
    assert held is not None
    assert held.adapters is not None
    path, whole = "model.embed_tokens", matrices(257, 64)
    whole = replace(whole, gain=mx.ones(64), token_gain=mx.arange(257.0)[:, None])
    body = pack_layer(1, path, whole)
    assert unpack_layer(body)[2].arrays().keys() == whole.arrays().keys()
    follower._handle(Kind.ADAPTER_LAYER, body)
    (kept,) = held.adapters._arriving.values()
    for name, array in whole.arrays().items():
        assert mx.array_equal(kept.arrays()[name], array)
    follower._handle(Kind.ADAPTER, place(1, 1))
    assert answers == [(1, {}), (9, {})]


@given(st.data())
def test_a_layer_that_was_cut_or_changed_raises_no_other_error(data: st.DataObject) -> None:
    body = bytearray(pack_layer(1, Q, matrices(4, 4)))
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):
        number, layer, found = unpack_layer(bytes(body))
        assert isinstance(number, int)
        assert isinstance(layer, str)
        assert found.nbytes > 0


def test_a_model_without_adapters_gets_none(rank: tuple[Follower, list[Any]]) -> None:
    follower, _ = rank
    assert follower._held is not None
    follower._held.adapters = None
    with pytest.raises(WireError, match="ADAPTER for a model without adapters"):
        follower._handle(Kind.ADAPTER, place(1, 0))
