"""`modelpack smoke`: passed and failed checks, and the reports for CI."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import pytest

import modelpack
from modelpack.operations.lookup import stored_model
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_engine.config import EngineConfig
from modelpack_engine.models.load_progress import LoadProgress
from modelpack_server.cli.smoke import junit_xml
from modelpack_server.smoke_test import Check, SmokeReport, check_text, check_vector, smoke_test
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.engine.embedding.models import write_model

SMALL = ("--device", "cpu", "--kv-cache-bytes", "50000000")


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if check.problem is not None]


@pytest.mark.parametrize(
    ("text", "tokens", "finish", "expected"),
    [
        ("Paris.", [1, 2], "stop", []),
        ("Zażółć gęślą jaźń\n\t日本", [1, 2, 3], "stop", []),
        ("no, no", [1, 1], "stop", []),
        ("cut with\ufffd", [1, 2], "length", []),
        ("", [], "stop", ["not empty"]),
        (" \n", [1, 2], "stop", ["not empty"]),
        ("bad \ufffd bytes", [1, 2], "stop", ["printable"]),
        ("bad\ufffd", [1, 2], "stop", ["printable"]),
        ("esc\x1b[2J", [1, 2], "stop", ["printable"]),
        ("nul\0", [1, 2], "length", ["printable"]),
        ("!!!!!", [7, 7, 7, 7, 7], "length", ["varied"]),
        ("so !!!!!!!!!!!!", [1, 2] + [7] * 12, "length", ["varied"]),
        ("so !!!!!!!!!!!", [1, 2] + [7] * 11, "length", []),
        ("Paris", [1, 2], "abort", ["ended"]),
        ("Paris", [1, 2], None, ["ended"]),
    ],
)
def test_what_is_sane(
    text: str, tokens: list[int], finish: str | None, expected: list[str]
) -> None:
    assert failed(check_text(text, tokens, finish)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ([0.5, 0.0], []),
        ([0.0, 0.0], ["not zero"]),
        ([0.5, float("nan")], ["finite"]),
        ([float("-inf")], ["finite"]),
    ],
)
def test_what_vectors_are(vector: list[float], expected: list[str]) -> None:
    assert failed(check_vector(vector)) == expected


@pytest.mark.long
def test_a_real_model_passes_from_a_clean_store(store: LayoutStore, tmp_path: Path) -> None:
    digest = str(stored_model(store, "ai/smollm2").digest)
    with registry() as server:
        name = f"{server.url.removeprefix('http://')}/ai/smollm2:v1"
        modelpack.push("ai/smollm2", to=name, store=store)
        result = succeed(
            "smoke", name, "--clean", "--expect", "Paris", "--junit", tmp_path / "junit.xml",
            "--store", tmp_path / "unused", *SMALL,
        )  # fmt: skip
    report = result.json
    assert not (tmp_path / "unused").exists()
    assert (report["passed"], report["reference"], report["digest"]) == (True, name, digest)
    assert (report["finish_reason"], report["device"]) == ("stop", "cpu")
    assert set(report["checks"]) == {"not empty", "printable", "varied", "ended", "expected"}
    assert report["time_to_first_token_seconds"] > 0
    assert report["tokens_per_second"] > 0
    assert {"modelpack", "mlx", "mlx-lm", "python", "platform"} == set(report["versions"])
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == (
        "6", "0", "0",
    )  # fmt: skip


def test_a_model_that_writes_bytes_at_random_fails(store: LayoutStore, tmp_path: Path) -> None:
    result = run(
        "smoke", "team/tiny", "--store", store.root, "--expect", "Paris", "--max-tokens", "40",
        "--min-tps", "1e9", "--junit", tmp_path / "junit.xml", *SMALL,
    )  # fmt: skip
    assert result.code == 1
    wrong = {name for name, passed in result.json["checks"].items() if not passed}
    assert {"expected", "speed", "printable"} <= wrong
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert {case.attrib["name"] for case in suite if case.find("failure") is not None} == wrong


def test_the_load_is_reported(store: LayoutStore) -> None:
    reports: list[tuple[str, LoadProgress | None]] = []
    config = EngineConfig(device="cpu", kv_cache_bytes=50_000_000)
    smoke_test(
        "team/tiny", store, config, max_tokens=1,
        on_progress=lambda name, progress: reports.append((name, progress)),
    )  # fmt: skip
    assert {name for name, _ in reports} == {"team/tiny"}
    assert reports[-1][1] is None
    assert any(progress is not None and progress.warming_up for _, progress in reports)


@pytest.mark.long
def test_an_embedding_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    store = LayoutStore(tmp_path / "store")
    files = tmp_path / "files"
    files.mkdir()
    write_model(files, "bert")
    modelpack.package("team/bert", PackageRequest(safetensors_dir=files), store=store)
    report = succeed("smoke", "team/bert", "--store", store.root, *SMALL).json
    assert report["checks"] == {"finite": True, "not zero": True}
    assert report["dimensions"] == 32
    assert run("smoke", "team/bert", "--store", store.root, "--expect", "x", *SMALL).code == 2
    result = run("run", "team/bert", "hello", "--store", store.root, *SMALL)
    assert result.code == 2
    assert "embedding model" in result.err


def test_errors_are_no_failed_checks(store: LayoutStore) -> None:
    assert run("smoke", "team/tiny", "--store", store.root, "--expect", "(", *SMALL).code == 2
    with registry() as server:
        missing = f"{server.url.removeprefix('http://')}/team/missing:v1"
        assert run("smoke", missing, "--clean", *SMALL).code == 3


def test_a_model_that_does_not_load_is_reported(store: LayoutStore, tmp_path: Path) -> None:
    result = run(
        "smoke", "team/tiny", "--store", store.root, "--device", "cpu", "--kv-cache-bytes", "1",
        "--junit", tmp_path / "junit.xml",
    )  # fmt: skip
    assert result.code == 1
    [problem] = result.json["problems"]
    assert "KV" in problem
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.attrib["errors"] == "1"
    assert suite.find("testcase/error") is not None


def test_junit_holds_any_answer() -> None:
    report = SmokeReport(
        None, "sha256:0", "?", checks=(Check("printable", "\x00 & <b>"),), answer="\x1b\ud800<&>"
    )
    suite = ElementTree.fromstring(junit_xml(report))
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert (failure.attrib["message"], failure.text) == ("\ufffd & <b>", "\ufffd\ufffd<&>")
