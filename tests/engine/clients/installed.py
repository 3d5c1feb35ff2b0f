"""Installs the clients that are not written in this repository, once for each set of pins.

CI imports this module without pytest, as `tests.interop.go_tool`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    pins = [_HERE / "package.json", _HERE / "package-lock.json"]
    if not _is_installed(directory, *pins):
        _require("npm", "the clients of npm")
        with _replacing(directory, *pins) as made:
            _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=made)
    return directory


def rust_client(cache: Path) -> Path:
    """Return the program of async_openai/, built inside `cache` with the crates of Cargo.lock.

    Raises ClientsError without cargo, or with what it printed if it fails.
    """
    directory = cache.absolute() / "async-openai"
    sources = [_HERE / "async_openai" / name for name in ("Cargo.toml", "Cargo.lock", "main.rs")]
    if not _is_installed(directory, *sources):
        _require("cargo", "async-openai")
        with _replacing(directory, *sources) as made:
            _run("cargo", "build", "--locked", "--quiet", "--target-dir", "target", cwd=made)
            (made / "target/debug/async_openai_client").rename(made / "client")
            shutil.rmtree(made / "target")
    return directory / "client"


def java_client(cache: Path) -> Path:
    """Return the directory inside `cache` with the program and the jars of langchain4j/.

    Raises ClientsError without mvn, or with what it printed if it fails.
    """
    directory = cache.absolute() / "langchain4j"
    sources = [_HERE / "langchain4j" / name for name in ("pom.xml", "Client.java")]
    if not _is_installed(directory, *sources):
        _require("mvn", "LangChain4j")
        copy = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
        with _replacing(directory, *sources) as made:
            _run("mvn", "-B", "-q", "-ntp", copy, "-DoutputDirectory=.", cwd=made)
            _run("javac", "-cp", "*", "Client.java", cwd=made)
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
        options = ("-q", "--disable-pip-version-check", "--no-compile", "--no-deps")
        _run(str(python), "-m", "pip", "install", *options, "-r", str(pins), cwd=directory)
        shutil.copyfile(pins, directory / pins.name)
    return python


def _is_installed(directory: Path, *pins: Path) -> bool:
    copies = [(directory / file.name, file) for file in pins]
    return all(copy.is_file() and copy.read_bytes() == file.read_bytes() for copy, file in copies)


def _require(program: str, clients: str) -> None:
    if shutil.which(program) is None:
        raise ClientsError(f"installing {clients} failed: no `{program}` on PATH")


@contextmanager
def _replacing(directory: Path, *sources: Path) -> Iterator[Path]:
    """Yield a directory with copies of `sources`, which replaces `directory` at the end.

    It is moved there only when it is complete, so no test runs half of a client.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "clients"
        made.mkdir()
        for source in sources:
            shutil.copyfile(source, made / source.name)
        yield made
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)


def _run(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClientsError(f"{' '.join(command)} took more than {_SECONDS} s") from error
    if done.returncode:
        raise ClientsError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
