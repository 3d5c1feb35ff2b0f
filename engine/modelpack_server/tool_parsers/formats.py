"""Detection of a model's output format from its chat template, or by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import (
    GEMMA,
    HARMONY,
    KIMI_K3,
    LONGCAT,
    MISTRAL,
    SEED,
    THINK,
)

__all__ = ["OutputFormat", "OutputParser", "find_format", "starts_reasoning"]


def _all(*markers: str) -> Callable[[str], bool]:
    return lambda template: all(marker in template for marker in markers)


def _any(*markers: str) -> Callable[[str], bool]:
    return lambda template: any(marker in template for marker in markers)


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda template: compiled.search(template) is not None


# The first that fits counts; a template shows its markers in what it tells the model and in how it
# writes past calls. `\n` in a Jinja string may be a backslash and an n, or a line break.
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
    """Return the format that a template's markers show; the model's type decides without any."""
    template = chat_template or ""
    family = next((name for name, fits in _FAMILY_SIGNS if fits(template)), None)
    family = family or _FAMILY_OF_TYPE.get(model_type)
    markers = next((m for m, sign in _REASONING_SIGNS if sign in template), None)
    if family == "harmony":
        markers = HARMONY
    elif family == "kimi_k3":  # its template puts the markers together from pieces
        markers = KIMI_K3
    elif markers is None and family in ("deepseek_v32", "minimax_m2"):
        markers = THINK  # also where there is no template to show it
    return OutputFormat(family, markers)


def starts_reasoning(format: OutputFormat, rendered_prompt_tail: str) -> bool:
    """Tell whether the prompt already opened a block of reasoning that the answer goes on with."""
    markers = format.reasoning
    if markers is None:
        return False
    _, opening, after = rendered_prompt_tail.rpartition(markers.opening)
    return bool(opening) and not after.strip()
