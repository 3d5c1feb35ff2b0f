"""Steps that the driver launches as graphs give the tokens of steps that MLX launches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack.formats.adapter import Adapter, read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.kernels import launch, operations, recording
from modelpack_engine.kernels.cuda import Compiled, GeneratedKernel
from modelpack_engine.kernels.recording import Note, NotRecordedError, Transient, recorded
from modelpack_engine.kernels.sources import CONSTANT_BELOW, kernel_source
from modelpack_engine.layers import adapters, kernels, matmul, packed, packed_wide
from modelpack_engine.layers.weights import Weights
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.patches import fused_layers
from modelpack_engine.platform import device
from modelpack_engine.platform.cublas import WORKSPACE_BYTES, CublasError
from modelpack_engine.platform.cublas import Shape as MatmulShape
from modelpack_engine.platform.driver import DriverError, pointer_bytes, shape_bytes
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner import replay
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.paged import Layout
from modelpack_engine.runner.replay import ReplayedTokens, Replays
from modelpack_engine.runner.step import NextToken, StepResult
from modelpack_engine.sampling.sampler import NO_TOKEN
from modelpack_engine.speculation import acceptance, head_runner
from modelpack_engine.speculation.acceptance import StepTimes
from modelpack_engine.speculation.eagle import EagleProposer
from modelpack_engine.speculation.head_runner import DraftWithin
from modelpack_engine.speculation.ngram import NgramProposer
from modelpack_engine.speculation.speculator import Speculator
from tests.adapters import write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.kernels.onhost import Host
from tests.engine.replay.conftest import Call, FakeDriver, no_driver, with_tiles
from tests.engine.runner.models import tiny_llama
from tests.engine.serving.tiny import VOCAB, tiny_tokenizer
from tests.engine.speculation.test_eagle import random_head
from tests.engine.vision import tiny

#: The tokens that the model of `drafting_engine` repeats after two prompts: some drafts are right.
PROMPTS, REPEATED = ([1, 2, 3], [9, 8, 7, 6]), (3, 59, 172, 177)
BUCKETS = Buckets(rows=(1, 2, 4, 8), chunk=(16,), table_width=(2, 8))


class KernelEngine(Engine):
    """An engine whose steps run as on a GPU."""

    def _choose_sizes(
        self, layout: ModelLayout | None, context_length: int, draft_bytes: int
    ) -> Sizes:
        return replace(super()._choose_sizes(layout, context_length, draft_bytes), buckets=BUCKETS)

    def _make_runner(self, loaded: LoadedModel, layout: ModelLayout | None) -> ModelRunner:
        return make_runner(
            loaded.model, num_blocks=self._sizes.num_blocks, buckets=BUCKETS, exact=False,
            compiled=True, self_test=False,
        )  # fmt: skip


def make_engine(
    head: EagleHead | None = None,
    *,
    layers: int = 1,
    packed: bool = False,
    zeros: bool = False,
    biases: bool = False,
    bits: int = 16,
    group: int = 32,
    value_bits: int = 16,
    **given: Any,
) -> KernelEngine:
    model = tiny_llama(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, vocab_size=VOCAB, tie_word_embeddings=not zeros,
        attention_bias=biases,
    )  # fmt: skip
    if zeros:
        model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    model.set_dtype(mx.bfloat16)
    if packed:
        nn.quantize(model, 32, 4, class_predicate=lambda _, module: type(module) is nn.Embedding)
    if bits < 16:
        nn.quantize(model, group, bits, class_predicate=lambda _, module: type(module) is nn.Linear)
    if value_bits < 16:
        nn.quantize(model, group, value_bits, class_predicate=lambda path, _: "v_proj" in path)
    loaded = LoadedModel(model, {"vocab_size": VOCAB}, tiny_tokenizer(), "llama", 256, (), 0)
    config = EngineConfig(kv_cache_bytes=1 << 20, max_num_seqs=4, **given)
    return KernelEngine(loaded, config, draft=head)


Tokens = dict[str, list[int]]
T = TypeVar("T")
#: A scenario: it gives an engine requests, and returns their tokens.
Scenario = Callable[[Engine], Tokens]


def add(
    engine: Engine,
    name: str,
    prompt: list[int],
    num_tokens: int,
    adapter: str | None = None,
    **params: Any,
) -> None:
    given = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True} | params
    engine.add_request(name, EngineRequest(prompt, SamplingParams(**given), adapter=adapter))


def step(engine: Engine, found: Tokens, steps: int = 1000) -> Tokens:
    """Run steps, at most so many; add the tokens to `found`."""
    while engine.has_work and (steps := steps - 1) >= 0:
        for event in engine.step():
            assert event.error is None
            found.setdefault(event.request_id, []).extend(event.token_ids)
    return found


def batches(engine: Engine, **params: Any) -> Tokens:
    """Requests that end one after the other: steps of 4, 2 and 1 rows."""
    add(engine, "one", [1, 2, 3], 14, seed=1, **params)
    add(engine, "two", [5, 6, 7, 8, 9], 6, seed=2, **params)
    add(engine, "three", [9, 8], 9, seed=3, **params)
    return step(engine, {})


def in_turn(engine: Engine) -> Tokens:
    """Steps by MLX between those of graphs: prompts, log-probabilities, and requests that leave."""
    add(engine, "one", [1, 2, 3], 30)
    found = step(engine, {}, 8)
    add(engine, "two", list(range(20, 40)), 3)
    step(engine, found, 6)
    add(engine, "three", [7, 7], 2, logprobs=1)
    step(engine, found, 4)
    add(engine, "four", [8], 20)
    step(engine, found, 5)
    engine.abort("four")
    del found["four"]
    add(engine, "five", list(range(40, 60)), 4)
    return step(engine, found)


SCENARIOS: dict[str, Scenario] = {
    "batches": batches,
    "drawn": partial(batches, temperature=1.5, top_p=0.9),
    "in turn": in_turn,
}


@cache
def expected(name: str) -> Tokens:
    """The tokens without a driver; to be called with kernels on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "find_driver", no_driver)
        engine = make_engine()
        assert engine._replays is None
        return SCENARIOS[name](engine)


