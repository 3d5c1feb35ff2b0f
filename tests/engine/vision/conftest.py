"""These tests need mlx-vlm, which scripts/make-venv installs for the extra dev."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("mlx_vlm") is None and not os.environ.get("MODELPACK_REQUIRE_PEERS"):
    collect_ignore_glob = ["test_*.py"]
