"""Zipapp, Debian package, binary and Homebrew formula: built, and used as a user would."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelpack._version import __version__
from modelpack.artifacts.digest import Digest
from scripts.packages.__main__ import _FORMULA, formula, main
from tests.models import tiny_gguf


@contextmanager
def served_by(command: list[str], environ: Mapping[str, str], store: Path) -> Iterator[str]:
    """Run `registry serve` of an installation; yield host:port."""
    serve = [*command, "registry", "serve", "--port", "0", "--store", str(store)]
    with subprocess.Popen(
        serve, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = None
            while found is None:
                line = process.stdout.readline()
                assert line, "the registry ended"
                found = re.search(r"127\.0\.0\.1:\d+|localhost:\d+|\[::1\]:\d+", line)
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


def smoke(command: list[str], directory: Path, path: str = os.environ["PATH"]) -> None:
    """Package a model, push it to the registry of the same installation, and pull it."""
    home = directory / "home"
    home.mkdir()
    environ = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"}

    def run(*arguments: str | Path, store: str = "store") -> str:
        done = subprocess.run(
            [*command, *map(str, arguments), "--store", str(directory / store)],
            env=environ, cwd=home, check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    version = subprocess.run(
        [*command, "version"], env=environ, check=True, capture_output=True, text=True
    ).stdout
    assert __version__ in version
    gguf = tiny_gguf(directory)
    with served_by(command, environ, directory / "registry") as host:
        name = f"{host}/team/tiny:v1"
        digest = run("package", name, "--gguf", gguf, "--quiet")
        run("push", name)
        assert run("pull", name, "--quiet", store="other") == digest
        path = run("resolve", name, store="other")
    assert Digest.of(Path(path).read_bytes()) == Digest.of(gguf.read_bytes())


PYTHON = os.path.realpath(sys.executable)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the zipapp, the Debian package and the binary."""
    output = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPKG_DEB_COMPRESSOR_LEVEL", "1")  # 6 s instead of 34
        main(["zipapp", "deb", "binary", "--output", str(output), "--python", PYTHON])
    return output


@pytest.mark.long
def test_zipapp_and_debian_package(built: Path, tmp_path: Path) -> None:
    (tmp_path / "zipapp").mkdir()
    smoke([PYTHON, str(built / "modelpack.pyz")], tmp_path / "zipapp")
    [package] = built.glob("modelpack_*.deb")
    root = tmp_path / "root"
    (root / "var/lib/dpkg/updates").mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    installed = subprocess.run(
        ["dpkg", "--root", root, "--force-not-root", "--force-depends", "-i", package],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    (tmp_path / "deb").mkdir()
    smoke([str(root / "usr/bin/modelpack")], tmp_path / "deb")
    pages = {path.name for path in (root / "usr/share/man/man1").iterdir()}
    assert {"modelpack.1.gz", "modelpack-pull.1.gz"} <= pages
    assert (root / "usr/share/bash-completion/completions/modelpack").stat().st_size
    control = subprocess.run(
        ["dpkg-deb", "-f", package], check=True, capture_output=True, text=True
    )
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"Depends: python3 (>= {minor}~)" in control.stdout


@pytest.mark.long
def test_a_binary_without_python(built: Path, tmp_path: Path) -> None:
    command = [str(built / "modelpack")]
    (tmp_path / "work").mkdir()
    smoke(command, tmp_path / "work", path="/nowhere")
    for more, said in (
        (["-m", "modelpack", "version"], __version__),  # as its own commands start it
        (["gateway", "--help"], "Forward requests to servers"),
    ):
        done = subprocess.run([*command, *more], env={"HOME": str(tmp_path)}, check=True,
                              capture_output=True, text=True)  # fmt: skip
        assert said in done.stdout
    helper, seen = tmp_path / "bin" / "docker-credential-seen", tmp_path / "seen"
    helper.parent.mkdir()
    # The helper starts the binary too, which must find its libraries.
    helper.write_text(
        f'#!/bin/sh\necho "${{LD_LIBRARY_PATH-unset}}" >> {seen}\n{command[0]} version >> {seen}\n'
    )
    helper.chmod(0o755)
    (tmp_path / "config.json").write_text('{"credsStore": "seen"}')
    for more_environ in ({}, {"LD_LIBRARY_PATH": "/its/own"}):
        environ = {"PATH": f"{helper.parent}:/usr/bin:/bin", "DOCKER_CONFIG": str(tmp_path)}
        subprocess.run([*command, "logout", "registry.example"], check=False,
                       env={**environ, **more_environ})  # fmt: skip
    [first, version, second, again] = seen.read_text().splitlines()
    assert (first, second) == ("unset", "/its/own")
    assert version == again == f"modelpack {__version__}"


@pytest.mark.long
def test_the_source_distribution_of_the_formula(tmp_path: Path) -> None:
    url = "https://models.example/modelpack.tar.gz"
    main(
        ["formula", "--url", url, "--homepage", "https://models.example", "--output", str(tmp_path)]
    )
    archive = tmp_path / f"modelpack-{__version__}.tar.gz"
    text = (tmp_path / "modelpack.rb").read_text()
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in text
    assert f'url "{url}"' in text
    with tarfile.open(archive) as content:
        names = content.getnames()
    for path in re.findall(r'"(requirements/[^"]+)"', _FORMULA):
        assert f"modelpack-{__version__}/{path}" in names


def test_the_formula_is_ruby(tmp_path: Path) -> None:
    archive = tmp_path / "modelpack.tar.gz"
    archive.write_bytes(b"x")
    made = formula(archive, tmp_path, "https://models.example/x.tar.gz", "https://models.example")
    text = made.read_text()
    assert "{" not in re.sub(r"#\{bin\}", "", text)  # nothing of the template is left
    blocks = re.findall(r"^ *(?:class|def|test do)", text, re.MULTILINE)
    assert len(re.findall(r"^ *end$", text, re.MULTILINE)) == len(blocks)
    if (ruby := shutil.which("ruby")) is not None:
        subprocess.run([ruby, "-c", made], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rpm"], "unknown kind 'rpm'"),
        (["formula"], "formula requires --url and --homepage"),
        (["formula", "--url", "https://x"], "formula requires --url and --homepage"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
