"""Services that run `modelpack serve`, `registry serve` and `gateway` for a user.

On Linux, a service is a user unit of systemd; on macOS, it is an agent of launchd. Secrets are not
part of a service: they are in its environment file.
Sources: systemd.service(5), systemd.exec(5), systemd.syntax(7), launchd.plist(5).
"""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from modelpack.errors import ModelpackError, NotFoundError, UnsupportedError, UsageError

#: The words of the command that each service runs.
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "serve": ("serve",),
    "registry": ("registry", "serve"),
    "gateway": ("gateway",),
}
#: Variables that a service gets from the environment of `install`. None of them holds a secret.
CARRIED: Final = (
    "DOCKER_CONFIG", "HF_HOME", "INSECURE_REGISTRY", "MODELPACK_ALLOW_PRIVATE", "MODELPACK_CACHE",
    "MODELPACK_KEYS", "MODELPACK_POLICY", "MODELPACK_STORE", "PATH",
)  # fmt: skip
#: Seconds before a service that failed is started again.
_RESTART_SECONDS: Final = 5
_PLAIN = re.compile(r"[\w@+=:,./-]+\Z", re.ASCII)
_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]+@")
# The agent runs this shell script, since launchd has no environment files: $0 is the file.
_WITH_ENVIRONMENT: Final = 'set -a; . "$0" && set +a && exec "$@"'


@dataclass(frozen=True, slots=True)
class Service:
    """A service: its `kind`, a key of `KINDS`, and the `options` of its command.

    Relative paths in the options are relative to `directory`. `environment` has no secrets; the
    `environment_file`, an absolute path, has them.
    """

    kind: str
    options: tuple[str, ...]
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    environment_file: Path | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for texts that a service file cannot hold, and for passwords."""
        paths = [str(self.directory), str(self.environment_file or "")]
        for text in (*self.options, *self.environment.values(), *paths):
            if not text.isprintable():  # control characters, and bytes that are not UTF-8
                raise UsageError(f"{text!r} is not printable, so no service file can hold it")
        for path in paths:
            if path.endswith(("\\", " ")):  # systemd would continue the line, or ignore the space
                raise UsageError(f"{path!r}: no service file can hold its last character")
        for option in self.options:
            if _PASSWORD.search(option):
                raise UsageError(
                    "a URL among the options contains a password, which every user can see in the "
                    "list of processes",
                    hint="put secrets into variables of the file for --env-file",
                )

    @property
    def command(self) -> list[str]:
        """The command line, with this Python by its full path."""
        return [sys.executable, "-m", "modelpack", *KINDS[self.kind], *self.options]


def carried_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of `CARRIED` that are set."""
    return {name: environment[name] for name in CARRIED if environment.get(name)}


def systemd_unit(service: Service) -> str:
    """Return the user unit of systemd."""
    program, *arguments = service.command
    # Variables are substituted in arguments, but not in the path of the program.
    words = [_word(program), *(_word(argument).replace("$", "$$") for argument in arguments)]
    lines = [
        "# Written by `modelpack service install`.",
        "[Unit]",
        f"Description=modelpack {' '.join(KINDS[service.kind])}",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(words)}",
        # These values are not split into words.
        f"WorkingDirectory={_specifiers(str(service.directory))}",
        *(f"Environment={_word(f'{key}={text}')}" for key, text in service.environment.items()),
    ]
    if service.environment_file is not None:
        lines.append(f"EnvironmentFile={_specifiers(str(service.environment_file))}")
    lines += [
        "Restart=on-failure",
        f"RestartSec={_RESTART_SECONDS}",
        "RestartPreventExitStatus=2",  # wrong usage
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines)


def _word(text: str) -> str:
    """Return one word of a line that systemd splits into words (systemd.syntax, "Quoting")."""
    if not _PLAIN.match(text):
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        text = f'"{escaped}"'
    return _specifiers(text)


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def launchd_agent(service: Service, home: Path) -> bytes:
    """Return the agent of launchd as a property list; its log is in the directory `home`."""
    command = service.command
    if service.environment_file is not None:
        command = ["/bin/sh", "-c", _WITH_ENVIRONMENT, str(service.environment_file), *command]
    log = str(home / "Library" / "Logs" / f"modelpack-{service.kind}.log")
    value: dict[str, Any] = {
        "Label": _label(service.kind),
        "ProgramArguments": command,
        "WorkingDirectory": str(service.directory),
        "EnvironmentVariables": dict(service.environment),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _RESTART_SECONDS,
        "ProcessType": "Interactive",  # without limits on CPU and I/O
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    return plistlib.dumps(value, sort_keys=False)


def _label(kind: str) -> str:
    return f"dev.modelpack.{kind}"


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """systemd or launchd: the place of a user's services, and the commands that control them."""

    platform: str = field(default_factory=lambda: sys.platform)
    home: Path = field(default_factory=Path.home)

    def __post_init__(self) -> None:
        """Raise `UnsupportedError` for other platforms."""
        if self.platform not in ("linux", "darwin"):
            raise UnsupportedError(f"no services on {self.platform}: expected Linux or macOS")

    def path(self, kind: str) -> Path:
        """Return the path of a service's file."""
        if self.platform == "darwin":
            return self.home / "Library" / "LaunchAgents" / f"{_label(kind)}.plist"
        config = Path(os.environ.get("XDG_CONFIG_HOME") or self.home / ".config")
        return config / "systemd" / "user" / f"modelpack-{kind}.service"

    def content(self, service: Service) -> bytes:
        """Return the bytes of a service's file."""
        if self.platform == "darwin":
            return launchd_agent(service, self.home)
        return systemd_unit(service).encode()

    def install(self, service: Service, *, start: bool = True) -> Path:
        """Write the service, replacing one of its kind, and return its path.

        With `start`, also start it now and at each login. Raises `ModelpackError` if that fails;
        the file is written then.
        """
        path = self.path(service.kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_bytes(self.content(service))
        scratch.replace(path)
        if not start:
            return path
        if self.platform == "darwin":
            self._run("launchctl", "bootout", self._domain, str(path), check=False)
            self._run("launchctl", "bootstrap", self._domain, str(path))
        else:
            self._run("systemctl", "--user", "daemon-reload")
            self._run("systemctl", "--user", "enable", path.name)
            self._run("systemctl", "--user", "restart", path.name)
        return path

    def remove(self, kind: str) -> Path:
        """Stop the service, delete its file and return its path; raise `NotFoundError`."""
        path = self.path(kind)
        if not path.exists():
            raise NotFoundError(f"no service to remove: {path} does not exist")
        # Without a session of the user, nothing runs that could be stopped.
        if self.platform == "darwin":
            self._run("launchctl", "bootout", self._domain, str(path), check=False)
            path.unlink()
        else:
            self._run("systemctl", "--user", "disable", "--now", path.name, check=False)
            path.unlink()
            self._run("systemctl", "--user", "daemon-reload", check=False)
        return path

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"

    def _run(self, *command: str, check: bool = True) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            problem = done.stderr.strip()[:300] if done.returncode else ""
            failed = done.returncode != 0
        except OSError as error:
            problem, failed = str(error), True
        if failed and check:
            what = shlex.join(command)
            raise ModelpackError(
                f"the service is written but not started: `{what}` failed: {problem}",
                hint="run that in a login session, or give --no-start to only write the service",
            )
