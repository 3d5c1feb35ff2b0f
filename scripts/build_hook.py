"""The build hook: manual pages, shell completions, and the engine's C++ library for CPUs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Writes the files that pyproject.toml lists as shared-data, and compiles the library."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write and compile; hatch calls this before it collects the files of a wheel."""
        root = Path(self.root)
        sys.path.insert(0, str(root))
        from scripts.documents.shared import write
        from scripts.native import build

        target = root / "build" / "share"
        shutil.rmtree(target, ignore_errors=True)
        write(target)
        if version == "editable":
            build.install(root)
        elif (built := build.build(root)) is not None:
            build_data["force_include"][str(built.path)] = f"modelpack_engine/cpu/{build.LIBRARY}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{built.platform}"
