"""Tiny models that transformers 4 and 5 saved: our logits are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelpack_engine.errors import ModelLoadError
from tests.engine.oracle.answers import FIXTURES, Case, answer, cases_of, cosine, fixture
from tests.engine.oracle.differences import DIFFERENCES, LOAD_ERRORS, OTHER_ANSWERS

pytestmark = pytest.mark.long

MODELS = {version: fixture(path)["models"] for version, path in FIXTURES.items()}
KINDS = [(version, kind) for version, models in MODELS.items() for kind in models]
AGREEING = [pair for pair in KINDS if pair not in DIFFERENCES]
COSINE = 0.9999


def agrees(case: Case, directory: Path) -> bool:
    directory.mkdir(exist_ok=True)
    return cosine(answer(case, directory)[0], case.logits) >= COSINE


def turned(case: Case) -> bool:
    """Whether only the base of the rotation was changed."""
    rope: Any = case.config.get("rope_parameters")
    return (
        case.field == "rope_parameters"
        and isinstance(rope, dict)
        and rope.get("rope_theta") == 77.0
        and rope.get("rope_type") == "default"
        and "attn_config" not in case.config  # dbrx has the base there too, and they have to agree
    )


ROTATIONS = [
    (kind, case)
    for version, kind in AGREEING
    for case in cases_of(kind, MODELS[version][kind])
    if turned(case)
]


def scaled(case: Case) -> bool:
    """Whether yarn was put in place of a plain rotation."""
    where, _, field = case.field.rpartition(".")
    rope: Any = (case.config[where] if where else case.config).get(field)
    return field == "rope_parameters" and rope.get("rope_type") == "yarn" and len(rope) <= 5


UNSCALED = [
    (kind, case)
    for kind in ("dbrx", "ernie4_5_moe", "glm", "phi", "qwen3_moe", "qwen3_vl_moe", "solar_open")
    for case in cases_of(kind, MODELS["5"][kind])
    if scaled(case)
]


@pytest.mark.parametrize(("version", "kind"), AGREEING)
def test_as_transformers_saves_it(version: str, kind: str, tmp_path: Path) -> None:
    assert agrees(next(iter(cases_of(kind, MODELS[version][kind]))), tmp_path)


@pytest.mark.parametrize(("kind", "case"), ROTATIONS, ids=[kind for kind, _ in ROTATIONS])
def test_rotations_of_transformers_5(kind: str, case: Case, tmp_path: Path) -> None:
    assert agrees(case, tmp_path)


@pytest.mark.parametrize(("kind", "case"), UNSCALED, ids=[kind for kind, _ in UNSCALED])
def test_rotations_that_mlx_lm_does_not_scale(kind: str, case: Case, tmp_path: Path) -> None:
    assert agrees(case, tmp_path)


@pytest.mark.parametrize(("version", "kind"), LOAD_ERRORS)
def test_models_that_do_not_load(version: str, kind: str, tmp_path: Path) -> None:
    case = next(iter(cases_of(kind, MODELS[version][kind])))
    with pytest.raises(ModelLoadError, match=kind):
        answer(case, tmp_path)


@pytest.mark.parametrize(("version", "kind"), OTHER_ANSWERS)
def test_models_of_which_one_version_answers_otherwise(
    version: str, kind: str, tmp_path: Path
) -> None:
    case = next(iter(cases_of(kind, MODELS[version][kind])))
    expected, _ = OTHER_ANSWERS[version, kind]
    assert cosine(answer(case, tmp_path)[0], case.logits) == pytest.approx(expected, abs=2e-3)
    assert ("5", kind) in AGREEING


def test_most_models_agree() -> None:
    assert len({kind for _, kind in AGREEING}) >= 80
    assert len(AGREEING) >= 135
    assert len(ROTATIONS) >= 45
    assert len({kind for kind, _ in UNSCALED}) == 7
