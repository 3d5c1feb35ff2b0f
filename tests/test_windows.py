"""The parts of the toolkit that touch no store need nothing that Windows lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.without_posix import HIDDEN_MODULES, HIDDEN_NAMES

ROOT = Path(__file__).parents[1]
PACKAGES = ("artifacts", "formats", "http", "registry")
_HIDE = f"""
import os, sys
for name in {HIDDEN_MODULES}: sys.modules[name] = None
for name in {HIDDEN_NAMES}: delattr(os, name)
"""
_IMPORT = """
import importlib, pkgutil
import modelpack
for package in PACKAGES:
    root = importlib.import_module(f"modelpack.{package}")
    for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        importlib.import_module(module.name)
"""


def test_packages_are_imported() -> None:
    code = f"{_HIDE}\nPACKAGES = {PACKAGES}\n{_IMPORT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The check would find a module that needs them.
    store = subprocess.run(
        [sys.executable, "-c", f"{_HIDE}\nimport modelpack.store.filesystem"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "fcntl" in store.stderr


@pytest.mark.long
def test_the_tests_of_the_workflow_pass() -> None:
    workflow = (ROOT / ".github" / "workflows" / "windows.yml").read_text()
    paths = re.findall(r"tests/[\w/]+(?:\.py)?", workflow.rpartition("-m pytest")[2])
    assert len(paths) > 5
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.without_posix", *paths],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
