"""Adapters in compiled steps and in fused layers give the logits of layers that run one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe

from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.config import EngineConfig
from modelpack_engine.core import sequence as sequences
from modelpack_engine.core.batch import build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.kernels import launch, operations
from modelpack_engine.kernels.sources import text
from modelpack_engine.layers import adapters, expert_kernels, kernels
from modelpack_engine.patches.lora import EXPERTS, LINEARS, LoRALayers, Matrices
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_runner import make_runner
from modelpack_engine.runner.paged import PagedRunner
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.runner.models import tiny_llama, token_ids
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.specimen import make_specimen

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], list(range(1, 41)), [7], list(range(50, 10, -1))]
#: The adapter of each prompt: two, and the base.
SLOTS = (1, 0, 2, 1)


def matrices(
    model: nn.Module, seed: int, rank: int = 2, only: str = "", *, gain: bool = False
) -> dict[str, Matrices]:
    """Return an adapter of the linear layers whose name ends in `only`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LINEARS) and name.endswith(only):
            outputs, inputs = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                inputs = inputs * 32 // module.bits
            keys = mx.random.split(mx.random.key(seed * 1000 + len(found)), 3)
            a = 0.3 * mx.random.normal((inputs, rank), key=keys[0])
            b = 0.3 * mx.random.normal((rank, outputs), key=keys[1])
            gains = mx.random.uniform(0.5, 1.5, (outputs,), key=keys[2]) if gain else None
            found[name] = Matrices(a, b, gains)
    return found


def runner_of(model: nn.Module, **choices: bool) -> PagedRunner:
    runner = make_runner(model, num_blocks=64, buckets=FEW, **{"exact": False, **choices})
    assert isinstance(runner, PagedRunner)
    assert runner.notes == ()
    return runner


def logits(runner: PagedRunner, slots: Sequence[int] = SLOTS, steps: int = 6) -> list[mx.array]:
    """Serve the prompts with these adapters, adding one at each step; return each step's logits."""
    sizes = Sizes(64, 128, 48, FEW)
    scheduler = Scheduler(sizes.scheduler_config(EngineConfig(max_num_seqs=8)), BlockManager(64))
    waiting = [
        sequences.Sequence(
            f"r{index}", prompt, SamplingParams(max_tokens=32), adapter_slot=slot,
            cache_salt=b"%d" % slot,
        )
        for index, (prompt, slot) in enumerate(zip(PROMPTS, slots, strict=True))
    ]  # fmt: skip
    found = []
    for _ in range(steps):
        if waiting:
            scheduler.add(waiting.pop(0))
        output = scheduler.schedule()
        assert output is not None
        batch = build_batch(output, None, FEW, 16)
        assert runner.is_compiled(batch) == (runner.compiled is not None)
        logits = runner.forward(batch, token_ids(batch))
        mx.eval(logits, runner.pools())
        found.append(logits[: len(batch.sample_rows)])  # rows of padding may follow
        scheduler.submitted(output)
        scheduler.collect(output, [(5 * len(found) + i) % 60 for i in range(len(output.sampled))])
    return found


def same(one: list[mx.array], other: list[mx.array]) -> bool:
    return all(mx.allclose(a, b, atol=2e-3).item() for a, b in zip(one, other, strict=True))


Adapters = Mapping[int, Mapping[str, Matrices]]


def expected(by_slot: Adapters, slots: Sequence[int] = SLOTS) -> list[mx.array]:
    """Return the logits of an uncompiled runner."""
    model = tiny_llama(head_dim=32)
    runner = runner_of(model, compiled=False)
    loras = LoRALayers(model, runner.adapter_rows)
    for slot, layers in by_slot.items():
        loras.set(slot, layers)
    return logits(runner, slots)


