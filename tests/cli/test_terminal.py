"""Texts from models cannot control the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpack.cli.docker_plugins import docker_model
from modelpack.cli.output import one_line, visible
from modelpack.errors import ModelpackError
from tests.cli.running import Result, modelpack
from tests.models import tiny_gguf
from tests.registry.faults import answering
from tests.registry.faulty import REPOSITORY, FaultyRegistry

# Sets the title, clears the screen, reverses the line, and imitates an error message.
EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil\x9b2J\nerror: forged"
DOCKER = "application/vnd.docker.ai"


def model(registry: FaultyRegistry, *, filepath: str = "model.gguf") -> str:
    """Publish a model with hostile text in every field; return its reference."""
    weight = registry.put_blob(b"weights")
    about: dict[str, Any] = {
        "config": {"format": "gguf", "architecture": EVIL, "parameters": EVIL, "size": EVIL,
                   "quantization": EVIL},
        "descriptor": {"family": EVIL, "createdAt": EVIL},
        "rootfs": {"type": "rootfs", "diff_ids": [str(weight.digest)]},
    }  # fmt: skip
    config = registry.put_blob(json.dumps(about).encode())
    raw = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": f"{DOCKER}.model.config.v0.1+json",
            "digest": str(config.digest),
            "size": config.size,
        },
        "layers": [
            {
                "mediaType": f"{DOCKER}.gguf.v3",
                "digest": str(weight.digest),
                "size": weight.size,
                "annotations": {"org.cncf.model.filepath": filepath, EVIL: EVIL},
            }
        ],
        "annotations": {EVIL: EVIL},
    }
    registry.put_manifest(json.dumps(raw).encode(), "v1")
    return f"{registry.host}/{REPOSITORY}:v1"


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with FaultyRegistry() as registry:
        yield registry


def check(result: Result) -> None:
    shown = result.out + result.err
    assert not [c for c in shown if not c.isprintable() and c not in "\n\ufffd"], shown
    assert not [line for line in shown.splitlines() if line.startswith("error: forged")]


@pytest.mark.parametrize("filepath", ["model.gguf", EVIL, f"../{EVIL}"], ids=["fine", "evil", "up"])
@pytest.mark.parametrize("progress", ["plain", "bars", "none"])
def test_commands(registry: FaultyRegistry, tmp_path: Path, filepath: str, progress: str) -> None:
    reference = model(registry, filepath=filepath)
    store = ("--store", tmp_path / "store", "--progress", progress)
    check(modelpack(*store, "pull", reference))
    for words in (["list"], ["inspect", reference], ["inspect", "--remote", reference],
                  ["resolve", reference], ["bundle", reference, tmp_path / "bundle"],
                  ["tag", reference, f"x:{EVIL}"], ["pull", EVIL], ["fsck"],
                  ["rm", reference]):  # fmt: skip
        check(modelpack(*store, *words))


@pytest.mark.parametrize("status", [401, 403, 404, 418, 500])
def test_what_a_registry_answers(registry: FaultyRegistry, tmp_path: Path, status: int) -> None:
    body = json.dumps({"errors": [{"code": EVIL, "message": EVIL}]}).encode()
    odd = answering(status, body, WWW_Authenticate='Basic realm="\x1b[2J"', Retry_After="0")
    registry.faults.add("*", "/v2/", odd, times=None)
    failed = modelpack("--store", tmp_path / "store", "pull", f"{registry.host}/{REPOSITORY}:v1")
    assert failed.code != 0
    check(failed)


class Server:
    """A model server that repeats the message of a registry."""

    endpoint = "http://127.0.0.1:1"

    @property
    def client(self) -> Server:
        return self

    def models(self) -> list[dict[str, Any]]:
        return []

    def pull(self, name: str, tell: Callable[[str], None]) -> None:
        tell(EVIL)
        raise ModelpackError(EVIL, hint=EVIL)


@pytest.mark.parametrize("words", [["pull", "m"], ["compose", "up", "--model", "m"]])
def test_what_a_server_tells_docker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setattr("modelpack.deploy.local_server.local_server", Server)
    monkeypatch.setattr("sys.argv", ["docker-model", "model", *words])
    with pytest.raises(SystemExit) as ended:
        docker_model()
    assert ended.value.code
    out = capsys.readouterr().out
    assert "owned" in out
    shown = [json.loads(line)["message"] for line in out.splitlines()] if "up" in words else [out]
    check(Result(1, "\n".join(shown).encode(), ""))


def test_tracebacks(tmp_path: Path) -> None:
    failed = modelpack("--store", tmp_path / "store", "--debug", "inspect", f"x/{EVIL}")
    assert "Traceback" in failed.err
    assert "\x1b" not in failed.err


def test_lines() -> None:
    assert visible("a\tb\nc\r\nd\x1b[1m") == "a\tb\nc\nd\ufffd[1m"
    assert one_line("a\nb\u2028c\u202ed") == "a\ufffdb\ufffdc\ufffdd"
    assert one_line("schön 模型") == "schön 模型"


def process(*words: str | Path, stdout: int, encoding: str = "utf-8") -> tuple[int, bytes, str]:
    done = subprocess.run(
        [sys.executable, "-m", "modelpack", *words],
        stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    return done.returncode, done.stdout or b"", done.stderr.decode(encoding)


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["manifest", "x:v1"],
                                   ["export", "x:v1", "-o", "-"]], ids=" ".join)  # fmt: skip
def test_a_full_output(tmp_path: Path, words: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert modelpack("package", "--gguf", tiny_gguf(tmp_path), "x:v1").code == 0
    with open("/dev/full", "wb") as full:
        code, _, err = process(*words, stdout=full.fileno())
    assert code == 1
    assert "cannot write the output: No space left on device" in err
    assert "unexpected" not in err
    assert "Exception" not in err


def test_a_terminal_that_lacks_characters(tmp_path: Path) -> None:
    directory = tmp_path / "模型 é"
    directory.mkdir()
    weights = tiny_gguf(directory)
    words = ["package", "--gguf", weights, "--annotation", "a=模型", "x:v1"]
    assert process(*words, stdout=subprocess.PIPE, encoding="latin-1")[0] == 0
    words = ["bundle", "x:v1", directory / "out"]
    code, out, err = process(*words, stdout=subprocess.PIPE, encoding="latin-1")
    assert code == 0, err
    assert "?? é" in out.decode("latin-1")
