"""`modelpack transcribe`, and `modelpack smoke` of a speech-to-text model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import modelpack
from modelpack.store.layout import LayoutStore
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.engine.embedding.models import write_model
from tests.engine.speech.tiny import noise, wav, write_whisper

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store and a sound."""
    root = tmp_path_factory.mktemp("speech")
    store = LayoutStore(root / "store")
    (root / "bert").mkdir()
    for name, path in (
        ("team/whisper", write_whisper(root / "whisper")),
        ("team/bert", write_model(root / "bert", "bert")),
    ):
        modelpack.package(name, modelpack.PackageRequest(safetensors_dir=path), store=store)
    (root / "a.wav").write_bytes(wav(noise(1)))
    return root


def test_formats(root: Path) -> None:
    where = ("team/whisper", root / "a.wav", "--store", root / "store", "--device", "cpu")
    text = succeed("transcribe", *where).out
    assert text.startswith("w")
    srt = succeed("transcribe", *where, "--format", "srt").out
    assert srt.startswith("1\n00:00:0")
    assert text.strip() in srt
    report = succeed("transcribe", *where, "--json", "--words", "--language", "DE").json
    assert (report["task"], report["language"], report["duration"]) == ("transcribe", "german", 1)
    assert [word["word"] for word in report["words"]] == report["text"].split()


def test_translation_as_vtt(root: Path) -> None:
    where = ("team/whisper", root / "a.wav", "--store", root / "store", "--device", "cpu")
    assert succeed("transcribe", *where, "--translate", "--format", "vtt").out.startswith("WEBVTT")


@pytest.mark.parametrize(
    ("model", "file", "options", "code", "said"),
    [
        ("team/whisper", "a.wav", ["--words"], 2, "--words requires --json"),
        ("team/whisper", "a.wav", ["--language", "tlh"], 2, "does not know the language 'tlh'"),
        ("team/whisper", "none.wav", [], 2, "does not exist"),
        ("team/whisper", "whisper/config.json", [], 2, "unknown format"),
        ("team/bert", "a.wav", [], 2, "team/bert is not a speech-to-text model"),
    ],
)
def test_refused(
    root: Path, model: str, file: str, options: list[str], code: int, said: str
) -> None:
    result = run("transcribe", model, root / file, "--store", root / "store", *options)
    assert (result.code, said in result.err) == (code, True), result.err


def test_smoke(root: Path) -> None:
    where = ("--store", root / "store", "--device", "cpu")
    report = run("smoke", "team/whisper", *where).json
    assert report["checks"].keys() == {"printable"}
    assert (report["prompt"], report["finish_reason"]) == ("", "stop")
    assert report["answer"]
    for option in (["--expect", "x"], ["--min-tps", "1"], ["--audio", root / "a.wav"]):
        result = run("smoke", "team/whisper", *where, *option)
        assert (result.code, "gets a tone" in result.err) == (2, True)
        assert str(option[0]) in result.err


def test_run_refers_to_transcribe(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = run("run", "team/whisper", "hello", "--store", root / "store", "--device", "cpu")
    assert result.code == 2
    assert "speech-to-text model" in result.err
    assert "modelpack transcribe" in result.err


def test_inspect_shows_the_capability(root: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path)
    succeed("package", "w", "--safetensors-dir", root / "whisper", "--format", "cncf", *store)
    shown = succeed("inspect", "w", *store, "--json").json
    assert json.dumps({"inputTypes": ["audio"], "outputTypes": ["text"]}) in json.dumps(shown)
    assert "audio to text" in succeed("inspect", "w", *store).out