@pytest.mark.long
def test_a_graph_serves_dora_of_embeddings() -> None:
    """Gains of outputs and of tokens, of the embedding and of the head that it is too."""
    model, path = tiny_llama(head_dim=32), "model.embed_tokens"
    tokens, width = model.model.embed_tokens.weight.shape

    def of(seed: int, *shape: int) -> dict[str, Matrices]:
        keys = mx.random.split(mx.random.key(seed), 3)
        a, b = mx.random.normal((tokens, 2), key=keys[0]), mx.random.normal((2, width), key=keys[1])
        values = mx.random.uniform(0.5, 1.5, shape or (1,), key=keys[2])
        gain = {} if not shape else {("gain", "token_gain")[len(shape) - 1]: values}
        return {path: Matrices(0.3 * a, 0.3 * b, **gain)}

    runner = runner_of(model, compiled=True)
    loras = LoRALayers(model, runner.adapter_rows)
    by_output, by_token = of(1, width), of(2, tokens, 1)
    for pair in ((by_output, by_token), (by_token, by_output), (of(3), by_token), (by_output, {})):
        for slot, layers in enumerate(pair, 1):
            loras.set(slot, layers)
        found = logits(runner)
        assert same(found, expected(dict(enumerate(pair, 1))))
        assert not same(found, expected({}, (0, 0, 0, 0)))


@pytest.mark.parametrize("gain", [False, True], ids=["lora", "dora"])
def test_a_graph_serves_whichever_adapters_are_in_memory(gain: bool) -> None:
    model = tiny_llama(head_dim=32)
    runner = runner_of(model, compiled=True)
    assert runner.compiled is not None
    loras = LoRALayers(model, runner.adapter_rows)
    one, two, three = (matrices(model, seed, rank=4, gain=gain) for seed in (1, 2, 3))
    loras.set(1, one)
    loras.set(2, two)
    base = expected({}, (0, 0, 0, 0))
    assert same(logits(runner, (0, 0, 0, 0)), base)
    first = logits(runner)
    assert same(first, expected({1: one, 2: two}))
    assert not same(first, base)
    graphs = len(runner.compiled._graphs)
    loras.set(1, three)
    assert same(logits(runner), expected({1: three, 2: two}))
    loras.set(2, {})
    assert same(logits(runner), expected({1: three, 2: {}}))
    assert len(runner.compiled._graphs) == graphs
    # Another rank has matrices of another shape, and other layers another graph.
    loras.set(2, matrices(model, 4, rank=7, gain=gain))
    assert same(logits(runner), expected({1: three, 2: matrices(model, 4, rank=7, gain=gain)}))
    assert len(runner.compiled._graphs) == graphs
    few = matrices(model, 5, only="v_proj")
    loras.set(1, few)
    loras.set(2, few)
    assert same(logits(runner), expected({1: few, 2: few}))
    assert len(runner.compiled._graphs) > graphs
    loras.undo()
    assert same(logits(runner, (0, 0, 0, 0)), base)


def test_one_adapter_for_all_rows() -> None:
    model = tiny_llama(head_dim=32)
    runner = runner_of(model, compiled=True)
    loras = LoRALayers(model, runner.adapter_rows)
    loras.set(1, one := matrices(model, 1))
    assert same(logits(runner, (1, 1, 1, 1)), expected({1: one}, (1, 1, 1, 1)))


