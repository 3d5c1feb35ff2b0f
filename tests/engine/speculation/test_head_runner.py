"""Drafts by fused kernels on an emulated GPU: the same as those of the head's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from modelpack_engine.kernels import grouped, launch, operations
from modelpack_engine.layers import dots, drafts, kernels, matmul, packed
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.sampling.delivery import Delivery
from modelpack_engine.speculation import head_runner
from modelpack_engine.speculation.eagle import _Launched
from modelpack_engine.speculation.head_layers import FusedLayer, HeadLayer
from modelpack_engine.speculation.head_runner import HeadDraft, HeadRunner, Rows
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.speculation.test_eagle import DRAFT_VOCAB, VOCAB, random_head

pytestmark = pytest.mark.long

TOKENS = 3
VERDICTS = (
    drafts.accepted_verdict, drafts.pick_verdict, drafts.norm_verdict, drafts.beside_verdict,
    kernels.verdict,
    dots.verdict, dots.normed_verdict,
)  # fmt: skip


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """The emulator runs a kernel when its graph is built, on arrays that have values."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(operations, "_verdicts", {})
    monkeypatch.setattr(operations, "_WIDTH", 4)
    monkeypatch.setattr(operations, "_SLOTS", 256)
    with emulated(monkeypatch, *VERDICTS) as found:
        yield found


def embeddings(*, quantised: bool = False) -> Any:
    table = nn.Embedding(VOCAB, 64)
    table.weight = mx.random.normal((VOCAB, 64), key=mx.random.key(2))
    return table.to_quantized(32, 8) if quantised else table


def head(**changed: Any) -> EagleHead:
    return random_head(num_heads=2, num_kv_heads=1, head_dim=32, **changed)


def runner(made: EagleHead, embed: Any) -> HeadRunner:
    return HeadRunner(
        made, embed, num_tokens=TOKENS, max_tokens=512, probabilities=False
    )  # fmt: skip


def drafted(found: HeadRunner) -> list[list[int]]:
    """Draft for two sequences: one has read 20 rows, and both have proposals; then once more."""
    states = mx.random.normal((40, 64), key=mx.random.key(3))
    given = [(7 * n) % VOCAB for n in range(40)]
    found.read(Rows(1, 0, list(range(20)), states[:20]), given[1:21], 64)
    rows = [
        Rows(0, 0, [5, 6, 7, 8], states[5:9], (given[6], given[7], 3)),
        Rows(1, 20, [20, 21], states[20:22], (given[21],)),
    ]
    ids = mx.array([given[6:10], [given[21], 9, 0, 0]], mx.int32)
    first = found.draft(rows, ids).found
    counts = [3, 2]
    assert first[:, 0].tolist() == counts
    last = [
        Rows(each.region, each.length + count, [each.positions[0] + count], states[n : n + 1])
        for n, (each, count) in enumerate(zip(rows, counts, strict=True))
    ]
    return [*first.tolist(), *found.draft(last, mx.array([[11], [12]], mx.int32)).found.tolist()]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_fused_layers_draft_the_same(host: Host, normed: bool, quantised: bool) -> None:
    made, embed = head(norm_before_residual=normed), embeddings(quantised=quantised)
    fused = runner(made, embed)
    assert isinstance(fused._layer, FusedLayer)
    plain = runner(made, embed)
    plain._layer = HeadLayer(made, embed)
    assert drafted(fused) == drafted(plain)
    bodies = {body for body, _ in host.calls}
    assert {"accepted", "norm_beside", "rotate", "decode", "add_norm", "pick"} <= bodies


def test_few_kernels_for_each_token(host: Host) -> None:
    """Beside the five matmuls: their number decides how long a draft takes."""
    fused = runner(head(), embeddings())
    rows = [Rows(0, 0, [0], mx.zeros((1, 64)))]
    fused.draft(rows, mx.array([[1]], mx.int32))
    host.calls.clear()
    fused.draft(rows, mx.array([[1]], mx.int32))
    bodies = [body for body, _ in host.calls]
    each = ["norm_beside", "rotate", "decode", "add_norm", "swiglu", "add_norm", "pick"]
    assert [body for body in bodies if body != "accepted"] == each * TOKENS


