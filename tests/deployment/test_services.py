"""`modelpack service`: units of systemd and agents of launchd, installed and removed again."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.deploy.services import (
    KINDS,
    Service,
    ServiceManager,
    carried_environment,
    launchd_agent,
    systemd_unit,
)
from modelpack.errors import ModelpackError, NotFoundError, UnsupportedError, UsageError
from tests.cli.running import modelpack as run
from tests.cli.running import succeed

SERVE = Service("serve", ("ai/smollm2", "--port", "8000"), Path("/srv/models"))
TEXT = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=20)
HARD = ["", " ", ";", "a b", "'", '"', "\\", "a\\", '\\"', "$HOME", "${HOME}", "$$", "%h", "%%",
        "#x", "é", "~", "-", "*", "|", "&&", "`id`"]  # fmt: skip


def values(unit: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{key}=")]


def words(line: str) -> list[str]:
    """Split a line as systemd.syntax(7) says: quotes, escapes and `%%`."""
    found = []
    for quoted, plain in re.findall(r'"((?:[^"\\]|\\.)*)"(?= |\Z)|([^\s"\'\\;]+)(?= |\Z)', line):
        found.append(plain or re.sub(r"\\(.)", r"\1", quoted))
    assert not any(re.search(r"(?<!%)(?:%%)*%(?!%)", word) for word in found), "a specifier"
    return [word.replace("%%", "%") for word in found]


@given(st.lists(TEXT | st.sampled_from(HARD), max_size=6), TEXT, TEXT)
def test_systemd_reads_what_was_given(options: list[str], name: str, value: str) -> None:
    directory = Path("/srv") / re.sub(r"[/\\ ]", "_", f"{name}.")
    service = Service("serve", tuple(options), directory, {"PATH": value}, Path("/etc/%s"))
    unit = systemd_unit(service)
    [command] = values(unit, "ExecStart")
    program, *arguments = words(command)
    assert not any(re.search(r"(?<!\$)(?:\$\$)*\$(?!\$)", one) for one in arguments), "a variable"
    assert [program, *(one.replace("$$", "$") for one in arguments)] == service.command
    assert [words(text) for text in values(unit, "Environment")] == [[f"PATH={value}"]]
    assert values(unit, "WorkingDirectory") == [str(directory).replace("%", "%%")]
    assert values(unit, "EnvironmentFile") == ["/etc/%%s"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("kind", KINDS)
def test_systemd_accepts_the_unit(tmp_path: Path, kind: str) -> None:
    secrets = tmp_path / "50% of $x.env"
    secrets.write_text("HF_TOKEN='x'\n")
    service = Service(kind, tuple(HARD), tmp_path, {"PATH": 'a "b" \\ %h:/bin'}, secrets)
    path = tmp_path / f"modelpack-{kind}.service"
    path.write_text(systemd_unit(service))
    done = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "verify", str(path)],
        capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@given(st.lists(TEXT | st.sampled_from(HARD), max_size=6))
def test_launchd_reads_what_was_given(options: list[str]) -> None:
    service = Service("gateway", tuple(options), Path("/srv"), {"PATH": "/bin"})
    value = plistlib.loads(launchd_agent(service, Path("/Users/me")))
    assert value["Label"] == "dev.modelpack.gateway"
    assert value["ProgramArguments"] == service.command
    assert value["ProgramArguments"][:4] == [sys.executable, "-m", "modelpack", "gateway"]
    assert value["WorkingDirectory"] == "/srv"
    assert value["EnvironmentVariables"] == {"PATH": "/bin"}
    assert (value["RunAtLoad"], value["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert value["StandardErrorPath"] == "/Users/me/Library/Logs/modelpack-gateway.log"


def test_an_agent_reads_its_environment_file(tmp_path: Path) -> None:
    secrets = tmp_path / "my $HOME.env"
    secrets.write_text("# keys\nMODELPACK_UPSTREAM_KEY='a $b \"c\"'\n")
    service = Service("serve", ("$0", "a b"), tmp_path, environment_file=secrets)
    arguments = plistlib.loads(launchd_agent(service, tmp_path))["ProgramArguments"]
    assert arguments[-len(service.command):] == service.command  # fmt: skip
    code = "import os, sys; print(os.environ['MODELPACK_UPSTREAM_KEY'], sys.argv[1:])"
    shell = arguments[: -len(service.command)]
    done = subprocess.run(
        [*shell, sys.executable, "-c", code, "$0", "a b"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "a $b \"c\" ['$0', 'a b']\n"


def test_no_secret_of_the_environment_is_carried() -> None:
    secrets = {"HF_TOKEN": "x", "MODELPACK_UPSTREAM_KEY": "x", "MODELPACK_API_KEY": "x"}
    carried = {"MODELPACK_STORE": "/srv", "PATH": "/bin"}
    assert carried_environment({**secrets, **carried, "MODELPACK_KEYS": ""}) == carried


@pytest.mark.parametrize(
    ("options", "directory", "problem"),
    [
        (("--upstream", "https://me:hunter2@host/"), "/srv", "a password"),
        (("a\nExecStartPre=/bin/x",), "/srv", "printable"),
        (("\udcff",), "/srv", "printable"),
        ((), "/srv/a\nb", "printable"),
        ((), "/srv/a\\", "last character"),
    ],
)
def test_what_no_service_holds(options: tuple[str, ...], directory: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        Service("registry", options, Path(directory))
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace systemctl and launchctl; they append their arguments to this file."""
    log = tmp_path / "calls"
    log.touch()
    (tmp_path / "bin").mkdir()
    for name in ("systemctl", "launchctl"):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\necho no bus >&2\nexit $FAIL\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", "0")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return log


