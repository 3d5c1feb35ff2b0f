"""Fields of config.json whose change alters transformers' logits: we follow, or refuse it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack_engine.errors import ModelLoadError
from tests.engine.oracle.answers import FIXTURES, Case, answer, cases_of, cosine, fixture
from tests.engine.oracle.differences import DIFFERENCES
from tests.engine.oracle.weights import TOKENS

MODELS = [
    pytest.param(kind, model, id=f"{version}-{kind}")
    for version, path in FIXTURES.items()
    for kind, model in fixture(path)["models"].items()
    if (version, kind) not in DIFFERENCES
]
#: Fields that we follow neither by our logits nor by a refusal, and why.
EXCEPTIONS = {
    "image_token_id": "ids of images: the prompt holds the other id by chance",
    "audio_token_id": "ids of sounds, likewise",
}
_ROPES = ("rope_scaling", "rope_parameters")


def left_out(case: Case) -> bool:
    return case.field.rpartition(".")[2] in EXCEPTIONS or short_factors(case)


def short_factors(case: Case) -> bool:
    """Whether it has longrope's factors of short contexts: a note says that they are not used."""
    part = case.config
    if "." in case.field:
        part = part[case.field.partition(".")[0]]
    # transformers 4 looks for the length beside the rotation only.
    before = part.get("original_max_position_embeddings", part.get("max_position_embeddings"))
    old = part.get("rope_scaling") or {}
    if old.get("rope_type") == "longrope" and before >= len(TOKENS):
        return True
    new = part.get("rope_parameters") or {}
    return any(
        rope.get("rope_type") == "longrope"
        and rope.get("original_max_position_embeddings", 0) >= len(TOKENS)
        for rope in (new, *(inner for inner in new.values() if isinstance(inner, dict)))
    )


def verdict(case: Case, directory: Path) -> str:
    """Return how the case ends: "" if it is right."""
    directory.mkdir(exist_ok=True)
    try:
        got, longest = answer(case, directory)
    except ModelLoadError as error:
        name = case.field.rpartition(".")[2]
        tensors = "parameters" in str(error)  # they are others than the class has
        members = ("rope", "rotary")  # a field of the rotation may be named in its place
        named = name in str(error) or (
            name in _ROPES and any(member in str(error).lower() for member in members)
        )
        return "" if tensors or named else f"refused without its name: {error}"
    except ValueError as error:  # as soon as it runs, for a part of a head of 15 numbers
        return "" if "dims must be even" in str(error) else str(error)
    if longest is not None and longest < len(TOKENS):
        return "" if "window" in case.field or "layer_types" in case.field else "limited"
    nearness = cosine(got, case.logits)
    return "" if nearness >= 0.9999 else f"cosine {nearness:.4f}"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "model"), MODELS)
def test_changed_fields_are_followed_or_refused(
    kind: str, model: dict[str, object], tmp_path: Path
) -> None:
    _, *cases = cases_of(kind, model)
    wrong = [
        f"{case.field}: {end}"
        for case in cases
        if not left_out(case) and (end := verdict(case, tmp_path / "model"))
    ]
    assert not wrong


def test_there_are_many_cases() -> None:
    counted = [case for p in MODELS for case in list(cases_of(*p.values))[1:]]
    assert len(counted) >= 700
    assert sum(map(left_out, counted)) <= 130
