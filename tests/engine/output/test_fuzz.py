"""For any output, the parser raises nothing, loses nothing and ignores the division into pieces."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelpack_server.tool_parsers.families import FAMILIES, OutputFormat
from modelpack_server.tool_parsers.parser import END_TOKENS
from tests.engine.output.cases import CASES
from tests.engine.output.reading import TOOLS, read
from tests.engine.output.writing import Case

WRITTEN = [case.written for case in CASES]
FRAGMENTS = sorted(
    {marker for family in FAMILIES.values() for marker in (*family.markers, *family.ends)}
    | {w[at : at + n] for w in WRITTEN for at in range(0, len(w), 7) for n in (5, 20)}
    | {tool.name for tool in TOOLS}
    | {"<think>", "</think>", "[THINK]", "[/THINK]", "<|channel>thought\n", "<channel|>", "</s>"}
    | {"<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "{", "}", '"', "\\", "\n"}
)
nonsense = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14)


@pytest.mark.long
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), nonsense, st.booleans(), st.booleans())
def test_pieces_make_no_difference(
    family: str, pieces: list[str], inside: bool, parallel: bool
) -> None:
    options = {"starts_reasoning": inside, "parallel": parallel}
    whole = read(family, ["".join(pieces)], **options)
    assert read(family, pieces, **options) == whole
    assert read(family, "".join(pieces), **options) == whole


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(set(FAMILIES) - {"harmony", "functionary"})), nonsense)
def test_without_a_call_nothing_is_lost(family: str, pieces: list[str]) -> None:
    """Output without channels, end tokens and calls is plain text."""
    written = "".join(pieces)
    assume(not any(token in written for token in END_TOKENS + FAMILIES[family].layout))
    found = read(OutputFormat(family), [written])
    if not any(entry[0] == "call" for entry in found):
        assert "".join(entry[1] for entry in found) == written


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CASES), st.data())
def test_any_beginning_of_an_answer_can_be_the_end(case: Case, data: st.DataObject) -> None:
    written = case.written
    cut = written[: data.draw(st.integers(0, len(written)))]
    found = read(case.family, [cut])
    whole_calls = [entry for entry in case.found if entry[0] == "call"]
    calls = [entry for entry in found if entry[0] == "call"]
    assert calls[:-1] == whole_calls[: max(len(calls) - 1, 0)], "an earlier call changed"


HOSTILE = {
    "markers": "{marker}" * 3000,
    "openings": "{marker}" + '{{"name": "now", "arguments": ' * 1500,
    "nesting": '{marker}{{"name": "now", "arguments": {{"a": ' + "[" * 20_000,
    "long name": "{marker}" + "a" * 50_000,
    "braces": "{marker}" + "{{" * 20_000,
    "unclosed string": '{marker}{{"name": "' + "x\\" * 20_000,
    "spaces": "{marker}" + " " * 50_000,
    "python": "{marker}[now(a=" + "(" * 20_000,
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"harmony", "xlam"}))
def test_hostile_answers_end_as_text_or_calls(family: str, attack: str) -> None:
    marker = next(iter(FAMILIES[family].markers))
    written = HOSTILE[attack].format(marker=marker)
    pieces = [written[at : at + 40] for at in range(0, len(written), 40)]
    found = read(family, pieces)
    if not any(entry[0] == "call" for entry in found):
        assert "".join(entry[1] for entry in found) == written


def test_reading_needs_neither_mlx_nor_transformers() -> None:
    """mlx-lm's own parsers raise nothing either."""
    code = """
import sys
from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import Tool
parser = OutputParser(OutputFormat.named("longcat"), [Tool("f")], starts_reasoning=False)
parts = parser.feed("<longcat_tool_call>f\\n<longcat_arg_key>a</longcat_arg_key>"
                    "<longcat_arg_value>1</longcat_arg_value></longcat_tool_call>")
assert parser.tool_calls == 1, parts
print(sorted({"mlx", "mlx_lm", "transformers", "numpy", "fastapi"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
