"""The tool-call markup of each family of models, for grammars.

The names match `tool_parsers.families`, which parses this markup. Source: the chat templates of
the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Parameters:
    """Arguments as elements: `before` NAME `after` VALUE `closing` `gap`.

    Strings have no quotes. `kinds` are attributes for strings and for JSON, inserted before the end
    of `after`.
    """

    before: str
    after: str
    closing: str
    gap: str = "\n"
    kinds: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Literals:
    """Arguments as key-value pairs in a JSON-like syntax.

    `opening` and `closing` enclose the arguments; `assign` separates keys from values. `quote` is
    the markup around strings; without it, strings and object keys are JSON. `names` is a regular
    expression for the function names that can be called.
    """

    opening: str
    closing: str
    assign: str
    separator: str
    quote: str = ""
    words: tuple[str, str, str] = ("true", "false", "null")
    names: str = r"[\w.-]+"


@dataclass(frozen=True, slots=True)
class ToolMarkup:
    """Calls as `opening` CALL `separator` CALL … `closing`.

    CALL is `before` NAME `after` ARGUMENTS `tail`.

    `number` is the text between the name and the call's number, for families that number calls.
    `single`: a reply has at most one call.
    """

    before: str
    after: str
    tail: str
    separator: str = ""
    opening: str = ""
    closing: str = ""
    arguments: Literal["json"] | Parameters | Literals = "json"
    number: str = ""
    single: bool = False


def _objects(opening: str, closing: str, separator: str = ", ") -> ToolMarkup:
    return ToolMarkup('{"name": "', '", "arguments": ', "}", separator, opening, closing)


_LLAMA = ToolMarkup('{"name": "', '", "parameters": ', "}", "; ")
_DSML = "｜DSML｜"
_PYTHON = Literals(
    "(", ")", "=", ", ", words=("True", "False", "None"), names=r"[^\W\d]\w*(\.[^\W\d]\w*)*"
)

TOOL_MARKUP: Mapping[str, ToolMarkup] = {
    "hermes": ToolMarkup(
        '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", separator="\n"
    ),
    "qwen3_coder": ToolMarkup(
        "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", separator="\n",
        arguments=Parameters("<parameter=", ">\n", "</parameter>"),
    ),
    "llama3": _LLAMA,
    "llama4": _LLAMA,
    "mistral": _objects("[TOOL_CALLS][", "]"),
    "mistral_v11": ToolMarkup("[TOOL_CALLS]", "", ""),
    "mistral_v13": ToolMarkup("[TOOL_CALLS]", "[ARGS]", ""),
    # <|call|> ends the text, so it is not part of the grammar.
    "harmony": ToolMarkup(
        "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", single=True
    ),
    "glm": ToolMarkup(
        "<tool_call>", "\n", "</tool_call>", separator="\n",
        arguments=Parameters("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
    ),
    "gemma4": ToolMarkup(
        "<|tool_call>call:", "", "<tool_call|>",
        arguments=Literals("{", "}", ":", ",", quote='<|"|>'),
    ),
    "function_gemma": ToolMarkup(
        "<start_function_call>call:", "", "<end_function_call>",
        arguments=Literals("{", "}", ":", ",", quote="<escape>"),
    ),
    "gemma_code": ToolMarkup(
        "", "", "", separator="\n", opening="```tool_code\n", closing="\n```", arguments=_PYTHON
    ),
    "deepseek_v3": ToolMarkup(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>",
        separator="\n", opening="<｜tool▁calls▁begin｜>", closing="<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": ToolMarkup(
        "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
        opening="<｜tool▁calls▁begin｜>", closing="<｜tool▁calls▁end｜>",
    ),
    "deepseek_v32": ToolMarkup(
        f'<{_DSML}invoke name="', '">\n', f"</{_DSML}invoke>\n",
        opening=f"<{_DSML}function_calls>\n", closing=f"</{_DSML}function_calls>",
        arguments=Parameters(f'<{_DSML}parameter name="', '">', f"</{_DSML}parameter>",
                             kinds=('" string="true', '" string="false')),
    ),
    "kimi_k2": ToolMarkup(
        "<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
        opening="<|tool_calls_section_begin|>", closing="<|tool_calls_section_end|>", number=":",
    ),
    "kimi_k3": ToolMarkup(
        '<|open|>call tool="', '"<|sep|><|open|>json type="object"<|sep|>',
        "<|close|>json<|sep|><|close|>call<|sep|>",
        opening="<|open|>tools<|sep|>", closing="<|close|>tools<|sep|>", number='" index="',
    ),
    "nemotron": _objects("<TOOLCALL>[", "]</TOOLCALL>"),
    "minimax_m2": ToolMarkup(
        '<invoke name="', '">\n', "</invoke>\n",
        opening="<minimax:tool_call>\n", closing="</minimax:tool_call>",
        arguments=Parameters('<parameter name="', '">', "</parameter>"),
    ),
    "granite": _objects("<|tool_call|>[", "]"),
    "lfm2": ToolMarkup(
        "", "", "", separator=", ", opening="<|tool_call_start|>[", closing="]<|tool_call_end|>",
        arguments=_PYTHON,
    ),
    "xlam": _objects("[", "]"),
    "functionary": ToolMarkup("<|recipient|>", "\n<|content|>", "", single=True),
    "minicpm5": ToolMarkup(
        '<function name="', '">', "</function>",
        arguments=Parameters('<param name="', '">', "</param>", gap=""),
    ),
}  # fmt: skip
