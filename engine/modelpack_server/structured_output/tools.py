"""Grammars of tool calls, in the Lark format of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from modelpack_engine.errors import RequestError, no_panics
from modelpack_server.structured_output.grammar import (
    LIMITS,
    Constraint,
    on_deep_stack,
    prepared,
    quoted,
)
from modelpack_server.structured_output.tool_markup import (
    TOOL_MARKUP,
    Literals,
    Parameters,
    ToolMarkup,
)
from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.parts import Tool, ToolChoice
from modelpack_server.tool_parsers.typed_values import allowed_types

#: Characters of a grammar. A definition with two references is written twice, so a schema's
#: grammar may double with each level of nesting.
MAX_TEXT = 1 << 20


class Rules:
    """The rules of a grammar under construction; its methods add rules and return expressions.

    They raise `RequestError` if the grammar exceeds `MAX_TEXT` characters.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._markup: dict[str, str] = {}  # by text: the name of its rule
        self._until: dict[str, str] = {}
        self._size = 0

    def charge(self, characters: int) -> None:
        """Add `characters` to the cost of the grammar."""
        self._size += characters
        if self._size > MAX_TEXT:
            raise RequestError(
                f"its schema makes a grammar of more than {MAX_TEXT} characters",
                param="tools",
                hint="use fewer references, and make properties required",
            )

    def text(self, text: str) -> str:
        """Return an expression for a text, in which special tokens count as tokens."""
        return self._markup.setdefault(text, f"m{len(self._markup)}") if text else ""

    def plain(self, text: str) -> str:
        """Return an expression for literal text: names that clients choose are never markup."""
        return quoted(text)

    def until(self, closing: str) -> str:
        """Return an expression for any text up to and including the markup `closing`."""
        return self._until.setdefault(closing, f"u{len(self._until)}")

    def rule(self, expression: str) -> str:
        """Add a rule and return its name."""
        return self._line("r", expression or EMPTY)

    def terminal(self, expression: str) -> str:
        """Add a terminal, of regular expressions joined by `&`, and return its name."""
        return self._line("T", expression)

    def _line(self, prefix: str, expression: str) -> str:
        self.charge(len(expression))
        self._lines.append(f"{prefix}{len(self._lines)}: {expression}")
        return f"{prefix}{len(self._lines) - 1}"

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return an expression for JSON that follows a schema."""
        return self.rule(f"%json {json.dumps(prepared(schema))}")

    def one_of(self, expressions: Iterable[str]) -> str:
        """Return an expression for any of the alternatives, of which there is at least one."""
        found = list(dict.fromkeys(expression or EMPTY for expression in expressions))
        return found[0] if len(found) == 1 else self.rule(" | ".join(found))

    def members(self, members: Sequence[tuple[str, bool]], separator: str) -> str:
        """Return an expression for members in this order, with `separator` between them.

        Each member is an expression and whether it is required.
        """

        def rest(start: int) -> str:
            parts = []
            for member, required in members[start:]:
                parts.append(f"{separator} {member}" if required else f"({separator} {member})?")
            return " ".join(parts)

        if not separator:
            each = (member if required else f"{member}?" for member, required in members)
            return self.rule(" ".join(each))
        firsts = []
        for at, (member, required) in enumerate(members):
            firsts.append(f"{member} {rest(at + 1)}")
            self.charge(len(firsts[-1]))
            if required:
                break
        else:
            firsts.append(EMPTY)
        return self.one_of(firsts)

    def constraint(self, start: str) -> Constraint:
        """Return the complete grammar."""
        source = "\n".join([f"start: {start}", *self._lines])
        markup = {name: text for text, name in self._markup.items()}
        until = {name: text for text, name in self._until.items()}
        return Constraint("grammar", source, markup, until)


EMPTY = '""'


Schema = Mapping[str, Any]

_MARK = '"'
_JSON_TEXT = r'/([^"\\\x00-\x1f]|\\["\\nt])*/'
_ANY_TYPES = ("string", "number", "boolean", "null", "array", "object")
_NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_DEPTH = 5  # levels of a value without a schema
_MAX_NESTING = 32
_VISIT = 64  # the cost, in characters, of visiting a value
_MAX_ITEMS = 64  # of a list without `maxItems`


def resolved(schema: object, root: Schema) -> Schema:
    """Return the schema that `schema` refers to within `root`; {} (any value) if there is none."""
    for _ in range(_MAX_NESTING):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for step in reference[2:].split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
    return schema if isinstance(schema, Mapping) else {}


def properties_of(schema: Schema) -> list[tuple[str, Any, bool]]:
    """Return the name and the schema of each property, and whether it is required."""
    properties, required = schema.get("properties"), schema.get("required")
    found = dict(properties) if isinstance(properties, Mapping) else {}
    needed = [n for n in required if isinstance(n, str)] if isinstance(required, list) else []
    found |= {name: {} for name in needed if name not in found}
    return [(name, part, name in needed) for name, part in found.items()]


def elements(rules: Rules, style: Parameters, root: Schema) -> str:
    """Return an expression for arguments as elements."""
    members = []
    for name, part, required in properties_of(resolved(root, root)):
        schema = resolved(part, root)
        types = allowed_types(schema)
        is_text = not types or "string" in types
        after = rules.text(style.kinds[not is_text] + style.after)
        if is_text:
            value = _text_value(rules, schema, style.closing)
        else:
            definitions = {k: root[k] for k in ("$defs", "definitions") if k in root}
            newline = rules.text("\n") if style.after.endswith("\n") else ""
            value = f"{rules.json({**schema, **definitions})} {newline} {rules.text(style.closing)}"
        head = f"{rules.text(style.before)} {rules.plain(name)} {after}"
        members.append((rules.rule(f"{head} {value} {rules.text(style.gap)}"), required))
    return rules.members(members, "") if members else ""


def _text_value(rules: Rules, schema: Schema, closing: str) -> str:
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(choices, list):
        if (body := bounded(rules, schema, "[^<]")) is None:
            return rules.until(closing)
        return f"{body} {rules.text(closing)}"
    texts = [value if isinstance(value, str) else json.dumps(value) for value in choices]
    return f"{rules.one_of(rules.plain(text) for text in texts)} {rules.text(closing)}"


def bounded(rules: Rules, schema: Schema, character: str) -> str | None:
    """Return an expression for a string with a length limit or a pattern, or None.

    `character` is a regular expression for the characters that it may contain.
    """
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    pattern = schema.get("pattern")
    if not least and most is None and pattern is None:
        return None
    terms = [f"/{character}{{{least},{'' if most is None else most}}}/"]
    if isinstance(pattern, str):
        before = "" if pattern.startswith("^") else "(?s:.*)"
        after = "" if pattern.endswith("$") else "(?s:.*)"
        expression = f"{before}(?:{pattern.removeprefix('^').removesuffix('$')}){after}"
        terms.append(f"/{regex_to_lark(expression, 'dw')}/")
    return rules.terminal(" & ".join(terms))


def literals(rules: Rules, style: Literals, root: Schema) -> str:
    """Return an expression for arguments as key-value pairs.

    It ignores the `format` of strings.
    """
    writer, assign = _Literals(rules, style, root), rules.text(style.assign)
    members = [
        (rules.rule(f"{rules.plain(name)} {assign} {writer.value(part, 0)}"), required)
        for name, part, required in properties_of(resolved(root, root))
    ]
    inner = rules.members(members, rules.text(style.separator)) if members else ""
    return f"{rules.text(style.opening)} {inner} {rules.text(style.closing)}"


class _Literals:
    def __init__(self, rules: Rules, style: Literals, root: Schema) -> None:
        self._rules = rules
        self._style = style
        self._root = root

    def value(self, part: object, depth: int) -> str:
        """Return an expression for a value at nesting level `depth`."""
        if depth > _MAX_NESTING:
            raise RequestError("its schema is nested too deeply", param="tools")
        self._rules.charge(_VISIT)
        schema = resolved(part, self._root)
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(choices, list) and choices:
            return self._rules.one_of(self._literal(value) for value in choices)
        for key in ("anyOf", "oneOf"):
            branches = schema.get(key)
            if isinstance(branches, list) and branches:
                return self._rules.one_of(self.value(branch, depth + 1) for branch in branches)
        types = schema.get("type", _ANY_TYPES)
        if "type" not in schema and "properties" in schema:
            types = "object"
        if depth >= _DEPTH and "type" not in schema:
            types = _ANY_TYPES[:4]
        named = [types] if isinstance(types, str) else types
        return self._rules.one_of(self._typed(str(name), schema, depth) for name in named)

    def _typed(self, name: str, schema: Schema, depth: int) -> str:
        rules, style = self._rules, self._style
        true, false, null = map(rules.text, style.words)
        if name == "string":
            return self._string(schema)
        if name in ("integer", "number"):
            limits = {key: schema[key] for key in _NUMERIC if key in schema}
            return rules.json({"type": name, **limits})
        if name == "boolean":
            return rules.one_of([true, false])
        if name == "null":
            return null
        if name == "array":
            return self._array(schema, depth)
        members = [
            (rules.rule(f"{self._key(key)} {self.value(part, depth + 1)}"), required)
            for key, part, required in properties_of(schema)
        ]
        inner = rules.members(members, rules.text(style.separator)) if members else ""
        return rules.rule(f'"{{" {inner} "}}"')

    def _array(self, schema: Schema, depth: int) -> str:
        item = self.value(schema.get("items", {}), depth + 1)
        least, most = schema.get("minItems", 0), schema.get("maxItems", _MAX_ITEMS)
        if most < 1:
            return '"[" "]"'
        separator = self._rules.text(self._style.separator)
        low, high = max(least - 1, 0), max(most, least) - 1
        items = f"{item} ({separator} {item}){{{low},{high}}}"
        return self._rules.rule(f'"[" {items} "]"' if least else f'"[" ({items})? "]"')

    def _string(self, schema: Schema) -> str:
        rules, quote = self._rules, self._style.quote
        if not quote:
            body = bounded(rules, schema, r'[^"\\\x00-\x1f]') or _JSON_TEXT
            return rules.rule(f"{rules.text(_MARK)} {body} {rules.text(_MARK)}")
        bound = bounded(rules, schema, "[^<]")
        body = rules.until(quote) if bound is None else f"{bound} {rules.text(quote)}"
        return rules.rule(f"{rules.text(quote)} {body}")

    def _key(self, key: str) -> str:
        if self._style.quote:
            return f"{self._rules.plain(key)} {self._rules.text(self._style.assign)}"
        return self._rules.plain(json.dumps(key, ensure_ascii=False) + ": ")

    def _literal(self, value: Any) -> str:
        rules, quote = self._rules, self._rules.text(self._style.quote)
        true, false, null = self._style.words
        if isinstance(value, str) and quote:
            return f"{quote} {rules.plain(value)} {quote}"
        if value is None or isinstance(value, bool):
            return rules.plain(null if value is None else true if value else false)
        if isinstance(value, str | int | float):
            return rules.plain(json.dumps(value, ensure_ascii=False))
        raise RequestError("enums of objects or arrays are not supported", param="tools")


MAX_CALLS = 16  # in one reply
MAX_TOOLS = 512 << 10  # characters of all schemas together


def tool_grammar(
    format: OutputFormat, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool = True
) -> Constraint:
    """Return the constraint for a reply that consists of tool calls.

    `choice.names` restricts the tools. A reply has one call if there is a single name or `parallel`
    is false. Raises `RequestError` for an unknown name, for a tool whose schema does not compile
    (with the tool's name), and for a model whose call format has no grammar.
    """
    assert choice.mode == "required", "only required calls have a grammar"
    markup = TOOL_MARKUP.get(format.family or "")
    if markup is None:
        raise RequestError(
            "cannot force a call: this model's chat template shows no known call format",
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
    """Return the schema of a tool's arguments: an object, which `prepared` closes."""
    schema = dict(parameters)
    if not {"$ref", "anyOf", "oneOf", "allOf"} & schema.keys():
        schema.setdefault("type", "object")
        schema.setdefault("properties", {})
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
        raise RequestError("tool_choice requires a call, but tools is empty", param="tool_choice")
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
            f"the tools' schemas have {total} characters, expected up to {MAX_TOOLS}", param="tools"
        )


def _named_call(rules: Rules, markup: ToolMarkup, tool: tuple[str, Mapping[str, Any]]) -> str:
    """Return an expression for a call of a tool; errors contain the tool's name."""
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
        raise RequestError(
            "its name is not valid in this model's calls, which are code", param="tools"
        )
    else:
        arguments = literals(rules, style, schema)
    number = f"{rules.text(markup.number)} /[0-9]{{1,2}}/" if markup.number else ""
    head = f"{rules.text(markup.before)} {rules.plain(written)} {number} {rules.text(markup.after)}"
    return rules.rule(f"{head} {arguments} {rules.text(markup.tail)}")
