"""The lock files: packages by version and hash, and all that pyproject.toml asks for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    "ci": ["dev"],
    "image": ["gateway", "tokens"],
    "image-engine": ["engine", "gateway", "tokens"],
}
_HASHES = re.compile(r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n")


def packages(path: Path) -> dict[str, list[Requirement]]:
    """Return what a lock file pins, by name; raise `AssertionError` for a line of another kind."""
    found: dict[str, list[Requirement]] = {}
    text, at = path.read_text(), 0
    for hashes in _HASHES.finditer(text):
        one = Requirement(text[at : hashes.start()])
        found.setdefault(canonicalize_name(one.name), []).append(one)
        at = hashes.end()
    assert at == len(text), text[at : at + 200]
    return found


def wanted(extras: list[str]) -> list[Requirement]:
    """Return the direct requirements of the project with these extras."""
    lines, optional = (
        [*PROJECT["project"]["dependencies"]],
        PROJECT["project"]["optional-dependencies"],
    )
    for extra in extras:
        for line in optional[extra]:
            one = Requirement(line)
            if one.name == "modelpack":
                lines += map(str, wanted(sorted(one.extras)))
            else:
                lines.append(line)
    return [Requirement(line) for line in lines]


def test_they_are_all_there() -> None:
    assert {path.stem for path in LOCKS} == {"audit", "binary", "build", "models", *EXTRAS}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_package_has_one_version_and_hashes(path: Path) -> None:
    for name, pinned in packages(path).items():
        for one in pinned:
            [specifier] = one.specifier
            assert specifier.operator == "==", one
            assert not one.url
        assert len(pinned) == 1 or all(one.marker for one in pinned), name
    assert "://" not in path.read_text()  # nor does it say where from


@pytest.mark.parametrize("name", EXTRAS)
def test_they_hold_what_the_project_asks_for(name: str) -> None:
    """After a change of pyproject.toml: scripts/lock."""
    pinned = packages(ROOT / "requirements" / f"{name}.lock")
    for one in wanted(EXTRAS[name]):
        there = pinned[canonicalize_name(one.name)]
        assert any(
            one.specifier.contains(str(found.specifier).removeprefix("=="), prereleases=True)
            for found in there
        ), one


def test_what_builds_the_wheel_is_locked() -> None:
    pinned = packages(ROOT / "requirements" / "build.lock")
    for line in PROJECT["build-system"]["requires"]:
        one = Requirement(line)
        [found] = pinned[canonicalize_name(one.name)]
        assert one.specifier.contains(str(found.specifier).removeprefix("=="))


def test_this_platform_installs_each_package_once() -> None:
    environment = default_environment()
    for name, pinned in packages(ROOT / "requirements" / "ci.lock").items():
        chosen = [one for one in pinned if not one.marker or one.marker.evaluate(dict(environment))]
        assert len(chosen) <= 1, name


@pytest.mark.parametrize("name", ["image", "image-engine"])
def test_the_bill_of_materials(name: str) -> None:
    path = ROOT / "requirements" / f"{name}.lock"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "sbom", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(done.stdout) is None
    components = json.loads(done.stdout)["components"]
    assert {canonicalize_name(one["name"]) for one in components} == packages(path).keys()
    assert all(one["hashes"] for one in components)
