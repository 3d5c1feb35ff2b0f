"""`modelpack bench`, from the command line to its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack as library
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.cli.running import modelpack, succeed
from tests.engine.server_benchmark.misbehaving import Misbehaving, running
from tests.engine.serving.tiny import TinyCatalogue, write_tiny

pytestmark = pytest.mark.long

SMALL = ("--prompt-tokens", "4", "--output-tokens", "3", "--requests", "3")


@pytest.fixture
def url() -> Iterator[str]:
    with ModelServer(lambda: ModelPool(TinyCatalogue()), address="127.0.0.1:0") as server:
        yield server.url


def test_two_servers(url: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("json", "md", "png")}
    with running(Misbehaving(models=("tiny",))) as other:
        result = succeed(
            "bench", url, other, *SMALL, "--concurrency", "1,2", "--model", "tiny",
            "--json-file", files["json"], "--markdown", files["md"], "--png", files["png"],
        )  # fmt: skip
    report = json.loads(files["json"].read_text())
    ours, theirs = report["targets"]
    assert [run["level"] for run in ours["runs"]] == [1, 2]
    for run in ours["runs"]:
        assert run["errors"] == {}
        assert run["output_tokens"] == 9, "answers have the length that is asked for"
        assert run["prompt_tokens"] > 12, "as the server counts"
        assert run["output_tokens_per_s"] > 0
        assert run["ttft_s"]["p99"] > 0
    assert theirs["versions"] == {"server": "9.8"}
    assert files["md"].read_text().rstrip() == result.out
    assert f"## Against {url}" in result.out
    assert report["command"].startswith(f"modelpack bench {url} ")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "2 at once" in result.err


def test_rates_and_workloads(url: str) -> None:
    report = succeed("bench", url, *SMALL, "--rate", "50", "--json").json
    assert (report["axis"], report["targets"][0]["runs"][0]["requests"]) == ("requests/s", 3)
    report = succeed("bench", url, "--workload", "rounds-of-five", "--requests", "1", "--json").json
    run = report["targets"][0]["runs"][0]
    assert run["load"] == "rounds-of-five"
    assert run["errors"] or run["output_tokens"] > 10


def test_a_model_is_served_for_the_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPACK_KEYS", str(tmp_path / "none"))
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    library.package("team/tiny", PackageRequest(safetensors_dir=files), store=store)
    report = succeed(
        "bench", "team/tiny", *SMALL, "--concurrency", "2", "--store", store.root, "--json",
        "--serve", "--device cpu --kv-cache-bytes 2000000",
    ).json  # fmt: skip
    [target] = report["targets"]
    assert target["runs"][0]["output_tokens"] == 9
    assert {"modelpack", "mlx", "mlx-lm"} <= target["versions"].keys()
    result = modelpack("bench", "team/tiny", *SMALL, "--store", store.root, "--serve", "--bogus")
    assert result.code == 1
    assert "--bogus" in result.err


def test_errors_only_is_a_failure() -> None:
    server = Misbehaving((b"data: 1\n\n",), models=("m",))
    with running(server) as url:
        result = modelpack("bench", url, *SMALL, "--concurrency", "1")
    assert result.code == 1
    assert "3 × invalid event: not a chunk" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["http://127.0.0.1:9"], 6, "no response from"),
        (["http://127.0.0.1:9", "--concurrency", "1,x"], 2, "list of numbers"),
        (["http://127.0.0.1:9", "--concurrency", "0"], 2, "above 0"),
        (
            ["http://127.0.0.1:9", "--rate", "1", "--concurrency", "1"],
            2,
            "--concurrency, --rate and --workload cannot",
        ),
        (["http://127.0.0.1:9", "--workload", "x"], 2, "no such workload"),
        (
            ["http://127.0.0.1:9", "--workload", "sonnet", "--prompt-tokens", "9"],
            2,
            "--workload cannot be combined with --prompt-tokens",
        ),
        (["http://127.0.0.1:9", "--serve", "--device cpu"], 2, "only URLs were given"),
        (["a", "http://b", "c", "--serve", "x", "--serve", "y"], 2, "options, got 2"),
        (["a", "--serve", "'"], 2, "quotation"),
        (["http://me:word@127.0.0.1:9"], 2, "contains credentials"),
        (["http://127.0.0.1:9", "--png", "/nowhere/at/all.png"], 2, "/nowhere/at"),
        (["NO::name"], 2, "NO::name"),
        ([], 2, "TARGET"),
    ],
)
def test_what_it_refuses(arguments: list[str], code: int, says: str) -> None:
    result = modelpack("bench", *arguments)
    assert result.code == code
    assert says in result.err
