"""Manuals and completions of shells, made when a wheel is built, in build/share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SharedFiles(BuildHookInterface):  # type: ignore[type-arg]
    """Writes what pyproject.toml calls shared-data."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatch before it collects the files of a wheel."""
        root = Path(self.root)
        sys.path.insert(0, str(root))
        from scripts.documents.shared import write

        target = root / "build" / "share"
        shutil.rmtree(target, ignore_errors=True)
        write(target)
