"""Builds the small Go programs that stand in for a peer, once for each content of their sources.

A program may replace a dependency by a directory that does not exist yet, when the dependency asks
for a newer Go than it needs:

    replace example.com/mod v1.2.3 => ./mod // h1:sum-of-the-module=

That version is then fetched through Go's own client, compared with the sum and unpacked there with
the `go` line of the program in place of its own. Everything else is left to `go build`.

A program may also be nothing but a go.mod that names a command of somebody else's, on a line of its
own: `tool example.com/mod/cmd/name`. That command is built then; with `// test` behind it, it is a
package of tests, of which `go test -c` makes a program; with `// tags one,two` behind it, it is
built with these tags. Of several, each is built by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

_TOOL = re.compile(r"^tool (\S+)(?: // (?:(test)|tags (\S+)))?$", re.MULTILINE)
_UNPACKED = re.compile(r"^replace (\S+) (\S+) => \./(\S+) // (h1:\S+)$", re.MULTILINE)


class GoToolError(RuntimeError):
    """A Go program could not be built."""


class GoMissingError(GoToolError):
    """There is no Go on this machine."""


def build_go_tool(package_dir: Path, cache: Path, tool: str = "") -> Path:
    """Build the Go program in `package_dir` and return the path of its binary inside `cache`.

    `tool` is the end of a command's path where go.mod names several. The binary is reused
    until a source file, go.mod, go.sum or the version of Go changes. Raises GoMissingError without
    Go, and GoToolError with the output of `go` if the build fails.
    """
    if shutil.which("go") is None:
        raise GoMissingError(f"building {package_dir} needs Go: no `go` on PATH")
    sources = sorted(p for p in package_dir.iterdir() if p.suffix in {".go", ".mod", ".sum"})
    if not sources:
        raise GoToolError(f"{package_dir} holds no Go program")
    key = hashlib.sha256(_go("env", "GOVERSION", "GOOS", "GOARCH", cwd=package_dir).encode())
    for source in sources:
        key.update(source.name.encode() + b"\0")
        key.update(hashlib.sha256(source.read_bytes()).digest())
    name = tool.replace("/", "-") or package_dir.name
    binary = cache.absolute() / "go" / f"{name}-{key.hexdigest()[:16]}"
    if binary.is_file():
        return binary

    binary.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final name and moved there, so that nobody runs half a binary.
    with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
        work = Path(scratch) / "src"
        work.mkdir()
        for source in sources:
            shutil.copyfile(source, work / source.name)
        go_mod = (work / "go.mod").read_text()
        for module, version, directory, expected in _UNPACKED.findall(go_mod):
            _unpack(module, version, expected, work / directory, _go_line(work))
        built = Path(scratch) / "binary"
        tools = _TOOL.findall(go_mod) or [(".", "", "")]
        [(package, is_test, tags)] = [each for each in tools if each[0].endswith(tool)]
        command = ["test", "-c"] if is_test else ["build", "-tags", tags]
        _go(*command, "-mod=readonly", "-trimpath", "-o", str(built), package, cwd=work)
        built.replace(binary)
    return binary


def go_module_file(module: str, version: str, expected: str, path: str) -> bytes:
    """Return a file of a Go module, fetched through Go's own client, whose sum is `expected`.

    Raises as `build_go_tool` does.
    """
    if shutil.which("go") is None:
        raise GoMissingError(f"reading {module} needs Go: no `go` on PATH")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "module"
        directory.mkdir()
        with zipfile.ZipFile(_verified(module, version, expected, directory)) as archive:
            return archive.read(f"{module}@{version}/{path}")


def _unpack(module: str, version: str, expected: str, directory: Path, go_line: str) -> None:
    prefix = f"{module}@{version}/"
    with zipfile.ZipFile(_verified(module, version, expected, directory)) as archive:
        for name in archive.namelist():
            # Go has checked the names and the sum of this archive.
            target = directory / name.removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    _go("mod", "edit", f"-go={go_line}", "go.mod", cwd=directory)


def _verified(module: str, version: str, expected: str, directory: Path) -> str:
    """Return the path of a module's archive."""
    download = _download(module, version, cwd=directory.parent)
    if download.get("Sum") != expected:
        raise GoToolError(
            f"{module}@{version}: expected the sum {expected}, got {download.get('Sum')}: "
            f"{download.get('Error', 'no error from go')}"
        )
    archive: str = download["Zip"]
    return archive


def _download(module: str, version: str, cwd: Path) -> dict[str, Any]:
    # A module that wants a newer Go is an error here, reported beside the archive it fetched.
    with tempfile.TemporaryDirectory(dir=cwd.parent) as outside:
        command = ["go", "mod", "download", "-json", f"{module}@{version}"]
        done = subprocess.run(
            command, cwd=outside, env=_environment(), capture_output=True, text=True
        )
    try:
        download: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise GoToolError(f"{' '.join(command)} failed:\n{done.stderr}") from error
    return download


def _go_line(work: Path) -> str:
    line: str = json.loads(_go("mod", "edit", "-json", cwd=work))["Go"]
    return line


def _go(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        ["go", *arguments], cwd=cwd, env=_environment(), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise GoToolError(f"go {' '.join(arguments)} in {cwd} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _environment() -> dict[str, str]:
    # No cgo: the programs need none, and a C compiler is one thing less to install.
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
