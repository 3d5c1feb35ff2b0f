"""The family's parser accepts every call that the grammar allows."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from modelpack_engine.errors import RequestError
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.structured_output import (
    Constraint,
    GrammarVocabulary,
    ReasoningBlock,
    compile_constraint,
    grammar_vocabulary,
    tool_grammar,
)
from modelpack_server.structured_output.tool_markup import TOOL_MARKUP, Literals, Parameters
from modelpack_server.tool_parsers.families import FAMILIES, OutputFormat
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import (
    Reasoning,
    Text,
    Tool,
    ToolArguments,
    ToolChoice,
    ToolStart,
)
from tests.engine.structured.vocabularies import byte_tokenizer
from tests.engine.structured.walking import accepts, bits_of, walk

pytestmark = pytest.mark.weights

REQUIRED = ToolChoice("required")
WEATHER = Tool(
    "get_weather",
    "The weather",
    {
        "type": "object",
        "$defs": {"unit": {"enum": ["°C", "°F"]}},
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 6},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"$ref": "#/$defs/unit"},
            "code": {"type": "string", "pattern": "^[a-c]{2}-[0-9]$"},
            "deep": {
                "type": "object",
                "properties": {
                    "on": {"type": "boolean"},
                    "list": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                    "none": {"type": "null"},
                },
                "required": ["on"],
                "additionalProperties": False,
            },
        },
        "required": ["city", "days"],
    },
)
STOP = Tool("stop", "", {})
NOTE = Tool("note", "", {"type": "object", "properties": {"text": {"type": "string"}}})
FREE = Tool(
    "free", "", {"type": "object", "properties": {"x": {}, "y": {"type": "object"}}, "required": []}
)
TOOLS = (WEATHER, STOP, NOTE)


def read(format: OutputFormat, text: str, tools: tuple[Tool, ...] = TOOLS) -> list[tuple[str, Any]]:
    """Return the calls in a text that consists of calls."""
    parser = OutputParser(format, tools, starts_reasoning=False)
    calls: dict[int, list[str]] = {}
    for part in [*parser.feed(text), *parser.finish()]:
        assert not isinstance(part, Text), (part, text)
        if isinstance(part, ToolStart):
            calls[part.index] = [part.name, ""]
        elif isinstance(part, ToolArguments):
            calls[part.index][1] += part.fragment
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


def closing_of(family: str) -> str:
    """Return the end of a string that may contain any text."""
    style = TOOL_MARKUP[family].arguments
    if isinstance(style, Literals):
        return style.quote
    return style.closing if isinstance(style, Parameters) else ""


def test_the_families_are_those_that_are_read() -> None:
    assert not set(TOOL_MARKUP) - set(FAMILIES)
    assert set(FAMILIES) - set(TOOL_MARKUP) == {"longcat"}


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(TOOL_MARKUP))
def test_forced_calls_are_read_and_valid(
    family: str, vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    family_format = OutputFormat.named(family)
    grammar = compile_constraint(tool_grammar(family_format, TOOLS, REQUIRED), vocabulary)
    texts = [walk(grammar, tokenizer, seed, 300, closing_of(family)) for seed in range(3)]
    found = [read(family_format, text) for text in texts if text is not None]
    assert found
    for calls in found:
        assert calls
        for name, arguments in calls:
            tool = next(tool for tool in TOOLS if tool.name == name)
            jsonschema.validate(arguments, dict(tool.parameters))


# The exact calls that the chat templates of these families render.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "note", "arguments": {"text": "é"}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=note>\n<parameter=text>\né\n</parameter>\n"
    "</function>\n</tool_call>",
    "llama3": '{"name": "note", "parameters": {"text": "é"}}',
    "mistral": '[TOOL_CALLS][{"name": "note", "arguments": {"text": "é"}}]',
    "mistral_v11": '[TOOL_CALLS]note{"text": "é"}',
    "mistral_v13": '[TOOL_CALLS]note[ARGS]{"text": "é"}',
    "harmony": '<|channel|>commentary to=functions.note <|constrain|>json<|message|>{"text":"é"}',
    "glm": "<tool_call>note\n<arg_key>text</arg_key>\n<arg_value>é</arg_value>\n</tool_call>",
    "gemma4": '<|tool_call>call:note{text:<|"|>é<|"|>}<tool_call|>',
    "function_gemma": "<start_function_call>call:note{text:<escape>é<escape>}<end_function_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>note\n"
    "```json\n"
    '{"text": "é"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>note<｜tool▁sep｜>"
    '{"text": "é"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="note">\n<｜DSML｜parameter'
    ' name="text" string="true">é</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.note:0"
    '<|tool_call_argument_begin|>{"text":"é"}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="note" index="1"<|sep|><|open|>json'
    ' type="object"<|sep|>{"text":"é"}<|close|>json<|sep|><|close|>call<|sep|>'
    "<|close|>tools<|sep|>",
    "nemotron": '<TOOLCALL>[{"name": "note", "arguments": {"text": "é"}}]</TOOLCALL>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="note">\n<parameter name="text">é</parameter>'
    "\n</invoke>\n</minimax:tool_call>",
    "granite": '<|tool_call|>[{"name": "note", "arguments": {"text": "é"}}]',
    "lfm2": '<|tool_call_start|>[note(text="é")]<|tool_call_end|>',
    "gemma_code": '```tool_code\nnote(text="é")\n```',
    "xlam": '[{"name": "note", "arguments": {"text": "é"}}]',
    "functionary": '<|recipient|>note\n<|content|>{"text": "é"}',
    "minicpm5": '<function name="note"><param name="text">é</param></function>',
}
MARKUP = r"<[^<>=\s]+?[|>]>?|\[/?[A-Z_]+\]|<\|.+?\|>|<\|\"\|>"


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("family", sorted(WRITTEN))
def test_calls_are_written_as_the_templates_do(family: str, special: bool) -> None:
    """Whether the vocabulary has the markup as special tokens or only as letters."""
    text = WRITTEN[family]
    tokens = [m for m in dict.fromkeys(re.findall(MARKUP, text)) if len(m) > 2] if special else []
    tokenizer = byte_tokenizer(tokens)
    grammar = compile_constraint(
        tool_grammar(OutputFormat.named(family), TOOLS, REQUIRED), grammar_vocabulary(tokenizer)
    )
    assert accepts(grammar, tokenizer, text)
    assert not accepts(grammar, tokenizer, text.replace("note", "nota"))
    assert not accepts(grammar, tokenizer, "no " + text)
    assert read(OutputFormat.named(family), text) == [("note", {"text": "é"})]


def test_special_tokens_are_not_spelled_out() -> None:
    tokenizer = byte_tokenizer(["[TOOL_CALLS]", "[ARGS]"])
    grammar = compile_constraint(
        tool_grammar(OutputFormat.named("mistral_v13"), [STOP], REQUIRED),
        grammar_vocabulary(tokenizer),
    )
    spelled = tokenizer.encode("[TOOL_CALLS]stop[ARGS]{}", parse_special=False)
    mask = grammar.mask()
    assert not mask.allowed()[spelled[0] // 8] >> spelled[0] % 8 & 1


def test_what_a_caller_names_is_never_markup() -> None:
    """A value that looks like a special token is plain text."""
    tokenizer = byte_tokenizer(["<|im_end|>"])
    schema = {"type": "object", "properties": {"k": {"enum": ["<|im_end|>"]}}, "required": ["k"]}
    for family in ("qwen3_coder", "gemma4", "hermes", "lfm2"):
        named = OutputFormat.named(family)
        constraint = tool_grammar(named, [Tool("end", "", schema)], REQUIRED, parallel=False)
        grammar = compile_constraint(constraint, grammar_vocabulary(tokenizer))
        text = walk(grammar, tokenizer, 1)
        assert text is not None
        assert read(named, text, (Tool("end", "", schema),)) == [("end", {"k": "<|im_end|>"})]
        mask = grammar.mask()
        for token in tokenizer.encode(text, parse_special=False):
            assert token in bits_of(mask.allowed()), family
            mask.accept(token)


ONE, OTHER = (f'<tool_call>\n{{"name": "{n}", "arguments": {{}}}}\n</tool_call>' for n in "ab")


@pytest.mark.parametrize(
    ("names", "parallel", "accepted"),
    [
        ((), True, [ONE, OTHER, f"{ONE}\n{OTHER}", f"{OTHER}\n{OTHER}\n{ONE}"]),
        ((), False, [ONE, OTHER]),
        (("a",), True, [ONE]),
        (("a", "b"), True, [ONE, OTHER, f"{ONE}\n{OTHER}", f"{OTHER}\n{OTHER}\n{ONE}"]),
    ],
)
def test_who_may_be_called_and_how_often(
    names: tuple[str, ...],
    parallel: bool,
    accepted: list[str],
    vocabulary: GrammarVocabulary,
    tokenizer: Tokenizer,
) -> None:
    tools = [Tool("a"), Tool("b"), Tool("c")] if names else [Tool("a"), Tool("b")]
    constraint = tool_grammar(
        OutputFormat.named("hermes"), tools, ToolChoice("required", names), parallel=parallel
    )
    grammar = compile_constraint(constraint, vocabulary)
    texts = ["", "Hello.", ONE, OTHER, f"{ONE}\n{OTHER}", f"{OTHER}\n{OTHER}\n{ONE}"]
    assert [text for text in texts if accepts(grammar, tokenizer, text)] == accepted


def test_reasoning_goes_before_a_call(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    family_format = OutputFormat.named("hermes")
    block = ReasoningBlock("</think>", "<think>", answer="never")
    constraint = tool_grammar(family_format, [Tool("a")], REQUIRED)
    grammar = compile_constraint(constraint, vocabulary, reasoning=block)
    text = f"<think>\nHm. {ONE}\n</think>\n\n{ONE}"
    assert accepts(grammar, tokenizer, text)
    assert not accepts(grammar, tokenizer, f"<think>{ONE}")
    parser = OutputParser(family_format, [Tool("a")], starts_reasoning=False)
    parts = [*parser.feed(text), *parser.finish()]
    assert sum(isinstance(part, ToolStart) for part in parts) == 1
    assert any(isinstance(part, Reasoning) for part in parts)


HARMONY = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>"]
FINAL = "<|channel|>final<|message|>"
COMMENTARY = "<|channel|>commentary to=functions.stop <|constrain|>json<|message|>{}"
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


@pytest.mark.parametrize("thought", ["", ANALYSIS])
def test_harmony_has_a_channel_for_everything(thought: str) -> None:
    tokenizer = byte_tokenizer(HARMONY)
    vocabulary = grammar_vocabulary(tokenizer)
    block = ReasoningBlock(
        "<|end|><|start|>assistant", "<|channel|>analysis<|message|>", answer=FINAL
    )
    call = compile_constraint(
        tool_grammar(OutputFormat.named("harmony"), [STOP], REQUIRED), vocabulary, reasoning=block
    )
    answer = compile_constraint(Constraint("regex", "yes"), vocabulary, reasoning=block)
    texts = [thought + COMMENTARY, thought + FINAL + "yes", thought + "yes"]
    assert [accepts(call, tokenizer, text) for text in texts] == [True, False, False]
    assert [accepts(answer, tokenizer, text) for text in texts] == [False, True, False]


@pytest.mark.parametrize(
    ("family", "tools", "names", "param", "reason"),
    [
        ("hermes", [Tool("bad", "", {"type": "strin"})], (), "tools", "'bad'"),
        ("gemma4", [STOP, Tool("bad", "", {"not": {}})], (), "tools", "'bad'"),
        (
            "hermes",
            [Tool("bad", "", {"properties": {"a": {"pattern": "["}}})],
            (),
            "tools",
            "'bad'",
        ),
        ("hermes", [STOP], ("start",), "tool_choice", "'start'"),
        ("hermes", [], (), "tool_choice", "tools is empty"),
        ("longcat", [STOP], (), "tool_choice", "no known call format"),
        (None, [STOP], (), "tool_choice", "no known call format"),
        ("lfm2", [Tool("stop-all")], (), "tools", "'stop-all'"),
        ("gemma4", [Tool("x", "", {"properties": {"a": {"enum": [[1]]}}})], (), "tools", "'x'"),
    ],
)
def test_refusals(
    family: str | None, tools: list[Tool], names: tuple[str, ...], param: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        tool_grammar(OutputFormat(family), tools, ToolChoice("required", names))
    assert caught.value.param == param


def test_arguments_that_a_tool_does_not_name_are_not_written(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    grammar = compile_constraint(
        tool_grammar(OutputFormat.named("mistral_v11"), [NOTE, STOP], REQUIRED), vocabulary
    )
    assert accepts(grammar, tokenizer, '[TOOL_CALLS]note{"text": "x"}')
    assert accepts(grammar, tokenizer, "[TOOL_CALLS]stop{}")
    assert not accepts(grammar, tokenizer, '[TOOL_CALLS]note{"text": "x", "more": 1}')
    assert not accepts(grammar, tokenizer, '[TOOL_CALLS]stop{"text": "x"}')


@pytest.mark.parametrize("family", ["gemma4", "lfm2", "qwen3_coder", "hermes"])
def test_values_of_any_kind(
    family: str, vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    family_format = OutputFormat.named(family)
    grammar = compile_constraint(tool_grammar(family_format, [FREE], REQUIRED), vocabulary)
    texts = [walk(grammar, tokenizer, seed, 90, closing_of(family)) for seed in range(4)]
    found = [read(family_format, text, (FREE,)) for text in texts if text is not None]
    assert found
    assert all(name == "free" for calls in found for name, _ in calls)


def _chain(levels: int, level: Any, last: Any) -> dict[str, Any]:
    """Return a schema with definitions that each refer to the next one."""
    refs = [{"$ref": f"#/$defs/d{i}"} for i in range(levels + 1)]
    parts = {f"d{i}": level(refs[i + 1]) for i in range(levels)}
    return {
        "type": "object",
        "properties": {"x": refs[0]},
        "$defs": parts | {f"d{levels}": last},
    }


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["gemma4", "lfm2"])
@pytest.mark.parametrize(
    "schema",
    [
        _chain(28, lambda part: {"type": "object", "properties": {"a": part, "b": part}}, {}),
        _chain(28, lambda part: {"anyOf": [part, part]}, {"type": "null"}),
        _chain(28, lambda part: {"type": ["array", "null", "array"], "items": part}, {}),
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(480)}},
    ],
    ids=["properties", "alternatives", "types", "optional properties"],
)  # fmt: skip
def test_schemas_that_make_a_huge_grammar_are_refused(family: str, schema: dict[str, Any]) -> None:
    """Without a limit, writing 28 levels of two references each would take days."""
    with pytest.raises(RequestError, match="grammar of more than") as caught:
        tool_grammar(OutputFormat(family), [Tool("f", "", schema)], REQUIRED)
    assert caught.value.param == "tools"
    small = _chain(5, lambda part: {"type": "object", "properties": {"a": part, "b": part}}, {})
    assert tool_grammar(OutputFormat(family), [Tool("f", "", small)], REQUIRED)
