"""The admission policies in examples/admission, against the definitions of their operators."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelpack.trust.keys import parse_public_key
from tests.conftest import ROOT
from tests.deployment.schemas import ADMISSION, kubeconform, write_custom_schemas

pytestmark = [pytest.mark.peer("go"), pytest.mark.long]

POLICIES = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / "examples" / "admission").glob("*.yaml"))
}


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("schemas")
    write_custom_schemas(made, ADMISSION)
    return made


def test_they_are_valid(schemas: Path) -> None:
    assert {policy["kind"] for policy in POLICIES.values()} == {*ADMISSION}
    assert kubeconform(schemas, POLICIES.values()) == []


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects in a policy, but for its metadata."""
    if isinstance(value, dict):
        yield value
        for name, one in value.items():
            if name != "metadata":
                yield from objects_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from objects_in(one)


@pytest.mark.parametrize("name", POLICIES)
def test_a_field_that_does_not_exist(schemas: Path, name: str) -> None:
    """In every object of a policy: so the schema knows all of it."""
    wrong = []
    for at in range(len([*objects_in(POLICIES[name]["spec"])])):
        changed = deepcopy(POLICIES[name])
        [*objects_in(changed["spec"])][at]["unheardOf"] = "text"
        wrong.append(changed)
    assert len(kubeconform(schemas, wrong)) == len(wrong)


def test_their_keys_are_keys() -> None:
    found = [
        value
        for policy in POLICIES.values()
        for one in objects_in(policy["spec"])
        for value in one.values()
        if isinstance(value, str) and "PUBLIC KEY" in value
    ]
    assert len(found) == 4
    assert {parse_public_key(pem.encode(), "policy").der for pem in found} == {
        parse_public_key(found[0].encode(), "policy").der
    }
