"""Our readers and mlx-lm's parsers agree on well-formed output."""

from __future__ import annotations

from typing import Any

import pytest

from modelpack_server.tool_parsers import json_calls
from modelpack_server.tool_parsers.json_calls import tool_parser
from tests.engine.output.cases import CASES
from tests.engine.output.reading import TOOLS, Found, call, read, text
from tests.engine.output.writing import Case

PARSERS = {
    "hermes": "json_tools",
    "qwen3_coder": "qwen3_coder",
    "mistral": "mistral",
    "mistral_v13": "mistral",
    "glm": "glm47",
    "gemma4": "gemma4",
    "function_gemma": "function_gemma",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "lfm2": "pythonic",
}
TWO_CALLS = [case for case in CASES if case.family in PARSERS and case.name in ("two", "list")]
SCHEMAS = [{"function": {"name": t.name, "parameters": dict(t.parameters)}} for t in TOOLS]


def theirs(module: Any, written: str) -> Found:
    """Read like mlx-lm's server: block by block, between its start and end markers."""
    found: Found = []
    start, end = module.tool_call_start, module.tool_call_end
    for block in written.removesuffix("</s>").split(start)[1:]:
        parsed = module.parse_tool_call(block.split(end)[0] if end else block, SCHEMAS)
        for one in parsed if isinstance(parsed, list) else [parsed]:
            found.append(call(one["name"], **one["arguments"]))
    return found


@pytest.mark.parametrize("case", TWO_CALLS, ids=lambda case: case.family)
def test_both_find_the_same(case: Case) -> None:
    ours = [entry for entry in read(case.family, [case.written]) if entry[0] == "call"]
    assert len(ours) == 2
    assert theirs(tool_parser(PARSERS[case.family]), case.written) == ours


def test_every_parser_is_compared() -> None:
    assert [case.family for case in TWO_CALLS] == sorted(
        PARSERS, key=[case.family for case in CASES].index
    )


WRITTEN = (
    "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key></longcat_tool_call>"
)


class Stub:
    def __init__(self, result: Any) -> None:
        self._result = result

    def parse_tool_call(self, text: str, tools: Any) -> Any:
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


@pytest.mark.parametrize(
    "result",
    [
        KeyError("x"),
        RecursionError(),
        AttributeError("None has no group"),
        None,
        "text",
        {"name": None, "arguments": {}},
        {"name": "get_weather", "arguments": "{}"},
        {"name": "rm_rf", "arguments": {}},
        {"name": "get_weather", "arguments": {"days": float("nan")}},
        [{"name": "get_weather", "arguments": {}}, {"name": "rm_rf", "arguments": {}}],
    ],
)
def test_what_their_parser_cannot_read_is_text(
    result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_calls, "tool_parser", lambda name: Stub(result))
    assert read("longcat", [WRITTEN]) == [text(WRITTEN)]
    good = {"name": "get_weather", "arguments": {"city": "x"}}
    monkeypatch.setattr(json_calls, "tool_parser", lambda name: Stub([good, good]))
    assert read("longcat", [WRITTEN]) == [call("get_weather", city="x")] * 2


def test_a_parser_that_mlx_lm_lacks_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool_parser("no_such_format") is None
    monkeypatch.setattr(json_calls, "tool_parser", lambda name: None)
    assert read("longcat", [WRITTEN]) == [text(WRITTEN)]