@pytest.mark.parametrize(("name", "launches"), [("batches", 7), ("drawn", 7), ("in turn", 20)])
def test_the_same_tokens(name: str, launches: int, driver: FakeDriver) -> None:
    wanted = expected(name)
    assert len(set(map(tuple, wanted.values()))) > 2
    engine = make_engine()
    assert engine._replays is not None
    assert SCENARIOS[name](engine) == wanted
    assert driver.num_launches == launches
    engine.close()
    assert driver.graphs == {}
    assert driver.events == set()


def test_values_of_another_type_are_recorded(driver: FakeDriver) -> None:
    """As in GGUF's mixes, such as Q4_K_M."""
    make = partial(make_engine, value_bits=8)
    wanted = by_mlx(SCENARIOS["batches"], make)
    assert SCENARIOS["batches"](make()) == wanted
    assert driver.num_launches == 7
    rotations = [dict(call.note.template) for calls in driver.graphs.values() for call in calls
                 if call.note.body == "rotate_decode"]  # fmt: skip
    assert rotations
    assert all(each["OWN_VALUES"] for each in rotations)


def test_rotation_reads_early_what_earlier_steps_wrote(driver: FakeDriver) -> None:
    """A model without norms of queries has arrays in their place that no kernel writes."""
    SCENARIOS["batches"](make_engine())
    notes = [call.note for calls in driver.graphs.values() for call in calls]
    written = {id(array) for note in notes for array in note.outputs}
    rotations = [note for note in notes if note.body == "rotate_decode"]
    assert rotations
    for note in rotations:
        given = dict(zip(note.source.inputs, note.inputs, strict=True))
        assert id(given["joint"]) in written
        assert not {id(given["q_weight"]), id(given["k_weight"])} & written
        assert given["q_weight"].size >= CONSTANT_BELOW


def test_graphs_run_where_several_steps_decode_in_a_row(driver: FakeDriver) -> None:
    replays = make_engine()._replays
    assert replays is not None

    def pays(graphs: bool) -> bool:
        if not graphs:
            replays.end_run()
        return graphs and replays._pays()

    assert all(pays(True) for _ in range(40))
    alternating = [pays(graphs) for graphs in [False, True] * 20]
    assert alternating[1]
    assert not any(alternating[20:])
    assert [pays(True) for _ in range(3)] == [False, True, True]
    for _ in range(8):
        assert not pays(False)
        later = [pays(True) for _ in range(6)]
    assert all(later), "rows of six are expected now"


def test_arguments_are_those_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel gets its arrays, each with its shape if it has that parameter, then its outputs."""
    source = kernel_source("rows", "cuda")
    table, index, out = mx.zeros((1, 7, 8)), mx.zeros((5,), mx.int32), mx.zeros((1, 5, 8))
    template = [("T", mx.float32), ("D", 8), ("VEC", 4), ("SMALL", 0)]
    arrays = [table, index]
    note = Note("rows", source, template, arrays, arrays, [out], (256, 1, 1), (256, 1, 1), 64)
    kernel = GeneratedKernel(source, arrays, template, [mx.float32])
    head = kernel.text[kernel.text.index("__global__") :]
    names = re.findall(r"(\w+)[,)]", head[: head.index("{")])
    assert names == ["table", "table_shape", "index", "index_shape", "out"]
    compiled: list[str] = []

    def compiled_kernel(made: GeneratedKernel) -> Compiled:
        compiled.append(made.text)
        return Compiled(b"code", "symbol")

    monkeypatch.setattr(replay, "compiled_kernel", compiled_kernel)
    loaded: list[tuple[object, ...]] = []

    def function(*given: object) -> int:
        loaded.append(given)
        return 9

    driver: Any = SimpleNamespace(new_stream=lambda: 1, function=function)
    runner: Any = SimpleNamespace(compiled=object())
    replays = Replays(runner, driver)
    calls = [replays._kernel_call(note, [1000, 2000], [3000]) for _ in range(2)]
    assert calls[0] == calls[1]
    assert calls[0].arguments == (
        pointer_bytes(1000), shape_bytes((1, 7, 8)), pointer_bytes(2000), shape_bytes((5,)),
        pointer_bytes(3000),
    )  # fmt: skip
    assert (calls[0].grid, calls[0].threads) == ((1, 1, 1), (256, 1, 1))
    assert (calls[0].function, calls[0].shared_bytes) == (9, 64)
    assert loaded == [(b"code", "symbol", 64)] * 2
    assert compiled == [kernel.text], "compiled once"


def test_numbers_that_become_more(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected("in turn")
    monkeypatch.setattr(replay, "_FEWEST_NUMBERS", 16)
    engine = make_engine()
    assert SCENARIOS["in turn"](engine) == wanted
    assert engine._replays is not None
    assert len(engine._replays._memories) > 1
    engine.close()
    assert driver.events == set()


def drafting_engine(*, packed: bool = False, **given: Any) -> KernelEngine:
    head = random_head(num_heads=2, num_kv_heads=1, head_dim=32)
    columns = mx.arange(head.config.draft_vocab_size)
    head.d2t = mx.array(REPEATED)[columns % len(REPEATED)] - columns
    return make_engine(
        head, layers=2, packed=packed, draft_model="head", speculative_method="eagle3",
        num_speculative_tokens=4, **given,
    )  # fmt: skip


def one_by_one(engine: Engine, **params: Any) -> Tokens:
    found: Tokens = {}
    for prompt in PROMPTS:
        add(engine, f"{prompt}", prompt, 20, **params)
        step(engine, found)
    return found


def together(engine: Engine) -> Tokens:
    found: Tokens = {}
    for prompt, num_tokens in zip(PROMPTS, (20, 16), strict=True):
        add(engine, f"{prompt}", prompt, num_tokens)
        step(engine, found, 3)
    return step(engine, found)


def look_up(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    """Propose so many tokens now and then."""

    def found(num_known: int) -> list[int]:
        return list(REPEATED[:num_tokens]) if num_known % 4 == 1 else []

    def propose(self: NgramProposer, lengths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        return {
            each: found(each.num_known_tokens) for each in lengths if found(each.num_known_tokens)
        }

    def after(
        self: NgramProposer, sequence: Sequence, token_ids: list[int], num_sequences: int
    ) -> tuple[list[int], float]:
        return found(sequence.num_known_tokens + len(token_ids)), 99.0

    monkeypatch.setattr(NgramProposer, "propose", propose)
    monkeypatch.setattr(NgramProposer, "after", after)


def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a head draft behind all steps, without lookups."""
    monkeypatch.setattr(StepTimes, "least_accepted", lambda self, num_sequences: -1.0)
    monkeypatch.setattr(acceptance, "_PLAIN_STEPS", 0)
    look_up(monkeypatch, 0)


