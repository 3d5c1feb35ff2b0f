"""`modelpack run` with a prompt: arguments, piped input, and JSON."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from modelpack.store.layout import LayoutStore
from modelpack_server.cli.run import figures
from modelpack_server.conversation.spec import ChatUsage
from tests.cli.running import Result
from tests.cli.running import modelpack as run

SMALL = ("--device", "cpu", "--kv-cache-bytes", "2000000", "--max-tokens", "4")


def tiny(store: LayoutStore, *arguments: str) -> Result:
    return run("run", "team/tiny", *arguments, "--store", store.root, *SMALL)


def test_a_prompt(store: LayoutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    result = tiny(store, "hello", "there")
    assert result.code == 0, result.err
    assert result.stdout.endswith(b"\n")
    assert "(truncated: maximum number of tokens" in result.err
    assert "(truncated: maximum number of tokens" not in tiny(store, "hello", "-q").err


def test_figures_after_a_response(store: LayoutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    result = tiny(store, "hello", "--verbose", "--quiet")
    assert result.code == 0, result.err
    found = dict(line.split(":") for line in result.err.splitlines() if line.count(":") == 1)
    assert list(found)[-6:] == [
        "total duration", "time to first token", "prompt eval count", "prompt eval rate",
        "eval count", "eval rate",
    ]  # fmt: skip
    assert found["eval count"].strip() == "4 tokens"
    assert re.fullmatch(r" +\d+\.\d\d tokens/s", found["eval rate"])
    assert re.fullmatch(r" +\d+\.\d{3} s", found["time to first token"])


def test_rates_count_only_computed_tokens() -> None:
    lines = figures(ChatUsage(30, 11, 10), 1.0, 3.0, 4.0).splitlines()
    assert lines[2] == "prompt eval count:    30 tokens (10 cached)"
    assert [line.split(":")[1].strip() for line in lines if "rate" in line] == [
        "10.00 tokens/s", "10.00 tokens/s"
    ]  # fmt: skip
    assert figures(ChatUsage(3, 1), 1.0, 1.0, 1.0).endswith("eval rate:            -")


@pytest.mark.long
def test_arguments_and_what_is_piped_in_are_one_prompt(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    for arguments, piped in ((["ab"], ""), ([], "ab\n"), (["ab"], "cde"), (["ab", "c"], "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        answer = tiny(store, *arguments, "--json").json
        lengths.append(answer["prompt_tokens"])
        assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 4)
    assert [length - lengths[0] for length in lengths] == [0, 0, 5, 2]  # one token per byte


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "stdin is empty"),
        (["hi", "--preset", "loud"], "loud"),
        (["hi", "--temperature", "7"], "temperature"),
        (["hi", "--top-p", "0"], "top-p"),
    ],
)
def test_wrong_usage(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    result = tiny(store, *arguments)
    assert result.code == 2
    assert says in result.err


@pytest.mark.long
def test_a_reader_that_goes_away(store: LayoutStore) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpack", "run", "team/tiny", "x", "--store", str(store.root),
         "--device", "cpu", "--kv-cache-bytes", "2000000"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(60) == 1
    assert b"error" not in errors, errors
