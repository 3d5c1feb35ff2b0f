"""Output formats of model families: their markers and readers, and their detection.

`FAMILIES` is the table of formats. `find_format` detects a model's format from its chat template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from modelpack.errors import UsageError
from modelpack_server.tool_parsers import json_calls, literal_calls, xml_calls
from modelpack_server.tool_parsers.calls import Found, Reader, read_each
from modelpack_server.tool_parsers.json_calls import read_json_calls
from modelpack_server.tool_parsers.parts import (
    GEMMA,
    HARMONY,
    KIMI_K3,
    LONGCAT,
    MISTRAL,
    SEED,
    THINK,
    ReasoningMarkers,
)  # fmt: skip
from modelpack_server.tool_parsers.source import NotACall, Reading, Source


@dataclass(frozen=True, slots=True)
class Family:
    """The call format of a family of models.

    `markers` begin a call anywhere in the text; `bare` reads calls without a marker, which count
    only at the beginning of the reply. `ends` are markers that close a call: after an invalid call,
    everything up to the next end is dropped. `layout` are special tokens, with the text that goes
    with them, that only structure a reply.
    """

    markers: Mapping[str, Reader] = field(default_factory=dict)
    bare: Reader | None = None
    ends: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    special_tokens: bool = False  # the markers are special tokens, which plain text omits
    in_reasoning: bool = False  # calls may occur within a block of reasoning
    mistral_ids: bool = False


def _bare_json(source: Source, found: Found) -> Reading[None]:
    if (yield from source.peek()) != "{":
        raise NotACall
    yield from read_json_calls(source, found)


def _bare_list(source: Source, found: Found) -> Reading[None]:
    """Read [{"name": ..}], with or without a code fence."""
    fenced = yield from source.accept("```json")
    yield from source.spaces()
    if (yield from source.peek()) not in ("[", "{"):
        raise NotACall
    yield from read_json_calls(source, found)
    yield from source.spaces()
    if fenced:
        yield from source.accept("```")


def _bare_llama(source: Source, found: Found) -> Reading[None]:
    if (yield from source.peek()) == "[":
        yield from literal_calls.read_python_list(source, found)
    else:
        yield from _bare_json(source, found)


def _block(
    reader: Callable[[str, Source, Found], Reading[None]], opening: str, closing: str, **more: Any
) -> Family:
    """Return a format with one marker before its calls and one after them."""
    return Family({opening: partial(reader, closing)}, ends=(closing,), **more)


_DSML = "｜DSML｜"
_INVOKES = partial(xml_calls.read_invokes, _DSML)
_MISTRAL = Family(
    {"[TOOL_CALLS]": json_calls.read_mistral_calls}, special_tokens=True, mistral_ids=True
)
_LLAMA = Family(
    {
        "<|python_tag|>": json_calls.read_python_tag,
        "<|python_start|>": partial(literal_calls.read_python_block, "<|python_end|>"),
        "<function=": xml_calls.read_function_tag,
    },
    bare=_bare_llama,
    ends=("</function>", "<|python_end|>"),
    special_tokens=True,
)
_DEEPSEEK = Family(
    {
        "<｜tool▁calls▁begin｜>": partial(
            read_each,
            json_calls.read_deepseek_call,
            "<｜tool▁call▁begin｜>",
            "<｜tool▁calls▁end｜>",
        ),
        f"<{_DSML}function_calls>": partial(_INVOKES, f"</{_DSML}function_calls>"),
        f"<{_DSML}tool_calls>": partial(_INVOKES, f"</{_DSML}tool_calls>"),
    },
    ends=("<｜tool▁calls▁end｜>", f"</{_DSML}function_calls>", f"</{_DSML}tool_calls>"),
    special_tokens=True,
)

FAMILIES: Mapping[str, Family] = {
    "hermes": _block(
        json_calls.read_json_block, "<tool_call>", "</tool_call>", bare=_bare_json,
        special_tokens=True,  # in Hermes 2's vocabulary, but not in Qwen's
    ),
    "qwen3_coder": Family(
        {"<tool_call>": xml_calls.read_qwen_block, "<function=": xml_calls.read_functions},
        ends=("</tool_call>", "</function>"),
    ),
    "llama3": _LLAMA,
    "llama4": _LLAMA,
    "mistral": _MISTRAL,  # a list
    "mistral_v11": _MISTRAL,  # name{..}
    "mistral_v13": _MISTRAL,  # name[ARGS]{..}
    "harmony": Family(special_tokens=True),  # see harmony.py: all its messages have markers
    "glm": Family(
        {"<tool_call>": xml_calls.read_glm_block}, ends=("</tool_call>",),
        layout=("<|begin_of_box|>", "<|end_of_box|>"), special_tokens=True,
    ),
    "gemma4": Family(
        {"<|tool_call>": partial(literal_calls.read_gemma_block, '<|"|>', "<tool_call|>"),
         "```tool_code": literal_calls.read_tool_code, "call:": literal_calls.read_text_call},
        ends=("<tool_call|>",),
        layout=("<|channel>response\n", "<|channel>final\n", "<|channel>response", "<channel|>"),
        special_tokens=True,
    ),
    "function_gemma": _block(
        partial(literal_calls.read_gemma_block, "<escape>"),
        "<start_function_call>", "<end_function_call>", special_tokens=True,
    ),
    "gemma_code": Family(
        {"```tool_code": literal_calls.read_tool_code, "call:": literal_calls.read_text_call}
    ),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "kimi_k2": _block(
        partial(read_each, json_calls.read_kimi_call, "<|tool_call_begin|>"),
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
        special_tokens=True, in_reasoning=True,
    ),
    "nemotron": _block(json_calls.read_json_block, "<TOOLCALL>", "</TOOLCALL>"),
    "minimax_m2": _block(
        partial(xml_calls.read_invokes, ""), "<minimax:tool_call>", "</minimax:tool_call>",
        in_reasoning=True,
    ),
    "granite": Family(
        {"<|tool_call|>": partial(json_calls.read_json_block, ""),
         "<tool_call>": partial(json_calls.read_json_block, "</tool_call>")},
        ends=("</tool_call>",), special_tokens=True,
    ),
    "lfm2": _block(
        literal_calls.read_python_block, "<|tool_call_start|>", "<|tool_call_end|>",
        special_tokens=True,
    ),
    "xlam": Family(bare=_bare_list),
    "functionary": Family(
        {"<|recipient|>": json_calls.read_functionary_turn,
         "<|from|>assistant\n<|recipient|>": json_calls.read_functionary_turn},
        bare=json_calls.read_functionary_turn, special_tokens=True,
    ),
    "kimi_k3": _block(
        partial(json_calls.read_mlx_lm_block, "kimi_k3"),
        "<|open|>tools<|sep|>", "<|close|>tools<|sep|>", special_tokens=True,
        layout=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>",
                "<|end_of_msg|>"),
    ),
    "longcat": _block(
        partial(json_calls.read_mlx_lm_block, "longcat"),
        "<longcat_tool_call>", "</longcat_tool_call>", special_tokens=True,
    ),
    "minicpm5": _block(
        partial(json_calls.read_mlx_lm_block, "minicpm5"),
        "<function name=", "</function>", special_tokens=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A model's formats of calls (`family`, a key of `FAMILIES`) and reasoning; None: no format.

    `keeps_special_tokens`: the markers may be special tokens, so the engine must keep those in
    the text (`SamplingParams.skip_special_tokens`), and the parser removes them.
    """

    family: str | None = None
    reasoning: ReasoningMarkers | None = None

    @property
    def keeps_special_tokens(self) -> bool:
        special = self.family is not None and FAMILIES[self.family].special_tokens
        return special or (self.reasoning is not None and self.reasoning.anywhere)

    @classmethod
    def named(cls, family: str, *, reasoning: ReasoningMarkers | None = THINK) -> OutputFormat:
        """Return the format with this name, for a template that does not show its format.

        Raises `UsageError` with the known names.
        """
        if family not in FAMILIES:
            raise UsageError(
                f"no such tool-call format: {family!r}",
                hint=f"use one of {', '.join(sorted(FAMILIES))}",
            )
        return cls(family, _REASONING_OF.get(family, reasoning))

    def without_reasoning(self) -> OutputFormat:
        """Return the format of a reply with reasoning switched off.

        Harmony keeps its channels, since its messages cannot be read without them.
        """
        return self if self.family == "harmony" else replace(self, reasoning=None)