def test_systemd(tmp_path: Path, calls: Path) -> None:
    manager = ServiceManager("linux", tmp_path / "home")
    path = manager.install(SERVE)
    assert path == tmp_path / "home/.config/systemd/user/modelpack-serve.service"
    assert path.read_text() == systemd_unit(SERVE)
    unit = "modelpack-serve.service"
    started = ["daemon-reload", f"enable {unit}", f"restart {unit}"]
    assert calls.read_text().splitlines() == [f"systemctl --user {one}" for one in started]
    other = Service("serve", (), Path("/srv"))
    assert manager.install(other, start=False) == path
    assert path.read_text() == systemd_unit(other)
    assert len(calls.read_text().splitlines()) == len(started)
    assert manager.remove("serve") == path
    assert not list(path.parent.iterdir())
    assert calls.read_text().splitlines()[len(started) :] == [
        f"systemctl --user disable --now {unit}", "systemctl --user daemon-reload",
    ]  # fmt: skip
    with pytest.raises(NotFoundError, match=re.escape(str(path))):
        manager.remove("serve")


def test_launchd(tmp_path: Path, calls: Path) -> None:
    manager = ServiceManager("darwin", tmp_path / "home")
    path = manager.install(SERVE)
    assert path == tmp_path / "home/Library/LaunchAgents/dev.modelpack.serve.plist"
    assert path.read_bytes() == launchd_agent(SERVE, tmp_path / "home")
    domain = f"gui/{os.getuid()}"
    manager.remove("serve")
    assert not path.exists()
    assert calls.read_text().splitlines() == [
        f"launchctl bootout {domain} {path}",
        f"launchctl bootstrap {domain} {path}",
        f"launchctl bootout {domain} {path}",
    ]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_without_a_session(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setenv("FAIL", "1")
    manager = ServiceManager(platform, tmp_path / "home")
    with pytest.raises(ModelpackError, match=r"written but not started: .* failed: no bus"):
        manager.install(SERVE)
    assert manager.path("serve").exists()
    manager.remove("serve")
    assert not manager.path("serve").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ModelpackError, match="No such file"):
        manager.install(SERVE)


def test_other_platforms() -> None:
    with pytest.raises(UnsupportedError, match="win32"):
        ServiceManager("win32")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


def test_the_command(here: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPACK_POLICY", "/etc/policy.toml")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    secrets = here / "secrets.env"
    secrets.write_text("HF_TOKEN='hf_secret'\n")
    secrets.chmod(0o644)
    arguments = ["registry", "--env-file", "secrets.env", "--", "--addr", "127.0.0.1:0"]
    shown = succeed("service", "install", "--store", "models", "--print", *arguments)
    assert "hf_secret" not in shown.out
    [command] = values(shown.out, "ExecStart")
    assert words(command) == [
        sys.executable, "-m", "modelpack", "registry", "serve", "--store", str(here / "models"),
        "--addr", "127.0.0.1:0",
    ]  # fmt: skip
    assert values(shown.out, "WorkingDirectory") == [str(here)]
    assert values(shown.out, "EnvironmentFile") == [str(secrets)]
    assert "MODELPACK_POLICY=/etc/policy.toml" in values(shown.out, "Environment")
    assert calls.read_text() == ""
    done = succeed("service", "install", "--no-start", *arguments)
    path = Path(done.out)
    assert path.is_file()
    assert "other users can read" in done.err
    assert calls.read_text() == ""
    assert succeed("service", "install", "--json", "--store", "x", "registry").json["started"]
    assert "restart modelpack-registry.service" in calls.read_text()
    assert succeed("service", "remove", "registry").out == str(path)
    assert not path.exists()
    assert run("service", "remove", "registry").code == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["registry", "--", "--nonsense"], "--nonsense"),
        (["registry", "--", "--port", "70000"], "70000"),
        (["serve", "--", "--device", "tpu"], "tpu"),
        (["gateway", "--", "--balance", "fair"], "fair"),
        # It would write a new API key to the log at each start.
        (["gateway", "--", "key", "team"], "'key' is not an option of modelpack gateway"),
        (["nothing"], "nothing"),
        (["registry", "--env-file", "missing.env"], "missing.env"),
    ],
)
def test_wrong_usage(here: Path, calls: Path, arguments: list[str], problem: str) -> None:
    done = run("service", "install", *arguments)
    assert done.code == 2
    assert problem in done.err
    assert not (here / "home").exists()
    assert calls.read_text() == ""