@dataclass(frozen=True)
class Drafting:
    """A scenario with a head, the rows of its graphs, and how many of them are launched at least.

    At least so many are launched `ahead`; with `misses`, other steps follow some of them. With
    `as_mlx`, the head drafts after the same steps as without graphs. With `packed`, the embeddings
    have 4 bits. Some proposals of tokens that it `looks_up` are between the drafts. A head `pauses`
    after two drafts. The `prompts` have graphs, too.
    """

    scenario: Scenario
    rows: set[int]
    launches: int
    ahead: int
    misses: bool = False
    as_mlx: bool = True
    looks_up: int = 0
    plain_every: int = 1000
    packed: bool = False
    pauses: bool = False
    prompts: bool = False


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Drafting(one_by_one, {4, 8}, 14, 13), id="alone"),
        pytest.param(
            Drafting(partial(one_by_one, temperature=0.05, seed=1), {4, 8}, 14, 13), id="drawn"
        ),
        pytest.param(
            Drafting(partial(one_by_one, stop=["\\"]), {8}, 10, 9, True), id="a stop string"
        ),
        pytest.param(Drafting(one_by_one, {4, 8, 16}, 16, 13, prompts=True), id="prompts"),
        pytest.param(Drafting(together, {16}, 5, 4), id="together"),
        pytest.param(Drafting(together, {16}, 5, 7, packed=True), id="together, packed"),
        pytest.param(Drafting(one_by_one, {4, 8}, 10, 5, looks_up=2), id="lookups"),
        pytest.param(
            Drafting(one_by_one, {4, 8}, 10, 12, looks_up=4), id="lookups of as many tokens"
        ),
        pytest.param(
            Drafting(one_by_one, {1, 8}, 12, 2, True, as_mlx=False, pauses=True), id="a pause"
        ),
        pytest.param(
            Drafting(one_by_one, {1, 8}, 12, 5, True, as_mlx=False, plain_every=3), id="pauses"
        ),
    ],
)
def test_a_head_drafts_within_the_graph(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, case: Drafting
) -> None:
    least = 99.0 if case.pauses else -1.0
    monkeypatch.setattr(StepTimes, "least_accepted", lambda self, num_sequences: least)
    monkeypatch.setattr(acceptance, "_PLAIN_STEPS", 0)
    monkeypatch.setattr(acceptance, "_PLAIN_EVERY", case.plain_every)
    look_up(monkeypatch, case.looks_up)
    monkeypatch.setattr(NgramProposer, "expects", lambda self, sequences: False)
    monkeypatch.setattr(NgramProposer, "expected", lambda self, sequence: 99.0)
    if case.as_mlx:
        monkeypatch.setattr(EagleProposer, "_next_step_drafts", False)
    if case.pauses:
        monkeypatch.setattr(acceptance, "_FEWEST_DRAFTS", 2)
        monkeypatch.setattr(acceptance, "_PAUSE", 10)
    if case.prompts:
        monkeypatch.setattr(replay, "_FREQUENT_PROMPTS", 1)
        monkeypatch.setattr(launch, "tried", with_tiles)
        monkeypatch.setattr(operations, "tried", with_tiles)
    if case.plain_every < 1000:
        monkeypatch.setattr(acceptance, "_PLAIN_STEPS", 4)
    proposed: list[tuple[int, ...]] = []  # of the engine that runs
    verified = Speculator.verified

    def noted(self: Speculator, proposal: Any, *given: Any, **more: Any) -> None:
        proposed.append(tuple(proposal.token_ids))
        verified(self, proposal, *given, **more)

    monkeypatch.setattr(Speculator, "verified", noted)
    if case.as_mlx:
        monkeypatch.setattr(head_runner, "_FEWEST_TOKENS", 16)  # the pool grows
    recorded: list[int] = []
    alone: set[bool] = set()
    record = Replays._record

    def counted(self: Replays, shape: Any, *given: Any) -> Any:
        recorded.append(shape.num_rows)
        alone.add(shape.layout.alone)
        return record(self, shape, *given)

    monkeypatch.setattr(Replays, "_record", counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "find_driver", no_driver)
        engine = drafting_engine(packed=case.packed)
        wanted = case.scenario(engine)
    by_mlx = proposed.copy()
    accepted = engine.stats().accepted_tokens
    assert case.pauses or 1 <= accepted < sum(map(len, by_mlx)) // 2
    proposed.clear()
    engine = drafting_engine(packed=case.packed)
    assert engine._replays is not None
    assert case.scenario(engine) == wanted
    if case.as_mlx:
        assert proposed == by_mlx
        assert engine.stats().accepted_tokens == accepted
    assert driver.num_launches >= case.launches
    assert engine._replays.num_ahead >= case.ahead
    assert bool(engine._replays.num_missed) == case.misses
    assert set(recorded) == case.rows, "a row, the tokens of a proposal, and padding"
    made = any(shape.layout.tiles for shape, graph in engine._replays._graphs.items() if graph)
    assert made == case.prompts
    assert len(recorded) < 12, "for sizes of the pool and of tables, not for each sequence"
    assert alone == {False}, "rows of a proposal attend to each other's keys"
    engine.close()
    assert driver.graphs == {}


