"""Installs the clients that are not written in this repository, once for each set of pins.

CI imports this module without pytest, as `tests.interop.go_tool`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_SECONDS = 180


class ClientsError(RuntimeError):
    """The clients could not be installed."""


def npm_clients(cache: Path) -> Path:
    """Return the directory inside `cache` with the packages of package-lock.json installed.

    Raises ClientsError without npm, or with what npm printed if it fails.
    """
    directory = cache.absolute() / "npm-clients"
    lock = _HERE / "package-lock.json"
    if _is_installed(directory, lock):
        return directory
    if shutil.which("npm") is None:
        raise ClientsError("installing the clients of npm failed: no `npm` on PATH")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Installed beside its final name and moved there, so that nobody runs half of the packages.
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "clients"
        made.mkdir()
        for source in (_HERE / "package.json", lock):
            shutil.copyfile(source, made / source.name)
        _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=made)
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)
    return directory


def _is_installed(directory: Path, pins: Path) -> bool:
    installed = directory / pins.name
    return installed.is_file() and installed.read_bytes() == pins.read_bytes()


def _run(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClientsError(f"{' '.join(command)} took more than {_SECONDS} s") from error
    if done.returncode:
        raise ClientsError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
