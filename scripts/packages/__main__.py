"""Build `modelpack.pyz`, `modelpack_VERSION_ARCH.deb`, `modelpack` and `modelpack.rb`.

    python -m scripts.packages --output dist zipapp deb    (make packages)
    python -m scripts.packages binary
    python -m scripts.packages formula --url URL_OF_THE_SDIST --homepage URL

All hold what requirements/image.lock has, by hash, and the toolkit without the engine. Some of it
is compiled, so zipapp and Debian package are for this system and this minor version of Python.
shiv makes the zipapp: Python cannot import compiled modules out of one, and shiv unpacks them.
PyInstaller makes the binary, which brings this Python with it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from modelpack._version import __version__

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "image.lock"
BINARY_LOCK = ROOT / "requirements" / "binary.lock"
DESCRIPTION = "Package, move and serve models as OCI artifacts"
#: 1 January 2026: files of packages have one time, so that a build can be repeated.
EPOCH = os.environ.get("SOURCE_DATE_EPOCH", "1767225600")
KINDS = ("zipapp", "deb", "binary", "formula")

_LAUNCHER = """\
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
PYTHONPATH=$root/site exec {python} -s -m modelpack "$@"
"""

#: Our own commands start others by `sys.executable -m modelpack`, which is the binary itself.
_ENTRY = """\
import os
import sys

# PyInstaller's libraries are not for the programs that this one starts, such as git.
original = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
os.environ.pop("LD_LIBRARY_PATH", None)
if original is not None:
    os.environ["LD_LIBRARY_PATH"] = original
if sys.argv[1:3] == ["-m", "modelpack"]:
    del sys.argv[1:3]
from modelpack.cli.main import main

main()
"""

_CONTROL = """\
Package: modelpack
Version: {version}
Architecture: {architecture}
Maintainer: Modelpack <modelpack@localhost>
Installed-Size: {kilobytes}
Depends: python3 (>= {minor}~), python3 (<< {following}~), ca-certificates
Section: utils
Priority: optional
Description: {description}
 The toolkit and the gateway. Serving needs the engine, which pip installs:
 pip install 'modelpack[engine]'.
"""

_FORMULA = """\
class Modelpack < Formula
  include Language::Python::Virtualenv

  desc "{description}"
  homepage "{homepage}"
  url "{url}"
  sha256 "{sha256}"
  license "Apache-2.0"

  depends_on "python@3.13"

  def install
    ENV["MODELPACK_NATIVE"] = "0"
    virtualenv_create(libexec, "python3.13", without_pip: false)
    pip = [libexec/"bin/python", "-m", "pip", "install", "--no-deps"]
    system(*pip, "--require-hashes", "-r", "requirements/image.lock")
    system(*pip, ".")
    bin.install_symlink libexec/"bin/modelpack"
    man1.install_symlink Dir[libexec/"share/man/man1/*.1"]
    bash_completion.install_symlink libexec/"share/bash-completion/completions/modelpack"
    zsh_completion.install_symlink libexec/"share/zsh/site-functions/_modelpack"
    fish_completion.install_symlink libexec/"share/fish/vendor_completions.d/modelpack.fish"
  end

  test do
    assert_match version.to_s, shell_output("#{{bin}}/modelpack --version")
  end
end
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Build what the command line asks for, and print the paths."""
    parser = argparse.ArgumentParser(prog="python -m scripts.packages", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--python", default="/usr/bin/python3", help="runs the Debian package")
    parser.add_argument("--url", help="where the formula finds the source distribution")
    parser.add_argument("--homepage", help="of the formula")
    options = parser.parse_args(arguments)
    kinds = options.kinds or ["zipapp", "deb"]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown kind {sorted(unknown)[0]!r}: expected {', '.join(KINDS)}")
    if "formula" in kinds and not (options.url and options.homepage):
        parser.error("formula requires --url and --homepage")
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="modelpack-packages-") as directory:
        work = Path(directory)
        if {"zipapp", "deb", "binary"} & set(kinds):
            installed(work / "site")
        if "zipapp" in kinds:
            print(zipapp(work / "site", options.output))
        if "deb" in kinds:
            print(deb(work / "site", work / "deb", options.output, options.python))
        if "binary" in kinds:
            print(binary(work / "site", work / "binary", options.output))
        if "formula" in kinds:
            made = sdist(options.output)
            print(formula(made, options.output, options.url, options.homepage))


def installed(site: Path) -> None:
    """Install the locked dependencies and this checkout into the new directory `site`."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
           "--no-deps", "--no-compile", "--target"]  # fmt: skip
    environ = {**os.environ, "MODELPACK_NATIVE": "0"}
    subprocess.run([*pip, site, "--require-hashes", "-r", LOCK], check=True, env=environ)
    with tempfile.TemporaryDirectory() as wheels:
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", wheels, ROOT]
        subprocess.run(wheel, check=True, env=environ)
        subprocess.run([*pip, site, *Path(wheels).glob("*.whl")], check=True, env=environ)
    shutil.rmtree(site / "bin", ignore_errors=True)  # scripts of this machine's Python
    for record in site.glob("*.dist-info/direct_url.json"):
        record.unlink()  # the path of a temporary directory


