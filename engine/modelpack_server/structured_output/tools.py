"""tool_grammar: an answer that is a call, or several, in the markup of the model's family."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from modelpack_engine.errors import RequestError
from modelpack_engine.panics import no_panics
from modelpack_server.structured_output.arguments import elements, literals
from modelpack_server.structured_output.compiling import LIMITS, on_deep_stack
from modelpack_server.structured_output.constraint import Constraint
from modelpack_server.structured_output.rules import Rules
from modelpack_server.structured_output.schemas import prepared
from modelpack_server.structured_output.tool_markup import TOOL_MARKUP, Parameters, ToolMarkup
from modelpack_server.tool_parsers.output_format import OutputFormat
from modelpack_server.tool_parsers.tools import Tool, ToolChoice

MAX_CALLS = 16  # in one answer
MAX_TOOLS = 512 << 10  # characters of all schemas together


def tool_grammar(
    format: OutputFormat, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool = True
) -> Constraint:
    """Return the constraint of an answer that has to call tools, and does nothing else.

    `choice.names` narrows what may be called; a single name is called once, as is any tool without
    `parallel`. Raises `RequestError` where a name is not among the tools, where a tool's schema
    does not compile (naming the tool), and where the model's family has no calls that we can write.
    """
    assert choice.mode == "required", "only calls that have to be made are forced"
    markup = TOOL_MARKUP.get(format.family or "")
    if markup is None:
        raise RequestError(
            "a call cannot be forced: this model's chat template shows no known format of calls",
            param="tool_choice",
            hint='use tool_choice "auto"',
        )
    allowed = _allowed(tools, choice)
    schemas = {tool.name: closed(tool.parameters) for tool in allowed}
    on_deep_stack(lambda: _check(schemas))
    rules = Rules()
    calls = rules.one_of(_named_call(rules, markup, tool) for tool in schemas.items())
    start = calls
    if parallel and not markup.single and len(choice.names) != 1:
        start = f"{calls} ({rules.text(markup.separator)} {calls}){{0,{MAX_CALLS - 1}}}"
    return rules.constraint(f"{rules.text(markup.opening)} {start} {rules.text(markup.closing)}")


def closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's arguments: an object, and of named properties only.

    That is less than JSON Schema allows where nothing is said, and what callers mean: a function
    takes no arguments that it does not name.
    """
    schema = dict(parameters)
    if not {"$ref", "anyOf", "oneOf", "allOf"} & schema.keys():
        schema.setdefault("type", "object")
        schema.setdefault("properties", {})
        required, properties = schema.get("required", []), schema["properties"]
        if isinstance(required, list) and isinstance(properties, Mapping):
            named = set(map(str, required)) <= properties.keys()
            if named and "patternProperties" not in schema:
                schema.setdefault("additionalProperties", False)
    return schema


def _allowed(tools: Sequence[Tool], choice: ToolChoice) -> list[Tool]:
    known = {tool.name: tool for tool in tools}
    for name in choice.names:
        if name not in known:
            raise RequestError(
                f"tool_choice names {name!r}, which is not among the tools", param="tool_choice"
            )
    allowed = [known[name] for name in dict.fromkeys(choice.names)] or list(known.values())
    if not allowed:
        raise RequestError("tool_choice wants a call, and there are no tools", param="tool_choice")
    return allowed


@no_panics("checking the schemas of tools")
def _check(schemas: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `RequestError` for the first schema that does not compile."""
    total = 0
    for name, schema in schemas.items():
        hint = None
        try:
            ready = prepared(schema)
            total += len(json.dumps(ready))
            problem = LLMatcher.validate_grammar(
                LLMatcher.grammar_from_json_schema(ready), limits=LIMITS
            )
        except (ValueError, RecursionError) as error:
            problem, hint = str(error), getattr(error, "hint", None)
        if problem and not problem.startswith("WARNING"):
            reason = problem.removesuffix("<non-verbose/>").strip()[:500]
            text = f"the parameters of the tool {name!r}: {reason}"
            raise RequestError(text, param="tools", hint=hint)
    if total > MAX_TOOLS:
        raise RequestError(
            f"the tools' schemas have {total} characters, expected up to {MAX_TOOLS}",
            param="tools",
        )


def _named_call(rules: Rules, markup: ToolMarkup, tool: tuple[str, Mapping[str, Any]]) -> str:
    """Return a tool's call; an error names the tool."""
    try:
        return _call(rules, markup, *tool)
    except RequestError as error:
        text = f"the tool {tool[0]!r}: {error}"
        raise RequestError(text, param="tools", hint=error.hint) from error


def _call(rules: Rules, markup: ToolMarkup, name: str, schema: Mapping[str, Any]) -> str:
    style = markup.arguments
    quotes = markup.before.endswith('"name": "')
    written = json.dumps(name, ensure_ascii=False)[1:-1] if quotes else name
    if style == "json":
        arguments = rules.json(schema)
    elif isinstance(style, Parameters):
        arguments = elements(rules, style, schema)
    elif re.fullmatch(style.names, name) is None:
        raise RequestError("it cannot be called: this model writes calls as code", param="tools")
    else:
        arguments = literals(rules, style, schema)
    number = f"{rules.text(markup.number)} /[0-9]{{1,2}}/" if markup.number else ""
    head = f"{rules.text(markup.before)} {rules.plain(written)} {number} {rules.text(markup.after)}"
    return rules.rule(f"{head} {arguments} {rules.text(markup.tail)}")
