"""Installs the clients that are not written in this repository, once for each set of pins.

CI imports this module without pytest, as `tests.interop.go_tool`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_SECONDS = 400


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
    # Installed beside its final name and moved there, so that no test runs half of them.
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "clients"
        made.mkdir()
        for source in (_HERE / "package.json", lock):
            shutil.copyfile(source, made / source.name)
        _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=made)
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)
    return directory


def python_clients(cache: Path) -> Path:
    """Return the Python of the environment inside `cache` with requirements.txt installed.

    Raises ClientsError with what pip printed if it fails.
    """
    directory = cache.absolute() / "python-clients"
    pins = _HERE / "requirements.txt"
    python = directory / "bin" / "python"
    if not _is_installed(directory, pins):
        # Environments cannot be moved: this one counts as whole once it holds the pins.
        directory.parent.mkdir(parents=True, exist_ok=True)
        _run(sys.executable, "-m", "venv", "--clear", str(directory), cwd=directory.parent)
        options = ("-q", "--disable-pip-version-check", "--no-deps", "-r", str(pins))
        _run(str(python), "-m", "pip", "install", *options, cwd=directory)
        shutil.copyfile(pins, directory / pins.name)
    return python


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
