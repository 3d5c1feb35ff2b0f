"""The build hook that writes manual pages and shell completions to build/share for the wheel."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SharedFiles(BuildHookInterface):  # type: ignore[type-arg]
    """Writes the files that pyproject.toml lists as shared-data."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files; hatch calls this before it collects the files of a wheel."""
        root = Path(self.root)
        sys.path.insert(0, str(root))
        from scripts.documents.shared import write

        target = root / "build" / "share"
        shutil.rmtree(target, ignore_errors=True)
        write(target)