@pytest.mark.long
def test_steps_by_mlx_have_drafts_after_graphs_had_some(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_always(monkeypatch)
    engine = drafting_engine()
    add(engine, "one", PROMPTS[0], 16)
    step(engine, {})
    launches, proposals = driver.num_launches, engine.stats().num_proposals
    assert launches > 4
    add(engine, "two", PROMPTS[0], 16, logprobs=1)  # which MLX computes
    step(engine, {})
    assert driver.num_launches == launches
    assert engine.stats().num_proposals - proposals > 4


@pytest.mark.long
@pytest.mark.parametrize("num_tokens", [3, 4])
def test_a_step_ahead_stays_in_the_heads_pool(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    """All drafts are accepted, so that sequences soon need a larger pool."""
    draft_always(monkeypatch)
    monkeypatch.setattr(head_runner, "_FEWEST_TOKENS", 16)
    launched = 0

    def launch(self: Replays, step: ReplayedTokens) -> None:
        nonlocal launched
        within, shape = step.draft, step.shape
        assert isinstance(within, DraftWithin)
        _, start, stop = replay._ends(shape, step.num_numbers, within)
        numbers, rows = step.place.numbers[start:stop], within.key.rows
        slots, length = numbers[rows : 2 * rows], numbers[-1]
        assert max(slots.max() + 1, length + rows + num_tokens) <= within.runner._size
        launched += 1
        original(self, step)

    original = Replays.launch
    monkeypatch.setattr(Replays, "launch", launch)
    head = random_head(num_heads=2, num_kv_heads=1, head_dim=32)
    head.d2t = -mx.arange(head.config.draft_vocab_size)
    engine = make_engine(
        head, layers=2, zeros=True, draft_model="head", speculative_method="eagle3",
        num_speculative_tokens=num_tokens,
    )  # fmt: skip
    add(engine, "one", [1, 2, 3], 120)
    assert step(engine, {}) == {"one": [0] * 120}
    assert engine._replays is not None
    assert launched >= 10
    assert engine._replays.num_ahead >= 8
    assert engine._replays.num_missed == 0


@pytest.mark.long
def test_a_launch_ahead_that_fails(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    engine = drafting_engine()
    replays = engine._replays
    assert replays is not None
    add(engine, "one", PROMPTS[0], 20)
    found: Tokens = {}
    for _ in range(20):
        step(engine, found, 1)
        if replays.num_ahead:
            break
    driver.fails = True
    step(engine, found)
    assert replays.gave_up, "MLX runs all steps from now on"
    assert len(found["one"]) == 20
    assert replays.num_ahead == 1


@pytest.mark.long
def test_graphs_that_are_dropped_before_a_launch_ahead(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after logits of a rejected row that are NaN: the sequence goes on, without its graph."""
    draft_always(monkeypatch)
    monkeypatch.setattr(replay, "_FREQUENT", 1)
    wanted = by_mlx(one_by_one, drafting_engine)
    engine, steps = drafting_engine(), count()
    assert engine._replays is not None
    forget, fail_rows = engine._replays.forget, engine._fail_rows

    def dropping(result: StepResult) -> None:
        if next(steps) % 5 == 4:
            forget()
        fail_rows(result)

    monkeypatch.setattr(engine, "_fail_rows", dropping)
    assert one_by_one(engine) == wanted
    assert engine._replays.num_ahead > 4


def test_a_wrong_index_is_found(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected("batches")
    assert SCENARIOS["batches"](make_engine()) == wanted
    write = Replays._write

    def wrong(self: Replays, batch: Any, *arguments: Any) -> Any:
        return write(self, replace(batch, from_previous=()), *arguments)

    monkeypatch.setattr(Replays, "_write", wrong)
    assert SCENARIOS["batches"](make_engine()) != wanted


def test_a_launch_that_fails_fails_the_requests(driver: FakeDriver) -> None:
    engine = make_engine()
    add(engine, "one", [1, 2, 3], 30)
    step(engine, {}, 8)
    assert driver.num_launches
    driver.fails = True
    with pytest.raises(DriverError, match="cuGraphLaunch"):
        step(engine, {})
    assert [event.error for event in engine.fail_all("it failed")] == ["it failed"]
    assert driver.graphs == {}
    driver.num_launches = 0
    wanted = expected("batches")
    assert SCENARIOS["batches"](engine) == wanted, "MLX runs all steps from now on"
    assert driver.num_launches == 0


def test_a_graph_with_other_tokens_is_not_used(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = expected("batches")
    make = driver.make_graph

    def without_norms(calls: list[Call], stream: int) -> int:
        return make([call for call in calls if call.note.body != "add_norm"], stream)

    monkeypatch.setattr(driver, "make_graph", without_norms)
    assert SCENARIOS["batches"](make_engine()) == wanted
    assert driver.num_launches == 1
    assert driver.graphs == {}
    assert "the graph of 4 rows gives other tokens" in caplog.text


def test_memory_that_cannot_be_had(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(num_bytes: int) -> int:
        raise DriverError("cuMemHostAlloc failed: CUDA error 2")

    monkeypatch.setattr(driver, "allocate_host", none)
    wanted = expected("batches")
    engine = make_engine()
    assert SCENARIOS["batches"](engine) == wanted
    engine.close()


@pytest.mark.parametrize("proposes", [False, True])
def test_graphs_are_dropped_before_blocks_are_zeroed(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, proposes: bool
) -> None:
    engine = make_engine()
    add(engine, "one", [1, 2, 3], 30)
    step(engine, {}, 8)
    assert driver.graphs
    slots = [[17]] if proposes else []
    output: Any = SimpleNamespace(sampled=[next(iter(engine._scheduler.decoding()))])
    none = [] if proposes else [NextToken(NO_TOKEN, None)]
    zeroed: list[object] = []

    def zero(what: object, group: int) -> None:
        assert driver.graphs == {}, "MLX may move the pools"
        zeroed.append(what)

    monkeypatch.setattr(engine._runner, "scrub", zero)
    monkeypatch.setattr(engine._runner, "scrub_slots", zero)
    engine._fail_rows(StepResult(output, [none], slots, []))
    assert len(zeroed) == 1


def prompts_between(engine: Engine, **params: Any) -> Tokens:
    """Prompts of several lengths in steps that decode, alone and together."""
    found: Tokens = {}
    for number in range(12):
        prompt = list(range(3 * number, 4 * number + 9))
        add(engine, f"{number}", prompt[: 5 + number % 3], 6, **params, seed=number)
        if number % 4 == 3:
            add(engine, f"{number} b", prompt[:9], 3, **params, seed=number)
        step(engine, found, 2)
    return step(engine, found)


def by_mlx(scenario: Callable[[Engine], T], make: Callable[[], Engine] = make_engine) -> T:
    """What a scenario returns without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "find_driver", no_driver)
        return scenario(make())


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.5}, id="drawn", marks=pytest.mark.long),
    ],
)
def test_prompts_within_graphs(
    driver: FakeDriver, launched: list[Layout], given: dict[str, Any]
) -> None:
    def scenario(engine: Engine) -> Tokens:
        return prompts_between(engine, **given)

    wanted = by_mlx(scenario)
    assert scenario(make_engine()) == wanted
    with_prompts = [layout for layout in launched if layout.tiles]
    assert len(with_prompts) >= 6
    assert {(layout.rows, layout.decode, layout.sampled) for layout in with_prompts} == {
        (32, 16, 4)
    }
    bodies = {call.note.body for calls in driver.graphs.values() for call in calls}
    assert {"prefill", "decode", "join"} <= bodies


