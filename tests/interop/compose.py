"""The real `docker compose`, with our plugins beside it, and an image that can call a server."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from modelpack.deploy.compose import install_plugins
from tests.interop.go_tool import build_go_tool
from tests.peers import require

ROOT = Path(__file__).resolve().parents[2]
#: A shell and curl, and nothing else.
CLIENT_IMAGE = "modelpack-test/client:debian"
_PATIENCE = 120


def build_compose() -> Path:
    """Build Docker Compose, where its sources are not built yet; return its path."""
    return build_go_tool(Path(__file__).parent / "compose_cli", ROOT / ".cache")


def import_client_image() -> str:
    """Make the image of the programs of this machine; return its name."""
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w", dereference=True) as tar:
        copied = set()
        for program in ("sh", "curl"):
            binary = require(program)
            tar.add(binary, f"bin/{program}")
            linked = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout
            copied |= set(re.findall(r"(/\S+) \(0x", linked))
        for library in sorted(copied):
            tar.add(library, library.lstrip("/"))
    subprocess.run(
        ["docker", "import", "-", CLIENT_IMAGE], input=tree.getvalue(), capture_output=True,
        check=True,
    )  # fmt: skip
    return CLIENT_IMAGE


@dataclass(frozen=True)
class Compose:
    """`docker compose` over the file in `directory`; `variables` are added to the environment."""

    binary: Path
    directory: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make what is Docker's directory of the user, with Compose and our plugins."""
        plugins = self.config / "cli-plugins"
        install_plugins(["docker-modelpack", "docker-model"], plugins)
        (plugins / "docker-compose").symlink_to(self.binary)

    @property
    def config(self) -> Path:
        """Docker's directory of the user."""
        return self.directory / "docker"

    def write(self, text: str) -> None:
        """Write the Compose file."""
        (self.directory / "compose.yaml").write_text(text)

    def try_(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Compose to its end."""
        return subprocess.run(
            ["docker", "compose", "--progress", "plain", *arguments],
            cwd=self.directory, capture_output=True, text=True, timeout=_PATIENCE,
            env={**os.environ, "DOCKER_CONFIG": str(self.config),
                 "XDG_STATE_HOME": str(self.directory / "state"), **self.variables},
        )  # fmt: skip

    def __call__(self, *arguments: str) -> str:
        """Return what a command prints; it has to succeed."""
        done = self.try_(*arguments)
        assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr
