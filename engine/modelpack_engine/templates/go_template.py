"""Go's text/template, as far as chat templates use it: parse a template and write it as Jinja.

Source: pkg.go.dev/text/template. Unsupported syntax is rejected by name: `with`, `define`,
`template`, `block`, `break`, `continue`, and assignments to existing variables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)'
    r"|(?P<name>[$.]?[A-Za-z_][\w.]*|\$[\w.]*|\.)|(?P<mark>:=|[()|,=]))",
    re.DOTALL,
)
_UNSUPPORTED = ("with", "define", "template", "block", "break", "continue")


class GoSyntaxError(ValueError):
    """A template is invalid, or uses syntax that is not supported."""


@dataclass(frozen=True, slots=True)
class Text:
    """Literal text."""

    text: str


@dataclass(frozen=True, slots=True)
class Output:
    """The value of a pipeline, given as tokens."""

    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assign:
    """A new variable, whose name includes the `$`, with the value of a pipeline."""

    name: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class If:
    """Branches, each with its condition; the last may have none."""

    branches: list[tuple[tuple[str, ...] | None, list[Node]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Range:
    """A loop over a pipeline; `names` are the variables of the index and the item."""

    names: tuple[str, str]
    tokens: tuple[str, ...]
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


Node = Text | Output | Assign | If | Range


def parse(template: str) -> list[Node]:
    """Return the tree of a template; raises `GoSyntaxError`."""
    root: list[Node] = []
    open_bodies: list[tuple[If | Range | None, list[Node]]] = [(None, root)]
    for piece in _pieces(template):
        owner, body = open_bodies[-1]
        if isinstance(piece, Text):
            body.append(piece)
            continue
        match piece:
            case ("if", *condition):
                made = If([(tuple(condition), [])])
                body.append(made)
                open_bodies.append((made, made.branches[-1][1]))
            case ("range", *rest):
                loop = _range(tuple(rest))
                body.append(loop)
                open_bodies.append((loop, loop.body))
            case ("else", *rest):
                open_bodies[-1] = (owner, _else(owner, tuple(rest)))
            case ("end",):
                if owner is None:
                    raise GoSyntaxError("{{ end }} without {{ if }} or {{ range }}")
                open_bodies.pop()
            case (name, ":=", *value):
                body.append(Assign(name, tuple(value)))
            case (name, *_) if name in _UNSUPPORTED or "=" in piece:
                raise GoSyntaxError(f"{' '.join(piece)[:60]!r} is not supported")
            case ():
                pass
            case _:
                body.append(Output(piece))
    if len(open_bodies) > 1:
        raise GoSyntaxError("{{ end }} is missing")
    return root


def tokens_of(action: str) -> tuple[str, ...]:
    """Return the tokens of an action; raises `GoSyntaxError`."""
    found, at = [], 0
    action = action.rstrip()
    while at < len(action):
        match = _TOKEN.match(action, at)
        if match is None:
            raise GoSyntaxError(f"cannot read {action[at : at + 40]!r}")
        found.append(match[match.lastgroup or 0])
        at = match.end()
    return tuple(found)


def _pieces(template: str) -> Iterator[Text | tuple[str, ...]]:
    """Yield text and actions in turn; a dash removes the white space next to it."""
    at, trims = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trims else text
        text = text.rstrip() if match[1] else text
        if text:
            yield Text(text)
        if not match[2].lstrip().startswith("/*"):
            yield tokens_of(match[2])
        at, trims = match.end(), bool(match[3])
    text = template[at:].lstrip() if trims else template[at:]
    if text:
        yield Text(text)


def _range(tokens: tuple[str, ...]) -> Range:
    match tokens:
        case (place, ",", item, ":=", *rest):
            return Range((place, item), tuple(rest))
        case (item, ":=", *rest):
            return Range(("", item), tuple(rest))
    return Range(("", ""), tokens)


def _else(owner: If | Range | None, tokens: tuple[str, ...]) -> list[Node]:
    """Return the body that begins with an else."""
    match owner, tokens:
        case If(), ("if", *condition):
            owner.branches.append((tuple(condition), []))
            return owner.branches[-1][1]
        case If(), ():
            owner.branches.append((None, []))
            return owner.branches[-1][1]
        case Range(), ():
            return owner.otherwise
    raise GoSyntaxError("{{ else }} without {{ if }} or {{ range }}")


# An action of a Go template: a field ({{ .Prompt }}), a variable, or a keyword.
_GO = re.compile(r"\{\{-?\s*(?:if |else if |range |with |end\b|else\b|\$|json |\.[A-Z])")

_TOP = {
    "Messages": "messages",
    "Tools": "tools",
    "System": "go.system",
    "Prompt": "go.prompt",
    "Response": "go.response",
    "Think": "enable_thinking",
    "IsThinkSet": "(enable_thinking is defined)",
    "Suffix": "''",
    "ThinkLevel": "(reasoning_effort or '')",
}
_FIELDS = {
    "Role": "role",
    "Content": "content",
    "Thinking": "reasoning_content",
    "ToolCalls": "tool_calls",
    "ToolName": "name",
    "ToolCallID": "tool_call_id",
    "Function": "function",
    "Name": "name",
    "Arguments": "arguments",
    "Description": "description",
    "Parameters": "parameters",
    "Type": "type",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_CONSTANTS = {"true": "true", "false": "false", "nil": "none"}
_JOINED = (
    "{%- set go = namespace(system='', prompt='', response='') -%}"
    "{%- for m in messages if m.role == 'system' -%}"
    "{%- set go.system = go.system + ('\\n\\n' if go.system else '') + m.content -%}"
    "{%- endfor -%}"
)
# One turn after another; a system prompt belongs to the turn after it.
_TURNS = (
    "{%- set go = namespace(system='', prompt='', response='') -%}"
    "{%- macro turn() -%}BODY{%- endmacro -%}"
    "{%- macro last() -%}LAST{%- endmacro -%}"
    "{%- for m in messages -%}"
    "{%- if go.response or (m.role == 'system' and go.prompt) -%}"
    "{{- turn() -}}"
    "{%- set go.system = '' -%}{%- set go.prompt = '' -%}{%- set go.response = '' -%}"
    "{%- endif -%}"
    "{%- if m.role == 'system' -%}{%- set go.system = m.content -%}"
    "{%- elif m.role == 'assistant' -%}{%- set go.response = m.content -%}"
    "{%- else -%}{%- set go.prompt = m.content -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- last() -}}"
)


def as_jinja(template: str) -> str:
    """Return a template as Jinja; raises `GoSyntaxError` for unsupported Go templates."""
    if _GO.search(template) is None:
        return template
    tree = parse(template)
    words = set(_words(tree))
    if any(word.removeprefix("$").startswith(".Messages") for word in words):
        return _JOINED + _written(tree, (), ".")
    if ".Response" not in words:
        tree = [*tree, Output((".Response",))]
    last: list[Node] = []
    _cut(tree, last)
    text = _TURNS.replace("LAST", _written(last, (), "."))
    return text.replace("BODY", _written(tree, (), "."))


def _words(tree: Sequence[Node]) -> Iterator[str]:
    for node in tree:
        match node:
            case Output() | Assign():
                yield from node.tokens
            case If():
                for condition, body in node.branches:
                    yield from condition or ()
                    yield from _words(body)
            case Range():
                yield from node.tokens
                yield from _words(node.body)
                yield from _words(node.otherwise)


def _cut(tree: Sequence[Node], kept: list[Node]) -> bool:
    """Copy the nodes before the response to `kept`; return whether there is a response."""
    for node in tree:
        match node:
            case Output((".Response",)):
                return True
            case If():
                branches: list[tuple[tuple[str, ...] | None, list[Node]]] = []
                kept.append(If(branches))
                found = False
                for condition, body in node.branches:
                    branches.append((condition, []))
                    found = _cut(body, branches[-1][1]) or found
                if found:
                    return True
            case _:
                kept.append(node)
    return False


def _written(tree: Sequence[Node], names: tuple[str, ...], dot: str) -> str:
    """Return nodes as Jinja; `names` are the defined variables, `dot` is what `.` refers to."""
    written = []
    for node in tree:
        match node:
            case Text():
                written.append("{{ " + json.dumps(node.text, ensure_ascii=False) + " }}")
            case Output():
                written.append("{{ " + _shown(_Pipeline(node.tokens, names, dot).value()) + " }}")
            case Assign():
                value = _Pipeline(node.tokens, names, dot).value()
                names = (*names, node.name)
                written.append(f"{{% set {_variable(node.name)} = {value} %}}")
            case If():
                for at, (condition, body) in enumerate(node.branches):
                    word = "else" if condition is None else "elif" if at else "if"
                    test = f" {_Pipeline(condition, names, dot).value()}" if condition else ""
                    written.append(f"{{% {word}{test} %}}{_written(body, names, dot)}")
                written.append("{% endif %}")
            case Range():
                written.append(_loop(node, names, dot))
    return "".join(written)


def _loop(node: Range, names: tuple[str, ...], dot: str) -> str:
    place, item = node.names
    given = tuple(name for name in node.names if name)
    own = f"item{len(names)}_{dot.count('item')}" if not item else _variable(item)
    head = f"{{% for {own} in {_Pipeline(node.tokens, names, dot).value()} or [] %}}"
    if place and place != "$_":
        head += f"{{% set {_variable(place)} = loop.index0 %}}"
    body = _written(node.body, (*names, *given), own)
    otherwise = _written(node.otherwise, names, dot)
    return f"{head}{body}{{% else %}}{otherwise}{{% endfor %}}"


def _variable(name: str) -> str:
    return f"go_{name.removeprefix('$')}"


def _shown(value: str) -> str:
    """Return an expression that prints a value: texts and numbers as they are, others as JSON."""
    if value.startswith(("'", '"')):
        return value
    plain = f"({value}) is string or ({value}) is number"
    return f"({value} if {plain} else (({value})|tojson if ({value}) else ''))"


class _Pipeline:
    """Reads a pipeline as an expression of Jinja."""

    def __init__(self, tokens: Sequence[str], names: tuple[str, ...], dot: str) -> None:
        self._tokens = list(tokens)
        self._names = names
        self._dot = dot

    def value(self) -> str:
        """Return the whole pipeline as an expression; raises `GoSyntaxError`."""
        found = self._stages()
        if self._tokens:
            raise GoSyntaxError(f"{self._tokens[0]!r} is not expected")
        return found

    def _stages(self) -> str:
        found = self._command(())
        while self._tokens[:1] == ["|"]:
            self._tokens.pop(0)
            found = self._command((found,))
        return found

    def _command(self, piped: tuple[str, ...]) -> str:
        if not self._tokens:
            raise GoSyntaxError("an expression is missing")
        word = self._tokens[0]
        if word[0] in '$."`(-' or word[0].isdigit() or word in _CONSTANTS:
            return self._operand()
        self._tokens.pop(0)
        arguments = []
        while self._tokens and self._tokens[0] not in ("|", ")"):
            arguments.append(self._operand())
        return _called(word, [*arguments, *piped])

    def _operand(self) -> str:
        word = self._tokens.pop(0)
        if word == "(":
            found = self._stages()
            if self._tokens[:1] != [")"]:
                raise GoSyntaxError("a parenthesis is not closed")
            self._tokens.pop(0)
            return f"({found})"
        if word[0] == '"':
            try:
                return json.dumps(json.loads(word), ensure_ascii=False)
            except ValueError:
                raise GoSyntaxError(f"the string {word[:40]} cannot be read") from None
        if word[0] == "`":
            return json.dumps(word[1:-1], ensure_ascii=False)
        if word[0] in "$.":
            return self._field(word)
        if word in _CONSTANTS or word[0] == "-" or word[0].isdigit():
            return _CONSTANTS.get(word, word)
        raise GoSyntaxError(f"{word!r} is not expected")

    def _field(self, word: str) -> str:
        """Return `.Role`, `$.Messages`, `$message.Content` and the like."""
        root, _, rest = word.partition(".")
        path = rest.split(".") if rest else []
        if root in ("", "$"):
            base = self._dot if root == "" else "."
        elif root in self._names:
            base = _variable(root)
        else:
            raise GoSyntaxError(f"the variable {root} is not defined")
        if base == ".":
            if not path or path[0] not in _TOP:
                raise GoSyntaxError(f"{word!r} is not a known field")
            base = _TOP[path.pop(0)]
        for name in path:
            if name not in _FIELDS:
                raise GoSyntaxError(f"{word!r} is not a known field")
            base += f".{_FIELDS[name]}"
        return base


def _called(name: str, arguments: list[str]) -> str:
    """Return a call of one of Go's functions; raises `GoSyntaxError`."""
    match name, arguments:
        case (("and" | "or"), [_, *_]):
            return "(" + f" {name} ".join(arguments) + ")"
        case "not", [value]:
            return f"(not {value})"
        case "len", [value]:
            return f"({value}|length)"
        case "slice", [value, *bounds] if len(bounds) <= 2:
            first, last = [*bounds, "", ""][:2]
            return f"{value}[{first}:{last}]"
        case "index", [value, key]:
            return f"{value}[{key}]"
        case "json", [value]:
            return f"({value}|tojson)"
        case (("print" | "printf"), [value]):
            return value
        case "eq", [value, *others] if len(others) > 1:
            return f"({value} in [{', '.join(others)}])"  # `value` may be long: write it once
        case _, [left, right] if name in _COMPARISONS:
            return f"({left} {_COMPARISONS[name]} {right})"
    raise GoSyntaxError(f"{name!r} with {len(arguments)} arguments is not supported")