@pytest.mark.long
def test_steps_that_cannot_be_graphs_end_a_run(
    launched: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs between steps by MLX do not pay, until prompts are recorded as well."""
    monkeypatch.setattr(replay, "_FREQUENT_PROMPTS", 1000)
    wanted, engine = by_mlx(prompts_between), make_engine()
    assert prompts_between(engine) == wanted
    assert not any(layout.tiles for layout in launched)
    few = len(launched)
    monkeypatch.setattr(replay, "_FREQUENT_PROMPTS", 0)
    assert engine._replays is not None
    engine._replays._usual_steps = 1.0
    launched.clear()
    prompts_between(engine)
    assert len(launched) <= few
    engine._replays._seen.clear()
    monkeypatch.setattr(replay, "_FREQUENT_PROMPTS", 1)
    prompts_between(engine)
    launched.clear()
    assert prompts_between(engine) == wanted
    assert len(launched) > few


@pytest.mark.long
def test_prompts_that_are_refused_are_not_recorded_without_an_end(
    driver: FakeDriver, launched: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that only decode stay graphs."""
    wanted, traced = by_mlx(prompts_between), list[Layout]()
    trace = Replays._traced

    def refused(self: Replays, shape: Any, *given: Any) -> Any:
        traced.append(shape.layout)
        if shape.layout.tiles:
            raise NotRecordedError("MLX multiplies")
        return trace(self, shape, *given)

    monkeypatch.setattr(Replays, "_traced", refused)
    monkeypatch.setattr(replay, "_FREQUENT_PROMPTS", 1)
    monkeypatch.setattr(replay, "_FEWEST_STEPS", 0)
    monkeypatch.setattr(replay, "_MOST_REFUSED", 1)
    engine = make_engine()
    assert prompts_between(engine) == wanted
    assert sum(layout.tiles > 0 for layout in traced) == 1
    assert engine._replays is not None
    assert not engine._replays.gave_up
    assert launched


@pytest.mark.long
def test_no_more_graphs_than_a_limit(
    driver: FakeDriver, launched: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_MOST_GRAPHS", 1)
    assert prompts_between(make_engine()) == by_mlx(prompts_between)
    assert len(driver.graphs) == 1


def test_a_larger_arena_is_twice_as_large(driver: FakeDriver) -> None:
    """Earlier graphs keep theirs: all together are at most twice the largest."""
    engine = make_engine()
    SCENARIOS["batches"](engine)
    assert engine._replays is not None
    arenas = {
        id(graph.kept[1]): graph.kept[1].nbytes
        for graph in engine._replays._graphs.values()
        if graph is not None
    }
    assert sum(arenas.values()) <= 2 * max(arenas.values())
    assert all(size & (size - 1) == 0 for size in arenas.values())


@pytest.mark.parametrize(
    ("free", "rows"), [(4 << 20, {1, 2, 4}), ((4 << 20) - 1, {1, 2}), (0, {1})]
)
def test_more_rows_than_are_planned_need_free_memory(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, free: int, rows: set[int]
) -> None:
    monkeypatch.setattr(replay, "_SPARE_BYTES", 100)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 60)
    monkeypatch.setattr(device, "total_memory", lambda: 1000 + free + 40)
    monkeypatch.setattr(device, "used_memory", lambda: 1000)
    engine = make_engine()
    replays = engine._replays
    assert replays is not None
    assert (replays._planned_rows, replays._row_bytes) == (4096, 0), "on a host"
    replays._planned_rows, replays._row_bytes = 1, 1 << 20
    assert SCENARIOS["batches"](engine) == expected("batches")
    assert {shape.num_rows for shape in replays._graphs} == rows
    assert not replays.gave_up


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (mx.zeros((2, 64), mx.float32), Weights.plain(mx.zeros((32, 64), mx.float32))),
        (mx.zeros((2, 64), mx.float16), Weights.plain(mx.zeros((32, 64), mx.bfloat16))),
        (mx.zeros((1, 2, 64), mx.float16), Weights.plain(mx.zeros((32, 64), mx.float16))),
        (
            mx.zeros((2, 64), mx.float16),
            Weights.plain(mx.zeros((32, 64), mx.float16), mx.zeros((32,), mx.float32)),
        ),
        (
            mx.zeros((200, 64), mx.float16),
            Weights(
                mx.zeros((32, 8), mx.uint32), mx.zeros((32, 1), mx.bfloat16),
                mx.zeros((32, 1), mx.bfloat16), None, 4, 64, "affine",
            ),
        ),
    ],
)  # fmt: skip
def test_other_matmuls_are_refused_at_once(x: mx.array, weights: Weights) -> None:
    """Not after two runs of the step."""
    with recorded() as recorder, pytest.raises(NotRecordedError, match="MLX multiplies"):
        matmul._by_mlx(x, weights)
    assert not recorder.notes


