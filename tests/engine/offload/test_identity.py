"""Only engines that would compute the same bytes find each other's blocks."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import mlx.core as mx
import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.runner.kv_offload import IDENTITY_SIZE, cache_identity
from modelpack_engine.runner.model_runner import make_runner
from tests.engine.serving.tiny import tiny_loaded, tiny_model

IDENTITIES = {
    "a model": ("a", 16, ["x", "y"]),
    "another": ("b", 16, ["x", "y"]),
    "other blocks": ("a", 32, ["x", "y"]),
    "another layer": ("a", 16, ["x", "z"]),
    "layers the other way round": ("a", 16, ["y", "x"]),
    "one layer": ("a", 16, ["xy"]),
    "more layers": ("a", 16, ["x", "y", ""]),
}


def test_all_that_matters_is_in_the_identity() -> None:
    found = {name: cache_identity(*parts) for name, parts in IDENTITIES.items()}
    for one, other in combinations(found, 2):
        assert found[one] != found[other], (one, other)
    assert {len(identity) for identity in found.values()} == {IDENTITY_SIZE}
    assert cache_identity(*IDENTITIES["a model"]) == found["a model"]


def test_layouts_are_told_apart() -> None:
    descriptions = []
    for settings in (
        {"exact": True},
        {"exact": False},
        {"exact": True, "dtype": mx.float16},
        {"exact": True, "block_size": 8},
    ):
        runner = make_runner(tiny_model(), num_blocks=4, self_test=False, **settings)  # type: ignore[arg-type]
        (contents,) = runner.block_contents()
        descriptions.append(tuple(contents.describe()))
    assert len(set(descriptions)) == len(descriptions)


def test_weights_without_a_name_are_not_kept_on_disk(tmp_path: Path) -> None:
    config = EngineConfig(device="cpu", kv_offload_dir=str(tmp_path / "kv"))
    with pytest.raises(EngineError, match="the weights have no name"):
        Engine(tiny_loaded(), config)
    assert not (tmp_path / "kv").exists()
