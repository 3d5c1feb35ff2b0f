"""The syntax of Go's text/template, as far as chat templates use it: text and actions to a tree.

Source: pkg.go.dev/text/template. What is not here is refused by name: `with`, `define`, `template`,
`block`, `break`, `continue`, and assignments to variables that exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)'
    r"|(?P<name>[$.]?[A-Za-z_][\w.]*|\$[\w.]*|\.)|(?P<mark>:=|[()|,=]))",
    re.DOTALL,
)
_UNSUPPORTED = ("with", "define", "template", "block", "break", "continue")


class GoSyntaxError(ValueError):
    """A template is no template, or uses what is not supported."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Output:
    """The value of a pipeline, given as tokens."""

    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assign:
    """A new variable, `$` and all, with the value of a pipeline."""

    name: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class If:
    """Branches, each with its condition; the last may have none."""

    branches: list[tuple[tuple[str, ...] | None, list[Node]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Range:
    """A loop over a pipeline; `names` are the variables of the place and the item."""

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
                    raise GoSyntaxError("an end too many")
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
        raise GoSyntaxError("an end is missing")
    return root


def tokens_of(action: str) -> tuple[str, ...]:
    """Return the words of an action; raises `GoSyntaxError`."""
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
    """Yield text and actions in turn; a dash takes the white space beside it away."""
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
    raise GoSyntaxError("an else that belongs nowhere")
