"""Compiled steps return the logits of uncompiled steps, and are built once for each shape."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepBatch, WindowTables, build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT, FEW, Buckets
from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.request import Media, SamplingParams
from modelpack_engine.runner import model_runner, paged
from modelpack_engine.runner.adapted import Adapted
from modelpack_engine.runner.kv_cache_size import Sizes, step_shapes
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.paged import CompiledSteps, PagedRunner
from tests.engine.fusion.test_kernels import tiny_qwen2_vl
from tests.engine.runner.models import (
    Attention,
    decode,
    make_model,
    prefill,
    tiny_llama,
    token_ids,
)
from tests.engine.runner.test_step import run, tiny_mamba
from tests.engine.serving.tiny import reference_tokens, tiny_loaded

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], list(range(1, 41)), [7], list(range(50, 10, -1))]


class Forgetful(Attention):
    """Attention whose Python code reads values, which is impossible in a compiled graph."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if mx.isnan(x).any().item():
            return x
        return super().__call__(x, mask, cache)


def logits_of_a_run(runner: ModelRunner, steps: int = 6) -> list[mx.array]:
    """Serve the prompts, adding a few at each step; return the logits of each step."""
    sizes = Sizes(64, 128, 48, FEW)
    blocks = BlockManager(64, 16)
    scheduler = Scheduler(sizes.scheduler_config(EngineConfig(max_num_seqs=8)), blocks)
    found = []
    waiting = [Sequence(f"r{i}", prompt, SamplingParams(max_tokens=32)) for i, prompt in
               enumerate(PROMPTS)]  # fmt: skip
    for _ in range(steps):
        if waiting:
            scheduler.add(waiting.pop(0))
        output = scheduler.schedule()
        assert output is not None
        batch = build_batch(output, None, FEW, 16)
        logits = runner.forward(batch, token_ids(batch))
        mx.eval(logits, runner.pools())
        found.append(logits[: len(batch.sample_rows)])  # rows of padding may follow
        scheduler.submitted(output)
        scheduler.collect(output, [(5 * len(found) + i) % 60 for i in range(len(output.sampled))])
    return found


@pytest.mark.parametrize("windowed", [False, True])
def test_the_same_logits(windowed: bool) -> None:
    arguments = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    runs = []
    for choice in (False, True):
        model = tiny_llama(**(arguments if windowed else {}))
        runner = make_runner(model, num_blocks=64, buckets=FEW, exact=False, compiled=choice)
        assert runner.tier == "paged"
        runs.append(logits_of_a_run(runner))
    for one, other in zip(*runs, strict=True):
        assert mx.allclose(one, other, atol=1e-4).item()


def logits_with_spans(runner: ModelRunner, buckets: Buckets, seen: bool) -> list[mx.array]:
    """Serve prompts whose tokens at some positions attend in both directions, if `seen`."""
    sizes = Sizes(64, 128, 128, buckets)
    scheduler = Scheduler(
        sizes.scheduler_config(EngineConfig(max_num_seqs=8)),
        BlockManager(64, 16),
        SimpleNamespace(prepare=lambda *_, **__: True),
    )
    found = []
    for spans, length in (((), 9), (((2, 6), (9, 20)), 21), (((1, 5),), 6), (((3, 30),), 40)):
        made = Sequence(f"r{length}", list(range(length)), SamplingParams(max_tokens=32))
        made.media = tuple(
            Media(low, (0,) * (high - low), b"", {}, bidirectional=((0, high - low),))
            for low, high in spans
        )
        scheduler.add(made)
        for _ in range(2):
            output = scheduler.schedule()
            assert output is not None
            batch = replace(build_batch(output, None, buckets, 16), media_rows=())
            if not seen:
                chunks = tuple(replace(chunk, spans=()) for chunk in batch.chunks)
                batch = replace(batch, chunks=chunks)
            if isinstance(runner, PagedRunner) and runner.compiled is not None:
                has_spans = any(chunk.spans for chunk in batch.chunks)
                assert runner.compiled.takes(batch) == (not has_spans)
            logits = runner.forward(batch, token_ids(batch))
            mx.eval(logits, runner.pools())
            found.append(logits[: len(batch.sample_rows)])
            scheduler.submitted(output)
            scheduler.collect(output, [(5 * len(found)) % 60] * len(output.sampled))
    return found


