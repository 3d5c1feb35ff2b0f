"""Recurrent models decode in compiled steps, as on a GPU, and generate mlx-lm's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from modelpack_engine.attention.metadata import States, StepInputs
from modelpack_engine.core.buckets import FEW, Buckets
from modelpack_engine.kernels import launch, operations
from modelpack_engine.layers import (
    adapters,
    convolution,
    delta_rule,
    expert_kernels,
    gated_norm,
    kernels,
    linear_attention,
    segments,
    state_space,
)
from modelpack_engine.patches.lora import LoRALayers
from modelpack_engine.patches.recurrent import KNOWN
from modelpack_engine.runner import adapted
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.paged import CompiledSteps, PagedRunner
from modelpack_engine.runner.recurrent import SlotSnapshot
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration, prompts
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.recurrent import RECURRENT
from tests.engine.zoo.specimen import adapter_of, make_specimen

pytestmark = pytest.mark.long

#: Recurrent layers of several kinds, with attention and alone.
ADAPTED = [each for each in RECURRENT if each.id in ("mamba2", "qwen3_next", "lfm2", "falcon_h1")]

BUCKETS = Buckets(rows=(4, 8), chunk=(8, 16), table_width=(2, 8))
#: Not compiled: attention and recurrence are in one module, or attention is written by hand.
NOT_COMPILED = {"baichuan_m1", "gear: capped scores"}


@pytest.mark.parametrize("configuration", RECURRENT, ids=lambda configuration: configuration.id)
def test_recurrent(
    configuration: Configuration,
    uncompiled: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = make_specimen(configuration)
    taken: list[bool] = []
    takes = CompiledSteps.takes

    def noticed(self: CompiledSteps, batch: object) -> bool:
        taken.append(takes(self, batch))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(CompiledSteps, "takes", noticed)
    runner = found.make_runner(buckets=BUCKETS, exact=False, compiled=True, self_test=False)
    try:
        taken.clear()
        setting = Setting(buckets=BUCKETS, exact=False, rows=32, blocks=9)
        driver = found.drive(setting, runner)
        assert driver.tokens == found.reference.tokens
        assert driver.scheduler.stats().num_mixed_steps >= 3
        assert driver.scheduler.stats().num_preemptions > 0
    finally:
        runner.undo()
    assert (True in taken) == (configuration.id not in NOT_COMPILED)


@pytest.fixture
def by_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute recurrent layers as on a GPU, but by definitions instead of kernels."""
    monkeypatch.setattr(segments, "supports", lambda *_, **__: True)
    monkeypatch.setattr(adapted, "_are_right", lambda *_: True)
    for layer in (convolution, delta_rule, linear_attention, state_space):
        monkeypatch.setattr(layer, "by_segments", in_place(layer.one_by_one))


def in_place(compute: Callable[..., tuple[mx.array, ...]]) -> Callable[..., Any]:
    """Return what computes the same, and writes states and snapshots in place as kernels do."""

    def computed(*args: Any, **kwargs: Any) -> mx.array:
        outputs, after, kept = compute(*args, **kwargs)
        states = next(arg for arg in args if isinstance(arg, States))
        mx.eval(outputs, after, kept)
        np.asarray(states.rows)[:], np.asarray(states.slots)[:] = after, kept
        return outputs

    return computed


#: Recurrent layers that compute all rows of a step in one call.
WHOLE = [each for each in RECURRENT if any(each.architecture == kind for kind, _ in KNOWN)]