def test_a_graph_of_joint_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph computes with the matrices that it is given, jointly and layer by layer."""
    monkeypatch.setattr(adapters, "verdict", lambda _: None)
    model, rows = nn.Module(), AdapterRows()
    model.one, model.two = nn.Linear(32, 24, bias=False), nn.Linear(32, 16, bias=False)
    joint = rows.join(model.one, model.two)
    loras = LoRALayers(model, rows)

    def compute(x: mx.array, slots: mx.array, arrays: list[mx.array]) -> list[mx.array]:
        rows.trace(slots)
        with loras.replaced(arrays):
            assert joint.matrices is not None
            a, b = joint.matrices
            rank = b.shape[1]
            inner = (x[:, None] @ a[slots].swapaxes(1, 2)).reshape(len(x), 2, 1, rank)
            both = [inner[:, 0] @ b[slots][..., :24], inner[:, 1] @ b[slots][..., 24:]]
            added = mx.concatenate(both, axis=-1)[:, 0]
            made = mx.concatenate([model.one(x), model.two(x)], axis=-1)
        rows.begin([])
        return [added, made]

    graph = mx.compile(compute)
    x, slots = mx.random.normal((3, 32), key=mx.random.key(1)), mx.array([1, 0, 1])
    base = x @ mx.concatenate([model.one.weight, model.two.weight]).T
    for seed in (1, 2):
        loras.set(1, layers := matrices(model, seed, rank=5))
        wanted = [x @ layers[name].a @ layers[name].b for name in ("one", "two")]
        delta = mx.concatenate(wanted, axis=-1) * (slots > 0)[:, None]
        added, made = graph(x, slots, loras.arrays())
        assert mx.allclose(added, delta, atol=1e-4).item()
        assert mx.allclose(made, base + delta, atol=1e-4).item()
        assert loras.fuses
    assert joint.matrices is not None
    loras.undo()
    assert joint.matrices is None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(operations, "_verdicts", {})
    monkeypatch.setattr(operations, "_WIDTH", 4)
    monkeypatch.setattr(operations, "_SLOTS", 256)
    verdicts = (kernels.verdict, adapters.verdict, adapters.wide_verdict, expert_kernels.verdict)
    with emulated(monkeypatch, *verdicts) as found:
        yield found


@pytest.mark.long
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_kernels_agree_with_mlx(host: Host, dtype: mx.Dtype) -> None:
    assert adapters.verdict(dtype) is None
    assert {body for body, _ in host.calls} == {"adapters", "adapters_norm"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("", ("", "")),
        ("shrink_wide", ("slots[row0 + i] != slots[row0 + i - 1]", "slots[row0 + i] > 9")),
        ("shrink_wide", ("row >= from && row < to", "row < to")),
        ("shrink_wide", ("(size_t)lower * IN", "(size_t)row0 * IN")),
        ("shrink_wide", ("low.z, high.z", "high.z, low.z")),
        ("shrink_wide", ("tile * 8 + r", "r")),
        ("shrink_wide", ("(size_t)slot * N", "(size_t)N")),
        ("shrink_wide", ("w < WARPS", "w < 1")),
        ("expand_wide", ("slots[row0 + i] != slots[row0 + i - 1]", "slots[row0 + i] > 9")),
        ("expand_wide", ("r >= from && r < to", "r < to")),
        ("expand_wide", ("r + 8 < rows ?", "r < rows ?")),
        ("expand_wide", ("i < 2 || deep", "true")),
        ("expand_wide", ("? 0x7632u : 0x5410u", "? 0x5410u : 0x7632u")),
        ("expand_wide", ("product + l * RANK + k + c", "product + k + c")),
        ("expand_wide", ("product + l * RANK + k);", "product + k);")),
        ("expand_wide", ("(c * 2 + i % 2) * EACH);", "c * 2 * EACH);")),
        ("expand_wide", ("block * TOKENS + thread / LANES", "block * TOKENS")),
        ("expand_wide", ("row < tokens && at < stop", "row < 1 && at < stop")),
    ],
)
def test_rows_on_tensor_cores(
    host: Host, monkeypatch: pytest.MonkeyPatch, body: str, wrong: tuple[str, str]
) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    if body:
        assert wrong[0] in text(body)
        host.break_by(lambda name, code: code.replace(*wrong) if name == body else code)
    found = adapters.wide_verdict(mx.bfloat16)
    assert {name for name, _ in host.calls} == {"shrink_wide", "expand_wide"}
    assert ("is off by" in str(found)) if body else (found is None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("shrink", ("slot * N +", "slot +")),
        ("shrink", ("+ product", "")),
        ("shrink", ("first += STEP", "first += RANKS")),
        ("shrink", ("inner[first + own_thread]", "inner[own_thread]")),
        ("shrink", ("s < NSG", "s < 1")),
        ("shrink", ("at += NSG * 32", "at += LOADS")),
        ("shrink", ("high ? sums[i] : sums[rest + i]", "sums[i]")),
        ("chunks", ("(chunk - chunks_before) * CHUNK", "0")),
        ("expand", ("inner[l * RANK + first + i]", "inner[first + i]")),
        ("expand", ("inner[l * RANK + first + i]", "inner[i]")),
        ("expand", ("turn * NSG * 32 +", "")),
        ("adapters", ("turn * NSG * 32 +", "")),
        ("adapters", ("changes[turn]", "changes[0]")),
        ("add_norm", ("changes[i]", "changes[0]")),
    ],
)
def test_the_verdict_names_a_wrong_kernel(host: Host, body: str, wrong: tuple[str, str]) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    assert "is off by" in str(adapters.verdict(mx.float32))


def base(bits: int = 16, group: int = 64, *, own_values: bool = False) -> nn.Module:
    """Return a model whose layers are all quantised, unless `bits` is 16; `own_values` have 8."""
    model = tiny_llama(head_dim=32, hidden_size=64 if bits < 16 else 32)
    if own_values:
        nn.quantize(model, group, 8, class_predicate=lambda path, _: "v_proj" in path)
    if bits < 16:
        nn.quantize(model, group, bits)
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    ("only", "bits", "group", "own_values"),
    [("", 16, 0, False), ("v_proj", 16, 0, False), ("", 4, 32, False), ("", 4, 64, False),
     ("", 8, 32, False), ("", 8, 64, False), ("v_proj", 4, 64, False), ("", 4, 64, True),
     ("v_proj", 4, 64, True), ("q_proj", 4, 64, True)],
)  # fmt: skip
def test_fused_layers(host: Host, only: str, bits: int, group: int, own_values: bool) -> None:
    """Their logits are those of layers that run one by one; all bodies run in one step."""
    make = partial(base, bits, group, own_values=own_values)
    by_slot = {slot: matrices(make(), slot, slot + 1, only) for slot in (1, 2)}
    found = []
    for fused in (False, True):
        model = make()
        runner = runner_of(model, exact=not fused, compiled=False)
        assert set(runner.fused) == ({"attention", "block", "MLP"} if fused else set())
        loras = LoRALayers(model, runner.adapter_rows)
        for slot, layers in by_slot.items():
            loras.set(slot, layers)
        assert loras.fuses
        before = len(host.calls)
        found.append(logits(runner, steps=4))
        bodies = [body for body, _ in host.calls[before:]]
        if fused:
            assert {"rotate", "add_norm", "adapters"} <= set(bodies)
            assert ("adapters_norm" in bodies) == (not only)
            joint = 1 if only else 4 + own_values  # of a layer
            assert bodies.count("adapters") == 4 * 3 * joint
        else:
            assert "adapters" not in bodies
        loras.undo()
        runner.undo()
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.long
def test_adapters_with_gains_are_not_fused(host: Host) -> None:
    model = tiny_llama(head_dim=32)
    runner = runner_of(model, compiled=False)
    loras = LoRALayers(model, runner.adapter_rows)
    loras.set(1, matrices(model, 1, gain=True))
    assert not loras.fuses
    host.calls.clear()
    logits(runner, (1, 1, 1, 1), steps=1)
    assert "adapters" not in {body for body, _ in host.calls}
    loras.set(1, {})
    assert loras.fuses


def mixture(bits: int = 16) -> nn.Module:
    """Return Qwen3's mixture of experts with random weights; those of experts have `bits`."""
    mx.random.seed(7)
    config = {
        "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 1e4,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip
    model: nn.Module = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
    if bits < 16:
        nn.quantize(model, 32, bits, class_predicate=lambda _, m: isinstance(m, EXPERTS))
    mx.eval(model.parameters())
    return model


def of_experts(model: nn.Module, seed: int, layer: str) -> dict[str, Matrices]:
    """Return an adapter of the attention and of one layer of the experts."""
    found = matrices(model, seed, only="q_proj")
    for name, module in model.named_modules():
        if isinstance(module, EXPERTS) and name.endswith(layer):
            sizes = module.num_experts, module.input_dims, module.output_dims
            keys = mx.random.split(mx.random.key(seed), 2)
            a = 0.3 * mx.random.normal((*sizes[:2], 2), key=keys[0])
            found[name] = Matrices(a, 0.3 * mx.random.normal((sizes[0], 2, sizes[2]), key=keys[1]))
    return found


FUSED_EXPERTS = {"route", "dispatch", "combine"}


@pytest.mark.long
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    ("changed", "fused"),
    [("q_proj", True), ("o_proj", True), ("mlp.gate", False), ("up_proj", False),
     ("down_proj", False)],
)  # fmt: skip
def test_experts_stay_fused_unless_adapters_change_them(
    host: Host, changed: str, fused: bool, bits: int
) -> None:
    """An adapter in memory that changes them counts, whichever the rows have."""

    def adapters_of(model: nn.Module) -> dict[int, dict[str, Matrices]]:
        made = (
            of_experts(model, 2, changed) if changed in ("up_proj", "down_proj")
            else matrices(model, 2, only=changed)
        )  # fmt: skip
        return {1: matrices(model, 1, only="v_proj"), 2: made}

    by_slot, found = adapters_of(mixture(bits)), []
    for exact in (True, False):
        model = mixture(bits)
        runner = runner_of(model, exact=exact, compiled=False)
        loras = LoRALayers(model, runner.adapter_rows)
        for slot, layers in by_slot.items():
            loras.set(slot, layers)
        before = len(host.calls)
        found.append(logits(runner, (1, 1, 1, 1), steps=4))
        bodies = {body for body, _ in host.calls[before:]}
        assert bodies & FUSED_EXPERTS == (FUSED_EXPERTS if fused and not exact else set())
        found.append(logits(runner, steps=4))
        # Steps without adapters, and after the adapter has gone.
        before = len(host.calls)
        found.append(logits(runner, (0, 0, 0, 0), steps=3))
        bodies = {body for body, _ in host.calls[before:]}
        assert bodies & FUSED_EXPERTS == (set() if exact else FUSED_EXPERTS)
        loras.set(2, {})
        before = len(host.calls)
        found.append(logits(runner, (1, 1, 1, 1), steps=3))
        bodies = {body for body, _ in host.calls[before:]}
        assert bodies & FUSED_EXPERTS == (set() if exact else FUSED_EXPERTS)
        loras.undo()
        runner.undo()
        assert not runner.adapter_rows.bypassed
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert same(one, other)
    assert not same(found[0], found[2])
    assert not same(found[0], found[1])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen3_next", {"gate", "shared_expert_gate", "gate_proj", "up_proj", "down_proj"}),
        ("deepseek_v3", {"gate_proj", "up_proj", "down_proj"}),  # its router is no linear layer
    ],
)
def test_what_fused_mixtures_bypass(host: Host, name: str, layers: set[str]) -> None:
    model = make_specimen(next(c for c in CATALOGUE if c.id == name)).model
    runner = make_runner(model, num_blocks=64, buckets=FEW, exact=False, compiled=False)
    assert runner.adapter_rows is not None
    bypassed = {id(layer) for layer in runner.adapter_rows.bypassed}
    found = {path for path, module in model.named_modules() if id(module) in bypassed}
    assert {path.rpartition(".")[2] for path in found} == layers
    assert all(".mlp." in path and ".shared_expert." not in path for path in found)