_REASONING_OF = {
    "harmony": HARMONY,
    "gemma4": GEMMA,
    "mistral": MISTRAL,
    "mistral_v11": MISTRAL,
    "mistral_v13": MISTRAL,
    "kimi_k3": KIMI_K3,
    "longcat": LONGCAT,
}


def _all(*markers: str) -> Callable[[str], bool]:
    return lambda template: all(marker in template for marker in markers)


def _any(*markers: str) -> Callable[[str], bool]:
    return lambda template: any(marker in template for marker in markers)


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda template: re.search(pattern, template) is not None


# The first match counts. A template contains its markers in its instructions and in its rendering
# of earlier calls. `\n` in a Jinja string may be a backslash and an n, or a line break.
_FAMILY_SIGNS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("harmony", _all("<|channel|>", "<|message|>")),
    ("minimax_m2", _any("<minimax:tool_call>")),
    ("gemma4", _all("<|tool_call>", "<tool_call|>")),
    ("function_gemma", _any("<start_function_call>")),
    ("longcat", _any("<longcat_tool_call>")),
    ("minicpm5", _all('<function name="', '<param name="')),
    ("glm", _any("<arg_key>")),
    ("lfm2", _any("<|tool_list_start|>", "<|tool_call_start|>")),
    ("qwen3_coder", _all("<function=", "<parameter=")),
    ("kimi_k3", _all("<|open|>", "<|sep|>")),
    ("kimi_k2", _any("<|tool_calls_section_begin|>", "<|im_middle|>")),
    ("deepseek_v32", _any("｜DSML｜")),
    ("deepseek_v3", _all("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", _any("<｜tool▁calls▁begin｜>")),
    ("mistral_v13", _all("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", _matches(r"\[TOOL_CALLS\]\s{0,64}(?:\[|['\"][^\n]{0,200}['\"]\s{0,64}\[)")),
    ("mistral", _all("[TOOL_CALLS]", "[/TOOL_RESULTS]", "tool_call_id")),
    ("mistral_v11", _any("[TOOL_CALLS]")),
    ("nemotron", _any("<TOOLCALL>")),
    ("functionary", _any("<|recipient|>")),
    ("granite", _any("<|tool_call|>")),
    ("llama4", _any("<|python_start|>")),
    ("llama3", _any("<|python_tag|>", '"parameters": dictionary of argument name')),
    ("hermes", _any("<tool_call>")),
    ("xlam", _matches(r"\[\s{0,64}\{\s{0,64}\\?[\"']name\\?[\"']\s{0,64}:")),
    ("gemma_code", _any("tool_code")),
)

_FAMILY_OF_TYPE = {
    "gpt_oss": "harmony",
    "deepseek_v32": "deepseek_v32",
    "kimi_k3": "kimi_k3",
    "gemma": "gemma_code",
    "gemma2": "gemma_code",
    "gemma3": "gemma_code",
    "gemma3_text": "gemma_code",
    "minimax_m2": "minimax_m2",
}

_REASONING_SIGNS = (
    (GEMMA, "<|channel>"),
    (MISTRAL, "[THINK]"),
    (SEED, "<seed:think>"),
    (LONGCAT, "<longcat_think>"),
    (THINK, "<think>"),
    (THINK, "</think>"),
)


def find_format(chat_template: str | None, *, model_type: str = "") -> OutputFormat:
    """Return the format whose markers a template contains, or else that of the model's type."""
    template = chat_template or ""
    family = next((name for name, fits in _FAMILY_SIGNS if fits(template)), None)
    family = family or _FAMILY_OF_TYPE.get(model_type)
    markers = next((m for m, sign in _REASONING_SIGNS if sign in template), None)
    if family == "harmony":
        markers = HARMONY
    elif family == "kimi_k3":  # its template builds the markers from pieces
        markers = KIMI_K3
    elif markers is None and family in ("deepseek_v32", "minimax_m2"):
        markers = THINK  # even without a template that shows it
    return OutputFormat(family, markers)


# Characters at a prompt's end that show whether it opens a block of reasoning.
_TAIL = 256


def starts_reasoning(format: OutputFormat, prompt: str) -> bool:
    """Return whether the prompt ends within a block of reasoning that it opened."""
    markers = format.reasoning
    if markers is None:
        return False
    _, opening, after = prompt[-_TAIL:].rpartition(markers.opening)
    return bool(opening) and not after.strip()
