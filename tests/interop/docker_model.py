"""The real `docker model` command line, built, and pointed at our server by MODEL_RUNNER_HOST."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.catalogue import Catalogue
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.interop.go_tool import build_go_tool

# Seconds that one command may take.
_PATIENCE = 60
ROOT = Path(__file__).resolve().parents[2]
CONFIG = EngineConfig(device="cpu", max_num_seqs=2, max_num_batched_tokens=64, kv_cache_bytes=2**27)


def build_docker_model() -> Path:
    """Build the command line, where its sources are not built yet; return its path."""
    return build_go_tool(Path(__file__).parent / "docker_cli", ROOT / ".cache")


@dataclass(frozen=True)
class DockerModel:
    """The command line, pointed at a server; `home` keeps the machine's own settings out."""

    binary: Path
    url: str
    home: Path

    def start(self, *arguments: str | Path, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a command; its input is empty."""
        return subprocess.Popen(
            [self.binary, *map(str, arguments)],
            env={
                "MODEL_RUNNER_HOST": self.url,
                "HOME": str(self.home),
                "PATH": os.environ["PATH"],
                "INSECURE_REGISTRY": "true",
                "NO_COLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    @contextmanager
    def following(self, *arguments: str) -> Iterator[IO[str]]:
        """Start a command that goes on for ever; yield what it prints, and end it after the block.

        It ends in any case once it has had its time.
        """
        with self.start(*arguments, stderr=subprocess.STDOUT) as process:
            limit = threading.Timer(_PATIENCE, process.kill)
            limit.start()
            try:
                assert process.stdout is not None
                yield process.stdout
            finally:
                limit.cancel()
                process.kill()

    def try_(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=_PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def __call__(self, *arguments: str | Path) -> str:
        """Return what a command prints; it has to succeed."""
        done = self.try_(*arguments)
        assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


@contextmanager
def serving(store: LayoutStore, catalogue: Catalogue | None = None) -> Iterator[ModelServer]:
    """Serve the models of a store, which `catalogue` loads (None: with real engines)."""
    with ModelServer(
        lambda: ModelPool(catalogue or StoreCatalogue(store, CONFIG), memory=2**32, grace=0.0),
        address="127.0.0.1:0",
    ) as server:
        yield server
