"""Distribution v3, the reference registry, built from its Go module."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.peers import free_port, require, wait_for_port

_CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@contextmanager
def distribution(root: Path) -> Iterator[str]:
    """Run distribution v3, built from its sources; yield its host:port."""
    require("go")
    program = build_go_tool(ROOT / "tests" / "interop" / "distribution", ROOT / ".cache")
    root.mkdir()
    port = free_port()
    config = root / "config.yml"
    config.write_text(_CONFIG.format(root=root / "data", port=port))
    surroundings = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", config], stdout=log, stderr=log, env=surroundings
        )
        try:
            wait_for_port(port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=20)