@pytest.mark.parametrize("configuration", WHOLE, ids=lambda configuration: configuration.id)
def test_prompts_and_tokens_in_one_step(
    configuration: Configuration,
    uncompiled: None,
    by_segments: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = make_specimen(configuration)
    monkeypatch.setattr(StepInputs, "begin", None)  # no step runs otherwise
    runner = found.make_runner(buckets=BUCKETS, exact=False, compiled=True, self_test=False)
    try:
        setting = Setting(buckets=BUCKETS, exact=False, rows=32, blocks=9)
        driver = found.drive(setting, runner)
        assert driver.tokens == found.reference.tokens
        assert driver.scheduler.stats().num_mixed_steps >= 3
        assert driver.scheduler.stats().num_preemptions > 0
        assert driver.scheduler.stats().cached_tokens > 0
        continued_from_slots(driver)
    finally:
        runner.undo()


@pytest.mark.parametrize("name", ["nemotron_h", "kimi_linear"])
def test_slots_that_are_fewer_than_prompts(
    name: str, uncompiled: None, by_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots are evicted for others, also while prompts continue from them."""
    monkeypatch.setattr(ModelLayout, "num_snapshots", 4)
    [known] = [each for each in RECURRENT if each.id == name]
    found = make_specimen(known)
    runner = found.make_runner(buckets=BUCKETS, exact=False, compiled=True, self_test=False)
    try:
        driver = Driver(runner, Setting(buckets=BUCKETS, exact=False, rows=64))
        texts = [[(5 * i + start) % 90 + 1 for i in range(40)] for start in range(6)]
        for text in [*texts, *texts[3:], *texts[4:], *texts]:
            driver.add(text, 5)
            driver.step()
        driver.run()
        by_text = {tuple(each.prompt_token_ids): each.output_token_ids for each in driver.sequences}
        assert len(by_text) == len(texts)
        for sequence in driver.sequences:
            assert sequence.output_token_ids == by_text[tuple(sequence.prompt_token_ids)]
        assert 0 < len(runner.snapshots) <= 3
        assert driver.scheduler.stats().cached_tokens > 0
    finally:
        runner.undo()


def continued_from_slots(driver: Driver) -> None:
    """Check that the tokens of prompts are the same after snapshots of the prompts before."""
    snapshots = driver.runner.snapshots
    assert snapshots is not None
    assert snapshots.within_chunks
    assert {type(state) for _, state in snapshots.items()} == {SlotSnapshot}
    before = driver.sequences
    again = [driver.add(each.prompt_token_ids, len(each.output_token_ids)) for each in before[:]]
    driver.run()
    for sequence, first in zip(again, before, strict=False):
        assert sequence.output_token_ids == first.output_token_ids
    assert sum(sequence.num_cached_tokens for sequence in again) > 0


@pytest.mark.parametrize("configuration", ADAPTED, ids=lambda configuration: configuration.id)
def test_recurrent_with_adapters(configuration: Configuration, uncompiled: None) -> None:
    """Some rows have one: all get the tokens of steps that are not compiled."""
    specimen, found = make_specimen(configuration), []
    for compiled in (False, True):
        runner = specimen.make_runner(
            buckets=BUCKETS, exact=False, compiled=compiled, self_test=False
        )
        assert runner.adapter_rows is not None
        loras = LoRALayers(specimen.model, runner.adapter_rows)
        loras.set(1, adapter_of(specimen.model))
        driver = Driver(runner, Setting(buckets=BUCKETS, exact=False, rows=32))
        for index, prompt in enumerate(prompts()):
            driver.add(prompt, 8, adapter=index % 2)
        driver.run()
        found.append(driver.tokens)
        loras.undo()
        runner.undo()
    assert found[0] == found[1]
    assert found[0][1] != specimen.reference.tokens[1][:8]
    assert found[0][0] == specimen.reference.tokens[0][:8]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(operations, "_verdicts", {})
    monkeypatch.setattr(operations, "_WIDTH", 4)
    monkeypatch.setattr(operations, "_SLOTS", 256)
    layers = (
        convolution, delta_rule, gated_norm, linear_attention, state_space, kernels, adapters,
        expert_kernels,
    )  # fmt: skip
    wide = delta_rule.wide_verdict, state_space.wide_verdict
    with emulated(monkeypatch, *(layer.verdict for layer in layers), *wide) as found:
        yield found


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        *((name, how) for name in ("nemotron_h", "qwen3_next", "qwen3_5") for how in ("", "all")),
        ("nemotron_h: experts", "all but experts"),
        ("qwen3_next", "all but experts"),
    ],
)
def test_layers_by_kernels(host: Host, uncompiled: None, name: str, tuned: str) -> None:
    """On an emulated GPU: prompts of several lengths and tokens, of layers that are fused."""
    [known] = [each for each in CATALOGUE if each.id == name]
    wide = {"linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "ssm_state_size"}
    own = dict.fromkeys(("head_dim", *sorted(wide & {*known.args})), 32)
    specimen = make_specimen(replace(known, args={**known.args, **own}))

    def tokens(**how: Any) -> list[list[int]]:
        runner = specimen.make_runner(buckets=FEW, exact=False, **how)
        try:
            assert isinstance(runner, PagedRunner)
            assert runner.notes == tuple(runner.adapted.notes())
            loras = LoRALayers(specimen.model, runner.adapter_rows)
            if tuned:
                layers = adapter_of(specimen.model)
                if tuned != "all":
                    routers = (".gate", ".shared_expert_gate")
                    layers = {n: one for n, one in layers.items() if not n.endswith(routers)}
                loras.set(1, layers)
                assert loras.fuses
                assert tuned == "all" or not loras.changes_bypassed
            if how["compiled"]:
                assert {"recurrence", "attention", "block"} <= {*runner.fused}
            host.calls.clear()
            driver = Driver(runner, Setting(buckets=FEW, exact=False, rows=32))
            for index, prompt in enumerate(prompts()[:3]):
                driver.add(prompt, 4, adapter=index % 2 if tuned else 0)
            driver.run()
            assert driver.scheduler.stats().num_mixed_steps > 0
            found = driver.tokens
            if how["compiled"] and not tuned:
                continued_from_slots(driver)
            loras.undo()
        finally:
            runner.undo()
        return found

    found = tokens(compiled=True)
    rule = "state_space" if "nemotron_h" in name else "delta_rule"
    assert {"convolve", rule, "gated_norm", "rotate"} <= {body for body, _ in host.calls}
    wanted = [own[:4] for own in specimen.reference.tokens[:3]]
    if not tuned:
        assert found == wanted
        return
    assert "adapters" in {body for body, _ in host.calls}
    if tuned != "all":
        assert {"route", "gate", "dispatch", "combine"} <= {body for body, _ in host.calls}
    assert [found[0], found[2]] == [wanted[0], wanted[2]]
    assert found[1] != wanted[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backend", lambda: "none")
        assert tokens(compiled=False) == found


@pytest.mark.parametrize(
    ("name", "bodies"),
    [
        ("rwkv7", {"convolve", "linear_attention"}),
        ("bailing_hybrid", {"linear_attention"}),
        ("bailing_moe_linear", {"linear_attention"}),
        ("olmo_hybrid", {"convolve", "delta_rule"}),
        ("plamo2", {"convolve", "state_space"}),
    ],
)
def test_layers_that_are_not_fused(
    host: Host, uncompiled: None, name: str, bodies: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [known] = [each for each in RECURRENT if each.id == name]
    specimen = make_specimen(known)
    monkeypatch.setattr(StepInputs, "begin", None)  # no step runs otherwise
    runner = specimen.make_runner(buckets=FEW, exact=False, compiled=True, self_test=False)
    try:
        driver = Driver(runner, Setting(buckets=FEW, exact=False, rows=32))
        for prompt in prompts()[:3]:
            driver.add(prompt, 4)
        host.calls.clear()
        driver.run()
        assert driver.scheduler.stats().num_mixed_steps > 0
        assert driver.tokens == [own[:4] for own in specimen.reference.tokens[:3]]
        assert bodies <= {body for body, _ in host.calls}
        continued_from_slots(driver)
    finally:
        runner.undo()


@pytest.mark.parametrize(
    ("name", "sizes", "bodies"),
    [
        ("nemotron_h", {"mamba_head_dim": 32, "ssm_state_size": 64}, {"state_space_wide"}),
        (
            "qwen3_5",
            {"linear_key_head_dim": 32, "linear_value_head_dim": 64},
            {"delta_tiles", "delta_wide"},
        ),
    ],
)
def test_prompts_on_tensor_cores(
    host: Host,
    uncompiled: None,
    name: str,
    sizes: dict[str, int],
    bodies: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16, the tokens are those of the kernels that go token by token."""
    [known] = [each for each in RECURRENT if each.id == name]
    args = {**known.args, **sizes, "head_dim": 32}
    specimen = make_specimen(replace(known, args=args))
    model = specimen.model
    cast = tree_map(lambda array: array.astype(mx.float16), model.parameters())
    model.update(cast)
    monkeypatch.setattr(StepInputs, "begin", None)  # no step runs otherwise

    def tokens() -> list[list[int]]:
        runner = specimen.make_runner(buckets=FEW, exact=False, compiled=True, self_test=False)
        try:
            driver = Driver(runner, Setting(buckets=FEW, exact=False, rows=128))
            for length in (70, 5, 45):
                driver.add([(7 * i + length) % 100 for i in range(length)], 4)
            host.calls.clear()
            driver.run()
            continued_from_slots(driver)
        finally:
            runner.undo()
        return driver.tokens

    found = []
    for wide in (False, True):
        monkeypatch.setattr(state_space, "_fits_wide", lambda *_, wide=wide: wide)
        monkeypatch.setattr(
            delta_rule,
            "_is_wide",
            lambda given, *_, wide=wide: wide and given[-1].shape[0] > given[-2].shape[0],
        )
        found.append(tokens())
        assert (bodies <= {body for body, _ in host.calls}) == wide
    assert found[0] == found[1]
