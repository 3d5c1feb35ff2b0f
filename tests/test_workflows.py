"""Workflows name files and options that there are; GitHub alone runs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from modelpack.cli.bench import bench

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
_PATH = re.compile(r"(?<![\w./-])((?:tests|benchmarks|scripts|engine|modelpack)/[\w./-]+)")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_paths_exist(path: Path) -> None:
    found = [name for name in _PATH.findall(path.read_text()) if "*" not in name]
    assert found
    missing = [name for name in found if not (ROOT / name.rstrip("/")).exists()]
    assert not missing


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