def test_matmuls_share_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once, and its address is asked for once."""
    prepared: list[Any] = []
    cublas = SimpleNamespace(prepare=prepared.append, multiply=lambda *given: given)
    asked: list[int] = []

    def addresses(arrays: list[mx.array]) -> list[int]:
        asked.extend(array.nbytes for array in arrays)
        return [77]

    monkeypatch.setattr(replay, "find_cublas", lambda: cublas)
    monkeypatch.setattr(replay, "addresses", addresses)
    driver: Any = SimpleNamespace(new_stream=lambda: 1)
    runner: Any = SimpleNamespace(compiled=object())
    replays = Replays(runner, driver)
    with recorded() as recorder:
        for rows in (96, 128):
            recorder.multiply(mx.zeros((rows, 64), mx.float16), mx.zeros((32, 64), mx.float16))
        recorder.multiply(
            mx.zeros((96, 64), mx.float16), mx.zeros((32, 64), mx.float16),
            mx.ones((32,), mx.float16),
        )  # fmt: skip
    reads = [[7, 8], [7, 8], [7, 8, 6]]
    calls: list[Any] = [
        replays._call(note, given, [9]) for note, given in zip(recorder.notes, reads, strict=True)
    ]
    assert prepared == [
        MatmulShape(rows, 32, 64, "float16", bias)
        for rows, bias in ((96, False), (128, False), (96, True))
    ]
    assert [call(5) for call in calls] == [
        (shape, 7, 8, 6 if shape.bias else None, 9, 77, 5) for shape in prepared
    ]
    assert asked == [WORKSPACE_BYTES]


def test_a_matmul_by_a_weight_that_is_not_kept(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    del host
    prepared: list[Any] = []
    cublas = SimpleNamespace(prepare=prepared.append, multiply=lambda *given: given)
    monkeypatch.setattr(replay, "find_cublas", lambda: cublas)
    monkeypatch.setattr(replay, "addresses", lambda arrays: [77] * len(arrays))
    packed_weight = mx.quantize(mx.random.normal((32, 64)).astype(mx.bfloat16), 32, 4)
    x = mx.zeros((96, 64), mx.bfloat16)
    compute = partial(kernels.dequantise, *packed_weight, 32, 4)
    with recorded(32 * 64 * 2) as recorder:
        recorder.multiply_dequantised(x, compute)
    with recorded(32 * 64 * 2 - 1) as smaller, pytest.raises(NotRecordedError, match="4096 bytes"):
        smaller.multiply_dequantised(x, compute)
    assert not smaller.notes
    runner: Any = SimpleNamespace(compiled=object())
    replays = Replays(runner, cast(Any, SimpleNamespace(new_stream=lambda: 1)))
    call: Any = replays._call(recorder.notes[1], [7, 8], [9])
    shape = MatmulShape(96, 32, 64, "bfloat16", False)
    assert prepared == [shape]
    assert call(5) == (shape, 7, 8, None, 9, 77, 5)


def test_a_matmul_that_cublas_refuses_is_left_to_mlx(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(calls: list[Call], stream: int) -> int:
        raise CublasError("cublasLtMatmul failed: cuBLAS status 15")

    caplog.set_level("INFO", logger=replay.__name__)
    monkeypatch.setattr(driver, "make_graph", refused)
    monkeypatch.setattr(replay, "_FEW_ROWS", 0)
    engine = make_engine()
    assert SCENARIOS["batches"](engine) == expected("batches")
    assert "steps of 4 rows are not recorded: cublasLtMatmul failed" in caplog.text
    assert engine._replays is not None
    assert not engine._replays.gave_up


@pytest.mark.parametrize("biases", [False, True])
def test_matmuls_by_mlx_are_recorded(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, biases: bool
) -> None:
    for takes in ("_takes", "_takes_one"):
        monkeypatch.setattr(matmul, takes, lambda *given, **more: False)
    wanted = by_mlx(SCENARIOS["batches"], partial(make_engine, biases=biases))
    assert SCENARIOS["batches"](make_engine(biases=biases)) == wanted
    assert driver.num_launches == 7
    notes = [call.note for calls in driver.graphs.values() for call in calls]
    assert {"matmul", "greedy"} <= {note.body for note in notes}
    assert any(len(note.inputs) == 3 for note in notes if note.body == "matmul") == biases


def adapter(directory: Path, seed: int) -> Adapter:
    model = tiny_llama(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB,
    )  # fmt: skip
    directory = directory / str(seed)
    return read_adapter(write_peft(directory, linears(model), rank=3, seed=seed, size=0.4))


def with_adapters(engine: Engine, directory: Path) -> list[Tokens]:
    """Batches with two adapters and the base, before and after another adapter has come."""
    engine.add_adapter("a", adapter(directory, 1), "a")
    engine.add_adapter("b", adapter(directory, 2), "b")
    found = []
    for turn in range(4):
        if turn == 2:
            engine.remove_adapter("b")
            engine.add_adapter("b", adapter(directory, 3), "c")
        for name, prompt in (("a", [1, 2, 3]), ("b", [5, 6, 7, 8, 9]), (None, [9, 8])):
            add(engine, str(name), prompt, 14, name)
        found.append(step(engine, {}))
    return found


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with adapters are recorded at once."""
    monkeypatch.setattr(replay, "_SETTLED_STEPS", 0)


@pytest.mark.parametrize(
    ("bits", "group"),
    [
        (16, 0),
        pytest.param(4, 64, marks=pytest.mark.long),
        pytest.param(8, 32, marks=pytest.mark.long),
    ],
)
def test_steps_with_adapters(
    driver: FakeDriver, settled: None, tmp_path: Path, bits: int, group: int
) -> None:
    """A graph reads the matrices of its time; it is dropped when they change."""
    quantised = {"packed": True, "bits": bits, "group": group} if bits < 16 else {}
    make = partial(make_engine, max_loras=3, **quantised)
    wanted = by_mlx(lambda engine: with_adapters(engine, tmp_path), make)
    assert wanted[0] == wanted[1] != wanted[2] == wanted[3]
    assert len(set(map(tuple, wanted[0].values()))) == 3
    engine = make()
    replays = engine._replays
    assert replays is not None
    made: list[tuple[int, int]] = []
    record = replays._record

    def noted(shape: Any, *given: Any) -> Any:
        found = record(shape, *given)
        if shape.layout.adapted:
            made.append((replays._adapters.version, found is not None))
        return found

    replays._record = noted  # type: ignore[method-assign]
    assert with_adapters(engine, tmp_path) == wanted
    assert len({version for version, _ in made}) == 2
    assert all(works for _, works in made)
    assert len(driver.graphs) == sum(graph is not None for graph in replays._graphs.values())
    bodies = {call.note.body for calls in driver.graphs.values() for call in calls}
    assert {"adapters", "adapters_norm"} & bodies
    assert ("dequantise" in bodies) == (bits < 16)
    packed = [
        bool(dict(call.note.template)["BITS"] < 16)
        for calls in driver.graphs.values() for call in calls if call.note.body == "dots"
    ]  # fmt: skip
    assert set(packed) == {bits < 16}
    engine.remove_adapter("a")
    engine.remove_adapter("b")
    assert not driver.graphs, "they would keep the matrices"
    rows = engine._runner.adapter_rows
    assert rows is not None
    assert all(joint.matrices is None for joint in rows.joint)
    engine.close()


