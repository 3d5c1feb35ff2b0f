"""Workflows name files and options that there are; GitHub alone runs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from modelpack_server.cli.bench import bench

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
_PATH = re.compile(
    r"(?<![\w./-])((?:tests|benchmarks|scripts|engine|modelpack|requirements)/[\w./-]+)"
)
_USES = re.compile(r"uses: *(\S+)(?:  # (v[\d.]+))?$", re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_paths_exist(path: Path) -> None:
    found = [name for name in _PATH.findall(path.read_text()) if "*" not in name]
    assert found
    missing = [name for name in found if not (ROOT / name.rstrip("/")).exists()]
    assert not missing


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_named_by_commit(path: Path) -> None:
    """And the comment says which release that is."""
    for action, release in _USES.findall(path.read_text()):
        if action.startswith("./"):
            assert (ROOT / action).is_file(), action
            continue
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
        assert release, action


def test_images_are_named_by_digest() -> None:
    for name in ("Dockerfile", "examples/ci/modelpack.gitlab-ci.yml"):
        text = (ROOT / name).read_text()
        images = re.findall(r"^(?:FROM|ARG BASE=| *image:) *([^\s$]+)", text, re.MULTILINE)
        assert images, name
        assert all(re.fullmatch(r"[\w./:-]+@sha256:[0-9a-f]{64}", image) for image in images)


def test_a_workflow_asks_for_few_permissions() -> None:
    for path in WORKFLOWS:
        assert "\npermissions:\n  contents: read\n" in path.read_text(), path.name


def test_what_a_release_makes() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    for step in ("attest-build-provenance@", "scripts/sbom", "--require-hashes", "audit.yml"):
        assert step in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_make_targets_exist(path: Path) -> None:
    targets = re.findall(r"\bmake ([\w./-]+)", path.read_text())
    rules = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) <= set(rules)


def test_the_benchmark_is_called_as_it_can_be() -> None:
    text = (ROOT / ".github" / "workflows" / "macos.yml").read_text().replace("\\\n", " ")
    [line] = re.findall(r"modelpack bench (.*)", text)
    with click.Context(bench) as context:
        bench.parse_args(context, shlex.split(line))
    assert context.params["concurrency"] == (1, 4, 16)
