"""`modelpack gateway` and `modelpack gateway key`, in processes and in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from modelpack.errors import NotFoundError
from modelpack_server.gateway import KeyFile
from modelpack_server.gateway.limits import Limits
from tests.cli.running import modelpack, succeed
from tests.gateway.servers import CHAT, COMPLETION, Upstream, new_client, serving


def test_a_key_is_shown_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    made = succeed(
        "gateway", "key", "alice", "--keys", file, "--requests-per-minute", "60",
        "--tokens-per-minute", "1000", "--concurrency", "2", "--model", "ai/*", "--model", "x",
    )  # fmt: skip
    assert made.out.startswith("mp_")
    assert made.out not in made.err
    assert str(file) in made.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = KeyFile(file).current().find(made.out)
    assert key is not None
    assert (key.limits, key.models) == (Limits(60, 1000, 2), ("ai/*", "x"))
    again = modelpack("gateway", "key", "alice", "--keys", file)
    assert again.code == 7
    assert "already has a key 'alice'" in again.err


def test_a_key_as_json_in_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    made = succeed("gateway", "key", "bob", "--json").json
    assert KeyFile(made["file"]).current().find(made["key"]) is not None
    assert Path(made["file"]).is_relative_to(tmp_path) or sys.platform == "darwin"


def test_keys_are_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secret = succeed("gateway", "key", "alice", "--keys", file, "--model", "ai/*").out
    succeed("gateway", "key", "create", "list", "--keys", file, "--concurrency", "2", "--gateway")
    keys = KeyFile(file)
    assert succeed("gateway", "key", "list", "--keys", file).out.splitlines() == [
        "NAME   REQUESTS/MIN  TOKENS/MIN  CONCURRENCY  MODELS  GATEWAY",
        "alice  -             -           -            ai/*",
        "list   -             -           2            all     yes",
    ]
    assert succeed("gateway", "key", "list", "--keys", file, "-q").out == "alice\nlist"
    found = succeed("gateway", "key", "list", "--keys", file, "--json").json
    assert found["keys"][1] == {
        "name": "list", "requests_per_minute": None, "tokens_per_minute": None, "concurrency": 2,
        "per_caller": None, "models": None, "gateway": True,
    }  # fmt: skip
    revoked = succeed("gateway", "key", "revoke", "alice", "--keys", file)
    assert revoked.err == f"removed alice from {file}\n"
    assert keys.current().find(secret) is None
    again = modelpack("gateway", "key", "revoke", "alice", "--keys", file)
    assert again.code == NotFoundError.exit_code
    assert "has no key 'alice'" in again.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["key", "a b"], 2, "not a valid key name"),
        (["key", "a", "--concurrency", "0"], 2, "concurrency"),
        ([], 2, "needs an upstream"),
        (["--upstream", "x"], 2, "not a valid server URL"),
        (["--upstream", "http://h", "--host", "0.0.0.0"], 2, "--allow-anonymous"),
        (["--upstream", "http://h", "--cors", "evil.example"], 2, "not a valid origin"),
        (["--upstream", "http://h", "--keys", "/nowhere"], 2, "cannot read the keys"),
        (["--upstream", "http://h", "--host", "192.0.2.1", "--allow-remote"], 2, "cannot listen"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    if arguments[:1] == ["key"]:
        arguments = [*arguments, "--keys", str(tmp_path / "keys.toml")]
    result = modelpack("gateway", *arguments)
    assert result.code == code
    assert message in result.err


def test_a_broken_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("[keys.a]\nsha256 = 'x'")
    result = modelpack("gateway", "--upstream", "http://127.0.0.1:1", "--keys", file)
    assert result.code == 1
    assert f"{file}: [keys.a] sha256: expected 64" in result.err


def test_the_command_serves_logs_and_stops(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secret = succeed("gateway", "key", "alice", "--keys", file).out
    with serving(Upstream()) as upstream:
        upstream = upstream.replace("127.0.0.1", "127.1")  # not recognised as this machine
        process = subprocess.Popen(
            [sys.executable, "-m", "modelpack", "gateway", "--upstream", upstream,
             "--port", "0", "--keys", str(file), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy(),
        )  # fmt: skip
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert (said["upstreams"], said["pid"]) == ([upstream], process.pid)
        url = said["url"]
        body = {"model": "m", "messages": [{"role": "user", "content": "top-secret"}]}
        with new_client(url) as client:
            assert client.get("/health").json()["status"] == "ok"
            assert client.post(CHAT, json=body).status_code == 401
            reply = client.post(CHAT, json=body, headers={"x-api-key": secret})
            assert reply.json() == COMPLETION
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    traces = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [trace["status"] for trace in traces] == [401, 200]  # and none for the probe
    assert (traces[1]["key"], traces[1]["upstream"]) == ("alice", upstream)
    assert f"all clients are one owner at {upstream}: set MODELPACK_UPSTREAM_KEY" in err
    assert secret not in err
    assert "top-secret" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--allow-anonymous"),
        (["--cors", "evil.example"], "not a valid origin"),
        (["--keys", "/nowhere"], "cannot read the keys"),
        (["--allow-media-url", "http://a.example"], "'http://a.example' is not a valid host"),
    ],
)
def test_serve_asks_for_the_same(arguments: list[str], message: str) -> None:
    pytest.importorskip("mlx_lm")
    result = modelpack("serve", *arguments)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("missing", ["httpx", "prometheus_client"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    result = modelpack("gateway", "--upstream", "http://127.0.0.1:1")
    assert result.code == 2
    assert f"requires {missing}, which is not installed" in result.err
    assert "modelpack[gateway]" in result.err