def test_nine_kernels_for_each_token_on_cuda(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matmuls of one row by our kernels, which also add and norm it: the same tokens."""
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    # On a CPU, MLX rotates in bfloat16, with an error that the verdict does not allow.
    monkeypatch.setattr(kernels, "verdict", lambda _: None)
    monkeypatch.setattr(packed, "has_warpgroups", lambda: False)
    monkeypatch.setattr(matmul, "_takes", lambda *_: False)  # has no emulated kernel
    monkeypatch.setattr(grouped, "takes", lambda *_: False)
    made, embed = head(), embeddings()
    made.set_dtype(mx.bfloat16)
    embed.set_dtype(mx.bfloat16)
    # With these, the two most likely tokens differ by more than 16 bits round.
    given = mx.random.normal((3, 64), key=mx.random.key(4)).astype(mx.bfloat16)

    def drafted_from(found: HeadRunner, states: mx.array) -> list[list[int]]:
        first = found.draft([Rows(0, 0, [0, 1], states[:2], (7,))], mx.array([[7, 9]], mx.int32))
        rows = [Rows(0, 2, [2], states[2:])]
        second = found.draft(rows, mx.array([[5]], mx.int32))
        return [*first.found.tolist(), *second.found.tolist()]  # type: ignore[list-item]

    fused = runner(made, embed)
    assert isinstance(fused._layer, FusedLayer)
    ours = drafted_from(fused, given)
    # MLX would not run the norms that the matmuls' kernels compute; the emulator does.
    bodies = [body for body, _ in host.calls if body != "add_norm"]
    each = ["norm_beside", "dots", "rotate", "decode", *["dots"] * 4, "pick"]
    assert bodies[-len(each) :] == each
    exact = head()
    exact.load_weights(
        [(n, a.astype(mx.float32)) for n, a in tree_flatten(made.parameters()) if n != "d2t"],
        strict=False,
    )
    embed.set_dtype(mx.float32)
    plain = runner(exact, embed)
    plain._layer = HeadLayer(exact, embed)
    assert ours == drafted_from(plain, given.astype(mx.float32))


def test_regions_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number and size: keys and values are kept, and drafts after them stay the same."""
    made, embed = head(), embeddings()
    expected = drafted(runner(made, embed))
    monkeypatch.setattr(head_runner, "_FEWEST_TOKENS", 16)
    small = runner(made, embed)
    states = mx.random.normal((40, 64), key=mx.random.key(3))
    small.read(Rows(0, 0, [0], states[:1]), [1], 1)
    before = small._pools.keys.shape[0]
    assert before == 16
    assert drafted(small) == expected
    assert small._pools.keys.shape[0] == 2 * 128
    small.clear()
    assert small._pools.keys.size == 0
    assert drafted(small) == expected


def test_regions_end_with_the_longest_sequence() -> None:
    """Not with the next power of two."""
    found = HeadRunner(head(), embeddings(), num_tokens=TOKENS, max_tokens=600, probabilities=False)
    found.reserve(1, 500)
    assert found._pools.keys.shape[0] == 512
    found.reserve(1, 595)
    assert found._pools.keys.shape[0] == 608


def test_states_of_another_type(host: Host) -> None:
    """Norms in float32 make the states of a model in 16 bits float32."""
    made, embed = head(), embeddings()
    made.set_dtype(mx.float16)
    embed.set_dtype(mx.float16)
    fused = runner(made, embed)
    assert isinstance(fused._layer, FusedLayer)
    states = mx.random.normal((1, 64), key=mx.random.key(3)).astype(mx.float16)
    ids = mx.array([[200]], mx.int32)
    expected = fused.draft([Rows(0, 0, [0], states)], ids).found.tolist()
    wide = states.astype(mx.float32)
    assert fused.draft([Rows(0, 0, [0], wide)], ids).found.tolist() == expected


@pytest.mark.parametrize(
    ("body", "edit", "verdict"),
    [
        ("accepted", ("last + 1 + i", "last + i"), lambda: drafts.accepted_verdict()),
        ("pick", ("i < COLUMNS", "i + 1 < COLUMNS"), lambda: drafts.pick_verdict(mx.float32, 1000)),
        ("norm_beside", ("PA_X % 2", "0"), lambda: drafts.norm_verdict(mx.float32)),
        ("beside", ("which == 1 ? b", "which == 1 ? c"), lambda: drafts.beside_verdict(mx.float16)),
    ],
)
def test_verdicts_name_a_wrong_kernel(
    host: Host, body: str, edit: tuple[str, str], verdict: Any
) -> None:
    assert verdict() is None
    for each in VERDICTS:
        each.cache_clear()

    def broken(name: str, source: str) -> str:
        return source.replace(*edit) if name == body else source

    host.break_by(broken)
    assert verdict() is not None


def test_a_draft_is_read_where_it_was_delivered() -> None:
    """As on CUDA, whose kernel writes to the host's memory; here, an array stands for it."""
    memory = np.array([2, 7, 8, 1, 9, 10], np.int32)
    draft = HeadDraft(mx.zeros((2, 3), mx.int32), None, Delivery(mx.zeros((1,)), memory))
    launched = _Launched(draft)
    assert launched.read(1) == (1, ([9, 10], []))
    assert launched.read(0) == (2, ([7, 8], []))


def test_a_type_of_16_bits(host: Host) -> None:
    for dtype in (mx.bfloat16, mx.float16):
        assert drafts.norm_verdict(dtype) is None
        assert drafts.pick_verdict(dtype, DRAFT_VOCAB) is None