def test_rows_that_see_later_ones() -> None:
    """The rows of a picture attend to all others of it, with and without padding and graphs."""
    arguments = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    found = []
    for buckets, exact, compiled, seen in (
        (EXACT, True, False, True), (FEW, False, False, True), (FEW, False, True, True),
        (FEW, False, True, False),
    ):  # fmt: skip
        runner = make_runner(
            tiny_llama(**arguments), num_blocks=64, buckets=buckets, exact=exact, compiled=compiled
        )
        assert runner.tier == "paged"
        found.append(logits_with_spans(runner, buckets, seen))
    first, *others, causal = found
    assert len(first) == 8
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert mx.allclose(one, two, atol=1e-4).item()
    same = [mx.allclose(a, b, atol=1e-4).item() for a, b in zip(first, causal, strict=True)]
    assert same == [True, True, *[False] * 6]


@pytest.mark.parametrize("grid", [False, True])
def test_rows_of_pictures(grid: bool) -> None:
    """With M-RoPE, rotations are not the places in the sequence, which the lengths still count.

    Rows of pictures have three, and embeddings that are not those of their tokens.
    """
    found: list[list[mx.array]] = []
    for compiled, shift in ((False, 3), (True, 3), (True, 0)):
        runner = make_runner(
            tiny_qwen2_vl(), num_blocks=8, buckets=FEW, exact=False, compiled=compiled
        )
        assert isinstance(runner, PagedRunner)
        scheduler = Scheduler(
            Sizes(8, 128, 48, FEW).scheduler_config(EngineConfig(max_num_seqs=8)), BlockManager(8)
        )
        logits: list[mx.array] = []
        for name, prompt in (("a", [3, 1, 4]), ("b", list(range(20)))):
            scheduler.add(Sequence(name, prompt, SamplingParams(max_tokens=32)))
            for _ in range(2):
                output = scheduler.schedule()
                assert output is not None
                batch = build_batch(output, None, FEW, 16)
                turned = [max(place - shift, 0) for place in batch.positions]
                beside = [place // 2 if grid and batch.chunks else place for place in turned]
                batch = replace(batch, rope_positions=(turned, beside, turned))
                embeddings = None
                if grid and batch.chunks:
                    embeddings = mx.random.normal((batch.num_rows, 64), key=mx.random.key(3))
                assert (runner.compiled is not None and runner.compiled.takes(batch)) == compiled
                made = runner.forward(batch, token_ids(batch), embeddings)
                mx.eval(made, runner.pools())
                logits.append(made[: len(batch.sample_rows)])
                scheduler.submitted(output)
                scheduler.collect(output, [5 + len(logits)] * len(output.sampled))
        found.append(logits)
    for one, other in zip(found[0], found[1], strict=True):
        assert mx.allclose(one, other, atol=1e-4).item()
    for one, plain in zip(found[1], found[2], strict=True):
        assert not mx.allclose(one, plain, atol=1e-4).item()


def test_the_same_hidden_states() -> None:
    """Rows are found in a compiled graph's own order, and are the inputs of the layers."""
    runs: list[list[mx.array]] = []
    for compiled in (False, True):
        runner = make_runner(
            tiny_llama(), num_blocks=64, buckets=FEW, exact=False, compiled=compiled
        )
        assert isinstance(runner, PagedRunner)
        runner.record_hidden((1, 1, 2), lambda states: 2 * states)
        found: list[mx.array] = []
        forward = runner.forward

        def noted(
            batch: StepBatch,
            ids: mx.array,
            *,
            forward: Any = forward,
            runner: PagedRunner = runner,
            found: list[mx.array] = found,
        ) -> mx.array:
            logits: mx.array = forward(batch, ids)
            hidden = runner.hidden_rows()
            assert hidden is not None
            found.extend(hidden.cut(row, 1) for row in range(len(batch.decode_seq_ids)))
            found.extend(hidden.cut(chunk.row, chunk.length) for chunk in batch.chunks)
            return logits

        runner.forward = noted  # type: ignore[method-assign]
        logits_of_a_run(runner)
        runs.append(found)
        runner.undo()
    assert len(runs[0]) == len(runs[1]) > 15
    for one, other in zip(*runs, strict=True):
        assert one.shape == other.shape
        assert mx.allclose(one, other, atol=1e-4).item()
    inner: Any = tiny_llama().model
    hidden = inner.embed_tokens(mx.array([PROMPTS[0]]))
    inputs = []
    for layer in inner.layers:
        hidden = layer(hidden, "causal", None)
        inputs.append(hidden[0])
    expected = 2 * mx.concatenate([inputs[0], inputs[0], inputs[1]], axis=-1)
    assert mx.allclose(runs[1][0], expected, atol=1e-4).item()


@pytest.mark.parametrize("sampled", [False, True])
def test_the_pools_wait_for_a_step_without_sampled_rows(
    monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    """Such a step is the beginning of a long prompt: only its pools are evaluated.

    With pools that are written in place, no array but the logits depends on a compiled step.
    """
    runner = make_runner(tiny_llama(), num_blocks=64, buckets=FEW, exact=False, compiled=True)
    assert isinstance(runner, PagedRunner)
    assert runner.compiled is not None
    runner.compiled._graphs.clear()  # those of the self-test return the pools
    monkeypatch.setattr(Adapted, "writes_in_place", property(lambda self: True))
    batch = prefill(1, [3, 1, 4, 1, 5, 9, 2, 6], [1])
    if not sampled:
        batch = replace(batch, sample_rows=(), sample_seqs=())
    mx.eval(runner.pools())
    runner.forward(batch, token_ids(batch))
    graph = io.StringIO()
    mx.export_to_dot(graph, *runner.pools())
    assert ("Matmul" in graph.getvalue()) is not sampled


def test_built_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    model = tiny_llama()
    inner = type(model.model)
    original = inner.__call__

    def counted(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        built.append(x.shape[0])
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(inner, "__call__", counted)
    runner = make_runner(model, num_blocks=64, buckets=FEW, exact=False, compiled=True)
    logits_of_a_run(runner)
    built.clear()
    logits_of_a_run(runner)
    assert built == []


def test_states_of_recurrent_models_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps are compiled once for each shape, at warm-up; steps with prompts are not."""
    traced: list[int] = []
    original = paged.CompiledSteps._trace

    def counted(self: paged.CompiledSteps, layout: paged.Layout, *inputs: Any) -> Any:
        traced.append(layout.rows)
        return original(self, layout, *inputs)

    monkeypatch.setattr(paged.CompiledSteps, "_trace", counted)
    runs = []
    for choice in (False, True):
        runner = make_runner(tiny_mamba(), num_blocks=64, buckets=FEW, exact=False, compiled=choice)
        assert not any("compiled" in note for note in runner.notes)
        runner.warm_up(
            step_shapes(FEW, max_num_seqs=8, max_chunk=16, max_model_len=64, block_size=16)
        )
        assert sorted(set(traced)) == ([1, 2, 4, 8] if choice else [])
        traced.clear()
        runs.append(logits_of_a_run(runner, steps=12))
    assert traced == []
    for one, other in zip(*runs, strict=True):
        assert mx.allclose(one, other, atol=1e-4).item()


def test_a_failed_trace_leaves_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(tiny_mamba(), num_blocks=8, exact=False, compiled=True)
    run(runner, prefill(1, [3, 1, 4, 1, 5], [1]))
    inner = type(runner.model.backbone)

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    batch = decode(1, 5, 6, [1])
    with monkeypatch.context() as patch:
        patch.setattr(inner, "__call__", broken)
        with pytest.raises(ValueError, match="broken"):
            runner.forward(batch, token_ids(batch))
    alone = make_runner(tiny_mamba(), num_blocks=8, exact=False, compiled=False)
    expected = run(alone, prefill(1, [3, 1, 4, 1, 5], [1]), batch)
    assert mx.allclose(run(runner, batch), expected, atol=1e-5).item()


def test_long_prompts_are_not_for_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "LONGEST_PROMPT", 24)
    taken: list[bool] = []
    takes = paged.CompiledSteps.takes

    def noticed(self: paged.CompiledSteps, batch: StepBatch) -> bool:
        taken.append(takes(self, batch))
        return taken[-1]

    monkeypatch.setattr(paged.CompiledSteps, "takes", noticed)
    runs = []
    for choice in (False, True):
        runner = make_runner(tiny_llama(), num_blocks=64, buckets=FEW, exact=False, compiled=choice)
        runs.append(logits_of_a_run(runner))
    assert True in taken
    assert False in taken
    for one, other in zip(*runs, strict=True):
        assert mx.allclose(one, other, atol=1e-4).item()


def test_a_model_that_looks_at_values_is_built_anew() -> None:
    runner = make_runner(
        make_model(Forgetful), num_blocks=64, buckets=FEW, exact=False, compiled=True
    )
    assert runner.tier == "paged"
    assert any("no compiled steps" in note for note in runner.notes)


def test_a_failed_trace_leaves_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    runner = make_runner(model, num_blocks=64, buckets=FEW, exact=False, compiled=True)
    before = logits_of_a_run(runner)
    inner = type(model.model)

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(inner, "__call__", broken)
        batch = build_batch_of_one([1] * 100)
        with pytest.raises(ValueError, match="broken"):
            runner.forward(batch, token_ids(batch))
    mx.eval(runner.pools())
    for one, other in zip(before, logits_of_a_run(runner), strict=True):
        assert mx.allclose(one, other, atol=1e-5).item()


def test_ids_are_taken_from_rows_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that takes them does not check an index; rows of padding take any id."""
    taken: list[tuple[int, list[int]]] = []
    take = paged.take

    def noted(numbers: mx.array, index: mx.array) -> mx.array:
        taken.append((numbers.size, index.tolist()))
        return take(numbers, index)

    monkeypatch.setattr(paged, "take", noted)
    runner = make_runner(tiny_llama(), num_blocks=64, buckets=FEW, exact=False, compiled=True)
    taken.clear()
    logits_of_a_run(runner)
    assert any(len(index) > size for size, index in taken), "some rows are padding"
    for size, index in taken:
        assert 0 <= min(index) <= max(index) < size


def build_batch_of_one(prompt: list[int]) -> StepBatch:
    scheduler = Scheduler(
        Sizes(64, 256, 256, FEW).scheduler_config(EngineConfig(max_num_seqs=2)),
        BlockManager(64, 16),
    )
    scheduler.add(Sequence("one", prompt, SamplingParams(max_tokens=2)))
    output = scheduler.schedule()
    assert output is not None
    return build_batch(output, None, FEW, 16)


def test_chunks_fill_tiles_and_are_not_padded_one_by_one() -> None:
    chunks = [SimpleNamespace(length=65)] * 3
    batch: Any = SimpleNamespace(num_decode=5, chunks=chunks)
    steps = CompiledSteps(Any, Any, FEW, Any)  # type: ignore[arg-type]
    assert steps.num_rows(batch) == (16, 16 + 3 * 80), "not 3 * 128"


@pytest.mark.long
def test_whole_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with compiled steps generates mlx-lm's tokens, in a batch and after preemption."""

    def as_on_a_gpu(model: nn.Module, **given: Any) -> ModelRunner:
        given |= {"buckets": FEW, "exact": False, "compiled": True}
        return make_runner(model, **given)

    monkeypatch.setattr(model_runner, "make_runner", as_on_a_gpu)
    per_block = 2 * 2 * 2 * 16 * 4 * 16
    config = EngineConfig(max_num_seqs=4, max_model_len=96, kv_cache_bytes=12 * per_block)
    engine = Engine(tiny_loaded(), config)
    assert isinstance(engine._runner, PagedRunner)
    assert engine._runner.compiled is not None
    prompts = [[i + 1, *range(2, 2 + 7 * i)] for i in range(1, 6)]
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    found = engine.generate(prompts, params)
    assert engine.stats().num_preemptions > 0
    for prompt, events in zip(prompts, found, strict=True):
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == reference_tokens(prompt, 30)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_tables_are_those_of_the_batch(random: Random) -> None:
    """Tables are reused between steps, while sequences join, leave, grow, propose or skip one."""
    runner = make_runner(
        tiny_llama(), num_blocks=8, buckets=FEW, exact=False, compiled=True, self_test=False
    )
    assert isinstance(runner, PagedRunner)
    steps = runner.compiled
    assert steps is not None
    steps._step.of_group(1)
    lengths: dict[int, int] = {}
    tables: dict[int, list[int]] = {}
    fresh = itertools.count(1)
    for seq_id in itertools.count():
        if seq_id > 40:
            break
        for gone in [i for i in lengths if random.random() < 0.15]:
            del lengths[gone], tables[gone]
        if random.random() < 0.7:
            lengths[seq_id], tables[seq_id] = random.randrange(1, 150), []
        ids = [i for i in lengths if random.random() < 0.9]
        random.shuffle(ids)
        proposes = random.random() < 0.5
        ids = [i for i in ids for _ in range(random.randint(1, 3) if proposes else 1)]
        positions = []
        for i in ids:
            positions.append(lengths[i])
            lengths[i] += 1
            while len(tables[i]) * 16 < lengths[i]:
                tables[i].append(next(fresh))
        rows, width = (
            FEW.pad_rows(len(ids)),
            FEW.pad_table_width(max((len(tables[i]) for i in ids), default=1)),
        )
        padded = [tables[i] + [0] * (width - len(tables[i])) for i in ids]
        padded += [[0] * width] * (rows - len(ids))
        in_window = [[block + 1000 for block in tables[i]] for i in ids]
        batch = StepBatch(
            token_ids=[0] * rows,
            positions=positions + [0] * (rows - len(ids)),
            slots=[0] * rows,
            from_previous=(),
            num_decode=rows,
            decode_tables=[list(tables[i]) for i in ids] + [[]] * (rows - len(ids)),
            table_width=width,
            decode_lengths=[1] * rows,
            decode_seq_ids=tuple(ids),
            chunks=(),
            sample_rows=tuple(range(len(ids))),
            sample_seqs=(),
            windows=(WindowTables([], in_window + [[]] * (rows - len(ids)), []),),
        )
        found = steps._decode_tables(batch, np.array(batch.positions, np.int32), rows)
        others = [[block and block + 1000 for block in table] for table in padded]
        assert [of_group.tolist() for of_group in found] == [padded, others]
