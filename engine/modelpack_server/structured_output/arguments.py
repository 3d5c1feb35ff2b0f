"""Grammars of a call's arguments, where they are not plain JSON: elements, and other literals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import regex_to_lark

from modelpack_engine.errors import RequestError
from modelpack_server.structured_output.rules import Rules
from modelpack_server.structured_output.tool_markup import Literals, Parameters
from modelpack_server.tool_parsers.typed import allowed_types

Schema = Mapping[str, Any]

_MARK = '"'
_JSON_TEXT = r'/([^"\\\x00-\x1f]|\\["\\nt])*/'
_ANY_TYPES = ("string", "number", "boolean", "null", "array", "object")
_NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_DEPTH = 5  # levels of a value of which the schema says nothing
_MAX_NESTING = 32
_VISIT = 64  # characters that looking at a value is charged as, whatever is written of it
_MAX_ITEMS = 64  # of a list that has no limit of its own


def resolved(schema: object, root: Schema) -> Schema:
    """Return what a schema refers to within `root`; {}, which is anything, for what is none."""
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
    """Return each property's name and schema, and whether it is required."""
    properties, required = schema.get("properties"), schema.get("required")
    found = dict(properties) if isinstance(properties, Mapping) else {}
    needed = [n for n in required if isinstance(n, str)] if isinstance(required, list) else []
    found |= {name: {} for name in needed if name not in found}
    return [(name, part, name in needed) for name, part in found.items()]


def elements(rules: Rules, style: Parameters, root: Schema) -> str:
    """Return the grammar of arguments that are elements."""
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
    """Return the text of a string whose length or pattern is given, of such characters only."""
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
    """Return the grammar of arguments that are key-value pairs.

    Of strings, formats are not held to.
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
        """Return the grammar of a value, which is `depth` levels deep."""
        if depth > _MAX_NESTING:
            raise RequestError("its schema is nested too deep", param="tools")
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
        raise RequestError("an enum of objects or arrays cannot be written", param="tools")
