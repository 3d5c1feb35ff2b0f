"""Verdicts of kernels: what was found on one backend is not taken for another's."""

from __future__ import annotations

import pytest

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.sources import Backend
from modelpack_engine.layers import blocks


def test_a_verdict_is_that_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine on the processor may run before one on the GPU, in one process."""
    on: list[Backend] = ["none"]
    compared: list[int] = []

    def compare(size: int) -> str | None:
        compared.append(size)
        return f"{size} is wrong on {on[0]}" if size > 4 else None

    monkeypatch.setattr(launch, "backend", lambda: on[0])
    verdict = launch.Verdict(compare)
    assert verdict(4) == "there is no GPU"
    on[0] = "cuda"
    assert [verdict(4), verdict(8), verdict(4)] == [None, "8 is wrong on cuda", None]
    on[0] = "metal"
    assert verdict(8) == "8 is wrong on metal"
    on[0] = "none"
    assert verdict(4) == "there is no GPU"
    assert compared == [4, 8, 8], "cached"
    on[0] = "cuda"
    verdict.cache_clear()
    assert verdict(8) == "8 is wrong on cuda"
    assert compared == [4, 8, 8, 8]


def test_tensor_cores_are_those_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_compute_capability", lambda: 9)
    monkeypatch.setattr(launch, "backend", lambda: "none")
    assert not blocks._has_tensor_cores()
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    assert blocks._has_tensor_cores()
