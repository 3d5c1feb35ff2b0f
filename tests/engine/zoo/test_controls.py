"""The tests of the zoo can fail: each of these faults is detected.

Without the self-test, the tokens differ; with it, the runner uses another tier and is correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.core import block_manager
from modelpack_engine.runner.model_runner import make_runner
from modelpack_engine.runner.recurrent import RecurrentState, StateRows
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.specimen import Specimen, make_specimen

pytestmark = [pytest.mark.usefixtures("uncompiled"), pytest.mark.long]


@dataclass(frozen=True)
class Fault:
    """A fault in an attribute of `where`, and the models that it affects."""

    what: str
    where: Any
    attribute: str
    make: Callable[[Any], Any]
    models: tuple[str, ...]


def _attend(**changes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a fault that changes the given arguments of `attend`."""

    def make(original: Any) -> Any:
        def attend(self: PagedKV, queries: mx.array, **how: Any) -> mx.array:
            for name, change in changes.items():
                if how.get(name) is not None or name == "window":
                    how[name] = change(how.get(name))
            return original(self, queries, **how)

        return attend

    return make


def _doubled(original: property) -> property:
    return property(lambda self: self.step.positions * 2)


def _forgetful(original: Any) -> Any:
    def store(self: RecurrentState, *pieces: Any) -> None:
        original(self, *pieces)
        self.arrays = [None if array is None else mx.zeros_like(array) for array in self.arrays]

    return store


def _mistaken(original: Any) -> Any:
    """Swap the states of two sequences."""

    def finish(self: StateRows) -> None:
        original(self)
        seq_ids = sorted(self.rows)[:2]
        if len(seq_ids) == 2:
            a, b = seq_ids
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    return finish


def _late(original: Any) -> Any:
    """Write the keys of every row one slot too far."""

    def begin(self: StepInputs, *args: Any) -> None:
        original(self, *args)
        self.slots, self.slot_runs = self.slots + 1, None

    return begin


def _blind(original: Any) -> Any:
    return lambda parent, token_ids, size: original(parent, [0] * len(token_ids), size)


WINDOWED = ("gpt_oss", "gemma3_text", "gemma4_text", "llama: sliding windows", "exaone4")
HYBRID = ("nemotron_h", "qwen3_next", "rwkv7", "baichuan_m1")

FAULTS = [
    Fault("positions doubled", PagedKV, "offset", _doubled,
          ("llama", "gpt2", "gemma2", "gemma4_text", "deepseek_v3")),
    Fault("window ignored", PagedKV, "attend", _attend(window=lambda _: 10**6), WINDOWED),
    Fault("sinks dropped", PagedKV, "attend", _attend(sinks=lambda _: None),
          ("gpt_oss", "mimo_v2_flash")),
    Fault("rotary scores dropped", PagedKV, "attend", _attend(query_pe=lambda pe: pe * 0),
          ("deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash")),
    Fault("cap on scores dropped", PagedKV, "attend", _attend(softcap=lambda _: None),
          ("gemma2",)),
    Fault("state forgotten", RecurrentState, "store", _forgetful, HYBRID),
    Fault("states mixed up", StateRows, "finish", _mistaken, HYBRID),
    Fault("keys written late", StepInputs, "begin", _late, ("llama", "deepseek_v32")),
]  # fmt: skip
CASES = [
    pytest.param(
        fault,
        name,
        id=f"{fault.what}-{name}",
        marks=pytest.mark.long if fault.models[0] != name else (),
    )
    for fault in FAULTS
    for name in fault.models
]


@cache
def specimen(name: str) -> Specimen:
    return make_specimen(next(c for c in CATALOGUE if c.id == name))


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_fault_is_found(fault: Fault, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = specimen(name)
    monkeypatch.setattr(
        fault.where, fault.attribute, fault.make(getattr(fault.where, fault.attribute))
    )
    runner = make_runner(found.model, num_blocks=64, self_test=False)
    try:
        assert found.drive(Setting(), runner).tokens != found.reference.tokens
    finally:
        runner.undo()


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_self_test_leaves_the_tier(
    fault: Fault, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = specimen(name)
    monkeypatch.setattr(
        fault.where, fault.attribute, fault.make(getattr(fault.where, fault.attribute))
    )
    runner = make_runner(found.model, num_blocks=64)
    try:
        assert any("runs with no" in message for message in caplog.messages)
        assert any("are off by" in note for note in runner.notes)
        assert found.drive(Setting(), runner).tokens == found.reference.tokens
    finally:
        runner.undo()


def test_prefix_without_regard_to_content_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test cannot detect this fault: the scheduler shares wrong blocks."""
    found = specimen("llama")
    monkeypatch.setattr(block_manager, "block_hashes", _blind(block_manager.block_hashes))
    driver: Driver = found.drive(Setting())
    assert driver.tokens != found.reference.tokens