def zipapp(site: Path, output: Path) -> Path:
    """Write `modelpack.pyz`, which unpacks itself into ~/.shiv, or SHIV_ROOT, at its first run."""
    made = output / "modelpack.pyz"
    command = [sys.executable, "-m", "shiv", "--site-packages", site, "--entry-point",
               "modelpack.cli.main:main", "--python", "/usr/bin/env python3", "--compressed",
               "--extend-pythonpath", "--reproducible", "--output-file", made]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH})
    return made


def binary(site: Path, work: Path, output: Path) -> Path:
    """Write `modelpack`: one file for systems with this C library or a newer one, without Python.

    It unpacks itself into a temporary directory at each start.
    """
    # An environment of its own: PyInstaller takes what it finds in the one that it runs in.
    venv.create(work / "env", with_pip=True)
    python = work / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--require-hashes", "-r", BINARY_LOCK], check=True,
    )  # fmt: skip
    entry = work / "entry_point.py"
    entry.write_text(_ENTRY)
    packages = ("modelpack", "modelpack_server.gateway", "modelpack_server.cli")
    command = [
        python, "-m", "PyInstaller", "--onefile", "--name", "modelpack", "--log-level", "ERROR",
        *(word for package in packages for word in ("--collect-submodules", package)),
        "--collect-data", "modelpack", "--copy-metadata", "modelpack", "--paths", site,
        "--distpath", output, "--workpath", work / "build", "--specpath", work, entry,
    ]  # fmt: skip
    environ = {"PYTHONPATH": str(site), "SOURCE_DATE_EPOCH": EPOCH, "PYTHONHASHSEED": "1"}
    subprocess.run(command, check=True, env={**os.environ, **environ})
    return output / "modelpack"


def deb(site: Path, root: Path, output: Path, python: str) -> Path:
    """Write the Debian package: /opt/modelpack, and links and pages in /usr."""
    major, minor = sys.version_info[:2]
    home = root / "opt" / "modelpack"
    shutil.copytree(site, home / "site")
    launcher = home / "bin" / "modelpack"
    launcher.parent.mkdir()
    launcher.write_text(_LAUNCHER.format(python=python))
    launcher.chmod(0o755)
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "modelpack").symlink_to("../../opt/modelpack/bin/modelpack")
    shutil.move(home / "site" / "share", root / "usr" / "share")
    for page in (root / "usr" / "share" / "man").rglob("*.1"):
        page.with_name(f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), mtime=0))
        page.unlink()
    papers = root / "usr" / "share" / "doc" / "modelpack"
    papers.mkdir(parents=True)
    shutil.copy(ROOT / "LICENSE", papers / "copyright")
    # Users cannot write there. The hashes of sources are not checked: a package replaces both.
    compiled = [sys.executable, "-m", "compileall", "-q", "-s", home, "-p", "/opt/modelpack",
                "--invalidation-mode", "unchecked-hash", home / "site"]  # fmt: skip
    subprocess.run(compiled, check=False)  # some packages have templates that are not Python
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    control = _CONTROL.format(
        version=__version__,
        architecture=architecture,
        kilobytes=sum(path.stat().st_size for path in files) // 1024,
        minor=f"{major}.{minor}",
        following=f"{major}.{minor + 1}",
        description=DESCRIPTION,
    )
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(control)
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    made = output / f"modelpack_{__version__}_{architecture}.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", root, made],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
    )  # fmt: skip
    return made


def sdist(output: Path) -> Path:
    """Write the source distribution."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", output]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return output / f"modelpack-{__version__}.tar.gz"


def formula(archive: Path, output: Path, url: str, homepage: str) -> Path:
    """Write the formula that installs the source distribution `archive` from `url`."""
    made = output / "modelpack.rb"
    made.write_text(
        _FORMULA.format(
            description=DESCRIPTION,
            homepage=homepage,
            url=url,
            sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        )
    )
    return made


if __name__ == "__main__":
    main()