def adapters_between(engine: Engine, directory: Path) -> Tokens:
    """Adapters come and go while requests run."""
    for seed, name in enumerate("ab", 1):
        engine.add_adapter(name, adapter(directory, seed), name)
    found: Tokens = {}
    add(engine, "1", [1, 2, 3], 40, "a")
    add(engine, "2", [4, 5], 40)
    step(engine, found, 12)
    engine.add_adapter("c", adapter(directory, 3), "c")
    step(engine, found, 5)
    add(engine, "3", [7, 8, 9], 20, "c")
    step(engine, found, 8)
    engine.remove_adapter("a")
    step(engine, found, 6)
    add(engine, "4", [7, 8, 9], 20, "b")
    return step(engine, found)


def prompts_with_adapters(engine: Engine, directory: Path) -> Tokens:
    for seed, name in enumerate("ab", 1):
        engine.add_adapter(name, adapter(directory, seed), name)
    found: Tokens = {}
    for turn in range(7):
        for name, prompt in (("a", [1, 2, 3, turn]), ("b", [4, 5, turn]), (None, [4, 5, turn])):
            add(engine, f"{turn} {name}", prompt, 5, name)
        step(engine, found)
    return found


@pytest.mark.parametrize(
    ("scenario", "max_loras"),
    [
        *(pytest.param(adapters_between, most, marks=pytest.mark.long) for most in (4, 1)),
        (prompts_with_adapters, 3),
    ],
)
def test_adapters_that_change_and_prompts(
    driver: FakeDriver, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    scenario: Callable[[Engine, Path], Tokens], max_loras: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(operations, "tried", with_tiles)
    make = partial(make_engine, max_loras=max_loras)
    wanted = by_mlx(lambda engine: scenario(engine, tmp_path), make)
    engine = make()
    recorded_tiles: list[int] = []
    graphs = driver.make_graph

    def made(calls: Iterable[Any], stream: int) -> int:
        kept = list(calls)
        if any(call.note.body in ("adapters", "adapters_norm") for call in kept):
            recorded_tiles.append(sum(call.note.body == "prefill" for call in kept))
        return graphs(kept, stream)

    monkeypatch.setattr(driver, "make_graph", made)
    assert scenario(engine, tmp_path) == wanted
    assert recorded_tiles
    assert any(recorded_tiles) == (scenario is prompts_with_adapters)
    engine.close()
    assert not driver.graphs


@pytest.mark.long
def test_adapters_that_come_and_go_have_no_graphs(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Recording would take longer than the graphs save; at first, that is not known."""
    monkeypatch.setattr(replay, "_SETTLED_STEPS", 3)
    engine = make_engine(max_loras=1)
    for seed in range(3):
        engine.add_adapter(f"{seed}", adapter(tmp_path, seed), f"{seed}")
    made: list[int] = []
    graphs = driver.make_graph
    monkeypatch.setattr(
        driver, "make_graph", lambda calls, stream: made.append(0) or graphs(calls, stream)
    )
    per_turn = []
    for turn in range(9):
        before = len(made)
        add(engine, f"{turn}", [1, 2, 3], 16, f"{turn % 3}")
        step(engine, {})
        per_turn.append(len(made) - before)
    assert per_turn[0] == 1
    assert per_turn[3:] == [0] * 6
    add(engine, "long", [1, 2, 3], 60, "0")
    step(engine, {})
    assert len(made) > sum(per_turn), "with one adapter for long"
    engine.close()


@pytest.mark.long
def test_drafts_with_adapters_are_left_to_mlx(
    driver: FakeDriver, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draft_always(monkeypatch)

    def scenario(engine: Engine) -> Tokens:
        engine.add_adapter("a", adapter(tmp_path, 1), "a")
        found = step(engine, {})
        add(engine, "with", [5, 6, 7], 30, "a")
        step(engine, found)
        add(engine, "without", [5, 6, 7], 30)
        return step(engine, found)

    make = partial(drafting_engine, max_loras=1)
    wanted = by_mlx(scenario, make)
    engine = make()
    assert scenario(engine) == wanted
    bodies = {call.note.body for calls in driver.graphs.values() for call in calls}
    assert bodies
    assert not bodies & {"adapters", "adapters_norm"}
    engine.close()


@pytest.mark.long
def test_steps_with_adapters_that_cannot_be_recorded(
    driver: FakeDriver, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A few are tried for each version of the matrices; those of the base are graphs."""
    make = partial(make_engine, max_loras=3)
    wanted = by_mlx(lambda engine: with_adapters(engine, tmp_path), make)
    add, tried = adapters.add, []

    def refusing(*given: Any, **more: Any) -> mx.array:
        if recording.active() is not None:
            tried.append(given)
        recording.refuse("adds adapters")
        return add(*given, **more)

    monkeypatch.setattr(adapters, "add", refusing)
    engine = make()
    assert with_adapters(engine, tmp_path) == wanted
    assert 2 <= len(tried) <= 2 * replay._MOST_REFUSED
    assert SCENARIOS["batches"](engine) == expected("batches")
    assert engine._replays is not None
    assert not engine._replays.gave_up
    assert driver.graphs
    engine.close()


@pytest.mark.parametrize("biases", [False, pytest.param(True, marks=pytest.mark.long)])
def test_weights_are_dequantised_one_by_one(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, biases: bool
) -> None:
    """With many rows; each takes the memory of those before it."""
    for takes in ("_takes", "_takes_one"):
        monkeypatch.setattr(matmul, takes, lambda *given, **more: False)
    monkeypatch.setattr(packed, "tile_for", lambda *given: None)
    monkeypatch.setattr(packed, "fits_row", lambda *given: False)
    monkeypatch.setattr(packed_wide, "tile_for", lambda *given, **more: None)
    monkeypatch.setattr(matmul, "FEW_ROWS", 0)
    make = partial(make_engine, bits=4, biases=biases, layers=3)
    wanted = by_mlx(SCENARIOS["batches"], make)
    engine = make()
    assert SCENARIOS["batches"](engine) == wanted
    assert driver.num_launches == 7
    for calls in driver.graphs.values():
        bodies = [call.note.body for call in calls]
        at = [index for index, body in enumerate(bodies) if body == "dequantise"]
        assert len(at) >= 9
        assert {bodies[index + 1] for index in at} == {"matmul"}
        assert all(calls[index].writes[0] == calls[index + 1].reads[1] for index in at)
        assert len({calls[index].writes[0] for index in at}) < len(at)
        outputs = [each for index in at for each in calls[index].note.outputs]
        assert {type(each) for each in outputs} == {Transient}, "they are not in memory"
        biased = [len(calls[index + 1].note.inputs) == 3 for index in at]
        assert any(biased) == biases


def test_matmuls_in_another_order_are_left_to_mlx(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """cuBLAS may add in another order than for MLX: one shape is refused, not all."""
    caplog.set_level("INFO")
    monkeypatch.setattr(matmul, "multiply", matmul._by_mlx)
    monkeypatch.setattr(fused_layers, "multiply", matmul._by_mlx)
    wanted = by_mlx(SCENARIOS["batches"])
    make = driver.make_graph

    def without_norms(calls: list[Call], stream: int) -> int:
        some = calls if driver.graphs else [c for c in calls if c.note.body != "add_norm"]
        driver.graphs[0] = []
        return make(some, stream)

    monkeypatch.setattr(driver, "make_graph", without_norms)
    engine = make_engine()
    assert SCENARIOS["batches"](engine) == wanted
    assert "MLX launches such steps: the graph of 4 rows gives other tokens" in caplog.text
    assert engine._replays is not None
    assert not engine._replays.gave_up
    assert driver.num_launches > 1


def test_a_step_that_mlx_computes_in_part_is_not_recorded(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=replay.__name__)
    monkeypatch.setattr(matmul, "multiply", lambda x, weights: x @ weights.weight.T)
    monkeypatch.setattr(fused_layers, "multiply", lambda x, weights: x @ weights.weight.T)
    engine = make_engine()
    found = SCENARIOS["batches"](engine)
    assert {name: len(tokens) for name, tokens in found.items()} == {
        "one": 14,
        "two": 6,
        "three": 9,
    }
    assert driver.num_launches == 0
    assert (
        "steps of 4 rows are not recorded: greedy reads logits, which no kernel writes"
        in caplog.text
    )


def seeing_engine(kind: str) -> KernelEngine:
    """An engine with a vision tower, whose text model has shapes that kernels support."""
    config_of, layers = tiny.config_of, 2 if kind in tiny.DEEP else 1

    def small(kind: str) -> dict[str, Any]:
        config = config_of(kind)
        text = config.get("text_config", config)
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
        if "head_dim" in text:
            text["head_dim"] = 32
        if rope := text.get("rope_scaling"):
            rope["mrope_section"] = [4, 6, 6]
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "config_of", small)
        directory = tiny.directory.__wrapped__(kind)
    loaded = load(ModelFiles.from_directory(directory), device="cpu")
    loaded.model.set_dtype(mx.bfloat16)
    config = EngineConfig(
        kv_cache_bytes=1 << 20, max_num_seqs=4, max_model_len=256, self_test=False
    )
    return KernelEngine(loaded, config)


def questions(engine: Engine, *more: str) -> Tokens:
    """Questions about each of five pictures, one after the other."""
    found: Tokens = {}
    for number in range(5):
        for question in ("What is it?", "How many?", *more):
            request = tiny.request(engine, f"<image>{question}", [tiny.picture(number)])
            engine.add_request(name := f"{number} {question}", request)
            while len(found.get(name, ())) < request.params.max_tokens:
                step(engine, found, 1)
    return step(engine, found)


def longer_questions(engine: Engine) -> Tokens:
    """Steps of more rows after those of the second questions."""
    return questions(engine, "How many of them are in the picture, and where?")


def questions_beside_text(engine: Engine) -> Tokens:
    """The same, while tokens are generated for a request without a picture."""
    add(engine, "text", [4, 5, 6], 100)
    return questions(engine)


@pytest.mark.parametrize(
    ("kind", "scenario", "axes"),
    [
        pytest.param("llava", questions, 1, id="a picture's rows are all in the prefix cache"),
        # Rotations are not the positions: a picture takes fewer of these.
        pytest.param(
            "qwen2_5_vl", longer_questions, 3, id="the last rows are computed again",
            marks=pytest.mark.long,
        ),
        pytest.param("qwen2_5_vl", questions_beside_text, 3, id="rows with the last tokens"),
        pytest.param("qwen3_vl", questions, 0, id="DeepStack", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_second_questions(
    driver: FakeDriver, launched: list[Layout], kind: str, scenario: Scenario, axes: int
) -> None:
    """Their steps are graphs; where MLX launches them (`axes` 0), those that decode are."""
    wanted = by_mlx(scenario, partial(seeing_engine, kind))
    assert len(set(map(tuple, wanted.values()))) > 4
    assert scenario(seeing_engine(kind)) == wanted
    assert sum(layout.tiles == 0 for layout in launched) > 40
    with_prompts = [layout for layout in launched if layout.tiles]
    assert len(with_prompts) <= 6, "first questions wait for the encoder on the device"
    # Two shapes at most are recorded, which copies embeddings as each launch does.
    assert driver.num_copies > 2 if axes == 3 else driver.num_copies == 0
    found = {layout.axes for layout in with_prompts}
    if scenario is questions_beside_text:  # the text before a picture, while the tower computes
        found.discard(1)
    assert found == ({axes} if axes else set())
    assert any(layout.decode for layout in with_prompts) == (scenario is questions_beside_text)
